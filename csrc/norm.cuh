// SPDX-License-Identifier: Apache-2.0
// RMSNorm of a row by one group of lanes.
#pragma once

#include "vector.cuh"

namespace mla_fusion {

// Of a row of `size` vectors, the kCount or fewer that a lane has: every 32nd.
template <typename Act, int kCount>
struct LaneVectors {
  static constexpr int kWidth = kActsPerVector<Act>;

  const int size;
  const int lane;

  // Whether any lane has a vector i.
  __device__ __forceinline__ bool has(int i) const { return i * kLanes < size; }
  __device__ __forceinline__ bool is_mine(int i) const { return lane + i * kLanes < size; }

  // The element with which this lane's vector i begins.
  __device__ __forceinline__ int index(int i) const { return (lane + i * kLanes) * kWidth; }

  // Behind the row's end, its start once more: cheaper than a branch.
  __device__ __forceinline__ void prefetch(const Act* row, int i) const {
    mla_fusion::prefetch(row + (is_mine(i) ? index(i) : 0));
  }

  // Zeros behind the row's end. Words, not elements: a compiler that sees elements may store them one by one.
  __device__ __forceinline__ uint4 load(const Act* row, int i) const {
    return is_mine(i) ? load_as<uint4>(row + index(i)) : uint4{};
  }

  __device__ __forceinline__ void load_all(const Act* row, uint4 (&words)[kCount]) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) words[i] = load(row, i);
  }

  // Of the whole row, the same for all lanes of the group.
  __device__ __forceinline__ float sum_of_squares(const uint4 (&words)[kCount]) const {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const auto part = elements<Act>(words[i]);
      float of_vector = 0.0f;
#pragma unroll
      for (int j = 0; j < kWidth; ++j) of_vector += to_float(part.at[j]) * to_float(part.at[j]);
      sum += of_vector;
    }
    return sum_over_lanes(sum);
  }
};

// sum / count, rounded as the division is: the product with the reciprocal is corrected by its exact remainder.
__device__ __forceinline__ float mean_of(float sum, int count, float inverse_count) {
  const float estimate = sum * inverse_count;
  const float corrected = fmaf(fmaf(-estimate, static_cast<float>(count), sum), inverse_count, estimate);
  // An infinity has no remainder.
  return estimate < 3e38f ? corrected : estimate;
}

__device__ __forceinline__ float inverse_rms_of(float sum_of_squares, int count, float inverse_count, float epsilon) {
  return rsqrtf(mean_of(sum_of_squares, count, inverse_count) + epsilon);
}

// As vLLM's compiled graphs round it: normalise and weigh in float, round once. Its ops round twice: to the activation
// type before the weight too.
template <typename Act>
__device__ __forceinline__ ActVector<Act> normalise(ActVector<Act> value, const ActVector<Act>& weight, float inverse_rms,
                                                    bool rounds_twice = false) {
#pragma unroll
  for (int i = 0; i < kActsPerVector<Act>; i += 2) {
    float first = to_float(value.at[i]) * inverse_rms;
    float second = to_float(value.at[i + 1]) * inverse_rms;
    if (rounds_twice) {
      round_pair(first, second, value.at[i], value.at[i + 1]);
      first = to_float(value.at[i]);
      second = to_float(value.at[i + 1]);
    }
    round_pair(first * to_float(weight.at[i]), second * to_float(weight.at[i + 1]), value.at[i], value.at[i + 1]);
  }
  return value;
}

}  // namespace mla_fusion
