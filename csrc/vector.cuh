// SPDX-License-Identifier: Apache-2.0
// Groups of lanes, and what they load, store, exchange and round as vectors. One source for CUDA and HIP: lanes are counted
// in groups of 32 whatever the hardware's wave size.
#pragma once

#include <type_traits>

#include "mla_rope_cache.h"
#include "numeric.h"

namespace mla_fusion {

constexpr int kLanes = 32;
constexpr int kMaxThreads = 256;
// How many blocks a multiprocessor must be able to run; 0 leaves it to the compiler, which from sm_100 on spills a register
// for more of them.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kMinBlocks = 1;
#else
constexpr int kMinBlocks = 0;
#endif
// HIP's second number has another meaning.
#ifdef __NVCC__
#define MLA_LAUNCH_BOUNDS(min_blocks) __launch_bounds__(kMaxThreads, min_blocks)
#else
#define MLA_LAUNCH_BOUNDS(min_blocks) __launch_bounds__(kMaxThreads)
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

template <typename Act>
__device__ __forceinline__ ActVector<Act> elements(const uint4& words) {
  ActVector<Act> out;
  memcpy(&out, &words, sizeof(out));
  return out;
}

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

}  // namespace mla_fusion
