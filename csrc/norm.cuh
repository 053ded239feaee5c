// SPDX-License-Identifier: Apache-2.0
// RMSNorm of values in vectors.
#pragma once

#include "vector.cuh"

namespace mla_fusion {

// RMSNorm as vLLM's compiled graphs round it: normalise and weigh in float, round once.
template <typename Act>
__device__ __forceinline__ ActVector<Act> normalise(const ActVector<Act>& in, const ActVector<Act>& weight, float inverse_rms) {
  ActVector<Act> out;
#pragma unroll
  for (int i = 0; i < kActsPerVector<Act>; i += 2) {
    round_pair(to_float(in.at[i]) * inverse_rms * to_float(weight.at[i]),
               to_float(in.at[i + 1]) * inverse_rms * to_float(weight.at[i + 1]), out.at[i], out.at[i + 1]);
  }
  return out;
}

}  // namespace mla_fusion
