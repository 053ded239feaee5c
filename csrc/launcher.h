// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>

namespace mla_fusion {

using torch::stable::Tensor;

// Checks the arguments, throws std::runtime_error (argument, expected, got) before anything is written, and runs the
// kernel of the tensors' device on the current stream. The shapes are in arguments.py. Those that end in _fresh make the
// outputs and return them in the same order.
void concat_and_cache_mla_rope_fused(const Tensor positions, Tensor q_pe, const Tensor k_pe, const Tensor kv_c,
                                     const Tensor cos_sin_cache, bool is_neox, const Tensor slot_mapping, Tensor kv_cache,
                                     std::string kv_cache_dtype, const Tensor kv_cache_scale, Tensor k_pe_out);
Tensor concat_and_cache_mla_rope_fused_fresh(const Tensor positions, Tensor q_pe, const Tensor k_pe, const Tensor kv_c,
                                             const Tensor cos_sin_cache, bool is_neox, const Tensor slot_mapping,
                                             Tensor kv_cache, std::string kv_cache_dtype, const Tensor kv_cache_scale);

// The same for the raw latent: its RMSNorm goes to the cache and to kv_c_normed_out.
void norm_concat_and_cache_mla_rope_fused(const Tensor positions, Tensor q_pe, const Tensor k_pe, const Tensor kv_c,
                                          const Tensor kv_c_weight, double epsilon, const Tensor cos_sin_cache,
                                          bool is_neox, const Tensor slot_mapping, Tensor kv_cache,
                                          std::string kv_cache_dtype, const Tensor kv_cache_scale, Tensor k_pe_out,
                                          Tensor kv_c_normed_out);
std::tuple<Tensor, Tensor> norm_concat_and_cache_mla_rope_fused_fresh(
    const Tensor positions, Tensor q_pe, const Tensor k_pe, const Tensor kv_c, const Tensor kv_c_weight, double epsilon,
    const Tensor cos_sin_cache, bool is_neox, const Tensor slot_mapping, Tensor kv_cache, std::string kv_cache_dtype,
    const Tensor kv_cache_scale);

// Before q_b: both norms, the query's quantisation, RoPE of the key and the cache rows.
void norms_rope_concat_and_cache_mla(const Tensor positions, const Tensor q_c, const Tensor q_c_weight, double q_epsilon,
                                     const Tensor k_pe, const Tensor kv_c, const Tensor kv_c_weight, double epsilon,
                                     const Tensor cos_sin_cache, bool is_neox, const Tensor slot_mapping, Tensor kv_cache,
                                     std::string kv_cache_dtype, const Tensor kv_cache_scale, std::string q_quant,
                                     bool q_rounds_twice, double q_smallest, std::optional<Tensor> q_static_scale,
                                     Tensor q_c_out, std::optional<Tensor> q_scales_out, Tensor k_pe_out,
                                     Tensor kv_c_normed_out);
std::tuple<Tensor, Tensor, Tensor, Tensor> norms_rope_concat_and_cache_mla_fresh(
    const Tensor positions, const Tensor q_c, const Tensor q_c_weight, double q_epsilon, const Tensor k_pe,
    const Tensor kv_c, const Tensor kv_c_weight, double epsilon, const Tensor cos_sin_cache, bool is_neox,
    const Tensor slot_mapping, Tensor kv_cache, std::string kv_cache_dtype, const Tensor kv_cache_scale,
    std::string q_quant, bool q_rounds_twice, double q_smallest, std::optional<Tensor> q_static_scale,
    std::string q_scales_layout);

// After q_b: RoPE of the query.
void rope_query(const Tensor positions, Tensor q_pe, const Tensor cos_sin_cache, bool is_neox);

}  // namespace mla_fusion
