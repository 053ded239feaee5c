// SPDX-License-Identifier: Apache-2.0
// Device code: RoPE on q_pe (in place) and k_pe (to k_pe_out), and the cache row [kv_c | rotated k_pe]. One source for
// CUDA and HIP: lanes are counted in groups of 32 whatever the hardware's wave size.
#pragma once

#include <type_traits>

#include "mla_rope_cache.h"
#include "numeric.h"

namespace mla_fusion {

constexpr int kLanes = 32;
constexpr int kMaxThreads = 256;
// From sm_100 on the compiler, left to itself, spills a register for occupancy.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
#define MLA_LAUNCH_BOUNDS __launch_bounds__(kMaxThreads, 1)
#else
#define MLA_LAUNCH_BOUNDS __launch_bounds__(kMaxThreads)
#endif

// NVIDIA GPUs never see the fnuz formats, and their kernels do without the code.
#ifdef __NVCC__
constexpr bool kHasFnuz = false;
#else
constexpr bool kHasFnuz = true;
#endif

// Kernel arguments that need no copy; HIP does not know the word and makes none.
#ifdef __NVCC__
#define MLA_GRID_CONSTANT __grid_constant__
#else
#define MLA_GRID_CONSTANT
#endif

template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Vector {
  T at[kCount];
};

template <typename Act>
constexpr int kActsPerVector = kVectorBytes / sizeof(Act);

template <typename Act>
using ActVector = Vector<Act, kActsPerVector<Act>>;

// One access of 4, 8 or 16 bytes whatever the element type.
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

__device__ __forceinline__ const void* position_address(const Params& p, int64_t token) {
  return static_cast<const char*>(p.positions) + token * (p.positions_are_int32 ? sizeof(int32_t) : sizeof(int64_t));
}

__device__ __forceinline__ int64_t position_of(const Params& p, int64_t token) {
  const void* address = position_address(p, token);
  return p.positions_are_int32 ? *static_cast<const int32_t*>(address) : *static_cast<const int64_t*>(address);
}

__device__ __forceinline__ int64_t slot_of(const Params& p, int64_t token) {
  return token < p.num_slots ? p.slot_mapping[token] : -1;
}

__device__ __forceinline__ int64_t cache_offset(const Params& p, int64_t slot) {
  const uint32_t index = static_cast<uint32_t>(slot);
  const uint32_t block = static_cast<uint32_t>((static_cast<uint64_t>(index) * p.block_factor) >> p.block_shift);
  const uint32_t row = index - block * p.block_size;
  return block * p.cache_block_stride + row * p.cache_row_stride;
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

// Programmatic dependent launch: this grid starts while the one before it ends and waits here for its results, and only
// then lets the next one start: whatever that one reads before it waits itself, all but this grid's results are there.
__device__ __forceinline__ void wait_for_inputs() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Brings a line that is read after the wait to the L2 cache, where a write of the grid before this one still reaches it.
__device__ __forceinline__ void prefetch(const void* address) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
#endif
}

// The value of the lane whose index differs in the bits of distance. All lanes of the group take part.
__device__ __forceinline__ float from_other_lane(float value, int distance) {
#if defined(__HIP_DEVICE_COMPILE__) || defined(__HIPCC__)
  return __shfl_xor(value, distance, kLanes);
#else
  return __shfl_xor_sync(0xffffffffu, value, distance);
#endif
}

// The sum over a group of lanes, for each of them, always added up in the same order.
__device__ __forceinline__ float sum_over_lanes(float value) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) value += from_other_lane(value, distance);
  return value;
}

// The largest of kCount neighbouring lanes, for each of them.
template <int kCount>
__device__ __forceinline__ float max_over_lanes(float value) {
#pragma unroll
  for (int distance = kCount / 2; distance > 0; distance /= 2) value = fmaxf(value, from_other_lane(value, distance));
  return value;
}

