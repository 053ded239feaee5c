// SPDX-License-Identifier: Apache-2.0
#include <torch/csrc/stable/library.h>

#include "launcher.h"

STABLE_TORCH_LIBRARY_FRAGMENT(mla_fusion, m) {
  m.def(
      "concat_and_cache_mla_rope_fused(Tensor positions, Tensor(a!) q_pe, Tensor k_pe, Tensor kv_c, Tensor cos_sin_cache, "
      "bool is_neox, Tensor slot_mapping, Tensor(b!) kv_cache, str kv_cache_dtype, Tensor kv_cache_scale, "
      "Tensor(c!) k_pe_out) -> ()");
  m.def(
      "norm_concat_and_cache_mla_rope_fused(Tensor positions, Tensor(a!) q_pe, Tensor k_pe, Tensor kv_c, "
      "Tensor kv_c_weight, float epsilon, Tensor cos_sin_cache, bool is_neox, Tensor slot_mapping, Tensor(b!) kv_cache, "
      "str kv_cache_dtype, Tensor kv_cache_scale, Tensor(c!) k_pe_out, Tensor(d!) kv_c_normed_out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mla_fusion, CPU, m) {
  m.impl("concat_and_cache_mla_rope_fused", TORCH_BOX(&mla_fusion::concat_and_cache_mla_rope_fused));
  m.impl("norm_concat_and_cache_mla_rope_fused", TORCH_BOX(&mla_fusion::norm_concat_and_cache_mla_rope_fused));
}

#ifdef MLA_FUSION_GPU
STABLE_TORCH_LIBRARY_IMPL(mla_fusion, CUDA, m) {
  m.impl("concat_and_cache_mla_rope_fused", TORCH_BOX(&mla_fusion::concat_and_cache_mla_rope_fused));
  m.impl("norm_concat_and_cache_mla_rope_fused", TORCH_BOX(&mla_fusion::norm_concat_and_cache_mla_rope_fused));
}
#endif

#ifdef MLA_FUSION_PORTABLE
// libstdc++'s reference counts ask glibc whether there is one thread only, which it says from 2.32 on. Where it does not,
// this one says no; where it does, the loader takes glibc's.
extern "C" {
char __libc_single_threaded = 0;
}
#endif
