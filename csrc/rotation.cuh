// SPDX-License-Identifier: Apache-2.0
// RoPE: the angles of a token and the pairs of a head that a lane turns.
#pragma once

#include "vector.cuh"

namespace mla_fusion {

__device__ __forceinline__ const void* position_address(const Params& p, int64_t token) {
  return static_cast<const char*>(p.positions) + token * (p.positions_are_int32 ? sizeof(int32_t) : sizeof(int64_t));
}

__device__ __forceinline__ int64_t position_of(const Params& p, int64_t token) {
  const void* address = position_address(p, token);
  return p.positions_are_int32 ? *static_cast<const int32_t*>(address) : *static_cast<const int64_t*>(address);
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

// The 16 bytes that one lane holds of a head: neighbouring pairs (GPT-J), or 8 bytes of each half (GPT-NeoX).
template <typename Act, bool kNeox>
struct HeadPart {
  static constexpr int kVectors = kNeox ? 2 : 1;
  static constexpr int kWidth = kActsPerVector<Act> / kVectors;
  static constexpr int kPairs = kActsPerVector<Act> / 2;

  Vector<Act, kWidth> part[kVectors];

  static __device__ __forceinline__ void prefetch(const Act* head, int column, int rot_dim) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) mla_fusion::prefetch(head + column * kWidth + i * (rot_dim / 2));
  }

  __device__ __forceinline__ void load(const Act* head, int column, int rot_dim) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) part[i] = load_as<Vector<Act, kWidth>>(head + column * kWidth + i * (rot_dim / 2));
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
      round_pair(a * angle.cos[i] - b * angle.sin[i], b * angle.cos[i] + a * angle.sin[i], first, second);
    }
  }
};

}  // namespace mla_fusion
