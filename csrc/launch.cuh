// SPDX-License-Identifier: Apache-2.0
// Chooses a kernel for the sizes and alignments at hand and launches it. CUDA or HIP runtime only, no torch headers.
// fp16 is compiled in a file of its own, so that a build uses more than one core.
#pragma once

#include <cuda_runtime.h>

#include <initializer_list>
#include <type_traits>

#include "mla_rope_cache.cuh"

namespace mla_fusion {

// The general kernel; its one instance is in mla_rope_cache.cu.
cudaError_t launch_general(const Params& params, cudaStream_t stream);

// Below this many groups of lanes the GPU is not full and one head per lane is the shortest way.
constexpr int64_t kGroupsToFillGpu = 8192;
constexpr int kHeadsWhenFull = 2;
// The same for the rows of the query's norm, and the vectors of a row that a lane then has.
constexpr int64_t kRowsToFillGpu = 512;
constexpr int kShareWhenFull = 2;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline bool is_aligned(const void* pointer, int64_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

// In elements of an activation type, and for the strides and pointers of its rows.
template <typename Act>
bool are_vectors(std::initializer_list<int64_t> counts, std::initializer_list<const void*> pointers) {
  for (const int64_t count : counts) {
    if (count % kActsPerVector<Act> != 0) return false;
  }
  for (const void* pointer : pointers) {
    if (!is_aligned(pointer, kVectorBytes)) return false;
  }
  return true;
}

template <typename Act>
bool heads_fit(const Params& p) {
  const int columns = p.rot_dim / kActsPerVector<Act>;
  return columns > 0 && columns <= kLanes && (columns & (columns - 1)) == 0 &&
         are_vectors<Act>({p.rot_dim, p.q_token_stride, p.q_head_stride, p.k_token_stride, p.cos_sin_stride},
                          {p.q_pe, p.k_pe, p.k_pe_out, p.cos_sin_cache});
}

template <typename Act>
bool latent_fits(const Params& p) {
  const bool is_ds_mla = p.cache_kind == CacheKind::kFp8DsMla;
  // In elements of the cache: where they are bytes, eight quantised values or sixteen bytes of the key are one store.
  const int64_t cache_step = is_ds_mla ? kVectorBytes : kActsPerVector<Act>;
  const int64_t cache_bytes = p.cache_kind == CacheKind::kCopy ? kVectorBytes : cache_step;
  return p.lora_rank > 0 && p.lora_rank <= kLatentVectors * kLanes * kActsPerVector<Act> &&
         (!is_ds_mla || p.lora_rank == kDsMlaLoraRank) && p.cache_block_stride % cache_step == 0 &&
         p.cache_row_stride % cache_step == 0 && is_aligned(p.kv_cache, cache_bytes) &&
         are_vectors<Act>({p.lora_rank, p.kv_token_stride}, {p.kv_c, p.kv_c_weight, p.kv_c_out});
}

template <typename Act>
bool query_norm_fits(const QueryNormParams& q) {
  return q.rank > 0 && q.rank <= kQueryVectors * kLanes * kActsPerVector<Act> &&
         are_vectors<Act>({q.rank, q.token_stride}, {q.in, q.weight, q.out});
}

// Sparse attention's models and those whose query has a scale of each row have bf16 activations.
template <typename Act>
constexpr bool kHasAllVectors = std::is_same_v<Act, BFloat16>;

// The vector kernels need every vector that they touch to be whole and aligned. What no model has takes the general kernel,
// and every build is shorter for it: those two with other activations, and GPT-NeoX pairs with fp8_ds_mla or around q_b.
template <typename Act>
bool vectors_fit(const Params& p) {
  const bool is_ds_mla = p.kv_c != nullptr && p.cache_kind == CacheKind::kFp8DsMla;
  const bool is_token_quant = p.query_norm.in != nullptr && p.query_norm.quant == QueryQuant::kToken;
  const bool is_whole_op = p.q_pe != nullptr && p.kv_c != nullptr;
  const bool has_vectors = p.is_neox ? is_whole_op && !is_ds_mla : kHasAllVectors<Act> || !(is_ds_mla || is_token_quant);
  return has_vectors && heads_fit<Act>(p) && (p.kv_c == nullptr || latent_fits<Act>(p)) &&
         (p.query_norm.in == nullptr || query_norm_fits<Act>(p.query_norm));
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

// kHeads or kShare as in the kernel; `query_tasks`: of a token. Where the GPU is not full, a block has one token.
template <typename Act, bool kNeox, int kHeads, Row kRow, bool kNorm, int kShare>
cudaError_t launch_vector(const Params& p, int64_t query_tasks, bool is_full, cudaStream_t stream) {
  const int64_t tasks = kRowTasks<kRow> + query_tasks;
  constexpr int kMaxGroups = kMaxThreads / kLanes;
  const int64_t blocks_per_token = ceil_div(tasks, kMaxGroups);
  const int64_t tasks_per_block = ceil_div(tasks, blocks_per_token);
  const int64_t tokens_per_block = is_full ? kMaxGroups / tasks_per_block : 1;
  const dim3 block(kLanes, tokens_per_block, tasks_per_block);
  const dim3 grid(ceil_div(p.num_tokens, tokens_per_block), blocks_per_token);
  return launch(mla_rope_cache_vector<Act, kNeox, kHeads, kRow, kNorm, kShare>, grid, block, p, stream);
}

inline bool fills_gpu(const Params& p) {
  return p.num_tokens * (1 + ceil_div(p.num_heads, heads_per_pass(p))) >= kGroupsToFillGpu;
}

template <typename Act, bool kNeox, int kHeads, Row kRow, bool kNorm>
cudaError_t launch_heads(const Params& p, cudaStream_t stream) {
  const int64_t tasks = ceil_div(p.num_heads, heads_per_pass(p) * kHeads);
  return launch_vector<Act, kNeox, kHeads, kRow, kNorm, 0>(p, tasks, fills_gpu(p), stream);
}

template <typename Act, Row kRow, bool kNorm>
cudaError_t choose_heads(const Params& p, cudaStream_t stream) {
  return fills_gpu(p) ? launch_heads<Act, false, kHeadsWhenFull, kRow, kNorm>(p, stream)
                      : launch_heads<Act, false, 1, kRow, kNorm>(p, stream);
}

template <typename Act, Row kRow, int kShare>
cudaError_t launch_query_norm(const Params& p, bool is_full, cudaStream_t stream) {
  const int64_t tasks = ceil_div(p.query_norm.rank, kShare * kLanes * kActsPerVector<Act>);
  return launch_vector<Act, false, 0, kRow, true, kShare>(p, tasks, is_full, stream);
}

// With a norm of the latent, as all models with one of the query have it.
template <typename Act, Row kRow>
cudaError_t choose_share(const Params& p, cudaStream_t stream) {
  if (p.num_tokens < kRowsToFillGpu) return launch_query_norm<Act, kRow, 1>(p, false, stream);
  return launch_query_norm<Act, kRow, kShareWhenFull>(p, true, stream);
}

template <typename Act, Row kRow>
cudaError_t choose_norm(const Params& p, cudaStream_t stream) {
  if (p.query_norm.in != nullptr) return choose_share<Act, kRow>(p, stream);
  if (p.kv_c_weight != nullptr) return choose_heads<Act, kRow, true>(p, stream);
  if constexpr (kRow == Row::kFp8DsMla) {
    // Sparse attention's models have a norm; without it one instance serves batches of all sizes.
    return launch_heads<Act, false, kHeadsWhenFull, kRow, false>(p, stream);
  } else {
    return choose_heads<Act, kRow, false>(p, stream);
  }
}

template <typename Act>
cudaError_t choose_cache(const Params& p, cudaStream_t stream) {
  if (p.kv_c == nullptr) return choose_heads<Act, Row::kNone, false>(p, stream);
  if constexpr (kHasAllVectors<Act>) {
    if (p.query_norm.in != nullptr && p.query_norm.quant == QueryQuant::kToken) {
      return launch_query_norm<Act, Row::kAny, kQueryVectors>(p, true, stream);
    }
    if (p.cache_kind == CacheKind::kFp8DsMla) return choose_norm<Act, Row::kFp8DsMla>(p, stream);
  }
  if (p.cache_kind == CacheKind::kCopy) return choose_norm<Act, Row::kCopy>(p, stream);
  return choose_norm<Act, Row::kFp8>(p, stream);
}

template <typename Act>
cudaError_t choose_path(const Params& p, cudaStream_t stream) {
  if (!vectors_fit<Act>(p)) return launch_general(p, stream);
  // Rare: one instance for all kinds of rows, with norm and without, and for batches of all sizes.
  if (p.is_neox) return launch_heads<Act, true, kHeadsWhenFull, Row::kCopyOrFp8, true>(p, stream);
  return choose_cache<Act>(p, stream);
}

}  // namespace mla_fusion
