// SPDX-License-Identifier: Apache-2.0
// The arguments of the query's norm: the form in which it is given to q_b, checked and put into Params.
#pragma once

#include <optional>
#include <string>

#include "checks.h"
#include "mla_rope_cache.h"

namespace mla_fusion {

struct C10_HIDDEN QueryNormArguments {
  const Tensor& weight;
  double epsilon;
  const std::string& quant;
  bool rounds_twice;
  double smallest;
  const std::optional<Tensor>& static_scale;
  const Tensor& out;
  const std::optional<Tensor>& scales_out;
};

// Quotients by the scales of smaller values are not exact.
constexpr double kSmallest = 0x1p-80;

inline QueryQuant query_quant_of(const std::string& quant) {
  if (quant == "none") return QueryQuant::kNone;
  if (quant == "group" || quant == "group_ue8m0") return QueryQuant::kGroup;
  if (quant == "token") return QueryQuant::kToken;
  if (quant == "static") return QueryQuant::kStatic;
  fail("q_quant must be one of none, group, group_ue8m0, token, static, got '", quant, "'; pass that of the op that is replaced");
}

// Whether the query's latent gets scales of its own.
inline bool has_scales(QueryQuant quant) { return quant == QueryQuant::kGroup || quant == QueryQuant::kToken; }

inline const float* static_scale_of(const QueryNormArguments& norm, QueryQuant quant, const Lead& lead) {
  const bool is_needed = quant == QueryQuant::kStatic;
  if (norm.static_scale.has_value() != is_needed) {
    fail("q_static_scale must be ", is_needed ? "one float32 value" : "None", " with q_quant '", norm.quant, "', got ",
         is_needed ? "None" : "a tensor", "; pass the layer's scale with 'static' only");
  }
  if (!is_needed) return nullptr;
  check_dtype("q_static_scale", *norm.static_scale, {ScalarType::Float});
  check_device("q_static_scale", *norm.static_scale, lead);
  if (norm.static_scale->numel() != 1) fail("q_static_scale must hold one value, got ", norm.static_scale->numel(), "; pass the layer's scale");
  return static_cast<const float*>(norm.static_scale->data_ptr());
}

// Of any strides: vLLM's GEMMs want them by rows, by columns, or by padded columns.
inline void set_scales(QueryNormParams& q, const QueryNormArguments& norm, int64_t num_tokens, const Lead& lead) {
  const bool is_needed = has_scales(q.quant);
  if (norm.scales_out.has_value() != is_needed) {
    fail("q_scales_out must be ", is_needed ? "a float32 tensor" : "None", " with q_quant '", norm.quant, "', got ",
         is_needed ? "None" : "a tensor", "; scales are written with 'group', 'group_ue8m0' and 'token' only");
  }
  if (!is_needed) return;
  const Tensor& scales = *norm.scales_out;
  if (q.quant == QueryQuant::kGroup) {
    if (q.rank % kQueryGroup != 0) fail("q_c must have a multiple of 128 columns with q_quant '", norm.quant, "', got ", int64_t{q.rank}, "; quantise it unfused");
    check_shape("q_scales_out", scales, "[num_tokens, q_lora_rank / 128]", {num_tokens, q.rank / kQueryGroup});
  } else {
    check_shape("q_scales_out", scales, "[num_tokens, 1]", {num_tokens, 1});
  }
  check_dtype("q_scales_out", scales, {ScalarType::Float});
  check_device("q_scales_out", scales, lead);
  q.scales = static_cast<float*>(scales.data_ptr());
  q.scale_token_stride = scales.stride(0);
  q.scale_group_stride = scales.stride(1);
}

// The lead is q_c.
inline void set_query_norm(Params& p, const QueryNormArguments& norm, const Lead& lead) {
  QueryNormParams& q = p.query_norm;
  const Tensor& q_c = lead.tensor;
  check_last_dim_contiguous("q_c", q_c);
  if (q_c.size(1) == 0) fail("q_c must have at least one column, got ", shape_text(q_c), "; pass the query's latent");
  q.rank = static_cast<int32_t>(q_c.size(1));
  q.quant = query_quant_of(norm.quant);
  q.scales_are_powers_of_two = norm.quant == "group_ue8m0";
  if (has_scales(q.quant) && !(norm.smallest >= kSmallest)) {
    fail("q_smallest must be at least 2**-80 with q_quant '", norm.quant, "', got ", norm.smallest, "; quantise it unfused");
  }
  check_shape("q_c_weight", norm.weight, "[q_lora_rank]", {q.rank});
  check_activations("q_c_weight", norm.weight, lead);
  check_output("q_c_out", norm.out, "[num_tokens, q_lora_rank]", {p.num_tokens, q.rank});
  check_dtype("q_c_out", norm.out, {q.quant == QueryQuant::kNone ? q_c.scalar_type() : ScalarType::Float8_e4m3fn});
  check_device("q_c_out", norm.out, lead);
  q.static_scale = static_scale_of(norm, q.quant, lead);
  set_scales(q, norm, p.num_tokens, lead);
  q.in = q_c.data_ptr();
  q.weight = norm.weight.data_ptr();
  q.out = norm.out.data_ptr();
  q.token_stride = q_c.stride(0);
  q.inverse_rank = 1.0f / static_cast<float>(q.rank);
  q.epsilon = static_cast<float>(norm.epsilon);
  q.smallest = static_cast<float>(norm.smallest);
  q.rounds_twice = norm.rounds_twice;
}

}  // namespace mla_fusion
