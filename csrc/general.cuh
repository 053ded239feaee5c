// SPDX-License-Identifier: Apache-2.0
// The kernel for what the vectors do not fit: any size, stride and alignment, one element at a time.
#pragma once

#include "cache_row.cuh"
#include "norm.cuh"
#include "rotation.cuh"

namespace mla_fusion {

// The norm of a row, by one group of lanes.
template <typename Act>
struct GeneralNorm {
  const Act* in;
  const Act* weight;
  bool rounds_twice;
  float inverse_rms;

  __device__ __forceinline__ GeneralNorm(const void* in, const void* weight, int count, float inverse_count, float epsilon,
                                         bool rounds_twice, int lane)
      : in(static_cast<const Act*>(in)), weight(static_cast<const Act*>(weight)), rounds_twice(rounds_twice) {
    float sum = 0.0f;
    for (int i = lane; i < count; i += kLanes) sum += to_float(this->in[i]) * to_float(this->in[i]);
    inverse_rms = inverse_rms_of(sum_over_lanes(sum), count, inverse_count, epsilon);
  }

  __device__ __forceinline__ Act operator()(int i) const {
    float value = to_float(in[i]) * inverse_rms;
    if (rounds_twice) value = to_float(from_float<Act>(value));
    return from_float<Act>(value * to_float(weight[i]));
  }
};

// Elements begin <= i < end in e4m3, by one group of lanes; returns their scale.
template <typename ValueAt, typename ScaleFor>
__device__ __forceinline__ float store_e4m3_tile(uint8_t* out, int begin, int end, int lane, const ValueAt& value_at,
                                                 const ScaleFor& scale_for) {
  float largest = 0.0f;
#pragma unroll 1
  for (int i = begin + lane; i < end; i += kLanes) largest = fmaxf(largest, fabsf(to_float(value_at(i))));
  const float scale = scale_for(max_over_lanes<kLanes>(largest));
#pragma unroll 1
  for (int i = begin + lane; i < end; i += kLanes) {
    out[i] = static_cast<uint8_t>(to_fp8_pair<Fp8::kE4M3>(to_float(value_at(i)) / scale, 0.0f));
  }
  return scale;
}

// One token, by one block. Loops that store stay rolled: the next loads must wait for them anyway, and unrolled they made
// every build longer.
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

  // Head num_heads is the key, if there is one.
  __device__ __forceinline__ void rotate_heads() const {
    const int half = p.rot_dim / 2;
    const int num_heads = p.num_heads + (p.k_pe != nullptr);
    const int64_t angle_row = position_of(p, token) * p.cos_sin_stride;
#pragma unroll 1
    for (int i = threadIdx.x; i < num_heads * half; i += blockDim.x) {
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

  // By one group of lanes: no shared memory, and the same order of addition at every launch.
  __device__ __forceinline__ void store_latent(int lane) const {
    const Act* kv_c = static_cast<const Act*>(p.kv_c) + token * p.kv_token_stride;
    if (p.kv_c_weight != nullptr) {
      const GeneralNorm<Act> norm(kv_c, p.kv_c_weight, p.lora_rank, p.inverse_lora_rank, p.epsilon, false, lane);
      Act* out = static_cast<Act*>(p.kv_c_out) + token * p.lora_rank;
#pragma unroll 1
      for (int i = lane; i < p.lora_rank; i += kLanes) out[i] = norm(i);
      // Below, each lane reads what it wrote itself.
      kv_c = out;
    }
    if (row < 0) return;
    if (is_ds_mla()) return store_ds_mla_tiles(static_cast<uint8_t*>(p.kv_cache) + row, kv_c, lane);
#pragma unroll 1
    for (int i = lane; i < p.lora_rank; i += kLanes) store_in_cache(i, kv_c[i]);
  }

  __device__ __forceinline__ void store_ds_mla_tiles(uint8_t* row, const Act* kv_c, int lane) const {
#pragma unroll 1
    for (int start = 0; start < kDsMlaLoraRank; start += kDsMlaTile) {
      const float scale = store_e4m3_tile(row, start, start + kDsMlaTile, lane, [&](int i) { return kv_c[i]; }, ds_mla_scale);
      if (lane == 0) memcpy(row + kDsMlaScales + start / kDsMlaTile * 4, &scale, sizeof(scale));
    }
  }

  __device__ __forceinline__ void normalise_query(int lane) const {
    const QueryNormParams& q = p.query_norm;
    const GeneralNorm<Act> norm(static_cast<const Act*>(q.in) + token * q.token_stride, q.weight, q.rank, q.inverse_rank,
                                q.epsilon, q.rounds_twice, lane);
    if (q.quant == QueryQuant::kNone) {
#pragma unroll 1
      for (int i = lane; i < q.rank; i += kLanes) static_cast<Act*>(q.out)[token * q.rank + i] = norm(i);
      return;
    }
    uint8_t* out = static_cast<uint8_t*>(q.out) + token * q.rank;
    if (q.quant == QueryQuant::kStatic) {
      const float factor = 1.0f / *q.static_scale;
#pragma unroll 1
      for (int i = lane; i < q.rank; i += kLanes) {
        out[i] = static_cast<uint8_t>(to_fp8_pair<Fp8::kE4M3>(to_float(norm(i)) * factor, 0.0f));
      }
      return;
    }
    const auto scale_for = [&](float largest) { return query_scale(largest, q.smallest, q.scales_are_powers_of_two); };
    const int tile = q.quant == QueryQuant::kGroup ? kQueryGroup : q.rank;
#pragma unroll 1
    for (int start = 0; start < q.rank; start += tile) {
      const float scale = store_e4m3_tile(out, start, start + tile, lane, norm, scale_for);
      if (lane == 0) q.scales[token * q.scale_token_stride + start / tile * q.scale_group_stride] = scale;
    }
  }
};

// Any rot_dim, rank, stride and alignment, one element at a time; a block is one token.
template <typename Act>
__global__ void __launch_bounds__(kMaxThreads) mla_rope_cache_general(const MLA_GRID_CONSTANT Params p) {
  wait_for_inputs();
  const int64_t token = blockIdx.x;
  const int64_t slot = slot_of(p, token);
  const int64_t row = slot < 0 ? -1 : cache_offset(p, slot);
  const bool has_no_scale = p.cache_kind == CacheKind::kCopy || p.cache_kind == CacheKind::kFp8DsMla;
  const GeneralToken<Act> self{p, token, row, has_no_scale ? 1.0f : *p.kv_cache_scale};
  const int group = threadIdx.x / kLanes;
  const int lane = threadIdx.x % kLanes;
  if (group == 0 && p.kv_c != nullptr) self.store_latent(lane);
  if (group == 1 && p.query_norm.in != nullptr) self.normalise_query(lane);
  self.rotate_heads();
}

}  // namespace mla_fusion
