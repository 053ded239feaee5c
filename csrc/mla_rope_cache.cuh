// SPDX-License-Identifier: Apache-2.0
// The vector kernel: RoPE on q_pe (in place) and k_pe (to k_pe_out), and the cache row [kv_c | rotated k_pe].
#pragma once

#include "roles.cuh"

namespace mla_fusion {

template <int kId, typename Role>
__device__ __forceinline__ void run_role(const Role& role) {
  role.prefetch_inputs();
  wait_for_inputs();
  role.run();
#ifndef __NVCC__
  // Ends that differ: LLVM would merge the roles' last stores into one and split it into bytes.
  asm volatile("" ::"n"(kId));
#endif
}

// Groups of lanes that a token has for its latent and its key.
constexpr int kFirstQueryTask = 2;

// A block is (32 lanes, tokens, tasks of a token).
template <typename Act, bool kNeox, int kHeads, Row kRow, bool kNorm>
__global__ void MLA_LAUNCH_BOUNDS mla_rope_cache_vector(const MLA_GRID_CONSTANT Params p) {
  const int64_t token = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (token >= p.num_tokens) return;
  const int task = blockIdx.y * blockDim.z + threadIdx.z;
  const int lane = threadIdx.x;
  if (task >= kFirstQueryTask) {
    run_role<0>(QueryHeads<Act, kNeox, kHeads>{p, token, lane, task - kFirstQueryTask});
  } else if (task == 0) {
    run_role<1>(Latent<Act, kRow, kNorm>{p, token, lane});
  } else {
    run_role<2>(Key<Act, kNeox, kRow>{p, token, lane});
  }
}

}  // namespace mla_fusion
