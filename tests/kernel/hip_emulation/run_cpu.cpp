// SPDX-License-Identifier: Apache-2.0
// Takes the place of the CPU kernel behind the op's launcher: tensors on the CPU go through the GPU's launch code and
// device code.
#include <hip/hip_runtime.h>

#include <stdexcept>

#include "mla_rope_cache.h"

extern "C" void configure_emulation(int wave_size, int last_lane_first) {
  emulation::wave_size = wave_size;
  emulation::last_lane_first = last_lane_first != 0;
}

namespace mla_fusion {

void run_cpu(const Params& params, int64_t begin, int64_t end) {
  if (begin != 0 || end != params.num_tokens) throw std::runtime_error("call torch.set_num_threads(1) first");
  const int error = launch_gpu(params, nullptr);
  if (error != 0) throw std::runtime_error(gpu_error_name(error));
}

}  // namespace mla_fusion
