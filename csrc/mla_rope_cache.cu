// SPDX-License-Identifier: Apache-2.0
// Chooses a kernel for the sizes and alignments at hand and launches it. CUDA or HIP runtime only, no torch headers.
#include <cuda_runtime.h>

#include "mla_rope_cache.cuh"

namespace mla_fusion {
namespace {

// Below this many groups of lanes the GPU is not full and one head per lane is the shortest way.
constexpr int64_t kGroupsToFillGpu = 8192;
constexpr int kHeadsWhenFull = 4;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

bool is_aligned(const void* pointer, int64_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

// The vector kernels need every vector that they touch to be whole and aligned.
template <typename Act>
bool vectors_fit(const Params& p) {
  constexpr int kWidth = kActsPerVector<Act>;
  const int per_column = p.is_neox ? 2 * kWidth : kWidth;
  const int columns = p.rot_dim / per_column;
  const bool shape_fits = p.rot_dim % per_column == 0 && p.lora_rank % kWidth == 0 && columns > 0 && columns <= kLanes &&
                          (columns & (columns - 1)) == 0;
  const bool strides_fit = p.q_token_stride % kWidth == 0 && p.q_head_stride % kWidth == 0 &&
                           p.k_token_stride % kWidth == 0 && p.kv_token_stride % kWidth == 0 &&
                           p.cos_sin_stride % kWidth == 0 && p.cache_block_stride % kWidth == 0 &&
                           p.cache_row_stride % kWidth == 0;
  const int64_t cache_bytes = p.cache_kind == CacheKind::kCopy ? kVectorBytes : kWidth;
  return shape_fits && strides_fit && is_aligned(p.q_pe, kVectorBytes) && is_aligned(p.k_pe, kVectorBytes) &&
         is_aligned(p.kv_c, kVectorBytes) && is_aligned(p.k_pe_out, kVectorBytes) &&
         is_aligned(p.cos_sin_cache, kVectorBytes) && is_aligned(p.kv_cache, cache_bytes);
}

template <typename Act, bool kNeox, int kHeads>
void launch_vector(const Params& p, cudaStream_t stream) {
  const int columns = p.rot_dim / (kActsPerVector<Act> * (kNeox ? 2 : 1));
  const int64_t tasks = 1 + ceil_div(p.num_heads, kLanes / columns * kHeads);
  constexpr int kMaxGroups = kMaxThreads / kLanes;
  const int64_t blocks_per_token = ceil_div(tasks, kMaxGroups);
  const int64_t tasks_per_block = ceil_div(tasks, blocks_per_token);
  const int64_t tokens_per_block = kHeads == 1 ? 1 : kMaxGroups / tasks_per_block;
  const dim3 block(kLanes, tasks_per_block, tokens_per_block);
  const dim3 grid(ceil_div(p.num_tokens, tokens_per_block), blocks_per_token);
  mla_rope_cache_vector<Act, kNeox, kHeads><<<grid, block, 0, stream>>>(p);
}

template <typename Act, bool kNeox>
void choose_heads(const Params& p, cudaStream_t stream) {
  const int columns = p.rot_dim / (kActsPerVector<Act> * (kNeox ? 2 : 1));
  const int64_t groups = p.num_tokens * (1 + ceil_div(p.num_heads, kLanes / columns));
  if (groups < kGroupsToFillGpu) {
    launch_vector<Act, kNeox, 1>(p, stream);
  } else {
    launch_vector<Act, kNeox, kHeadsWhenFull>(p, stream);
  }
}

template <typename Act>
void choose_path(const Params& p, cudaStream_t stream) {
  if (!vectors_fit<Act>(p)) {
    mla_rope_cache_general<Act><<<p.num_tokens, kMaxThreads, 0, stream>>>(p);
  } else if (p.is_neox) {
    choose_heads<Act, true>(p, stream);
  } else {
    choose_heads<Act, false>(p, stream);
  }
}

}  // namespace

int launch_gpu(const Params& params, void* stream_handle) {
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  switch (params.act_type) {
    case ActType::kFloat32:
      choose_path<float>(params, stream);
      break;
    case ActType::kFloat16:
      choose_path<Float16>(params, stream);
      break;
    case ActType::kBFloat16:
      choose_path<BFloat16>(params, stream);
      break;
  }
  return static_cast<int>(cudaGetLastError());
}

const char* gpu_error_name(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

}  // namespace mla_fusion
