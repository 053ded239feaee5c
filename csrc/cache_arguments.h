// SPDX-License-Identifier: Apache-2.0
// The cache's arguments: its kind, its rows and the slots, checked and put into Params.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>

#include "checks.h"
#include "mla_rope_cache.h"

namespace mla_fusion {

struct C10_HIDDEN CacheArguments {
  const Tensor& slot_mapping;
  const Tensor& kv_cache;
  const std::string& kv_cache_dtype;
  const Tensor& scale;
};

// A format of the cache by its name, and the dtypes in which the cache may come.
struct CacheFormat {
  const char* name;
  CacheKind kind;
  ScalarType fp8;
};

inline constexpr CacheFormat kFp8Formats[] = {
    {"fp8", CacheKind::kFp8E4M3, ScalarType::Float8_e4m3fn},
    {"fp8_e4m3", CacheKind::kFp8E4M3, ScalarType::Float8_e4m3fn},
    {"fp8_e5m2", CacheKind::kFp8E5M2, ScalarType::Float8_e5m2},
    {"fp8_e4m3fnuz", CacheKind::kFp8E4M3Fnuz, ScalarType::Float8_e4m3fnuz},
    {"fp8_e5m2fnuz", CacheKind::kFp8E5M2Fnuz, ScalarType::Float8_e5m2fnuz},
};

inline void check_fnuz(const std::string& kv_cache_dtype, const Lead& lead) {
#if defined(MLA_FUSION_GPU) && !defined(USE_ROCM)
  if (kv_cache_dtype.find("fnuz") != std::string::npos && !lead.tensor.is_cpu()) {
    fail("kv_cache_dtype '", kv_cache_dtype, "' is a format of AMD GPUs, this build is for NVIDIA's; use fp8_e4m3 or fp8_e5m2");
  }
#endif
}

inline CacheKind cache_kind_of(const std::string& kv_cache_dtype, const Tensor& kv_cache, const Lead& lead) {
  const ScalarType act = lead.tensor.scalar_type();
  if (kv_cache_dtype == "auto" || kv_cache_dtype == "bfloat16" || kv_cache_dtype == "float16") {
    check_dtype("kv_cache", kv_cache, {act});
    if (kv_cache_dtype != "auto" && kv_cache_dtype != dtype_name(act)) {
      fail("kv_cache_dtype '", kv_cache_dtype, "' must be the dtype of ", lead.name, " (", dtype_name(act), "); pass that or 'auto'");
    }
    return CacheKind::kCopy;
  }
  if (kv_cache_dtype == "fp8_ds_mla") {
    check_dtype("kv_cache", kv_cache, {ScalarType::Byte});
    check_dtype((std::string(lead.name) + " (for an fp8_ds_mla cache)").c_str(), lead.tensor, {ScalarType::BFloat16, ScalarType::Half});
    return CacheKind::kFp8DsMla;
  }
  check_fnuz(kv_cache_dtype, lead);
  for (const CacheFormat& format : kFp8Formats) {
    if (kv_cache_dtype != format.name) continue;
    check_dtype("kv_cache", kv_cache, {ScalarType::Byte, format.fp8});
    return format.kind;
  }
  fail("kv_cache_dtype must be one of auto, bfloat16, float16, fp8, fp8_e4m3, fp8_e5m2, fp8_e4m3fnuz, fp8_e5m2fnuz, fp8_ds_mla, got '",
       kv_cache_dtype, "'; pass the one that the cache was made for");
}

// Division by multiplication: with 2^n >= block_size, ceil(2^(31 + n) / block_size) is a factor of 32 bits that is right
// for every slot below 2^31 (Granlund and Montgomery 1994, theorem 4.2).
inline void set_block_size(Params& p, uint32_t block_size) {
  p.block_size = block_size;
  p.block_shift = 31;
  while ((uint64_t{1} << (p.block_shift - 31)) < block_size) ++p.block_shift;
  p.block_factor = static_cast<uint32_t>(((uint64_t{1} << p.block_shift) + block_size - 1) / block_size);
}


inline void check_ds_mla_size(const char* requirement, int64_t size, int64_t expected) {
  if (size != expected) fail(requirement, " for an fp8_ds_mla cache, got ", size, " columns; its rows have no other layout");
}

// After latent and key.
inline void check_cache_shape(const Params& p, const Tensor& kv_cache) {
  if (p.cache_kind == CacheKind::kFp8DsMla) {
    check_ds_mla_size("kv_c must be [num_tokens, 512]", p.lora_rank, kDsMlaLoraRank);
    check_ds_mla_size("k_pe must be [num_tokens, 1, 64]", p.rot_dim, kDsMlaRotDim);
    check_shape("kv_cache", kv_cache, "[num_blocks, block_size, bytes of a row]", {kAny, kAny, kDsMlaRowBytes});
  } else {
    check_shape("kv_cache", kv_cache, "[num_blocks, block_size, kv_lora_rank + rot_dim]", {kAny, kAny, p.lora_rank + p.rot_dim});
  }
  if (kv_cache.size(0) * kv_cache.size(1) > int64_t{INT32_MAX}) {
    fail("kv_cache must have fewer than 2^31 rows (num_blocks * block_size), got ", kv_cache.size(0) * kv_cache.size(1),
         "; pass a smaller cache");
  }
}

inline const float* cache_scale(CacheKind kind, const Tensor& scale, const Lead& lead) {
  if (kind == CacheKind::kCopy || kind == CacheKind::kFp8DsMla) return nullptr;
  check_dtype("kv_cache_scale", scale, {ScalarType::Float});
  check_device("kv_cache_scale", scale, lead);
  if (scale.numel() != 1) fail("kv_cache_scale must hold one value, got ", scale.numel(), "; pass the layer's scale");
  return static_cast<const float*>(scale.data_ptr());
}

// After latent and key. Of the slots those of the tokens count; vLLM's own mapping may be longer. An empty cache
// (profiling run) has no shape yet; without slots nothing is written.
inline void set_cache(Params& p, const CacheArguments& cache, const Lead& lead) {
  check_shape("slot_mapping", cache.slot_mapping, "[num_slots]", {kAny});
  check_dtype("slot_mapping", cache.slot_mapping, {ScalarType::Long});
  check_device("slot_mapping", cache.slot_mapping, lead);
  check_last_dim_contiguous("slot_mapping", cache.slot_mapping);
  const CacheKind kind = cache_kind_of(cache.kv_cache_dtype, cache.kv_cache, lead);
  const int64_t num_slots = std::min(cache.slot_mapping.size(0), p.num_tokens);
  // Nothing is quantised, and there is no scale to read.
  if (num_slots == 0 || cache.kv_cache.numel() == 0) return;

  p.cache_kind = kind;
  check_cache_shape(p, cache.kv_cache);
  check_device("kv_cache", cache.kv_cache, lead);
  check_last_dim_contiguous("kv_cache", cache.kv_cache);
  p.kv_cache_scale = cache_scale(kind, cache.scale, lead);
  p.kv_cache = cache.kv_cache.data_ptr();
  p.slot_mapping = static_cast<const int64_t*>(cache.slot_mapping.data_ptr());
  p.num_slots = num_slots;
  set_block_size(p, static_cast<uint32_t>(cache.kv_cache.size(1)));
  p.cache_block_stride = cache.kv_cache.stride(0);
  p.cache_row_stride = cache.kv_cache.stride(1);
}

}  // namespace mla_fusion
