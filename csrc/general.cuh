// SPDX-License-Identifier: Apache-2.0
// The kernel for what the vectors do not fit: any size, stride and alignment, one element at a time. One instance serves all
// activation types: here their elements are floats, rounded to the type.
#pragma once

#include "cache_row.cuh"
#include "norm.cuh"
#include "rotation.cuh"

namespace mla_fusion {

// Elements of the activation type.
struct Acts {
  ActType type;

  __device__ __forceinline__ float load(const void* from, int64_t index) const {
    if (type == ActType::kFloat32) return static_cast<const float*>(from)[index];
    const uint16_t bits = static_cast<const uint16_t*>(from)[index];
    return type == ActType::kFloat16 ? to_float(Float16{bits}) : to_float(BFloat16{bits});
  }

  // Of a type of 16 bits.
  __device__ __forceinline__ uint16_t bits(float value) const {
    return type == ActType::kFloat16 ? from_float<Float16>(value).bits : from_float<BFloat16>(value).bits;
  }

  __device__ __forceinline__ float round(float value) const {
    if (type == ActType::kFloat32) return value;
    return type == ActType::kFloat16 ? to_float(from_float<Float16>(value)) : to_float(from_float<BFloat16>(value));
  }

  __device__ __forceinline__ void store(void* to, int64_t index, float value) const {
    if (type == ActType::kFloat32) {
      static_cast<float*>(to)[index] = value;
    } else {
      static_cast<uint16_t*>(to)[index] = bits(value);
    }
  }

  // Bit for bit, NaN too.
  __device__ __forceinline__ void copy(const void* from, int64_t index, void* to, int64_t to_index) const {
    if (type == ActType::kFloat32) {
      static_cast<uint32_t*>(to)[to_index] = static_cast<const uint32_t*>(from)[index];
    } else {
      static_cast<uint16_t*>(to)[to_index] = static_cast<const uint16_t*>(from)[index];
    }
  }
};

// The norm of a row, by one group of lanes.
struct GeneralNorm {
  const Acts acts;
  const void* in;
  const int64_t start;
  const void* weight;
  const bool rounds_twice;
  float inverse_rms;

  __device__ __forceinline__ GeneralNorm(const Acts& acts, const void* in, int64_t start, const void* weight, int count,
                                         float inverse_count, float epsilon, bool rounds_twice, int lane)
      : acts(acts), in(in), start(start), weight(weight), rounds_twice(rounds_twice) {
    float sum = 0.0f;
#pragma unroll 1
    for (int i = lane; i < count; i += kLanes) {
      const float value = acts.load(in, start + i);
      sum += value * value;
    }
    inverse_rms = inverse_rms_of(sum_over_lanes(sum), count, inverse_count, epsilon);
  }

  __device__ __forceinline__ float operator()(int i) const {
    float value = acts.load(in, start + i) * inverse_rms;
    if (rounds_twice) value = acts.round(value);
    return acts.round(value * acts.load(weight, i));
  }
};

__device__ __forceinline__ uint8_t to_e4m3(float value) {
  return static_cast<uint8_t>(to_fp8_pair<Fp8::kE4M3>(value, 0.0f));
}

// Of the magnitudes of elements begin <= i < end, by one group of lanes.
template <typename ValueAt>
__device__ __forceinline__ float largest_of_tile(int begin, int end, int lane, const ValueAt& value_at) {
  float largest = 0.0f;
#pragma unroll 1
  for (int i = begin + lane; i < end; i += kLanes) largest = fmaxf(largest, fabsf(value_at(i)));
  return max_over_lanes<kLanes>(largest);
}

// One token, by one block. Loops stay rolled: unrolled they made every build longer and larger.
struct GeneralToken {
  const Params& p;
  const Acts acts;
  const int64_t token;
  const int64_t row;  // negative: not cached
  const float scale;

  __device__ __forceinline__ uint8_t* row_bytes() const { return static_cast<uint8_t*>(p.kv_cache) + row; }

  __device__ __forceinline__ void store_fp8(int index, float value) const {
    row_bytes()[index] = static_cast<uint8_t>(to_fp8_pair(p.cache_kind, value / scale, 0.0f));
  }

  __device__ __forceinline__ void store_key_in_cache(int index, float value) const {
    if (row < 0) return;
    if (p.cache_kind == CacheKind::kCopy) {
      acts.store(p.kv_cache, row + p.lora_rank + index, value);
    } else if (p.cache_kind == CacheKind::kFp8DsMla) {
      // A row may begin at any byte.
      const uint16_t bits = acts.bits(value);
      memcpy(row_bytes() + kDsMlaKey + index * sizeof(bits), &bits, sizeof(bits));
    } else {
      store_fp8(p.lora_rank + index, value);
    }
  }

