// SPDX-License-Identifier: Apache-2.0
#include <torch/csrc/stable/library.h>

#include "launcher.h"

STABLE_TORCH_LIBRARY_FRAGMENT(mla_fusion, m) {
  m.def(
      "concat_and_cache_mla_rope_fused(Tensor positions, Tensor(a!) q_pe, Tensor k_pe, Tensor kv_c, Tensor cos_sin_cache, "
      "bool is_neox, Tensor slot_mapping, Tensor(b!) kv_cache, str kv_cache_dtype, Tensor kv_cache_scale, "
      "Tensor(c!) k_pe_out) -> ()");
  m.def(
      "concat_and_cache_mla_rope_fused.fresh(Tensor positions, Tensor(a!) q_pe, Tensor k_pe, Tensor kv_c, "
      "Tensor cos_sin_cache, bool is_neox, Tensor slot_mapping, Tensor(b!) kv_cache, str kv_cache_dtype, "
      "Tensor kv_cache_scale) -> Tensor");
  m.def(
      "norm_concat_and_cache_mla_rope_fused(Tensor positions, Tensor(a!) q_pe, Tensor k_pe, Tensor kv_c, "
      "Tensor kv_c_weight, float epsilon, Tensor cos_sin_cache, bool is_neox, Tensor slot_mapping, Tensor(b!) kv_cache, "
      "str kv_cache_dtype, Tensor kv_cache_scale, Tensor(c!) k_pe_out, Tensor(d!) kv_c_normed_out) -> ()");
  m.def(
      "norm_concat_and_cache_mla_rope_fused.fresh(Tensor positions, Tensor(a!) q_pe, Tensor k_pe, Tensor kv_c, "
      "Tensor kv_c_weight, float epsilon, Tensor cos_sin_cache, bool is_neox, Tensor slot_mapping, Tensor(b!) kv_cache, "
      "str kv_cache_dtype, Tensor kv_cache_scale) -> (Tensor, Tensor)");
  m.def(
      "norms_rope_concat_and_cache_mla(Tensor positions, Tensor q_c, Tensor q_c_weight, float q_epsilon, Tensor k_pe, "
      "Tensor kv_c, Tensor kv_c_weight, float epsilon, Tensor cos_sin_cache, bool is_neox, Tensor slot_mapping, "
      "Tensor(a!) kv_cache, str kv_cache_dtype, Tensor kv_cache_scale, str q_quant, bool q_rounds_twice, float q_smallest, "
      "Tensor? q_static_scale, Tensor(b!) q_c_out, Tensor(c!)? q_scales_out, Tensor(d!) k_pe_out, "
      "Tensor(e!) kv_c_normed_out) -> ()");
  m.def(
      "norms_rope_concat_and_cache_mla.fresh(Tensor positions, Tensor q_c, Tensor q_c_weight, float q_epsilon, Tensor k_pe, "
      "Tensor kv_c, Tensor kv_c_weight, float epsilon, Tensor cos_sin_cache, bool is_neox, Tensor slot_mapping, "
      "Tensor(a!) kv_cache, str kv_cache_dtype, Tensor kv_cache_scale, str q_quant, bool q_rounds_twice, float q_smallest, "
      "Tensor? q_static_scale, str q_scales_layout) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("rope_query(Tensor positions, Tensor(a!) q_pe, Tensor cos_sin_cache, bool is_neox) -> ()");
}

// The launcher finds the device by itself. The last is an op of vLLM's graphs, whose schema has a tag that cannot be given
// here: layer_ops.py defines it.
#define MLA_FUSION_IMPLEMENTATIONS(m)                                                                                       \
  m.impl("concat_and_cache_mla_rope_fused", TORCH_BOX(&mla_fusion::concat_and_cache_mla_rope_fused));                       \
  m.impl("concat_and_cache_mla_rope_fused.fresh", TORCH_BOX(&mla_fusion::concat_and_cache_mla_rope_fused_fresh));           \
  m.impl("norm_concat_and_cache_mla_rope_fused", TORCH_BOX(&mla_fusion::norm_concat_and_cache_mla_rope_fused));             \
  m.impl("norm_concat_and_cache_mla_rope_fused.fresh", TORCH_BOX(&mla_fusion::norm_concat_and_cache_mla_rope_fused_fresh)); \
  m.impl("norms_rope_concat_and_cache_mla", TORCH_BOX(&mla_fusion::norms_rope_concat_and_cache_mla));                       \
  m.impl("norms_rope_concat_and_cache_mla.fresh", TORCH_BOX(&mla_fusion::norms_rope_concat_and_cache_mla_fresh));           \
  m.impl("rope_query", TORCH_BOX(&mla_fusion::rope_query));                                                                 \
  m.impl("fused_rope_query_in_place", TORCH_BOX(&mla_fusion::rope_query))

STABLE_TORCH_LIBRARY_IMPL(mla_fusion, CPU, m) { MLA_FUSION_IMPLEMENTATIONS(m); }

#ifdef MLA_FUSION_GPU
STABLE_TORCH_LIBRARY_IMPL(mla_fusion, CUDA, m) { MLA_FUSION_IMPLEMENTATIONS(m); }
#endif

#ifdef MLA_FUSION_PORTABLE
// libstdc++'s reference counts ask glibc whether there is one thread only, which it says from 2.32 on. Where it does not,
// this one says no; where it does, the loader takes glibc's.
extern "C" {
char __libc_single_threaded = 0;
}
#endif
