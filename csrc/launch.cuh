// SPDX-License-Identifier: Apache-2.0
// Chooses a kernel for the sizes and alignments at hand and launches it. CUDA or HIP runtime only, no torch headers.
// fp16 is compiled in a file of its own, so that a build uses more than one core.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "general.cuh"
#include "mla_rope_cache.cuh"

namespace mla_fusion {

// Below this many groups of lanes the GPU is not full and one head per lane is the shortest way.
constexpr int64_t kGroupsToFillGpu = 8192;
constexpr int kHeadsWhenFull = 2;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline bool is_aligned(const void* pointer, int64_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

// The vector kernels need every vector that they touch to be whole and aligned.
template <typename Act>
bool vectors_fit(const Params& p) {
  constexpr int kWidth = kActsPerVector<Act>;
  const int columns = p.rot_dim / kWidth;
  const bool shape_fits = p.rot_dim % kWidth == 0 && columns > 0 && columns <= kLanes &&
                          (columns & (columns - 1)) == 0 && p.lora_rank > 0 && p.lora_rank % kWidth == 0 &&
                          p.lora_rank <= kLatentVectors * kLanes * kWidth;
  const bool strides_fit = p.q_token_stride % kWidth == 0 && p.q_head_stride % kWidth == 0 &&
                           p.k_token_stride % kWidth == 0 && p.kv_token_stride % kWidth == 0 &&
                           p.cos_sin_stride % kWidth == 0;
  const bool tiles_fit = p.cache_kind != CacheKind::kFp8DsMla || p.lora_rank == kDsMlaLoraRank;
  // In elements of the cache: where they are bytes, eight quantised values or sixteen bytes of the key are one store.
  const int64_t cache_step = p.cache_kind == CacheKind::kFp8DsMla ? kVectorBytes : kWidth;
  const int64_t cache_bytes = p.cache_kind == CacheKind::kCopy ? kVectorBytes : cache_step;
  const bool cache_fits = p.cache_block_stride % cache_step == 0 && p.cache_row_stride % cache_step == 0 &&
                          is_aligned(p.kv_cache, cache_bytes);
  return shape_fits && strides_fit && tiles_fit && cache_fits && is_aligned(p.q_pe, kVectorBytes) &&
         is_aligned(p.k_pe, kVectorBytes) && is_aligned(p.kv_c, kVectorBytes) && is_aligned(p.k_pe_out, kVectorBytes) &&
         is_aligned(p.cos_sin_cache, kVectorBytes) && is_aligned(p.kv_c_weight, kVectorBytes) &&
         is_aligned(p.kv_c_out, kVectorBytes);
}

#if !defined(__HIP_PLATFORM_AMD__)
inline bool can_start_early() {
  int device = 0;
  int major = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  return major >= 9;
}
#endif

// Lets the grid start while the kernel before it in the stream ends; it waits for that one's results itself.
inline cudaError_t launch(void (*kernel)(Params), dim3 grid, dim3 block, const Params& p, cudaStream_t stream) {
#if defined(__HIP_PLATFORM_AMD__)
  kernel<<<grid, block, 0, stream>>>(p);
  return cudaGetLastError();
#else
  cudaLaunchAttribute early_start{};
  early_start.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early_start.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.stream = stream;
  config.attrs = &early_start;
  config.numAttrs = can_start_early() ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, p);
#endif
}

inline int heads_per_pass(const Params& p) { return kLanes >> p.column_shift; }

template <typename Act, bool kNeox, int kHeads, Row kRow, bool kNorm>
cudaError_t launch_vector(const Params& p, cudaStream_t stream) {
  const int64_t tasks = kFirstQueryTask + ceil_div(p.num_heads, heads_per_pass(p) * kHeads);
  constexpr int kMaxGroups = kMaxThreads / kLanes;
  const int64_t blocks_per_token = ceil_div(tasks, kMaxGroups);
  const int64_t tasks_per_block = ceil_div(tasks, blocks_per_token);
  const int64_t tokens_per_block = kHeads == 1 ? 1 : kMaxGroups / tasks_per_block;
  const dim3 block(kLanes, tokens_per_block, tasks_per_block);
  const dim3 grid(ceil_div(p.num_tokens, tokens_per_block), blocks_per_token);
  return launch(mla_rope_cache_vector<Act, kNeox, kHeads, kRow, kNorm>, grid, block, p, stream);
}

template <typename Act, bool kNeox, Row kRow, bool kNorm>
cudaError_t choose_heads(const Params& p, cudaStream_t stream) {
  const int64_t groups = p.num_tokens * (1 + ceil_div(p.num_heads, heads_per_pass(p)));
  return groups < kGroupsToFillGpu ? launch_vector<Act, kNeox, 1, kRow, kNorm>(p, stream)
                                   : launch_vector<Act, kNeox, kHeadsWhenFull, kRow, kNorm>(p, stream);
}

template <typename Act, bool kNeox, Row kRow>
cudaError_t choose_norm(const Params& p, cudaStream_t stream) {
  return p.kv_c_weight != nullptr ? choose_heads<Act, kNeox, kRow, true>(p, stream)
                                  : choose_heads<Act, kNeox, kRow, false>(p, stream);
}

template <typename Act>
cudaError_t launch_general(const Params& p, cudaStream_t stream) {
  return launch(mla_rope_cache_general<Act>, dim3(p.num_tokens), dim3(kMaxThreads), p, stream);
}

// Sparse attention's models have bf16 activations and GPT-J pairs; with others fp8_ds_mla takes the general kernel.
template <typename Act, bool kNeox>
constexpr bool kHasDsMlaVectors = std::is_same_v<Act, BFloat16> && !kNeox;

template <typename Act, bool kNeox>
cudaError_t choose_cache(const Params& p, cudaStream_t stream) {
  if (p.cache_kind == CacheKind::kCopy) {
    return choose_norm<Act, kNeox, Row::kCopy>(p, stream);
  } else if (p.cache_kind != CacheKind::kFp8DsMla) {
    return choose_norm<Act, kNeox, Row::kFp8>(p, stream);
  } else if constexpr (kHasDsMlaVectors<Act, kNeox>) {
    return choose_norm<Act, kNeox, Row::kFp8DsMla>(p, stream);
  } else {
    return launch_general<Act>(p, stream);
  }
}

template <typename Act>
cudaError_t choose_path(const Params& p, cudaStream_t stream) {
  if (!vectors_fit<Act>(p)) {
    return launch_general<Act>(p, stream);
  } else if (p.is_neox) {
    return choose_cache<Act, true>(p, stream);
  } else {
    return choose_cache<Act, false>(p, stream);
  }
}

}  // namespace mla_fusion
