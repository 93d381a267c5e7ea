// The loops of the SAM phases over one chunk. sam_chunks.cpp is compiled once per instruction set, and
// sam_chunks() picks one at run time, so that one binary runs on every processor.
#pragma once

#include <cstdint>

#include "noise_math.h"
#include "sam_math.h"
#include "scalar.h"

namespace fastsam::cpu {

// A multiple of kRoundedPerCounter, so that chunks share no counter.
constexpr int64_t kChunkElements = 16384;

// Settings of the ascent for one chunk.
template <class T>
struct Ascent {
  Arithmetic<T> scale, eta;
  bool adaptive, stochastic;
  bool counts;    // count the elements that it does not change
  NoiseKey key;   // key of the stochastic rounding
  int64_t begin;  // index of the chunk's first element in its tensor
};

// Functions over w, g, backup and state [size]. With `streams`, their stores bypass the cache.
template <class T>
struct SamChunks {
  double (*squared_norm)(const T* gradient, int64_t size);
  double (*adaptive_squared_norm)(const T* gradient, const T* weight, double eta, int64_t size);
  // Returns the number of elements that a nonzero gradient did not change, or 0 if they are not counted.
  int64_t (*perturb)(T* weight, const T* gradient, T* backup, const Ascent<T>& ascent, bool streams,
                     int64_t size);
  bool (*all_finite)(const T* gradient, int64_t size);
  void (*copy)(const T* from, T* to, bool streams, int64_t size);
  // `momentum` is null without momentum; `first` marks its first update.
  void (*sgd)(T* weight, const T* backup, const T* gradient, T* momentum, bool first,
              const SgdSettings<Arithmetic<T>>& settings, bool streams, int64_t size);
  // `maximum` is null without amsgrad.
  void (*adam)(T* weight, const T* backup, const T* gradient, T* first, T* second, T* maximum,
               const AdamSettings<Arithmetic<T>>& settings, bool streams, int64_t size);
};

// The functions for this processor.
template <class T>
const SamChunks<T>& sam_chunks();

}  // namespace fastsam::cpu
