// SPDX-License-Identifier: Apache-2.0
#include "launcher.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <initializer_list>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>

#include "mla_rope_cache.h"

namespace mla_fusion {
namespace {

using torch::headeronly::ScalarType;

// Tokens below which one thread is faster than several.
constexpr int64_t kCpuGrain = 8;

// No iostreams: where a toolchain links libstdc++ statically, two copies of its locales meet and number output crashes.
std::string text(std::string_view part) { return std::string(part); }
std::string text(int64_t part) { return std::to_string(part); }

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  throw std::runtime_error("mla_fusion: " + (text(parts) + ...));
}

std::string dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Float8_e4m3fn:
      return "float8_e4m3fn";
    case ScalarType::Float8_e5m2:
      return "float8_e5m2";
    case ScalarType::Float8_e4m3fnuz:
      return "float8_e4m3fnuz";
    case ScalarType::Float8_e5m2fnuz:
      return "float8_e5m2fnuz";
    default:
      return "dtype number " + std::to_string(static_cast<int>(type));
  }
}

std::string shape_text(const Tensor& tensor) {
  std::string sizes;
  for (int64_t i = 0; i < tensor.dim(); ++i) sizes += (i ? ", " : "") + std::to_string(tensor.size(i));
  return "[" + sizes + "]";
}

void check_dtype(const char* name, const Tensor& tensor, std::initializer_list<ScalarType> accepted) {
  std::string expected;
  for (const ScalarType type : accepted) {
    if (tensor.scalar_type() == type) return;
    expected += (expected.empty() ? "" : " or ") + dtype_name(type);
  }
  fail(name, " must have dtype ", expected, ", got ", dtype_name(tensor.scalar_type()), "; convert it before the call");
}

// kAny matches every size.
constexpr int64_t kAny = -1;

void check_shape(const char* name, const Tensor& tensor, const char* meaning, std::initializer_list<int64_t> expected) {
  bool matches = tensor.dim() == static_cast<int64_t>(expected.size());
  int64_t axis = 0;
  for (const int64_t size : expected) {
    matches = matches && (size == kAny || tensor.size(axis) == size);
    ++axis;
  }
  if (matches) return;
  std::string sizes;
  for (const int64_t size : expected) {
    sizes += (sizes.empty() ? "" : ", ") + (size == kAny ? std::string("any") : std::to_string(size));
  }
  fail(name, " must be ", meaning, " = [", sizes, "], got ", shape_text(tensor), "; pass a view or slice of that shape");
}

void check_last_dim_contiguous(const char* name, const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  if (tensor.size(last) > 1 && tensor.stride(last) != 1) {
    fail(name, " must have a contiguous last dimension (stride 1), got stride ", tensor.stride(last), "; call .contiguous()");
  }
}

void check_device(const char* name, const Tensor& tensor, const Tensor& q_pe) {
  if (tensor.is_cpu() == q_pe.is_cpu() && tensor.get_device_index() == q_pe.get_device_index()) return;
  const auto device_name = [](const Tensor& t) {
    return t.is_cpu() ? std::string("cpu") : "gpu " + std::to_string(t.get_device_index());
  };
  fail(name, " must be on the device of q_pe (", device_name(q_pe), "), got ", device_name(tensor), "; move it before the call");
}

ActType act_type_of(const Tensor& q_pe) {
  check_dtype("q_pe", q_pe, {ScalarType::BFloat16, ScalarType::Half, ScalarType::Float});
  switch (q_pe.scalar_type()) {
    case ScalarType::BFloat16:
      return ActType::kBFloat16;
    case ScalarType::Half:
      return ActType::kFloat16;
    default:
      return ActType::kFloat32;
  }
}