// One instruction where the GPU has one for both.
template <typename Act>
__device__ __forceinline__ void round_pair(float first, float second, Act& rounded_first, Act& rounded_second) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  if constexpr (std::is_same_v<Act, BFloat16>) {
    uint32_t bits;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(second), "f"(first));
    Vector<Act, 2> pair;
    memcpy(&pair, &bits, sizeof(pair));
    rounded_first = pair.at[0];
    rounded_second = pair.at[1];
    return;
  }
#endif
  rounded_first = from_float<Act>(first);
  rounded_second = from_float<Act>(second);
}

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

// Division by the cache's scale, rounded as IEEE division is, without its branches: the scale is split into a power of
// two and a mantissa in [1, 2), and the quotient by the mantissa's reciprocal is corrected by its exact remainder. Right
// for every 16-bit float and every scale that is a normal float (all mantissas were tried out on a GPU); wider
// activations take the general kernel.
struct Scale {
  float mantissa;
  float reciprocal;
  float inverse_power;

  __device__ __forceinline__ explicit Scale(float scale) {
    const uint32_t bits = bits_from_float(scale);
    const uint32_t exponent = (bits >> 23) & 0xffu;
    mantissa = float_from_bits((bits & 0x807fffffu) | 0x3f800000u);
    reciprocal = 1.0f / mantissa;
    inverse_power = float_from_bits(exponent < 254 ? (254 - exponent) << 23 : exponent == 254 ? 0x00400000u : 0u);
  }

  __device__ __forceinline__ float divide(float x) const {
    const float scaled = x * inverse_power;
    const float estimate = scaled * reciprocal;
    const float corrected = fmaf(fmaf(-estimate, mantissa, scaled), reciprocal, estimate);
    // The correction turns -0 into 0, and an infinity, which has no remainder, into NaN.
    const float signed_correctly = float_from_bits(bits_from_float(corrected) | (bits_from_float(estimate) & 0x80000000u));
    return fabsf(estimate) < 1e9f ? signed_correctly : estimate;
  }
};

__device__ __forceinline__ uint16_t to_fp8_pair(CacheKind kind, float low, float high) {
  if constexpr (kHasFnuz) {
    switch (kind) {
      case CacheKind::kFp8E4M3Fnuz:
        return to_fp8_pair<Fp8::kE4M3Fnuz>(low, high);
      case CacheKind::kFp8E5M2Fnuz:
        return to_fp8_pair<Fp8::kE5M2Fnuz>(low, high);
      default:
        break;
    }
  }
  // Where it is one instruction, converting to both is cheaper than code for each.
  const uint16_t e4m3 = to_fp8_pair<Fp8::kE4M3>(low, high);
  const uint16_t e5m2 = to_fp8_pair<Fp8::kE5M2>(low, high);
  return kind == CacheKind::kFp8E5M2 ? e5m2 : e4m3;
}

template <typename Act, int kCount>
__device__ __forceinline__ Vector<uint32_t, kCount / 4> quantise(const Vector<Act, kCount>& in, const Scale& scale, CacheKind kind) {
  Vector<uint32_t, kCount / 4> out;
#pragma unroll
  for (int i = 0; i < kCount; i += 4) {
    const uint32_t low = to_fp8_pair(kind, scale.divide(to_float(in.at[i])), scale.divide(to_float(in.at[i + 1])));
    const uint32_t high = to_fp8_pair(kind, scale.divide(to_float(in.at[i + 2])), scale.divide(to_float(in.at[i + 3])));
    out.at[i / 4] = low | high << 16;
  }
  return out;
}

// What a row of the cache holds, where it is known at compile time.
enum class Row { kCopy, kFp8, kFp8DsMla };

