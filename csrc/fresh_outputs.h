// SPDX-License-Identifier: Apache-2.0
// Memory for the outputs of a call that is not given any: undefined, contiguous but for scales. From Python each would cost
// the host microseconds.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <array>
#include <cstdint>
#include <string>

#include "checks.h"
#include "mla_rope_cache.h"
#include "query_norm_arguments.h"

namespace mla_fusion {

template <size_t kDims>
Tensor fresh(const Tensor& like, int32_t dtype, const std::array<int64_t, kDims>& sizes, const std::array<int64_t, kDims>& strides) {
  int32_t device_type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle made = nullptr;
  const int32_t device = like.get_device_index();
  if (aoti_torch_empty_strided(kDims, sizes.data(), strides.data(), dtype, device_type, device, &made) != AOTI_TORCH_SUCCESS) {
    fail("out of memory: none for an output of shape ", shape_text(sizes), "; lower max_num_batched_tokens or gpu_memory_utilization");
  }
  return Tensor(made);
}

inline int32_t dtype_of(const Tensor& tensor) {
  int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  return dtype;
}

// [num_tokens, 1, rot_dim], the key with or without a dimension of heads.
inline Tensor fresh_key(const Tensor& k_pe) {
  if (k_pe.dim() != 2 && k_pe.dim() != 3) fail("k_pe must be [num_tokens, rot_dim] or [num_tokens, 1, rot_dim], got ", shape_text(k_pe), "; pass the part that is rotated");
  const int64_t rot_dim = k_pe.size(k_pe.dim() - 1);
  return fresh<3>(k_pe, dtype_of(k_pe), {k_pe.size(0), 1, rot_dim}, {rot_dim, rot_dim, 1});
}

// [num_tokens, rank] of a latent's dtype, or another.
inline Tensor fresh_rows(const char* name, const Tensor& latent, int32_t dtype) {
  check_shape(name, latent, "[num_tokens, rank]", {kAny, kAny});
  return fresh<2>(latent, dtype, {latent.size(0), latent.size(1)}, {latent.size(1), 1});
}

inline Tensor fresh_latent(const Tensor& kv_c) { return fresh_rows("kv_c", kv_c, dtype_of(kv_c)); }

inline Tensor fresh_query_latent(const Tensor& q_c, QueryQuant quant) {
  return fresh_rows("q_c", q_c, quant == QueryQuant::kNone ? dtype_of(q_c) : aoti_torch_dtype_float8_e4m3fn());
}

// After fresh_query_latent. Empty where the form has no scales.
inline Tensor fresh_scales(const Tensor& q_c, QueryQuant quant, const std::string& layout) {
  const int32_t dtype = aoti_torch_dtype_float32();
  if (!has_scales(quant)) return fresh<1>(q_c, dtype, {0}, {1});
  const int64_t num_tokens = q_c.size(0);
  const int64_t columns = quant == QueryQuant::kToken ? 1 : q_c.size(1) / kQueryGroup;
  if (layout == "rows") return fresh<2>(q_c, dtype, {num_tokens, columns}, {columns, 1});
  if (layout == "columns") return fresh<2>(q_c, dtype, {num_tokens, columns}, {1, num_tokens});
  if (layout == "columns of 4") return fresh<2>(q_c, dtype, {num_tokens, columns}, {1, (num_tokens + 3) / 4 * 4});
  fail("q_scales_layout must be one of rows, columns, columns of 4, got '", layout, "'; pass that of the op that is replaced");
}

}  // namespace mla_fusion
