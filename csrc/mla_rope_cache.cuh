// SPDX-License-Identifier: Apache-2.0
// Device code: RoPE on q_pe (in place) and k_pe (to k_pe_out), and the cache row [kv_c | rotated k_pe]. One source for
// CUDA and HIP: lanes are counted in groups of 32 whatever the hardware's wave size, and no warp-wide instruction is used.
#pragma once

#include "mla_rope_cache.h"
#include "numeric.h"

namespace mla_fusion {

constexpr int kLanes = 32;
constexpr int kMaxThreads = 256;
constexpr int kVectorBytes = 16;

// NVIDIA GPUs never see the fnuz formats, and their kernels do without the code.
#ifdef __NVCC__
constexpr bool kHasFnuz = false;
#else
constexpr bool kHasFnuz = true;
#endif

template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Vector {
  T at[kCount];
};

template <typename Act>
constexpr int kActsPerVector = kVectorBytes / sizeof(Act);

template <typename Act>
using ActVector = Vector<Act, kActsPerVector<Act>>;

// A 16-byte access whatever the element type.
template <typename T>
__device__ __forceinline__ T load_as(const void* address) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  T out;
  if constexpr (sizeof(T) == 16) {
    const uint4 raw = *static_cast<const uint4*>(address);
    memcpy(&out, &raw, 16);
  } else if constexpr (sizeof(T) == 8) {
    const uint2 raw = *static_cast<const uint2*>(address);
    memcpy(&out, &raw, 8);
  } else {
    const uint32_t raw = *static_cast<const uint32_t*>(address);
    memcpy(&out, &raw, 4);
  }
  return out;
}

template <typename T>
__device__ __forceinline__ void store_as(void* address, const T& value) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  if constexpr (sizeof(T) == 16) {
    uint4 raw;
    memcpy(&raw, &value, 16);
    *static_cast<uint4*>(address) = raw;
  } else if constexpr (sizeof(T) == 8) {
    uint2 raw;
    memcpy(&raw, &value, 8);
    *static_cast<uint2*>(address) = raw;
  } else {
    uint32_t raw;
    memcpy(&raw, &value, 4);
    *static_cast<uint32_t*>(address) = raw;
  }
}

__device__ __forceinline__ int64_t position_of(const Params& p, int64_t token) {
  return p.positions_are_int32 ? static_cast<const int32_t*>(p.positions)[token]
                               : static_cast<const int64_t*>(p.positions)[token];
}

__device__ __forceinline__ int64_t slot_of(const Params& p, int64_t token) {
  return token < p.num_slots ? p.slot_mapping[token] : -1;
}

__device__ __forceinline__ int64_t cache_offset(const Params& p, int64_t slot) {
  // 64-bit division is slow; slots beyond 2^31 are legal but rare.
  if (slot <= INT32_MAX && p.block_size <= INT32_MAX) {
    const uint32_t block = static_cast<uint32_t>(slot) / static_cast<uint32_t>(p.block_size);
    const uint32_t row = static_cast<uint32_t>(slot) - block * static_cast<uint32_t>(p.block_size);
    return block * p.cache_block_stride + row * p.cache_row_stride;
  }
  return slot / p.block_size * p.cache_block_stride + slot % p.block_size * p.cache_row_stride;
}

// kCount values of cos and of sin, from pair first_pair on, in float.
template <typename Act, int kCount>
struct CosSin {
  float cos[kCount];
  float sin[kCount];

  __device__ __forceinline__ void load(const Params& p, int64_t position, int first_pair) {
    const int64_t row = position * p.cos_sin_stride;
    if (p.cos_sin_is_float) {
      const float* cos_row = static_cast<const float*>(p.cos_sin_cache) + row + first_pair;
      read(cos_row, cos);
      read(cos_row + p.rot_dim / 2, sin);
    } else {
      const Act* cos_row = static_cast<const Act*>(p.cos_sin_cache) + row + first_pair;
      read(cos_row, cos);
      read(cos_row + p.rot_dim / 2, sin);
    }
  }

 private:
  template <typename T>
  static __device__ __forceinline__ void read(const T* source, float* out) {
    constexpr int kPerLoad = kCount * sizeof(T) > kVectorBytes ? kVectorBytes / sizeof(T) : kCount;
#pragma unroll
    for (int i = 0; i < kCount; i += kPerLoad) {
      const auto part = load_as<Vector<T, kPerLoad>>(source + i);
#pragma unroll
      for (int j = 0; j < kPerLoad; ++j) out[i + j] = to_float(part.at[j]);
    }
  }
};

// What one lane holds of a head: a vector of neighbouring pairs (GPT-J), or the same vector of both halves (GPT-NeoX).
template <typename Act, bool kNeox>
struct HeadPart {
  static constexpr int kWidth = kActsPerVector<Act>;
  static constexpr int kVectors = kNeox ? 2 : 1;
  static constexpr int kPairs = kNeox ? kWidth : kWidth / 2;