// The tile's scale and the latent in it; neighbouring lanes hold the tile's other vectors.
template <typename Act>
__device__ __forceinline__ void store_ds_mla_latent(uint8_t* row, int index, const ActVector<Act>& value) {
  constexpr int kLanesPerTile = kDsMlaTile / kActsPerVector<Act>;
  float largest = 0.0f;
#pragma unroll
  for (int i = 0; i < kActsPerVector<Act>; ++i) largest = fmaxf(largest, fabsf(to_float(value.at[i])));
  const float scale = ds_mla_scale(max_over_lanes<kLanesPerTile>(largest));
  store_as(row + index, quantise(value, Scale(scale), CacheKind::kFp8E4M3));
  if (index % kDsMlaTile == 0) store_as(row + kDsMlaScales + index / kDsMlaTile * 4, scale);
}

// Some of the latent into the cache row that starts at row, at element index.
template <Row kRow, typename Act, int kCount>
__device__ __forceinline__ void store_latent(const Params& p, int64_t row, int index, const Vector<Act, kCount>& value,
                                             const Scale& scale) {
  if constexpr (kRow == Row::kCopy) {
    store_as(static_cast<Act*>(p.kv_cache) + row + index, value);
  } else if constexpr (kRow == Row::kFp8) {
    store_as(static_cast<uint8_t*>(p.kv_cache) + row + index, quantise(value, scale, p.cache_kind));
  } else {
    store_ds_mla_latent<Act>(static_cast<uint8_t*>(p.kv_cache) + row, index, value);
  }
}

// The same for the rotated key.
template <Row kRow, typename Act, int kCount>
__device__ __forceinline__ void store_key(const Params& p, int64_t row, int index, const Vector<Act, kCount>& value,
                                          const Scale& scale) {
  if constexpr (kRow == Row::kFp8DsMla) {
    store_as(static_cast<uint8_t*>(p.kv_cache) + row + kDsMlaKey + index * sizeof(Act), value);
  } else {
    store_latent<kRow>(p, row, p.lora_rank + index, value, scale);
  }
}

// One element of a row into the cache. Of fp8_ds_mla only the key's are stored one by one.
template <typename Act>
__device__ __forceinline__ void store_cache_element(const Params& p, int64_t row, int index, Act value, float scale) {
  uint8_t* bytes = static_cast<uint8_t*>(p.kv_cache) + row;
  if (p.cache_kind == CacheKind::kCopy) {
    static_cast<Act*>(p.kv_cache)[row + index] = value;
  } else if (p.cache_kind != CacheKind::kFp8DsMla) {
    bytes[index] = static_cast<uint8_t>(to_fp8_pair(p.cache_kind, to_float(value) / scale, 0.0f));
  } else if (index >= p.lora_rank) {
    memcpy(bytes + kDsMlaKey + (index - p.lora_rank) * sizeof(Act), &value, sizeof(Act));
  }
}

// RMSNorm as vLLM's compiled graphs round it: normalise and weigh in float, round once.
template <typename Act>
__device__ __forceinline__ ActVector<Act> normalise(const ActVector<Act>& in, const ActVector<Act>& weight, float inverse_rms) {
  ActVector<Act> out;
#pragma unroll
  for (int i = 0; i < kActsPerVector<Act>; i += 2) {
    round_pair(to_float(in.at[i]) * inverse_rms * to_float(weight.at[i]),
               to_float(in.at[i + 1]) * inverse_rms * to_float(weight.at[i + 1]), out.at[i], out.at[i + 1]);
  }
  return out;
}

// The row of a token in the cache, and by what its values are divided. Loaded before the row's values, so that all the
// loads are on their way together; `offset` is the first to wait for one.
template <Row kRow>
struct CacheRow {
  int64_t slot;
  float scale;

  __device__ __forceinline__ CacheRow(const Params& p, int64_t token)
      : slot(slot_of(p, token)), scale(kRow == Row::kFp8 ? *p.kv_cache_scale : 1.0f) {}

  // Negative: not cached.
  __device__ __forceinline__ int64_t offset(const Params& p) const { return slot < 0 ? -1 : cache_offset(p, slot); }
};

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