CacheKind cache_kind_of(const std::string& kv_cache_dtype, const Tensor& kv_cache, const Tensor& q_pe) {
  if (kv_cache_dtype == "auto" || kv_cache_dtype == "bfloat16" || kv_cache_dtype == "float16") {
    check_dtype("kv_cache", kv_cache, {q_pe.scalar_type()});
    if (kv_cache_dtype != "auto" && kv_cache_dtype != dtype_name(q_pe.scalar_type())) {
      fail("kv_cache_dtype '", kv_cache_dtype, "' must be the dtype of q_pe (", dtype_name(q_pe.scalar_type()), "); pass that or 'auto'");
    }
    return CacheKind::kCopy;
  }
  if (kv_cache_dtype == "fp8" || kv_cache_dtype == "fp8_e4m3") {
    check_dtype("kv_cache", kv_cache, {ScalarType::Byte, ScalarType::Float8_e4m3fn});
    return CacheKind::kFp8E4M3;
  }
  if (kv_cache_dtype == "fp8_e5m2") {
    check_dtype("kv_cache", kv_cache, {ScalarType::Byte, ScalarType::Float8_e5m2});
    return CacheKind::kFp8E5M2;
  }
  if (kv_cache_dtype == "fp8_ds_mla") {
    check_dtype("kv_cache", kv_cache, {ScalarType::Byte});
    check_dtype("q_pe (for an fp8_ds_mla cache)", q_pe, {ScalarType::BFloat16, ScalarType::Half});
    return CacheKind::kFp8DsMla;
  }
#if defined(MLA_FUSION_GPU) && !defined(USE_ROCM)
  if (kv_cache_dtype.find("fnuz") != std::string::npos && !q_pe.is_cpu()) {
    fail("kv_cache_dtype '", kv_cache_dtype, "' is a format of AMD GPUs, this build is for NVIDIA's; use fp8_e4m3 or fp8_e5m2");
  }
#endif
  if (kv_cache_dtype == "fp8_e4m3fnuz") {
    check_dtype("kv_cache", kv_cache, {ScalarType::Byte, ScalarType::Float8_e4m3fnuz});
    return CacheKind::kFp8E4M3Fnuz;
  }
  if (kv_cache_dtype == "fp8_e5m2fnuz") {
    check_dtype("kv_cache", kv_cache, {ScalarType::Byte, ScalarType::Float8_e5m2fnuz});
    return CacheKind::kFp8E5M2Fnuz;
  }
  fail("kv_cache_dtype must be one of auto, bfloat16, float16, fp8, fp8_e4m3, fp8_e5m2, fp8_e4m3fnuz, fp8_e5m2fnuz, fp8_ds_mla, got '",
       kv_cache_dtype, "'; pass the one that the cache was made for");
}

// On the CPU the indices can be looked at; on a GPU that would be a synchronisation.
void check_indices_on_cpu(const Params& p, int64_t max_position, int64_t num_rows) {
  for (int64_t i = 0; i < p.num_tokens; ++i) {
    const int64_t position = p.positions_are_int32 ? static_cast<const int32_t*>(p.positions)[i]
                                                   : static_cast<const int64_t*>(p.positions)[i];
    if (position < 0 || position >= max_position) {
      fail("positions[", i, "] must be in [0, ", max_position, ") (the rows of cos_sin_cache), got ", position,
           "; make cos_sin_cache longer or correct the position");
    }
  }
  for (int64_t i = 0; i < p.num_slots; ++i) {
    if (p.slot_mapping[i] >= num_rows) {
      fail("slot_mapping[", i, "] must be below ", num_rows, " (the rows of kv_cache), got ", p.slot_mapping[i],
           "; pass -1 for a token that is not cached");
    }
  }
}

// Division by multiplication: with 2^n >= block_size, ceil(2^(31 + n) / block_size) is a factor of 32 bits that is right
// for every slot below 2^31 (Granlund and Montgomery 1994, theorem 4.2).
void set_block_size(Params& p, uint32_t block_size) {
  p.block_size = block_size;
  p.block_shift = 31;
  while ((uint64_t{1} << (p.block_shift - 31)) < block_size) ++p.block_shift;
  p.block_factor = static_cast<uint32_t>(((uint64_t{1} << p.block_shift) + block_size - 1) / block_size);
}

struct Norm {
  const Tensor& weight;
  const Tensor& out;
  double epsilon;
};

void check_norm(const Norm& norm, const Tensor& q_pe, int64_t num_tokens, int64_t lora_rank) {
  check_shape("kv_c_weight", norm.weight, "[kv_lora_rank]", {lora_rank});
  check_shape("kv_c_normed_out", norm.out, "[num_tokens, kv_lora_rank]", {num_tokens, lora_rank});
  if (!norm.out.is_contiguous()) fail("kv_c_normed_out must be contiguous; allocate it with torch.empty");
  check_dtype("kv_c_weight", norm.weight, {q_pe.scalar_type()});
  check_dtype("kv_c_normed_out", norm.out, {q_pe.scalar_type()});
  check_device("kv_c_weight", norm.weight, q_pe);
  check_device("kv_c_normed_out", norm.out, q_pe);
  check_last_dim_contiguous("kv_c_weight", norm.weight);
}