  ActVector<Act> part[kVectors];

  __device__ __forceinline__ void load(const Act* head, int column, int rot_dim) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) part[i] = load_as<ActVector<Act>>(head + column * kWidth + i * (rot_dim / 2));
  }

  __device__ __forceinline__ void store(Act* head, int column, int rot_dim) const {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) store_as(head + column * kWidth + i * (rot_dim / 2), part[i]);
  }

  __device__ __forceinline__ void rotate(const CosSin<Act, kPairs>& angle) {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      Act& first = kNeox ? part[0].at[i] : part[0].at[2 * i];
      Act& second = kNeox ? part[kVectors - 1].at[i] : part[0].at[2 * i + 1];
      const float a = to_float(first);
      const float b = to_float(second);
      first = from_float<Act>(a * angle.cos[i] - b * angle.sin[i]);
      second = from_float<Act>(b * angle.cos[i] + a * angle.sin[i]);
    }
  }
};

template <Fp8 kFormat, typename Act>
__device__ __forceinline__ Vector<uint8_t, kActsPerVector<Act>> quantise(const ActVector<Act>& in, float scale) {
  Vector<uint8_t, kActsPerVector<Act>> out;
#pragma unroll
  for (int i = 0; i < kActsPerVector<Act>; i += 2) {
    const uint16_t pair = to_fp8_pair<kFormat>(to_float(in.at[i]) / scale, to_float(in.at[i + 1]) / scale);
    memcpy(&out.at[i], &pair, sizeof(pair));
  }
  return out;
}

// One vector into the cache row that starts at row, at element index.
template <typename Act>
__device__ __forceinline__ void store_cache(const Params& p, int64_t row, int index, const ActVector<Act>& value, float scale) {
  uint8_t* bytes = static_cast<uint8_t*>(p.kv_cache) + row + index;
  switch (p.cache_kind) {
    case CacheKind::kCopy:
      return store_as(static_cast<Act*>(p.kv_cache) + row + index, value);
    case CacheKind::kFp8E4M3:
      return store_as(bytes, quantise<Fp8::kE4M3, Act>(value, scale));
    case CacheKind::kFp8E5M2:
      return store_as(bytes, quantise<Fp8::kE5M2, Act>(value, scale));
    case CacheKind::kFp8E4M3Fnuz:
      if constexpr (kHasFnuz) store_as(bytes, quantise<Fp8::kE4M3Fnuz, Act>(value, scale));
      return;
    case CacheKind::kFp8E5M2Fnuz:
      if constexpr (kHasFnuz) store_as(bytes, quantise<Fp8::kE5M2Fnuz, Act>(value, scale));
      return;
  }
}

// One element into the cache, at the given offset from its start.
template <typename Act>
__device__ __forceinline__ void store_cache_element(const Params& p, int64_t offset, Act value, float scale) {
  uint8_t* byte = static_cast<uint8_t*>(p.kv_cache) + offset;
  switch (p.cache_kind) {
    case CacheKind::kCopy:
      static_cast<Act*>(p.kv_cache)[offset] = value;
      return;
    case CacheKind::kFp8E4M3:
      *byte = to_fp8<Fp8::kE4M3>(to_float(value) / scale);
      return;
    case CacheKind::kFp8E5M2:
      *byte = to_fp8<Fp8::kE5M2>(to_float(value) / scale);
      return;
    case CacheKind::kFp8E4M3Fnuz:
      if constexpr (kHasFnuz) *byte = to_fp8<Fp8::kE4M3Fnuz>(to_float(value) / scale);
      return;
    case CacheKind::kFp8E5M2Fnuz:
      if constexpr (kHasFnuz) *byte = to_fp8<Fp8::kE5M2Fnuz>(to_float(value) / scale);
      return;
  }
}

