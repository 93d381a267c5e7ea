// Storage types of the 16-bit formats, the arithmetic type of every storage type, and conversions between
// them.
#pragma once

#include <cstdint>
#include <cstring>

#include "host_device.h"

namespace fastsam {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

// Arithmetic is float32 for 16-bit and float32 storage, and float64 for float64 storage. Long sums are
// float64.
template <class T>
struct ArithmeticOf {
  using type = float;
};
template <>
struct ArithmeticOf<double> {
  using type = double;
};
template <class T>
using Arithmetic = typename ArithmeticOf<T>::type;

FASTSAM_HD uint32_t float_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

FASTSAM_HD float bits_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

FASTSAM_HD float load(float stored) { return stored; }
FASTSAM_HD double load(double stored) { return stored; }
FASTSAM_HD float load(BFloat16 stored) { return bits_float(static_cast<uint32_t>(stored.bits) << 16); }

FASTSAM_HD float load(Float16 stored) {
#if defined(__CUDA_ARCH__)
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(stored.bits));
  return value;
#else
  // Multiplying by 2^112 changes the exponent bias from 15 to 127 and also normalizes subnormals.
  const float magnitude = bits_float(static_cast<uint32_t>(stored.bits & 0x7fffu) << 13) * 0x1p112f;
  const uint32_t special = magnitude >= 65536.0f ? 0x7f800000u : 0u;  // inf and NaN keep a full exponent
  return bits_float(float_bits(magnitude) | special | static_cast<uint32_t>(stored.bits & 0x8000u) << 16);
#endif
}

FASTSAM_HD void store(float value, float& stored) { stored = value; }
FASTSAM_HD void store(double value, double& stored) { stored = value; }

FASTSAM_HD void store(float value, BFloat16& stored) {
  const uint32_t bits = float_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
  stored.bits = static_cast<uint16_t>(value != value ? 0x7fc0u : rounded);
}

FASTSAM_HD void store(float value, Float16& stored) {
#if defined(__CUDA_ARCH__)
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(stored.bits) : "f"(value));
#else
  const uint32_t bits = float_bits(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Adding 0.5 aligns the last bit of a float16 subnormal with the last bit of a float, so the hardware
  // rounds.
  const uint32_t subnormal = float_bits(bits_float(magnitude) + 0.5f) - float_bits(0.5f);
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  const uint32_t result = magnitude >= 0x47800000u ? special : finite;
  stored.bits = static_cast<uint16_t>(result | ((bits >> 16) & 0x8000u));
#endif
}

// Stochastic rounding to one of the two neighbors of `value`, with probabilities that make the mean `value`.
// `random` is uniform in [0, 2^16). Wider types store the value unchanged.
FASTSAM_HD void store_at_random(float value, uint32_t, float& stored) { stored = value; }
FASTSAM_HD void store_at_random(double value, uint32_t, double& stored) { stored = value; }

FASTSAM_HD void store_at_random(float value, uint32_t random, BFloat16& stored) {
  const uint32_t rounded = (float_bits(value) + random) >> 16;  // a carry rounds away from zero
  stored.bits = static_cast<uint16_t>(value != value ? 0x7fc0u : rounded);
}

FASTSAM_HD void store_at_random(float value, uint32_t random, Float16& stored) {
  const uint32_t bits = float_bits(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const bool is_subnormal = magnitude < 0x38800000u;
  // Subnormals of float16 are multiples of 2^-24. Fixed point with 16 more bits has the fraction between two
  // of them, to which the random bits are added.
  const float scaled = is_subnormal ? bits_float(magnitude) * 0x1p40f : 0.0f;
  const uint32_t subnormal = (static_cast<uint32_t>(static_cast<int32_t>(scaled)) + random) >> 16;
  const uint32_t normal = (magnitude - (112u << 23) + (random >> 3)) >> 13;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t finite = is_subnormal ? subnormal : normal;
  const uint32_t result = magnitude >= 0x47800000u ? special : finite;
  stored.bits = static_cast<uint16_t>(result | ((bits >> 16) & 0x8000u));
}

FASTSAM_HD bool is_finite(float value) { return (float_bits(value) & 0x7f800000u) != 0x7f800000u; }

FASTSAM_HD bool is_finite(double value) {
  uint64_t bits;
  memcpy(&bits, &value, sizeof bits);
  return (bits & 0x7ff0000000000000ull) != 0x7ff0000000000000ull;
}

// The two ways to round a product. Left alone, compilers fuse products with additions in some places and not
// in others, even between the vectorized body and the tail of one loop, so an element's bits would depend on
// its index. The loops of SAM and of noise are compiled without this contraction on CPUs and fuse only
// through multiply_add. Sums of Lanczos have no such promise.

// a * b + c, rounded once if the processor has a fused multiply-add, else twice.
FASTSAM_HD float multiply_add(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#elif defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

FASTSAM_HD double multiply_add(double a, double b, double c) {
#if defined(__CUDA_ARCH__)
  return __fma_rn(a, b, c);
#elif defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return __builtin_fma(a, b, c);
#else
  return a * b + c;
#endif
}

// a * b, rounded before anything is added to it.
FASTSAM_HD float product(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

FASTSAM_HD double product(double a, double b) {
#if defined(__CUDA_ARCH__)
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}

}  // namespace fastsam