// `norm` is null where the latent is cached as it is.
void check_and_launch(const Tensor& positions, Tensor& q_pe, const Tensor& k_pe, const Tensor& kv_c, const Norm* norm,
                      const Tensor& cos_sin_cache, bool is_neox, const Tensor& slot_mapping, Tensor& kv_cache,
                      const std::string& kv_cache_dtype, const Tensor& kv_cache_scale, Tensor& k_pe_out) {
  Params p{};
  p.act_type = act_type_of(q_pe);
  check_shape("q_pe", q_pe, "[num_tokens, num_heads, rot_dim]", {kAny, kAny, kAny});
  const int64_t num_tokens = q_pe.size(0);
  const int64_t rot_dim = q_pe.size(2);
  if (rot_dim == 0 || rot_dim % 2 != 0) fail("q_pe must have an even, positive rot_dim, got ", rot_dim, "; pass the part of the query that is rotated");

  check_shape("kv_c", kv_c, "[num_tokens, kv_lora_rank]", {num_tokens, kAny});
  const int64_t lora_rank = kv_c.size(1);
  if (k_pe.dim() == 3) {
    check_shape("k_pe", k_pe, "[num_tokens, 1, rot_dim]", {num_tokens, 1, rot_dim});
  } else {
    check_shape("k_pe", k_pe, "[num_tokens, rot_dim]", {num_tokens, rot_dim});
  }
  check_shape("k_pe_out", k_pe_out, "[num_tokens, 1, rot_dim]", {num_tokens, 1, rot_dim});
  if (!k_pe_out.is_contiguous()) fail("k_pe_out must be contiguous; allocate it with torch.empty");
  if (norm != nullptr) check_norm(*norm, q_pe, num_tokens, lora_rank);
  check_shape("cos_sin_cache", cos_sin_cache, "[max_position, rot_dim]", {kAny, rot_dim});
  check_shape("positions", positions, "[num_tokens]", {num_tokens});
  check_shape("slot_mapping", slot_mapping, "[num_slots]", {kAny});
  const int64_t num_slots = slot_mapping.size(0);
  if (num_slots > num_tokens) fail("slot_mapping must have at most num_tokens = ", num_tokens, " entries, got ", num_slots, "; pass slot_mapping[:num_tokens]");

  check_dtype("positions", positions, {ScalarType::Long, ScalarType::Int});
  check_dtype("slot_mapping", slot_mapping, {ScalarType::Long});
  for (const auto& [name, tensor] : {std::pair("k_pe", &k_pe), {"kv_c", &kv_c}, {"k_pe_out", &std::as_const(k_pe_out)}}) {
    check_dtype(name, *tensor, {q_pe.scalar_type()});
  }
  check_dtype("cos_sin_cache", cos_sin_cache, {q_pe.scalar_type(), ScalarType::Float});
  for (const auto& [name, tensor] : {std::pair("positions", &positions), {"k_pe", &k_pe}, {"kv_c", &kv_c}, {"cos_sin_cache", &cos_sin_cache},
                                     {"slot_mapping", &slot_mapping}, {"k_pe_out", &std::as_const(k_pe_out)}}) {
    check_device(name, *tensor, q_pe);
    check_last_dim_contiguous(name, *tensor);
  }
  check_last_dim_contiguous("q_pe", q_pe);

  p.cache_kind = cache_kind_of(kv_cache_dtype, kv_cache, q_pe);
  // An empty cache (profiling run) has no shape yet; without slots nothing is written.
  const bool has_cache = num_slots > 0 && kv_cache.numel() > 0;
  if (has_cache) {
    if (p.cache_kind == CacheKind::kFp8DsMla) {
      check_shape("kv_c", kv_c, "[num_tokens, 512] for an fp8_ds_mla cache", {num_tokens, kDsMlaLoraRank});
      check_shape("q_pe", q_pe, "[num_tokens, num_heads, 64] for an fp8_ds_mla cache", {num_tokens, kAny, kDsMlaRotDim});
      check_shape("kv_cache", kv_cache, "[num_blocks, block_size, bytes of a row]", {kAny, kAny, kDsMlaRowBytes});
    } else {
      check_shape("kv_cache", kv_cache, "[num_blocks, block_size, kv_lora_rank + rot_dim]", {kAny, kAny, lora_rank + rot_dim});
    }
    check_device("kv_cache", kv_cache, q_pe);
    if (kv_cache.size(0) * kv_cache.size(1) > int64_t{INT32_MAX}) {
      fail("kv_cache must have fewer than 2^31 rows (num_blocks * block_size), got ", kv_cache.size(0) * kv_cache.size(1),
           "; pass a smaller cache");
    }
    check_last_dim_contiguous("kv_cache", kv_cache);
    if (p.cache_kind != CacheKind::kCopy && p.cache_kind != CacheKind::kFp8DsMla) {
      check_dtype("kv_cache_scale", kv_cache_scale, {ScalarType::Float});
      check_device("kv_cache_scale", kv_cache_scale, q_pe);
      if (kv_cache_scale.numel() != 1) fail("kv_cache_scale must hold one value, got ", kv_cache_scale.numel(), "; pass the layer's scale");
      p.kv_cache_scale = static_cast<const float*>(kv_cache_scale.data_ptr());
    }
    p.kv_cache = kv_cache.data_ptr();
    p.slot_mapping = static_cast<const int64_t*>(slot_mapping.data_ptr());
    p.num_slots = num_slots;
    set_block_size(p, static_cast<uint32_t>(kv_cache.size(1)));
    p.cache_block_stride = kv_cache.stride(0);
    p.cache_row_stride = kv_cache.stride(1);
  } else {
    // Nothing is quantised, and there is no scale to read.
    p.cache_kind = CacheKind::kCopy;
  }
  if (num_tokens == 0) return;

  p.q_pe = q_pe.data_ptr();
  p.k_pe = k_pe.data_ptr();
  p.kv_c = kv_c.data_ptr();
  if (norm != nullptr) {
    p.kv_c_weight = norm->weight.data_ptr();
    p.kv_c_out = norm->out.data_ptr();
    p.epsilon = static_cast<float>(norm->epsilon);
  }
  p.k_pe_out = k_pe_out.data_ptr();
  p.positions = positions.data_ptr();
  p.cos_sin_cache = cos_sin_cache.data_ptr();
  p.q_token_stride = q_pe.stride(0);
  p.q_head_stride = q_pe.stride(1);
  p.k_token_stride = k_pe.stride(0);
  p.kv_token_stride = kv_c.stride(0);
  p.cos_sin_stride = cos_sin_cache.stride(0);
  p.num_tokens = num_tokens;
  p.num_heads = static_cast<int32_t>(q_pe.size(1));
  p.rot_dim = static_cast<int32_t>(rot_dim);
  p.lora_rank = static_cast<int32_t>(lora_rank);
  p.inverse_lora_rank = 1.0f / static_cast<float>(lora_rank);
  p.is_neox = is_neox;
  // Used where a head is a power of two of vectors.
  while (int64_t{kVectorBytes} << (p.column_shift + 1) <= rot_dim * static_cast<int64_t>(q_pe.element_size())) ++p.column_shift;
  p.cos_sin_is_float = cos_sin_cache.scalar_type() == ScalarType::Float;
  p.positions_are_int32 = positions.scalar_type() == ScalarType::Int;

  if (q_pe.is_cpu()) {
    check_indices_on_cpu(p, cos_sin_cache.size(0), has_cache ? kv_cache.size(0) * kv_cache.size(1) : 0);
    torch::stable::parallel_for(0, num_tokens, kCpuGrain, [&p](int64_t begin, int64_t end) { run_cpu(p, begin, end); });
    return;
  }
#ifdef MLA_FUSION_GPU
  const int32_t device = q_pe.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const int error = launch_gpu(p, stream);
  if (error != 0) fail("the kernel launch failed: ", gpu_error_name(error), "; `vllm-mla-fusion doctor` shows for which GPU it was built");
#else
  fail("q_pe must be on the CPU, got a GPU tensor: this build has no GPU kernel; `vllm-mla-fusion doctor` tells why");
#endif
}

}  // namespace

