// The loops of the SAM phases over one chunk. sam_chunks.cpp is compiled once for every instruction set, so
// that one binary serves every processor; sam_chunks() picks at run time.
#pragma once

#include <cstdint>

#include "noise_math.h"
#include "sam_math.h"
#include "scalar.h"

namespace fastsam::cpu {

constexpr int64_t kChunkElements = 16384;  // a multiple of kRoundedPerCounter: chunks share no counter

// What an ascent does to one chunk.
template <class T>
struct Ascent {
  Arithmetic<T> scale, eta;
  bool adaptive, stochastic;
  bool counts;    // count the elements that it cannot change
  NoiseKey key;   // of the stochastic rounding
  int64_t begin;  // place of the chunk in its tensor
};

// Functions over w, g, backup and state [size]. Where `streams`, their stores bypass the cache.
template <class T>
struct SamChunks {
  double (*squared_norm)(const T* gradient, int64_t size);
  double (*adaptive_squared_norm)(const T* gradient, const T* weight, double eta, int64_t size);
  // Returns how many elements a non-zero gradient could not change, 0 where they are not counted.
  int64_t (*perturb)(T* weight, const T* gradient, T* backup, const Ascent<T>& ascent, bool streams,
                     int64_t size);
  bool (*all_finite)(const T* gradient, int64_t size);
  void (*copy)(const T* from, T* to, bool streams, int64_t size);
  // `momentum` is null without momentum; `first`: no update has reached it yet.
  void (*sgd)(T* weight, const T* backup, const T* gradient, T* momentum, bool first,
              const SgdSettings<Arithmetic<T>>& settings, bool streams, int64_t size);
  // `maximum` is null without amsgrad.
  void (*adam)(T* weight, const T* backup, const T* gradient, T* first, T* second, T* maximum,
               const AdamSettings<Arithmetic<T>>& settings, bool streams, int64_t size);
};

// Those for this processor.
template <class T>
const SamChunks<T>& sam_chunks();

}  // namespace fastsam::cpu
