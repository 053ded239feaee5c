// SPDX-License-Identifier: Apache-2.0
// What one group of lanes does for a token: its latent, its key, or some heads of its query.
#pragma once

#include "cache_row.cuh"
#include "norm.cuh"
#include "rotation.cuh"

namespace mla_fusion {

// Vectors of the latent that a lane holds: 512 elements of 16 bits, what MLA models have, are two.
constexpr int kLatentVectors = 2;

// The latent of one token: normalised if kNorm, and into the cache.
template <typename Act, Row kRow, bool kNorm>
struct Latent {
  static constexpr int kWidth = kActsPerVector<Act>;

  const Params& p;
  const int64_t token;
  const int lane;

  __device__ __forceinline__ const Act* source() const { return static_cast<const Act*>(p.kv_c) + token * p.kv_token_stride; }
  __device__ __forceinline__ const Act* weight() const { return static_cast<const Act*>(p.kv_c_weight); }
  __device__ __forceinline__ int vectors() const { return p.lora_rank / kWidth; }

  // The element with which this lane's vector i begins; lanes behind the last vector read the last one once more.
  __device__ __forceinline__ int index_to_read(int i) const { return (is_mine(i) ? lane + i * kLanes : vectors() - 1) * kWidth; }
  __device__ __forceinline__ bool is_mine(int i) const { return lane + i * kLanes < vectors(); }

  __device__ __forceinline__ void prefetch_inputs() const {
#pragma unroll
    for (int i = 0; i < kLatentVectors; ++i) {
      prefetch(source() + index_to_read(i));
      // The same for all tokens: once is enough, and more would queue for one line.
      if (kNorm && token == 0) prefetch(weight() + index_to_read(i));
    }
    if (lane == 0 && token < p.num_slots) prefetch(p.slot_mapping + token);
    if (kRow == Row::kFp8 && token == 0 && lane == 0) prefetch(p.kv_cache_scale);
  }

  __device__ __forceinline__ void run() const {
    const CacheRow<kRow> row(p, token);
    // Words, not elements: a compiler that sees elements may store them one by one.
    uint4 words[kLatentVectors];
    uint4 weights[kLatentVectors];
#pragma unroll
    for (int i = 0; i < kLatentVectors; ++i) {
      words[i] = load_as<uint4>(source() + index_to_read(i));
      if constexpr (kNorm) weights[i] = load_as<uint4>(weight() + index_to_read(i));
    }
    float inverse_rms = 0.0f;
    if constexpr (kNorm) inverse_rms = rsqrtf(sum_of_squares(words) * p.inverse_lora_rank + p.epsilon);
    const int64_t offset = row.offset(p);
    const Scale scale(row.scale);
#pragma unroll
    for (int i = 0; i < kLatentVectors; ++i) {
      if (!is_mine(i)) continue;
      const int index = index_to_read(i);
      auto value = elements(words[i]);
      if constexpr (kNorm) {
        value = normalise<Act>(value, elements(weights[i]), inverse_rms);
        store_as(static_cast<Act*>(p.kv_c_out) + token * p.lora_rank + index, value);
      }
      if (offset >= 0) store_latent<kRow>(p, offset, index, value, scale);
    }
  }

 private:
  static __device__ __forceinline__ ActVector<Act> elements(const uint4& words) {
    ActVector<Act> out;
    memcpy(&out, &words, sizeof(out));
    return out;
  }

  // Of the whole latent, the same for all lanes of the group.
  __device__ __forceinline__ float sum_of_squares(const uint4 (&words)[kLatentVectors]) const {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kLatentVectors; ++i) {
      if (!is_mine(i)) continue;
      const auto part = elements(words[i]);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) sum += to_float(part.at[j]) * to_float(part.at[j]);
    }
    return sum_over_lanes(sum);
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

// kHeads heads per lane, neighbouring lanes on neighbouring columns of a head; rotated in place.
template <typename Act, bool kNeox, int kHeads>
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
