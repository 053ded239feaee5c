// SPDX-License-Identifier: Apache-2.0
#include "launcher.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>

#include "cache_arguments.h"
#include "checks.h"
#include "fresh_outputs.h"
#include "mla_rope_cache.h"
#include "query_norm_arguments.h"

namespace mla_fusion {
namespace {

// Tokens below which one thread is faster than several.
constexpr int64_t kCpuGrain = 8;

ActType act_type_of(const Lead& lead) {
  check_dtype(lead.name, lead.tensor, {ScalarType::BFloat16, ScalarType::Half, ScalarType::Float});
  switch (lead.tensor.scalar_type()) {
    case ScalarType::BFloat16:
      return ActType::kBFloat16;
    case ScalarType::Half:
      return ActType::kFloat16;
    default:
      return ActType::kFloat32;
  }
}

// A call without roles: no query, no key, no latent.
Params start(const Lead& lead, int64_t num_tokens, int64_t rot_dim) {
  Params p{};
  p.act_type = act_type_of(lead);
  p.num_tokens = num_tokens;
  p.rot_dim = static_cast<int32_t>(rot_dim);
  // Used where a head is a power of two of vectors.
  const int64_t head_bytes = rot_dim * static_cast<int64_t>(lead.tensor.element_size());
  while (int64_t{kVectorBytes} << (p.column_shift + 1) <= head_bytes) ++p.column_shift;
  return p;
}

struct Angles {
  const Tensor& positions;
  const Tensor& cos_sin_cache;
  bool is_neox;
};

void set_angles(Params& p, const Angles& angles, const Lead& lead) {
  check_shape("cos_sin_cache", angles.cos_sin_cache, "[max_position, rot_dim]", {kAny, p.rot_dim});
  check_shape("positions", angles.positions, "[num_tokens]", {p.num_tokens});
  check_dtype("positions", angles.positions, {ScalarType::Long, ScalarType::Int});
  check_dtype("cos_sin_cache", angles.cos_sin_cache, {lead.tensor.scalar_type(), ScalarType::Float});
  check_device("positions", angles.positions, lead);
  check_device("cos_sin_cache", angles.cos_sin_cache, lead);
  check_last_dim_contiguous("positions", angles.positions);
  check_last_dim_contiguous("cos_sin_cache", angles.cos_sin_cache);
  p.positions = angles.positions.data_ptr();
  p.positions_are_int32 = angles.positions.scalar_type() == ScalarType::Int;
  p.cos_sin_cache = angles.cos_sin_cache.data_ptr();
  p.cos_sin_stride = angles.cos_sin_cache.stride(0);
  p.cos_sin_is_float = angles.cos_sin_cache.scalar_type() == ScalarType::Float;
  p.is_neox = angles.is_neox;
}

int64_t rot_dim_of(const char* name, const Tensor& tensor) {
  const int64_t rot_dim = tensor.size(tensor.dim() - 1);
  if (rot_dim == 0 || rot_dim % 2 != 0) fail(name, " must have an even, positive rot_dim, got ", rot_dim, "; pass the part that is rotated");
  return rot_dim;
}

// Begins a call whose lead is the query.
Params start_with_query(const Tensor& q_pe) {
  const Lead lead{"q_pe", q_pe};
  act_type_of(lead);
  check_shape("q_pe", q_pe, "[num_tokens, num_heads, rot_dim]", {kAny, kAny, kAny});
  check_last_dim_contiguous("q_pe", q_pe);
  Params p = start(lead, q_pe.size(0), rot_dim_of("q_pe", q_pe));
  p.q_pe = q_pe.data_ptr();
  p.q_token_stride = q_pe.stride(0);
  p.q_head_stride = q_pe.stride(1);
  p.num_heads = static_cast<int32_t>(q_pe.size(1));
  return p;
}

void set_key(Params& p, const Tensor& k_pe, const Tensor& k_pe_out, const Lead& lead) {
  if (k_pe.dim() == 3) {
    check_shape("k_pe", k_pe, "[num_tokens, 1, rot_dim]", {p.num_tokens, 1, p.rot_dim});
  } else {
    check_shape("k_pe", k_pe, "[num_tokens, rot_dim]", {p.num_tokens, p.rot_dim});
  }
  check_activations("k_pe", k_pe, lead);
  check_output("k_pe_out", k_pe_out, "[num_tokens, 1, rot_dim]", {p.num_tokens, 1, p.rot_dim});
  check_activations("k_pe_out", k_pe_out, lead);
  p.k_pe = k_pe.data_ptr();
  p.k_token_stride = k_pe.stride(0);
  p.k_pe_out = k_pe_out.data_ptr();
}

void set_latent(Params& p, const Tensor& kv_c, const Lead& lead) {
  check_shape("kv_c", kv_c, "[num_tokens, kv_lora_rank]", {p.num_tokens, kAny});
  check_activations("kv_c", kv_c, lead);
  if (kv_c.size(1) == 0) fail("kv_c must have at least one column, got ", shape_text(kv_c), "; pass the latent");
  p.kv_c = kv_c.data_ptr();
  p.kv_token_stride = kv_c.stride(0);
  p.lora_rank = static_cast<int32_t>(kv_c.size(1));
  p.inverse_lora_rank = 1.0f / static_cast<float>(p.lora_rank);
}

// After the latent.
void set_latent_norm(Params& p, const Tensor& weight, double epsilon, const Tensor& out, const Lead& lead) {
  check_shape("kv_c_weight", weight, "[kv_lora_rank]", {p.lora_rank});
  check_activations("kv_c_weight", weight, lead);
  check_output("kv_c_normed_out", out, "[num_tokens, kv_lora_rank]", {p.num_tokens, p.lora_rank});
  check_activations("kv_c_normed_out", out, lead);
  p.kv_c_weight = weight.data_ptr();
  p.kv_c_out = out.data_ptr();
  p.epsilon = static_cast<float>(epsilon);
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

// `num_rows`: of the cache, or 0.
void run(const Params& p, const Lead& lead, const Angles& angles, int64_t num_rows) {
  const bool has_work = p.k_pe != nullptr || p.num_heads > 0;
  if (p.num_tokens == 0 || !has_work) return;
  if (lead.tensor.is_cpu()) {
    check_indices_on_cpu(p, angles.cos_sin_cache.size(0), num_rows);
    torch::stable::parallel_for(0, p.num_tokens, kCpuGrain, [&p](int64_t begin, int64_t end) { run_cpu(p, begin, end); });
    return;
  }
#ifdef MLA_FUSION_GPU
  const int32_t device = lead.tensor.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const int error = launch_gpu(p, stream);
  if (error != 0) fail("the kernel launch failed: ", gpu_error_name(error), "; `vllm-mla-fusion doctor` shows for which GPU it was built");
#else
  fail(lead.name, " must be on the CPU, got a GPU tensor: this build has no GPU kernel; `vllm-mla-fusion doctor` tells why");
#endif
}

// After query and latent: the key, the cache, and the kernel.
void run_with_key(Params& p, const Tensor& k_pe, const Tensor& k_pe_out, const Angles& angles, const CacheArguments& cache,
                  const Lead& lead) {
  set_key(p, k_pe, k_pe_out, lead);
  set_angles(p, angles, lead);
  set_cache(p, cache, lead);
  run(p, lead, angles, p.num_slots > 0 ? cache.kv_cache.size(0) * cache.kv_cache.size(1) : 0);
}

}  // namespace

void concat_and_cache_mla_rope_fused(const Tensor positions, Tensor q_pe, const Tensor k_pe, const Tensor kv_c,
                                     const Tensor cos_sin_cache, bool is_neox, const Tensor slot_mapping, Tensor kv_cache,
                                     std::string kv_cache_dtype, const Tensor kv_cache_scale, Tensor k_pe_out) {
  const Lead lead{"q_pe", q_pe};
  Params p = start_with_query(q_pe);
  set_latent(p, kv_c, lead);
  run_with_key(p, k_pe, k_pe_out, {positions, cos_sin_cache, is_neox}, {slot_mapping, kv_cache, kv_cache_dtype, kv_cache_scale}, lead);
}

Tensor concat_and_cache_mla_rope_fused_fresh(const Tensor positions, Tensor q_pe, const Tensor k_pe, const Tensor kv_c,
                                             const Tensor cos_sin_cache, bool is_neox, const Tensor slot_mapping,
                                             Tensor kv_cache, std::string kv_cache_dtype, const Tensor kv_cache_scale) {
  const Tensor key = fresh_key(k_pe);
  concat_and_cache_mla_rope_fused(positions, q_pe, k_pe, kv_c, cos_sin_cache, is_neox, slot_mapping, kv_cache, kv_cache_dtype,
                                  kv_cache_scale, key);
  return key;
}

void norm_concat_and_cache_mla_rope_fused(const Tensor positions, Tensor q_pe, const Tensor k_pe, const Tensor kv_c,
                                          const Tensor kv_c_weight, double epsilon, const Tensor cos_sin_cache,
                                          bool is_neox, const Tensor slot_mapping, Tensor kv_cache,
                                          std::string kv_cache_dtype, const Tensor kv_cache_scale, Tensor k_pe_out,
                                          Tensor kv_c_normed_out) {
  const Lead lead{"q_pe", q_pe};
  Params p = start_with_query(q_pe);
  set_latent(p, kv_c, lead);
  set_latent_norm(p, kv_c_weight, epsilon, kv_c_normed_out, lead);
  run_with_key(p, k_pe, k_pe_out, {positions, cos_sin_cache, is_neox}, {slot_mapping, kv_cache, kv_cache_dtype, kv_cache_scale}, lead);
}

std::tuple<Tensor, Tensor> norm_concat_and_cache_mla_rope_fused_fresh(
    const Tensor positions, Tensor q_pe, const Tensor k_pe, const Tensor kv_c, const Tensor kv_c_weight, double epsilon,
    const Tensor cos_sin_cache, bool is_neox, const Tensor slot_mapping, Tensor kv_cache, std::string kv_cache_dtype,
    const Tensor kv_cache_scale) {
  const Tensor key = fresh_key(k_pe);
  const Tensor latent = fresh_latent(kv_c);
  norm_concat_and_cache_mla_rope_fused(positions, q_pe, k_pe, kv_c, kv_c_weight, epsilon, cos_sin_cache, is_neox, slot_mapping,
                                       kv_cache, kv_cache_dtype, kv_cache_scale, key, latent);
  return {key, latent};
}

void norms_rope_concat_and_cache_mla(const Tensor positions, const Tensor q_c, const Tensor q_c_weight, double q_epsilon,
                                     const Tensor k_pe, const Tensor kv_c, const Tensor kv_c_weight, double epsilon,
                                     const Tensor cos_sin_cache, bool is_neox, const Tensor slot_mapping, Tensor kv_cache,
                                     std::string kv_cache_dtype, const Tensor kv_cache_scale, std::string q_quant,
                                     bool q_rounds_twice, double q_smallest, std::optional<Tensor> q_static_scale,
                                     Tensor q_c_out, std::optional<Tensor> q_scales_out, Tensor k_pe_out,
                                     Tensor kv_c_normed_out) {
  const Lead lead{"q_c", q_c};
  act_type_of(lead);
  check_shape("q_c", q_c, "[num_tokens, q_lora_rank]", {kAny, kAny});
  check_shape("k_pe_out", k_pe_out, "[num_tokens, 1, rot_dim]", {q_c.size(0), 1, kAny});
  Params p = start(lead, q_c.size(0), rot_dim_of("k_pe_out", k_pe_out));
  set_query_norm(p, {q_c_weight, q_epsilon, q_quant, q_rounds_twice, q_smallest, q_static_scale, q_c_out, q_scales_out}, lead);
  set_latent(p, kv_c, lead);
  set_latent_norm(p, kv_c_weight, epsilon, kv_c_normed_out, lead);
  run_with_key(p, k_pe, k_pe_out, {positions, cos_sin_cache, is_neox}, {slot_mapping, kv_cache, kv_cache_dtype, kv_cache_scale}, lead);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> norms_rope_concat_and_cache_mla_fresh(
    const Tensor positions, const Tensor q_c, const Tensor q_c_weight, double q_epsilon, const Tensor k_pe,
    const Tensor kv_c, const Tensor kv_c_weight, double epsilon, const Tensor cos_sin_cache, bool is_neox,
    const Tensor slot_mapping, Tensor kv_cache, std::string kv_cache_dtype, const Tensor kv_cache_scale,
    std::string q_quant, bool q_rounds_twice, double q_smallest, std::optional<Tensor> q_static_scale,
    std::string q_scales_layout) {
  const QueryQuant quant = query_quant_of(q_quant);
  const Tensor query = fresh_query_latent(q_c, quant);
  const Tensor scales = fresh_scales(q_c, quant, q_scales_layout);
  const Tensor key = fresh_key(k_pe);
  // The key's output, which the rest is judged by, is not the caller's.
  rot_dim_of("k_pe", k_pe);
  if (k_pe.size(0) != q_c.size(0)) fail("k_pe must have a row for each of q_c's ", q_c.size(0), " tokens, got ", shape_text(k_pe), "; pass those of the same step");
  const Tensor latent = fresh_latent(kv_c);
  norms_rope_concat_and_cache_mla(positions, q_c, q_c_weight, q_epsilon, k_pe, kv_c, kv_c_weight, epsilon, cos_sin_cache,
                                  is_neox, slot_mapping, kv_cache, kv_cache_dtype, kv_cache_scale, q_quant, q_rounds_twice,
                                  q_smallest, q_static_scale, query,
                                  has_scales(quant) ? std::optional(scales) : std::nullopt, key, latent);
  return {query, scales, key, latent};
}

void rope_query(const Tensor positions, Tensor q_pe, const Tensor cos_sin_cache, bool is_neox) {
  const Lead lead{"q_pe", q_pe};
  const Angles angles{positions, cos_sin_cache, is_neox};
  Params p = start_with_query(q_pe);
  set_angles(p, angles, lead);
  run(p, lead, angles, 0);
}

}  // namespace mla_fusion
