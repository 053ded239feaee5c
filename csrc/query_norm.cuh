// SPDX-License-Identifier: Apache-2.0
// The role before q_b: RMSNorm of the query's latent, given on in the activation type or in e4m3 with scales, by the rules
// of vLLM's ops rms_norm_per_block_quant, rms_norm_dynamic_per_token_quant and rms_norm_static_fp8_quant.
#pragma once

#include "norm.cuh"
#include "quantisation.cuh"

namespace mla_fusion {

// Vectors of the row that a lane reads: 2048 elements of 16 bits at most; DeepSeek-V3's 1536 are six.
constexpr int kQueryVectors = 8;

// Some of one token's row: kShare of the vectors that each lane has. Every group adds the squares of the whole row, in one
// order: what is shared costs loads from nearby caches, no synchronisation, and gives the same bits at every kShare. The
// form with a scale of the whole row, and only that, takes a group that has all of it.
template <typename Act, int kShare>
struct QueryNorm {
  using Vectors = LaneVectors<Act, kQueryVectors>;
  static constexpr int kWidth = Vectors::kWidth;
  static constexpr int kLanesPerGroup = kQueryGroup / kWidth;
  static constexpr bool kHasRow = kShare == kQueryVectors;

  const QueryNormParams& p;
  const int64_t token;
  const int lane;
  const int task;

  __device__ __forceinline__ const Act* source() const { return static_cast<const Act*>(p.in) + token * p.token_stride; }
  __device__ __forceinline__ const Act* weight() const { return static_cast<const Act*>(p.weight); }
  __device__ __forceinline__ Vectors mine() const { return {p.rank / kWidth, lane}; }
  __device__ __forceinline__ int vector(int i) const { return task * kShare + i; }

  __device__ __forceinline__ void prefetch_inputs() const {
#pragma unroll
    for (int i = 0; i < kShare; ++i) {
      mine().prefetch(source(), vector(i));
      if (token == 0) mine().prefetch(weight(), vector(i));
    }
  }

  __device__ __forceinline__ void run() const {
    uint4 words[kQueryVectors];
    if constexpr (kHasRow) {
      mine().load_all(source(), words);
      return run_row(inverse_rms_of(mine().sum_of_squares(words), p.rank, p.inverse_rank, p.epsilon));
    }
    uint4 own[kShare];
    uint4 weights[kShare];
    mine().load_all(source(), words);
#pragma unroll
    for (int i = 0; i < kShare; ++i) {
      // An index known at compile time keeps the words in registers; another task's are read again.
      own[i] = mine().load(source(), vector(i));
      weights[i] = mine().load(weight(), vector(i));
    }
    const float static_scale = p.quant == QueryQuant::kStatic ? *p.static_scale : 1.0f;
    const float inverse_rms = inverse_rms_of(mine().sum_of_squares(words), p.rank, p.inverse_rank, p.epsilon);
    ActVector<Act> values[kShare];
#pragma unroll
    for (int i = 0; i < kShare; ++i) {
      values[i] = normalise<Act>(elements<Act>(own[i]), elements<Act>(weights[i]), inverse_rms, p.rounds_twice);
    }
#pragma unroll
    for (int i = 0; i < kShare; ++i) {
      if (mine().has(vector(i))) store(vector(i), values[i], static_scale);
    }
  }

 private:
  __device__ __forceinline__ float scale_for(float largest) const {
    return query_scale(largest, p.smallest, p.scales_are_powers_of_two);
  }

  // kToken. Each vector is normalised for the scale and once more for what is stored, in one loop that stays rolled:
  // unrolled over the whole row the code is 40 kB.
  __device__ __forceinline__ void run_row(float inverse_rms) const {
    float largest = 0.0f;
    float scale = 1.0f;
#pragma unroll 1
    for (int i = 0, is_second_time = 0; is_second_time < 2;) {
      const ActVector<Act> value = normalise<Act>(elements<Act>(mine().load(source(), i)),
                                                  elements<Act>(mine().load(weight(), i)), inverse_rms, p.rounds_twice);
      if (is_second_time) {
        store_e4m3(i, value, OwnScale(scale));
      } else {
        largest = fmaxf(largest, largest_of(value));
      }
      if (mine().has(++i)) continue;
      i = 0;
      ++is_second_time;
      scale = scale_for(max_over_lanes<kLanes>(largest));
    }
    if (lane == 0) p.scales[token * p.scale_token_stride] = scale;
  }

  // The other forms. All lanes of the group take part, those behind the row's end too.
  __device__ __forceinline__ void store(int vector, const ActVector<Act>& value, float static_scale) const {
    if (p.quant == QueryQuant::kNone) {
      if (mine().is_mine(vector)) store_as(static_cast<Act*>(p.out) + token * p.rank + mine().index(vector), value);
    } else if (p.quant == QueryQuant::kStatic) {
      store_e4m3(vector, value, Reciprocal{1.0f / static_scale});
    } else {
      const float scale = scale_for(max_over_lanes<kLanesPerGroup>(largest_of(value)));
      const int index = mine().index(vector);
      if (mine().is_mine(vector) && index % kQueryGroup == 0) {
        p.scales[token * p.scale_token_stride + index / kQueryGroup * p.scale_group_stride] = scale;
      }
      store_e4m3(vector, value, OwnScale(scale));
    }
  }

  template <typename Quotient>
  __device__ __forceinline__ void store_e4m3(int vector, const ActVector<Act>& value, const Quotient& quotient) const {
    uint8_t* out = static_cast<uint8_t*>(p.out) + token * p.rank + mine().index(vector);
    if (mine().is_mine(vector)) store_as(out, quantise(value, quotient, CacheKind::kFp8E4M3));
  }
};

}  // namespace mla_fusion
