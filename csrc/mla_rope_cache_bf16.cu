// SPDX-License-Identifier: Apache-2.0
#include "launch.cuh"

namespace mla_fusion {

void launch_bf16(const Params& params, cudaStream_t stream) { choose_path<BFloat16>(params, stream); }

}  // namespace mla_fusion
