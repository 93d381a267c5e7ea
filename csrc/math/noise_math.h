// Counter-based standard normal numbers: Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy
// as 1, 2, 3") and the Box-Muller transform. The elementary functions are written out here, because those of
// the libraries differ between backends and instruction sets.
#pragma once

#include <math.h>

#include <cstdint>

#include "host_device.h"
#include "scalar.h"

namespace fastsam {

// Number of normal numbers from one counter.
constexpr int kPerCounter = 4;

// Seed of a sequence of random numbers, with the step and the stream that select the sequence.
struct NoiseKey {
  uint64_t seed;
  uint32_t step;
  uint32_t stream;
};

FASTSAM_HD void philox_multiply(uint32_t factor, uint32_t value, uint32_t& high, uint32_t& low) {
  const uint64_t product = static_cast<uint64_t>(factor) * value;
  high = static_cast<uint32_t>(product >> 32);
  low = static_cast<uint32_t>(product);
}

// Ten rounds on a 128-bit counter c[4] with a 64-bit key.
FASTSAM_HD void philox(uint32_t c[4], uint64_t key) {
  uint32_t key0 = static_cast<uint32_t>(key);
  uint32_t key1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    uint32_t high0, low0, high1, low1;
    philox_multiply(0xD2511F53u, c[0], high0, low0);
    philox_multiply(0xCD9E8D57u, c[2], high1, low1);
    c[0] = high1 ^ c[1] ^ key0;
    c[1] = low1;
    c[2] = high0 ^ c[3] ^ key1;
    c[3] = low0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}

// Natural logarithm of a positive normal float, accurate to a few units in the last place: value = 2^k m with
// m in [1/sqrt2, sqrt2), and ln m = 2 artanh((m - 1) / (m + 1)) by five terms of its series.
FASTSAM_HD float natural_log(float value) {
  const uint32_t bits = float_bits(value);
  const int32_t shifted = static_cast<int32_t>(bits - 0x3f3504f3u) >> 23;
  const float m = bits_float(bits - (static_cast<uint32_t>(shifted) << 23));
  const float s = (m - 1.0f) / (m + 1.0f);
  const float s2 = s * s;
  const float series = 1.0f + s2 * (1.0f / 3 + s2 * (1.0f / 5 + s2 * (1.0f / 7 + s2 * (1.0f / 9))));
  return static_cast<float>(shifted) * 0.693147181f + 2.0f * s * series;
}

// sin and cos of 2 pi (quarter / 4 + x) with x in [-1/8, 1/8]: Taylor series for x, then swaps and signs for
// the quarter turns. The small range keeps the series short and accurate.
FASTSAM_HD void turn(uint32_t quarter, float x, float& sine, float& cosine) {
  const float a = 6.28318531f * x;
  const float a2 = a * a;
  const float s =
      a * (1.0f - a2 * (1.0f / 6 - a2 * (1.0f / 120 - a2 * (1.0f / 5040 - a2 * (1.0f / 362880)))));
  const float c = 1.0f - a2 * (0.5f - a2 * (1.0f / 24 - a2 * (1.0f / 720 - a2 * (1.0f / 40320))));
  const float swapped_s = (quarter & 1u) != 0u ? c : s;
  const float swapped_c = (quarter & 1u) != 0u ? s : c;
  sine = (quarter & 2u) != 0u ? -swapped_s : swapped_s;
  cosine = ((quarter + 1u) & 2u) != 0u ? -swapped_c : swapped_c;
}

// Two independent standard normal numbers from 64 random bits.
FASTSAM_HD void box_muller(uint32_t bits0, uint32_t bits1, float& first, float& second) {
  const float uniform = (static_cast<float>(bits0) + 1.0f) * 0x1p-32f;  // (0, 1]
  const float squared = -2.0f * natural_log(uniform);
  const float radius = sqrtf(squared > 0.0f ? squared : 0.0f);
  // The two top bits choose the quarter turn; the others, minus one half of their range, the angle within it.
  const float within = static_cast<float>(bits1 & 0x3fffffffu) * 0x1p-32f - 0.125f;
  float sine, cosine;
  turn(bits1 >> 30, within, sine, cosine);
  first = radius * cosine;
  second = radius * sine;
}

// The 128 random bits of one counter of a stream.
FASTSAM_HD void random_words(const NoiseKey& key, int64_t counter, uint32_t c[4]) {
  c[0] = static_cast<uint32_t>(counter);
  c[1] = static_cast<uint32_t>(static_cast<uint64_t>(counter) >> 32);
  c[2] = key.stream;
  c[3] = key.step;
  philox(c, key.seed);
}

// Standard normal numbers for the elements [4 counter, 4 counter + 4) of a stream.
FASTSAM_HD void standard_normals(const NoiseKey& key, int64_t counter, float z[kPerCounter]) {
  uint32_t c[4];
  random_words(key, counter, c);
  box_muller(c[0], c[1], z[0], z[1]);
  box_muller(c[2], c[3], z[2], z[3]);
}

FASTSAM_HD NoiseKey noise_key(const int64_t* seed_and_step, int64_t stream) {
  return {static_cast<uint64_t>(seed_and_step[0]), static_cast<uint32_t>(seed_and_step[1]),
          static_cast<uint32_t>(stream)};
}

}  // namespace fastsam
