// SPDX-License-Identifier: Apache-2.0
// fp8: the division by a scale, and the conversion.
#pragma once

#include "vector.cuh"

namespace mla_fusion {

// NVIDIA GPUs never see the fnuz formats, and their kernels do without the code.
#ifdef __NVCC__
constexpr bool kHasFnuz = false;
#else
constexpr bool kHasFnuz = true;
#endif

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

  __device__ __forceinline__ float operator()(float x) const {
    const float scaled = x * inverse_power;
    const float estimate = scaled * reciprocal;
    const float corrected = fmaf(fmaf(-estimate, mantissa, scaled), reciprocal, estimate);
    // The correction turns -0 into 0, and an infinity, which has no remainder, into NaN.
    const float signed_correctly = float_from_bits(bits_from_float(corrected) | (bits_from_float(estimate) & 0x80000000u));
    return fabsf(estimate) < 1e9f ? signed_correctly : estimate;
  }
};

// The same for values that are at most 448 times the scale, as those that have it from the largest of them are, and a
// scale of 2^-90 or more: without powers of two, since nothing overflows. The remainder is negated, which keeps the sign
// of zero. An infinite scale is left out of it: its values are zeros, or NaN where they are infinite.
struct OwnScale {
  float scale;
  float reciprocal;

  __device__ __forceinline__ explicit OwnScale(float scale) : scale(scale < INFINITY ? scale : 0.0f), reciprocal(1.0f / scale) {}

  __device__ __forceinline__ float operator()(float x) const {
    const float estimate = x * reciprocal;
    return fmaf(-fmaf(estimate, scale, -x), reciprocal, estimate);
  }
};

__device__ __forceinline__ Fp8 format_of(CacheKind kind) {
  if (kHasFnuz && kind == CacheKind::kFp8E4M3Fnuz) return Fp8::kE4M3Fnuz;
  if (kHasFnuz && kind == CacheKind::kFp8E5M2Fnuz) return Fp8::kE5M2Fnuz;
  return kind == CacheKind::kFp8E5M2 ? Fp8::kE5M2 : Fp8::kE4M3;
}

__device__ __forceinline__ uint16_t to_fp8_pair(CacheKind kind, float low, float high) {
#if MLA_CONVERTS_FP8
  // Converting to both is cheaper than code for each.
  const uint16_t e4m3 = to_fp8_pair<Fp8::kE4M3>(low, high);
  const uint16_t e5m2 = to_fp8_pair<Fp8::kE5M2>(low, high);
  return kind == CacheKind::kFp8E5M2 ? e5m2 : e4m3;
#else
  const Fp8 format = format_of(kind);
  return static_cast<uint16_t>(to_fp8(format, low) | (to_fp8(format, high) << 8));
#endif
}

// Multiplication by the reciprocal, where stock vLLM does that.
struct Reciprocal {
  float factor;

  __device__ __forceinline__ float operator()(float x) const { return x * factor; }
};

template <typename Act, int kCount, typename Quotient>
__device__ __forceinline__ Vector<uint32_t, kCount / 4> quantise(const Vector<Act, kCount>& in, const Quotient& quotient, CacheKind kind) {
  Vector<uint32_t, kCount / 4> out;
#pragma unroll
  for (int i = 0; i < kCount; i += 4) {
    const uint32_t low = to_fp8_pair(kind, quotient(to_float(in.at[i])), quotient(to_float(in.at[i + 1])));
    const uint32_t high = to_fp8_pair(kind, quotient(to_float(in.at[i + 2])), quotient(to_float(in.at[i + 3])));
    out.at[i / 4] = low | high << 16;
  }
  return out;
}

// Of a vector's magnitudes.
template <typename Act, int kCount>
__device__ __forceinline__ float largest_of(const Vector<Act, kCount>& in) {
  float largest = 0.0f;
#pragma unroll
  for (int i = 0; i < kCount; ++i) largest = fmaxf(largest, fabsf(to_float(in.at[i])));
  return largest;
}

}  // namespace mla_fusion
