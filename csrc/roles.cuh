// SPDX-License-Identifier: Apache-2.0
// What one group of lanes does for a token: its latent, its key, or some heads of its query. The norm of the query is in
// query_norm.cuh.
#pragma once

#include "cache_row.cuh"
#include "norm.cuh"
#include "rotation.cuh"

namespace mla_fusion {

// Vectors of the latent that a lane holds: 512 elements of 16 bits, what MLA models have, are two.
constexpr int kLatentVectors = 2;

// The latent of one token: normalised if kNorm (and, in an open instance, if it has a weight), and into the cache.
template <typename Act, Row kRow, bool kNorm>
struct Latent {
  using Vectors = LaneVectors<Act, kLatentVectors>;

  const Params& p;
  const int64_t token;
  const int lane;

  __device__ __forceinline__ const Act* source() const { return static_cast<const Act*>(p.kv_c) + token * p.kv_token_stride; }
  __device__ __forceinline__ const Act* weight() const { return static_cast<const Act*>(p.kv_c_weight); }
  __device__ __forceinline__ Vectors mine() const { return {p.lora_rank / Vectors::kWidth, lane}; }

  __device__ __forceinline__ void prefetch_inputs() const {
#pragma unroll
    for (int i = 0; i < kLatentVectors; ++i) {
      mine().prefetch(source(), i);
      // The same for all tokens: once is enough, and more would queue for one line.
      if (kNorm && (!kIsOpen<kRow> || p.kv_c_weight != nullptr) && token == 0) mine().prefetch(weight(), i);
    }
    if (lane == 0 && token < p.num_slots) prefetch(p.slot_mapping + token);
    const bool is_scaled = kRow == Row::kFp8 || (kIsOpen<kRow> && has_scale(p.cache_kind));
    if (is_scaled && token == 0 && lane == 0) prefetch(p.kv_cache_scale);
  }

  __device__ __forceinline__ void run() const {
    const bool has_norm = kNorm && (!kIsOpen<kRow> || p.kv_c_weight != nullptr);
    const CacheRow<kRow> row(p, token);
    uint4 words[kLatentVectors];
    uint4 weights[kLatentVectors];
    mine().load_all(source(), words);
    float inverse_rms = 0.0f;
    if (has_norm) {
      mine().load_all(weight(), weights);
      inverse_rms = inverse_rms_of(mine().sum_of_squares(words), p.lora_rank, p.inverse_lora_rank, p.epsilon);
    }
    const int64_t offset = row.offset(p);
    const Scale scale(row.scale);
#pragma unroll
    for (int i = 0; i < kLatentVectors; ++i) {
      if (!mine().is_mine(i)) continue;
      const int index = mine().index(i);
      auto value = elements<Act>(words[i]);
      if (has_norm) {
        value = normalise<Act>(value, elements<Act>(weights[i]), inverse_rms);
        store_as(static_cast<Act*>(p.kv_c_out) + token * p.lora_rank + index, value);
      }
      if (offset >= 0) store_latent<kRow, Act>(p, offset, index, value, scale);
    }
  }
};

// The key of one token: rotated into k_pe_out and into the cache.
template <typename Act, bool kNeox, Row kRow>
struct Key {
  using Part = HeadPart<Act, kNeox>;

  const Params& p;
  const int64_t token;
  const int lane;

  __device__ __forceinline__ const Act* source() const { return static_cast<const Act*>(p.k_pe) + token * p.k_token_stride; }
  // Lanes behind the last column read what the first ones read.
  __device__ __forceinline__ int column() const { return lane & ((1 << p.column_shift) - 1); }

  __device__ __forceinline__ void prefetch_inputs() const {
    Part::prefetch(source(), column(), p.rot_dim);
    if (lane == 0) prefetch(position_address(p, token));
  }

  __device__ __forceinline__ void run() const {
    const int64_t position = position_of(p, token);
    Part key;
    key.load(source(), column(), p.rot_dim);
    const CacheRow<kRow> row(p, token);
    CosSin<Act, Part::kPairs> angle;
    angle.load(p, position, column() * Part::kPairs);
    const int64_t offset = row.offset(p);
    const Scale scale(row.scale);
    key.rotate(angle);
    if (lane >> p.column_shift) return;
    key.store(static_cast<Act*>(p.k_pe_out) + token * p.rot_dim, lane, p.rot_dim);
    if (offset < 0) return;
#pragma unroll
    for (int i = 0; i < Part::kVectors; ++i) {
      store_key<kRow>(p, offset, lane * Part::kWidth + i * (p.rot_dim / 2), key.part[i], scale);
    }
  }
};

// kHeads heads per lane, neighbouring lanes on neighbouring columns of a head; rotated in place. kIsAlone: no key brings the
// position to L2.
template <typename Act, bool kNeox, int kHeads, bool kIsAlone>
struct QueryHeads {
  using Part = HeadPart<Act, kNeox>;

  const Params& p;
  const int64_t token;
  const int lane;
  const int task;

  __device__ __forceinline__ int column() const { return lane & ((1 << p.column_shift) - 1); }
  __device__ __forceinline__ int head(int i) const {
    const int heads_at_once = kLanes >> p.column_shift;
    return (task * kHeads + i) * heads_at_once + (lane >> p.column_shift);
  }
  __device__ __forceinline__ Act* head_start(int i) const {
    return static_cast<Act*>(p.q_pe) + token * p.q_token_stride + head(i) * p.q_head_stride;
  }

  __device__ __forceinline__ void prefetch_inputs() const {
#pragma unroll
    for (int i = 0; i < kHeads; ++i) {
      if (head(i) < p.num_heads) Part::prefetch(head_start(i), column(), p.rot_dim);
    }
    if (kIsAlone && task == 0 && lane == 0) prefetch(position_address(p, token));
  }

  __device__ __forceinline__ void run() const {
    const int64_t position = position_of(p, token);
    Part part[kHeads];
#pragma unroll
    for (int i = 0; i < kHeads; ++i) {
      if (head(i) < p.num_heads) part[i].load(head_start(i), column(), p.rot_dim);
    }
    CosSin<Act, Part::kPairs> angle;
    angle.load(p, position, column() * Part::kPairs);
#pragma unroll
    for (int i = 0; i < kHeads; ++i) {
      if (head(i) >= p.num_heads) continue;
      part[i].rotate(angle);
      part[i].store(head_start(i), column(), p.rot_dim);
    }
  }
};

}  // namespace mla_fusion
