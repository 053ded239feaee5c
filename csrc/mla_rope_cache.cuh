// SPDX-License-Identifier: Apache-2.0
// The vector kernel: which group of lanes does what of a token. Each op is an instance with other roles: RoPE of the
// query, key and latent with their cache row (the whole op), the norm of the query with key and latent (before q_b), or
// RoPE of the query alone (after q_b).
#pragma once

#include "query_norm.cuh"
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
template <Row kRow>
constexpr int kRowTasks = kRow == Row::kNone ? 0 : 2;

// Where a norm's blocks do not fill the GPU, registers are for its loads: for more blocks the compiler would move one behind
// the sum, to its only use.
template <bool kNorm, int kHeads, int kShare>
constexpr int kMinBlocksOf = kNorm && kHeads <= 1 && kShare <= 1 ? 1 : kMinBlocks;

// A block is (32 lanes, tokens, tasks of a token). The tasks behind latent and key are the query's: kHeads heads per lane
// to rotate, or, where that is 0, kShare vectors per lane to normalise.
template <typename Act, bool kNeox, int kHeads, Row kRow, bool kNorm, int kShare>
__global__ void MLA_LAUNCH_BOUNDS((kMinBlocksOf<kNorm, kHeads, kShare>)) mla_rope_cache_vector(const MLA_GRID_CONSTANT Params p) {
  static_assert((kHeads == 0) != (kShare == 0));
  const int64_t token = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (token >= p.num_tokens) return;
  const int task = blockIdx.y * blockDim.z + threadIdx.z;
  const int lane = threadIdx.x;
  if (task >= kRowTasks<kRow>) {
    const int query_task = task - kRowTasks<kRow>;
    if constexpr (kShare > 0) {
      run_role<0>(QueryNorm<Act, kShare>{p.query_norm, token, lane, query_task});
    } else {
      run_role<0>(QueryHeads<Act, kNeox, kHeads, kRow == Row::kNone>{p, token, lane, query_task});
    }
  } else if constexpr (kRow != Row::kNone) {
    if (task == 0) {
      run_role<1>(Latent<Act, kRow, kNorm>{p, token, lane});
    } else {
      run_role<2>(Key<Act, kNeox, kRow>{p, token, lane});
    }
  }
}

}  // namespace mla_fusion
