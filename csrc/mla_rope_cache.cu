// SPDX-License-Identifier: Apache-2.0
#include "launch.cuh"

namespace mla_fusion {

void launch_fp16(const Params& params, cudaStream_t stream);

int launch_gpu(const Params& params, void* stream_handle) {
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  switch (params.act_type) {
    case ActType::kFloat32:
      // Rare on a GPU: the general kernel will do, and every build is shorter for it.
      launch_general<float>(params, stream);
      break;
    case ActType::kFloat16:
      launch_fp16(params, stream);
      break;
    case ActType::kBFloat16:
      choose_path<BFloat16>(params, stream);
      break;
  }
  return static_cast<int>(cudaGetLastError());
}

const char* gpu_error_name(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

}  // namespace mla_fusion