void concat_and_cache_mla_rope_fused(const Tensor positions, Tensor q_pe, const Tensor k_pe, const Tensor kv_c,
                                     const Tensor cos_sin_cache, bool is_neox, const Tensor slot_mapping, Tensor kv_cache,
                                     std::string kv_cache_dtype, const Tensor kv_cache_scale, Tensor k_pe_out) {
  check_and_launch(positions, q_pe, k_pe, kv_c, nullptr, cos_sin_cache, is_neox, slot_mapping, kv_cache, kv_cache_dtype,
                   kv_cache_scale, k_pe_out);
}

void norm_concat_and_cache_mla_rope_fused(const Tensor positions, Tensor q_pe, const Tensor k_pe, const Tensor kv_c,
                                          const Tensor kv_c_weight, double epsilon, const Tensor cos_sin_cache,
                                          bool is_neox, const Tensor slot_mapping, Tensor kv_cache,
                                          std::string kv_cache_dtype, const Tensor kv_cache_scale, Tensor k_pe_out,
                                          Tensor kv_c_normed_out) {
  const Norm norm{kv_c_weight, kv_c_normed_out, epsilon};
  check_and_launch(positions, q_pe, k_pe, kv_c, &norm, cos_sin_cache, is_neox, slot_mapping, kv_cache, kv_cache_dtype,
                   kv_cache_scale, k_pe_out);
}

}  // namespace mla_fusion
