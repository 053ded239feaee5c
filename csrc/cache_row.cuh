// SPDX-License-Identifier: Apache-2.0
// Rows of the KV cache: where a token's is, and how latent and key are stored in each kind.
#pragma once

#include "quantisation.cuh"

namespace mla_fusion {

__device__ __forceinline__ int64_t slot_of(const Params& p, int64_t token) {
  return token < p.num_slots ? p.slot_mapping[token] : -1;
}

__device__ __forceinline__ int64_t cache_offset(const Params& p, int64_t slot) {
  const uint32_t index = static_cast<uint32_t>(slot);
  const uint32_t block = static_cast<uint32_t>((static_cast<uint64_t>(index) * p.block_factor) >> p.block_shift);
  const uint32_t row = index - block * p.block_size;
  return block * p.cache_block_stride + row * p.cache_row_stride;
}

// What a row of the cache holds: known at compile time, or, in rarer instances, one of two or three kinds. kNone: neither
// key nor latent takes part.
enum class Row { kCopy, kFp8, kFp8DsMla, kNone, kCopyOrFp8, kAny };

template <Row kRow>
constexpr bool kIsOpen = kRow == Row::kCopyOrFp8 || kRow == Row::kAny;

// Whether a row's values are divided by the cache's scale.
__device__ __forceinline__ bool has_scale(CacheKind kind) { return kind != CacheKind::kCopy && kind != CacheKind::kFp8DsMla; }

// The tile's scale and the latent in it; neighbouring lanes hold the tile's other vectors.
template <typename Act>
__device__ __forceinline__ void store_ds_mla_latent(uint8_t* row, int index, const ActVector<Act>& value) {
  constexpr int kLanesPerTile = kDsMlaTile / kActsPerVector<Act>;
  const float scale = ds_mla_scale(max_over_lanes<kLanesPerTile>(largest_of(value)));
  store_as(row + index, quantise(value, Scale(scale), CacheKind::kFp8E4M3));
  if (index % kDsMlaTile == 0) store_as(row + kDsMlaScales + index / kDsMlaTile * 4, scale);
}

// Elements into the cache row that starts at row, at element index, as they are or divided by the cache's scale.
template <Row kRow, typename Act, int kCount>
__device__ __forceinline__ void store_elements(const Params& p, int64_t row, int index, const Vector<Act, kCount>& value,
                                               const Scale& scale) {
  if constexpr (kRow == Row::kCopy) {
    store_as(static_cast<Act*>(p.kv_cache) + row + index, value);
  } else if constexpr (kRow == Row::kFp8) {
    store_as(static_cast<uint8_t*>(p.kv_cache) + row + index, quantise(value, scale, p.cache_kind));
  } else if (p.cache_kind == CacheKind::kCopy) {
    store_elements<Row::kCopy>(p, row, index, value, scale);
  } else {
    store_elements<Row::kFp8>(p, row, index, value, scale);
  }
}

// Some of the latent.
template <Row kRow, typename Act>
__device__ __forceinline__ void store_latent(const Params& p, int64_t row, int index, const ActVector<Act>& value,
                                             const Scale& scale) {
  if constexpr (kRow == Row::kAny) {
    if (p.cache_kind == CacheKind::kFp8DsMla) return store_latent<Row::kFp8DsMla, Act>(p, row, index, value, scale);
  }
  if constexpr (kRow == Row::kFp8DsMla) {
    store_ds_mla_latent<Act>(static_cast<uint8_t*>(p.kv_cache) + row, index, value);
  } else {
    store_elements<kRow>(p, row, index, value, scale);
  }
}

// Some of the rotated key.
template <Row kRow, typename Act, int kCount>
__device__ __forceinline__ void store_key(const Params& p, int64_t row, int index, const Vector<Act, kCount>& value,
                                          const Scale& scale) {
  if constexpr (kRow == Row::kAny) {
    if (p.cache_kind == CacheKind::kFp8DsMla) return store_key<Row::kFp8DsMla>(p, row, index, value, scale);
  }
  if constexpr (kRow == Row::kFp8DsMla) {
    store_as(static_cast<uint8_t*>(p.kv_cache) + row + kDsMlaKey + index * sizeof(Act), value);
  } else {
    store_elements<kRow>(p, row, p.lora_rank + index, value, scale);
  }
}

// The row of a token in the cache, and by what its values are divided. Loaded before the row's values, so that all the
// loads are on their way together; `offset` is the first to wait for one.
template <Row kRow>
struct CacheRow {
  int64_t slot;
  float scale;

  __device__ __forceinline__ CacheRow(const Params& p, int64_t token)
      : slot(slot_of(p, token)), scale(kRow == Row::kFp8 || (kIsOpen<kRow> && has_scale(p.cache_kind)) ? *p.kv_cache_scale : 1.0f) {}

  // Negative: not cached.
  __device__ __forceinline__ int64_t offset(const Params& p) const { return slot < 0 ? -1 : cache_offset(p, slot); }
};

}  // namespace mla_fusion