template <int kId, typename Role>
__device__ __forceinline__ void run_role(const Role& role) {
  role.prefetch_inputs();
  wait_for_inputs();
  role.run();
#ifndef __NVCC__
  // Ends that differ: LLVM would merge the roles' last stores into one and split it into bytes.
  asm volatile("" ::"n"(kId));
#endif
}

// Groups of lanes that a token has for its latent and its key.
constexpr int kFirstQueryTask = 2;

// A block is (32 lanes, tokens, tasks of a token).
template <typename Act, bool kNeox, int kHeads, Row kRow, bool kNorm>
__global__ void MLA_LAUNCH_BOUNDS mla_rope_cache_vector(const MLA_GRID_CONSTANT Params p) {
  const int64_t token = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (token >= p.num_tokens) return;
  const int task = blockIdx.y * blockDim.z + threadIdx.z;
  const int lane = threadIdx.x;
  if (task >= kFirstQueryTask) {
    run_role<0>(QueryHeads<Act, kNeox, kHeads>{p, token, lane, task - kFirstQueryTask});
  } else if (task == 0) {
    run_role<1>(Latent<Act, kRow, kNorm>{p, token, lane});
  } else {
    run_role<2>(Key<Act, kNeox, kRow>{p, token, lane});
  }
}

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

// Any rot_dim, lora_rank, stride and alignment, one element at a time; a block is one token. Loops that store stay
// rolled: the next loads must wait for them anyway, and unrolled they made every build longer.
template <typename Act>
__global__ void __launch_bounds__(kMaxThreads) mla_rope_cache_general(const MLA_GRID_CONSTANT Params p) {
  wait_for_inputs();
  const int64_t token = blockIdx.x;
  const int half = p.rot_dim / 2;
  const int64_t slot = slot_of(p, token);
  const int64_t row = slot < 0 ? -1 : cache_offset(p, slot);
  const bool is_ds_mla = p.cache_kind == CacheKind::kFp8DsMla;
  const float scale = p.cache_kind == CacheKind::kCopy || is_ds_mla ? 1.0f : *p.kv_cache_scale;
  const int64_t angle_row = position_of(p, token) * p.cos_sin_stride;

  const auto angle_at = [&](int index) {
    return p.cos_sin_is_float ? static_cast<const float*>(p.cos_sin_cache)[angle_row + index]
                              : to_float(static_cast<const Act*>(p.cos_sin_cache)[angle_row + index]);
  };
  const auto cache_at = [&](int index, Act value) {
    if (row >= 0) store_cache_element(p, row, index, value, scale);
  };

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
  if (p.kv_c_weight == nullptr && !is_ds_mla) {
#pragma unroll 1
    for (int i = threadIdx.x; i < p.lora_rank; i += blockDim.x) cache_at(i, kv_c[i]);
    return;
  }
  // One group of lanes has the whole row: no shared memory, and the same order of addition at every launch.
  if (threadIdx.x >= kLanes) return;
  if (p.kv_c_weight != nullptr) {
    float sum = 0.0f;
    for (int i = threadIdx.x; i < p.lora_rank; i += kLanes) sum += to_float(kv_c[i]) * to_float(kv_c[i]);
    const float inverse_rms = rsqrtf(sum_over_lanes(sum) * p.inverse_lora_rank + p.epsilon);
    Act* out = static_cast<Act*>(p.kv_c_out) + token * p.lora_rank;
#pragma unroll 1
    for (int i = threadIdx.x; i < p.lora_rank; i += kLanes) {
      out[i] = from_float<Act>(to_float(kv_c[i]) * inverse_rms * to_float(static_cast<const Act*>(p.kv_c_weight)[i]));
      cache_at(i, out[i]);
    }
    // Below, each lane reads what it wrote itself.
    kv_c = out;
  }
  if (is_ds_mla && row >= 0) store_ds_mla_tiles(static_cast<uint8_t*>(p.kv_cache) + row, kv_c, threadIdx.x);
}

}  // namespace mla_fusion
