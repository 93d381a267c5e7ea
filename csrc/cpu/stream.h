// Stores that bypass the cache. An ordinary store reads a cache line before it overwrites it, and evicts
// another; where the written memory is too large to be found in the cache by its next reader, both are
// wasted.
#pragma once

#include <cstdint>

#include "loops.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace fastsam::cpu {

// Bytes that one launch writes to one operand from which on these stores bypass the cache. Measured on Zen 4
// with 1 MiB of L2 a core and 32 MiB of L3: back-to-back steps, whose next reader finds in the cache whatever
// can be there, lose up to 30 % below 4 MiB, break even near 8 and gain 10 to 50 % above. After a forward and
// backward pass that flush the cache, as in training, they gain at every size.
constexpr int64_t kStreamedBytes = int64_t{8} << 20;

constexpr int64_t kLineBytes = 64;
constexpr int64_t kTileBytes = 256;  // a loop of constant length that fills a few registers

#if defined(__SSE2__)

constexpr bool kCanStream = true;

// Writes a tile to a destination that is aligned to a cache line.
template <class T>
FASTSAM_INLINE void stream_tile(const T* tile, T* destination) {
#if defined(__AVX512F__)
  using Vector = __m512i;
  const auto stream = [](Vector* to, const Vector* from) {
    _mm512_stream_si512(to, _mm512_load_si512(from));
  };
#elif defined(__AVX__)
  using Vector = __m256i;
  const auto stream = [](Vector* to, const Vector* from) {
    _mm256_stream_si256(to, _mm256_load_si256(from));
  };
#else
  using Vector = __m128i;
  const auto stream = [](Vector* to, const Vector* from) { _mm_stream_si128(to, _mm_load_si128(from)); };
#endif
  for (int64_t i = 0; i < kTileBytes / static_cast<int64_t>(sizeof(Vector)); ++i) {
    stream(reinterpret_cast<Vector*>(destination) + i, reinterpret_cast<const Vector*>(tile) + i);
  }
}

#else

constexpr bool kCanStream = false;

template <class T>
FASTSAM_INLINE void stream_tile(const T*, T*) {}

#endif

// Calls write(i, element) for i in [0, size), which assigns to element `i` of `destination`, and lets these
// stores bypass the cache where `streams`. Inside parallel_for, which fences them.
template <class T, class Write>
FASTSAM_INLINE void write_each(bool streams, T* destination, int64_t size, const Write& write) {
  int64_t i = 0;
  if (kCanStream && streams) {
    constexpr int64_t kTile = kTileBytes / static_cast<int64_t>(sizeof(T));
    for (; i < size && reinterpret_cast<uintptr_t>(destination + i) % kLineBytes != 0; ++i) {
      write(i, destination[i]);
    }
    for (; i + kTile <= size; i += kTile) {
      alignas(kLineBytes) T tile[kTile];
      FASTSAM_INDEPENDENT
      for (int64_t k = 0; k < kTile; ++k) write(i + k, tile[k]);
      stream_tile(tile, destination + i);
    }
  }
  FASTSAM_INDEPENDENT
  for (; i < size; ++i) write(i, destination[i]);
}

}  // namespace fastsam::cpu
