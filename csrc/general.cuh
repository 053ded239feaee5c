// SPDX-License-Identifier: Apache-2.0
// The kernel for what the vectors do not fit: any size, stride and alignment, one element at a time.
#pragma once

#include "cache_row.cuh"
#include "rotation.cuh"

namespace mla_fusion {

// The latent of a row of fp8_ds_mla at any alignment, by one group of lanes.
template <typename Act>
__device__ __forceinline__ void store_ds_mla_tiles(uint8_t* row, const Act* kv_c, int lane) {
#pragma unroll 1
  for (int start = 0; start < kDsMlaLoraRank; start += kDsMlaTile) {
    float largest = 0.0f;
    for (int i = start + lane; i < start + kDsMlaTile; i += kLanes) largest = fmaxf(largest, fabsf(to_float(kv_c[i])));
    const float scale = ds_mla_scale(max_over_lanes<kLanes>(largest));
#pragma unroll 1
    for (int i = start + lane; i < start + kDsMlaTile; i += kLanes) {
      row[i] = static_cast<uint8_t>(to_fp8_pair<Fp8::kE4M3>(to_float(kv_c[i]) / scale, 0.0f));
    }
    if (lane == 0) memcpy(row + kDsMlaScales + start / kDsMlaTile * 4, &scale, sizeof(scale));
  }
}

// One token, by one block.
template <typename Act>
struct GeneralToken {
  const Params& p;
  const int64_t token;
  const int64_t row;  // negative: not cached
  const float scale;

  __device__ __forceinline__ bool is_ds_mla() const { return p.cache_kind == CacheKind::kFp8DsMla; }

  __device__ __forceinline__ float angle_at(int64_t angle_row, int index) const {
    return p.cos_sin_is_float ? static_cast<const float*>(p.cos_sin_cache)[angle_row + index]
                              : to_float(static_cast<const Act*>(p.cos_sin_cache)[angle_row + index]);
  }

  __device__ __forceinline__ void store_in_cache(int index, Act value) const {
    if (row >= 0) store_cache_element(p, row, index, value, scale);
  }

  // Loops that store stay rolled: the next loads must wait for them anyway, and unrolled they made every build longer.
  __device__ __forceinline__ void rotate_heads() const {
    const int half = p.rot_dim / 2;
    const int64_t angle_row = position_of(p, token) * p.cos_sin_stride;
    // Head num_heads is the key.
#pragma unroll 1
    for (int i = threadIdx.x; i < (p.num_heads + 1) * half; i += blockDim.x) {
      const int head = i / half;
      const int pair = i - head * half;
      const int first = p.is_neox ? pair : 2 * pair;
      const int second = p.is_neox ? pair + half : 2 * pair + 1;
      const bool is_key = head == p.num_heads;
      Act* out = is_key ? static_cast<Act*>(p.k_pe_out) + token * p.rot_dim
                        : static_cast<Act*>(p.q_pe) + token * p.q_token_stride + head * p.q_head_stride;
      const Act* in = is_key ? static_cast<const Act*>(p.k_pe) + token * p.k_token_stride : out;
      const float a = to_float(in[first]);
      const float b = to_float(in[second]);
      const float cos = angle_at(angle_row, pair);
      const float sin = angle_at(angle_row, half + pair);
      const Act rotated_first = from_float<Act>(a * cos - b * sin);
      const Act rotated_second = from_float<Act>(b * cos + a * sin);
      out[first] = rotated_first;
      out[second] = rotated_second;
      if (is_key) {
        store_in_cache(p.lora_rank + first, rotated_first);
        store_in_cache(p.lora_rank + second, rotated_second);
      }
    }
  }

  __device__ __forceinline__ void store_latent() const {
    const Act* kv_c = static_cast<const Act*>(p.kv_c) + token * p.kv_token_stride;
    if (p.kv_c_weight == nullptr && !is_ds_mla()) {
#pragma unroll 1
      for (int i = threadIdx.x; i < p.lora_rank; i += blockDim.x) store_in_cache(i, kv_c[i]);
      return;
    }
    // One group of lanes has the whole row: no shared memory, and the same order of addition at every launch.
    if (threadIdx.x >= kLanes) return;
    // Below, each lane reads what it wrote itself.
    if (p.kv_c_weight != nullptr) kv_c = normalise_latent(kv_c);
    if (is_ds_mla() && row >= 0) store_ds_mla_tiles(static_cast<uint8_t*>(p.kv_cache) + row, kv_c, threadIdx.x);
  }

  __device__ __forceinline__ const Act* normalise_latent(const Act* kv_c) const {
    float sum = 0.0f;
    for (int i = threadIdx.x; i < p.lora_rank; i += kLanes) sum += to_float(kv_c[i]) * to_float(kv_c[i]);
    const float inverse_rms = rsqrtf(sum_over_lanes(sum) * p.inverse_lora_rank + p.epsilon);
    Act* out = static_cast<Act*>(p.kv_c_out) + token * p.lora_rank;
#pragma unroll 1
    for (int i = threadIdx.x; i < p.lora_rank; i += kLanes) {
      out[i] = from_float<Act>(to_float(kv_c[i]) * inverse_rms * to_float(static_cast<const Act*>(p.kv_c_weight)[i]));
      store_in_cache(i, out[i]);
    }
    return out;
  }
};

// Any rot_dim, lora_rank, stride and alignment, one element at a time; a block is one token.
template <typename Act>
__global__ void __launch_bounds__(kMaxThreads) mla_rope_cache_general(const MLA_GRID_CONSTANT Params p) {
  wait_for_inputs();
  const int64_t token = blockIdx.x;
  const int64_t slot = slot_of(p, token);
  const int64_t row = slot < 0 ? -1 : cache_offset(p, slot);
  const bool has_no_scale = p.cache_kind == CacheKind::kCopy || p.cache_kind == CacheKind::kFp8DsMla;
  const GeneralToken<Act> self{p, token, row, has_no_scale ? 1.0f : *p.kv_cache_scale};
  self.rotate_heads();
  self.store_latent();
}

}  // namespace mla_fusion
