// Stores that bypass the cache. An ordinary store first reads the cache line that it overwrites, and evicts
// another line. Both are wasted if the written memory is too large to stay in the cache until its next
// reader.
#pragma once

#include <cstdint>

#include "loops.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace fastsam::cpu {

// Stores bypass the cache if a launch writes at least this many bytes to one operand. Measured on Zen 4 with
// 1 MiB of L2 per core and 32 MiB of L3: for back-to-back steps, the best case for the cache, streaming loses
// up to 30 % below 4 MiB, breaks even near 8 MiB and gains 10 to 50 % above. After a forward and backward
// pass that replace the contents of the cache, as in training, it gains at every size.
constexpr int64_t kStreamedBytes = int64_t{8} << 20;

constexpr int64_t kLineBytes = 64;
constexpr int64_t kTileBytes = 256;  // a few vector registers, written by a loop of constant length

#if defined(__SSE2__)

constexpr bool kCanStream = true;

// Writes a tile to a destination aligned to a cache line.
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

// Calls write(i, element), which assigns element `i` of `destination`, for i in [0, size). With `streams` the
// stores bypass the cache: elements are written to a tile on the stack, which is then streamed. Call it
// inside parallel_for, which fences the streaming stores.
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
