// SPDX-License-Identifier: Apache-2.0
// float <-> bf16, fp16 and fp8, for host and device alike. The bit-level versions serve the CPU, ROCm and GPUs without
// the instruction; where an NVIDIA GPU has it, the instruction gives the same bits, a NaN's sign aside. AMD's fp8
// instructions do not saturate and could not be compared with the bit-level version on hardware yet, so ROCm stays with
// the latter.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__) || defined(__HIPCC__)
#define MLA_FN __host__ __device__ __forceinline__
#else
#define MLA_FN inline
#endif

// Whether the GPU has an instruction for it.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
#define MLA_CONVERTS_FP8 1
#else
#define MLA_CONVERTS_FP8 0
#endif

namespace mla_fusion {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

MLA_FN float float_from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

MLA_FN uint32_t bits_from_float(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

MLA_FN float to_float(float value) { return value; }

MLA_FN float to_float(BFloat16 value) { return float_from_bits(static_cast<uint32_t>(value.bits) << 16); }

MLA_FN float to_float(Float16 value) {
#if defined(__CUDA_ARCH__)
  float out;
  asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(value.bits));
  return out;
#elif defined(__HIP_DEVICE_COMPILE__)
  _Float16 half;
  memcpy(&half, &value.bits, sizeof(half));
  return static_cast<float>(half);
#else
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return float_from_bits(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  // Shifted into place the exponent is 112 too small; the multiplication mends it, subnormals included.
  const float scaled = float_from_bits(magnitude << 13) * float_from_bits(0x77800000u);
  return float_from_bits(sign | bits_from_float(scaled));
#endif
}

template <typename T>
MLA_FN T from_float(float value);

template <>
MLA_FN float from_float<float>(float value) {
  return value;
}

template <>
MLA_FN BFloat16 from_float<BFloat16>(float value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return {bits};
#else
  const uint32_t bits = bits_from_float(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
#endif
}

// Round to nearest even into a format of kMantissa mantissa bits whose smallest normal exponent is kMinExponent.
// Returns the magnitude's bits; overflow carries into the exponent and is the caller's to handle.
template <int kMantissa, int kMinExponent>
MLA_FN uint32_t round_magnitude(uint32_t magnitude) {
  constexpr int kDropped = 23 - kMantissa;
  constexpr uint32_t kMinNormal = static_cast<uint32_t>(kMinExponent + 127) << 23;
  if (magnitude < kMinNormal) {
    // Adding this power of two leaves the rounded subnormal in the low mantissa bits.
    const uint32_t magic = static_cast<uint32_t>(kMinExponent + 127 + kDropped) << 23;
    return bits_from_float(float_from_bits(magnitude) + float_from_bits(magic)) - magic;
  }
  const uint32_t rounded = magnitude + (1u << (kDropped - 1)) - 1u + ((magnitude >> kDropped) & 1u);
  return (rounded >> kDropped) - (static_cast<uint32_t>(kMinExponent + 126) << kMantissa);
}

template <>
MLA_FN Float16 from_float<Float16>(float value) {
#if defined(__CUDA_ARCH__)
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return {bits};
#elif defined(__HIP_DEVICE_COMPILE__)
  const _Float16 half = static_cast<_Float16>(value);
  Float16 out;
  memcpy(&out.bits, &half, sizeof(half));
  return out;
#else
  const uint32_t bits = bits_from_float(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {0x7fff};
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // 65520 and above
  return {static_cast<uint16_t>(sign | round_magnitude<10, -14>(magnitude))};
#endif
}

// kE4M3 and kE5M2 are OCP's. The fnuz formats of AMD's gfx94x have no infinity and no -0, whose code is NaN instead, and
// an exponent bias that is larger by one.
enum class Fp8 { kE4M3, kE5M2, kE4M3Fnuz, kE5M2Fnuz };

// A format by its numbers: the bits of float32's significand that it lacks, and as float32's bits its smallest normal and
// its largest value.
struct Fp8Numbers {
  uint32_t dropped;
  uint32_t smallest_normal;
  uint32_t largest;
  bool is_fnuz;
};

MLA_FN constexpr Fp8Numbers numbers_of(Fp8 format) {
  const bool is_e4m3 = format == Fp8::kE4M3 || format == Fp8::kE4M3Fnuz;
  const bool is_fnuz = format == Fp8::kE4M3Fnuz || format == Fp8::kE5M2Fnuz;
  const uint32_t smallest = is_e4m3 ? 0x3c800000u : 0x38800000u;             // 2^-6, 2^-14; fnuz: half of these
  const uint32_t largest_e4m3 = is_fnuz ? 0x43700000u : 0x43e00000u;         // 240, 448
  return {is_e4m3 ? 20u : 21u, smallest - (is_fnuz ? 0x00800000u : 0u), is_e4m3 ? largest_e4m3 : 0x47600000u, is_fnuz};
}

// Round to nearest even, saturating (infinity too); NaN stays NaN. One way for all formats, which may be known at run time
// only.
MLA_FN uint8_t to_fp8(Fp8 format, float value) {
  const Fp8Numbers f = numbers_of(format);
  const uint32_t bits = bits_from_float(value);
  const uint32_t sign = (bits >> 24) & 0x80u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint8_t>(f.is_fnuz ? 0x80u : sign | 0x7fu);
  const uint32_t clamped = magnitude < f.largest ? magnitude : f.largest;
  const uint32_t own_exponent = clamped & 0x7f800000u;
  const uint32_t exponent = own_exponent > f.smallest_normal ? own_exponent : f.smallest_normal;
  // Adding this power of two leaves the rounded significand in the lowest bits; a carry goes on into the exponent.
  const uint32_t magic = exponent + (f.dropped << 23);
  const uint32_t significand = bits_from_float(float_from_bits(clamped) + float_from_bits(magic)) - magic;
  const uint32_t rounded = ((exponent - f.smallest_normal) >> f.dropped) + significand;
  return static_cast<uint8_t>(f.is_fnuz && rounded == 0 ? 0u : sign | rounded);
}

// The scale of a tile of fp8_ds_mla: its largest magnitude becomes e4m3's largest value. The bound is the smallest normal.
MLA_FN float ds_mla_scale(float largest) { return fmaxf(largest / 448.0f, float_from_bits(0x00800000u)); }

// That of a group or row of the query, which counts as at least `smallest`; rounded up to a power of two by the same
// functions as vLLM's, whose logarithm is not exact.
MLA_FN float query_scale(float largest, float smallest, bool is_power_of_two) {
  const float scale = fmaxf(largest, smallest) / 448.0f;
  return is_power_of_two ? exp2f(ceilf(log2f(fmaxf(scale, 1e-10f)))) : scale;
}

// Two values at once, the first in the low byte.
template <Fp8 kFormat>
MLA_FN uint16_t to_fp8_pair(float low, float high) {
#if MLA_CONVERTS_FP8
  uint16_t pair;
  if constexpr (kFormat == Fp8::kE4M3) {
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
  } else {
    static_assert(kFormat == Fp8::kE5M2);
    asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
  }
  return pair;
#else
  return static_cast<uint16_t>(to_fp8(kFormat, low) | (to_fp8(kFormat, high) << 8));
#endif
}

}  // namespace mla_fusion