  // Head num_heads is the key, if there is one.
  __device__ __forceinline__ void rotate_heads() const {
    const int half = p.rot_dim / 2;
    const int num_heads = p.num_heads + (p.k_pe != nullptr);
    const int64_t angle_row = position_of(p, token) * p.cos_sin_stride;
    const Acts angles{p.cos_sin_is_float ? ActType::kFloat32 : acts.type};
#pragma unroll 1
    for (int i = threadIdx.x; i < num_heads * half; i += blockDim.x) {
      const int head = i / half;
      const int pair = i - head * half;
      const int first = p.is_neox ? pair : 2 * pair;
      const int second = p.is_neox ? pair + half : 2 * pair + 1;
      const bool is_key = head == p.num_heads;
      const int64_t in_start = is_key ? token * p.k_token_stride : token * p.q_token_stride + head * p.q_head_stride;
      const int64_t out_start = is_key ? token * p.rot_dim : in_start;
      const void* in = is_key ? p.k_pe : p.q_pe;
      void* out = is_key ? p.k_pe_out : p.q_pe;
      const float a = acts.load(in, in_start + first);
      const float b = acts.load(in, in_start + second);
      const float cos = angles.load(p.cos_sin_cache, angle_row + pair);
      const float sin = angles.load(p.cos_sin_cache, angle_row + half + pair);
      const float rotated_first = acts.round(a * cos - b * sin);
      const float rotated_second = acts.round(b * cos + a * sin);
      acts.store(out, out_start + first, rotated_first);
      acts.store(out, out_start + second, rotated_second);
      if (is_key) {
        store_key_in_cache(first, rotated_first);
        store_key_in_cache(second, rotated_second);
      }
    }
  }

  // By one group of lanes: no shared memory, and the same order of addition at every launch.
  __device__ __forceinline__ void store_latent(int lane) const {
    const void* latent = p.kv_c;
    int64_t start = token * p.kv_token_stride;
    if (p.kv_c_weight != nullptr) {
      const GeneralNorm norm(acts, latent, start, p.kv_c_weight, p.lora_rank, p.inverse_lora_rank, p.epsilon, false, lane);
      // Below, each lane reads what it wrote itself.
      latent = p.kv_c_out;
      start = token * p.lora_rank;
#pragma unroll 1
      for (int i = lane; i < p.lora_rank; i += kLanes) acts.store(p.kv_c_out, start + i, norm(i));
    }
    if (row < 0) return;
    if (p.cache_kind == CacheKind::kFp8DsMla) return store_ds_mla_tiles(latent, start, lane);
#pragma unroll 1
    for (int i = lane; i < p.lora_rank; i += kLanes) {
      if (p.cache_kind == CacheKind::kCopy) {
        acts.copy(latent, start + i, p.kv_cache, row + i);
      } else {
        store_fp8(i, acts.load(latent, start + i));
      }
    }
  }

  __device__ __forceinline__ void store_ds_mla_tiles(const void* latent, int64_t start, int lane) const {
    const auto value_at = [&](int i) { return acts.load(latent, start + i); };
#pragma unroll 1
    for (int tile = 0; tile < kDsMlaLoraRank; tile += kDsMlaTile) {
      const float tile_scale = ds_mla_scale(largest_of_tile(tile, tile + kDsMlaTile, lane, value_at));
      if (lane == 0) memcpy(row_bytes() + kDsMlaScales + tile / kDsMlaTile * 4, &tile_scale, sizeof(tile_scale));
#pragma unroll 1
      for (int i = tile + lane; i < tile + kDsMlaTile; i += kLanes) row_bytes()[i] = to_e4m3(value_at(i) / tile_scale);
    }
  }

  __device__ __forceinline__ void normalise_query(int lane) const {
    const QueryNormParams& q = p.query_norm;
    const GeneralNorm norm(acts, q.in, token * q.token_stride, q.weight, q.rank, q.inverse_rank, q.epsilon, q.rounds_twice,
                           lane);
    const bool is_plain = q.quant == QueryQuant::kNone;
    const bool is_static = q.quant == QueryQuant::kStatic;
    const float factor = is_static ? 1.0f / *q.static_scale : 1.0f;
    const int tile = q.quant == QueryQuant::kGroup ? kQueryGroup : q.rank;
#pragma unroll 1
    for (int start = 0; start < q.rank; start += tile) {
      float tile_scale = 1.0f;
      if (!is_plain && !is_static) {
        tile_scale = query_scale(largest_of_tile(start, start + tile, lane, norm), q.smallest, q.scales_are_powers_of_two);
        if (lane == 0) q.scales[token * q.scale_token_stride + start / tile * q.scale_group_stride] = tile_scale;
      }
#pragma unroll 1
      for (int i = start + lane; i < start + tile; i += kLanes) {
        const float value = norm(i);
        if (is_plain) {
          acts.store(q.out, token * q.rank + i, value);
        } else {
          static_cast<uint8_t*>(q.out)[token * q.rank + i] = to_e4m3(is_static ? value * factor : value / tile_scale);
        }
      }
    }
  }
};

// Any rot_dim, rank, stride and alignment; a block is one token.
__global__ void MLA_LAUNCH_BOUNDS(kMinBlocks) mla_rope_cache_general(const MLA_GRID_CONSTANT Params p) {
  wait_for_inputs();
  const int64_t token = blockIdx.x;
  const int64_t slot = slot_of(p, token);
  const int64_t row = slot < 0 ? -1 : cache_offset(p, slot);
  const GeneralToken self{p, Acts{p.act_type}, token, row, has_scale(p.cache_kind) ? *p.kv_cache_scale : 1.0f};
  const int group = threadIdx.x / kLanes;
  const int lane = threadIdx.x % kLanes;
  if (group == 0 && p.kv_c != nullptr) self.store_latent(lane);
  if (group == 1 && p.query_norm.in != nullptr) self.normalise_query(lane);
  self.rotate_heads();
}

}  // namespace mla_fusion
