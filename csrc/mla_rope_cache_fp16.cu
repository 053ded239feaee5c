// SPDX-License-Identifier: Apache-2.0
#include "launch.cuh"

namespace mla_fusion {

cudaError_t launch_fp16(const Params& params, cudaStream_t stream) { return choose_path<Float16>(params, stream); }

}  // namespace mla_fusion
