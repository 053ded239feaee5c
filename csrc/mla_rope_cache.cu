// SPDX-License-Identifier: Apache-2.0
#include "general.cuh"
#include "launch.cuh"

namespace mla_fusion {

cudaError_t launch_fp16(const Params& params, cudaStream_t stream);

cudaError_t launch_general(const Params& params, cudaStream_t stream) {
  return launch(mla_rope_cache_general, dim3(params.num_tokens), dim3(kMaxThreads), params, stream);
}

namespace {

cudaError_t launch_act_type(const Params& params, cudaStream_t stream) {
  switch (params.act_type) {
    case ActType::kFloat32:
      // Rare on a GPU: the general kernel will do, and every build is shorter for it.
      return launch_general(params, stream);
    case ActType::kFloat16:
      return launch_fp16(params, stream);
    case ActType::kBFloat16:
      return choose_path<BFloat16>(params, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

int launch_gpu(const Params& params, void* stream) {
  return static_cast<int>(launch_act_type(params, static_cast<cudaStream_t>(stream)));
}

const char* gpu_error_name(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

}  // namespace mla_fusion