// The latent and the key of one token, by one group of lanes.
template <typename Act, bool kNeox>
__device__ __forceinline__ void run_latent_and_key(const Params& p, int64_t token, int lane) {
  constexpr int kWidth = kActsPerVector<Act>;
  constexpr int kBatch = 2;
  using Part = HeadPart<Act, kNeox>;

  const int64_t slot = slot_of(p, token);
  const int64_t position = position_of(p, token);
  const float scale = p.cache_kind == CacheKind::kCopy ? 1.0f : *p.kv_cache_scale;
  const Act* kv_c = static_cast<const Act*>(p.kv_c) + token * p.kv_token_stride;
  const int vectors = p.lora_rank / kWidth;

  ActVector<Act> latent[kBatch];
#pragma unroll
  for (int i = 0; i < kBatch; ++i) {
    const int index = lane + i * kLanes;
    if (index < vectors) latent[i] = load_as<ActVector<Act>>(kv_c + index * kWidth);
  }

  const int columns = p.rot_dim / (kWidth * Part::kVectors);
  const bool has_key = lane < columns;
  Part key;
  if (has_key) {
    CosSin<Act, Part::kPairs> angle;
    key.load(static_cast<const Act*>(p.k_pe) + token * p.k_token_stride, lane, p.rot_dim);
    angle.load(p, position, lane * Part::kPairs);
    key.rotate(angle);
    key.store(static_cast<Act*>(p.k_pe_out) + token * p.rot_dim, lane, p.rot_dim);
  }

  if (slot < 0) return;
  const int64_t row = cache_offset(p, slot);
  if (has_key) {
#pragma unroll
    for (int i = 0; i < Part::kVectors; ++i) {
      store_cache<Act>(p, row, p.lora_rank + lane * kWidth + i * (p.rot_dim / 2), key.part[i], scale);
    }
  }
  for (int first = lane; first < vectors; first += kBatch * kLanes) {
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int index = first + i * kLanes;
      if (index >= vectors) continue;
      if (first != lane) latent[i] = load_as<ActVector<Act>>(kv_c + index * kWidth);
      store_cache<Act>(p, row, index * kWidth, latent[i], scale);
    }
  }
}

// kHeads heads per lane, neighbouring lanes on neighbouring columns of a head.
template <typename Act, bool kNeox, int kHeads>
__device__ __forceinline__ void run_query_heads(const Params& p, int64_t token, int lane, int task) {
  using Part = HeadPart<Act, kNeox>;
  const int columns = p.rot_dim / (Part::kWidth * Part::kVectors);
  const int heads_at_once = kLanes / columns;
  const int column = lane & (columns - 1);
  const int first_head = task * heads_at_once * kHeads + lane / columns;
  Act* q = static_cast<Act*>(p.q_pe) + token * p.q_token_stride;

  const int64_t position = position_of(p, token);
  Part part[kHeads];
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    const int head = first_head + i * heads_at_once;
    if (head < p.num_heads) part[i].load(q + head * p.q_head_stride, column, p.rot_dim);
  }
  CosSin<Act, Part::kPairs> angle;
  angle.load(p, position, column * Part::kPairs);
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    const int head = first_head + i * heads_at_once;
    if (head >= p.num_heads) continue;
    part[i].rotate(angle);
    part[i].store(q + head * p.q_head_stride, column, p.rot_dim);
  }
}

// A block is (32 lanes, tasks of a token, tokens). Task 0 is the latent and the key, the others are heads of the query.
template <typename Act, bool kNeox, int kHeads>
__global__ void __launch_bounds__(kMaxThreads) mla_rope_cache_vector(const Params p) {
  const int64_t token = static_cast<int64_t>(blockIdx.x) * blockDim.z + threadIdx.z;
  if (token >= p.num_tokens) return;
  const int task = blockIdx.y * blockDim.y + threadIdx.y;
  if (task == 0) {
    run_latent_and_key<Act, kNeox>(p, token, threadIdx.x);
  } else {
    run_query_heads<Act, kNeox, kHeads>(p, token, threadIdx.x, task - 1);
  }
}

// Any rot_dim, lora_rank, stride and alignment, one element at a time; a block is one token.
template <typename Act>
__global__ void __launch_bounds__(kMaxThreads) mla_rope_cache_general(const Params p) {
  const int64_t token = blockIdx.x;
  const int half = p.rot_dim / 2;
  const int64_t slot = slot_of(p, token);
  const int64_t row = slot < 0 ? -1 : cache_offset(p, slot);
  const float scale = p.cache_kind == CacheKind::kCopy ? 1.0f : *p.kv_cache_scale;
  const int64_t angle_row = position_of(p, token) * p.cos_sin_stride;

  const auto angle_at = [&](int index) {
    return p.cos_sin_is_float ? static_cast<const float*>(p.cos_sin_cache)[angle_row + index]
                              : to_float(static_cast<const Act*>(p.cos_sin_cache)[angle_row + index]);
  };
  const auto cache_at = [&](int index, Act value) {
    if (row >= 0) store_cache_element(p, row + index, value, scale);
  };

  // Head num_heads is the key.
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
    const float cos = angle_at(pair);
    const float sin = angle_at(half + pair);
    const Act rotated_first = from_float<Act>(a * cos - b * sin);
    const Act rotated_second = from_float<Act>(b * cos + a * sin);
    out[first] = rotated_first;
    out[second] = rotated_second;
    if (is_key) {
      cache_at(p.lora_rank + first, rotated_first);
      cache_at(p.lora_rank + second, rotated_second);
    }
  }
  const Act* kv_c = static_cast<const Act*>(p.kv_c) + token * p.kv_token_stride;
  for (int i = threadIdx.x; i < p.lora_rank; i += blockDim.x) cache_at(i, kv_c[i]);
}

}  // namespace mla_fusion
