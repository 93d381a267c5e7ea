// Compiled once per instruction set, with its name in FASTSAM_ISA. This file must not emit a function that
// another translation unit emits too: the linker keeps one of them, perhaps this one, which older processors
// cannot run. Therefore nothing of the standard library is used, and everything else is in an unnamed
// namespace.
#include "sam_chunks.h"

#include "loops.h"
#include "stream.h"

namespace fastsam::cpu {
namespace {

constexpr int64_t kLanes = 16;

// Sum of term(i)^2 over [0, size). Four squares are added in the type of the terms, so that four terms take
// one conversion to float64. These sums are added in float64: the rounding error does not grow with the size.
template <class Term>
FASTSAM_INLINE double sum_of_squares(int64_t size, const Term& term) {
  double lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= size; i += 4 * kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const auto a = term(i + lane), b = term(i + lane + kLanes);
      const auto c = term(i + lane + 2 * kLanes), d = term(i + lane + 3 * kLanes);
      lanes[lane] += static_cast<double>(multiply_add(a, a, b * b) + multiply_add(c, c, d * d));
    }
  }
  for (; i < size; ++i) {
    const double a = term(i);
    lanes[i % kLanes] += a * a;
  }
  double sum = 0.0;
  for (int64_t lane = 0; lane < kLanes; ++lane) sum += lanes[lane];
  return sum;
}

template <class A, class T>
double squared_norm_in(const T* gradient, int64_t size) {
  return sum_of_squares(size, [=](int64_t i) { return static_cast<A>(load(gradient[i])); });
}

template <class A, class T>
double adaptive_squared_norm_in(const T* gradient, const T* weight, A eta, int64_t size) {
  return sum_of_squares(size, [=](int64_t i) {
    return normalization<A>(load(weight[i]), eta) * static_cast<A>(load(gradient[i]));
  });
}

// Whether a chunk's sum of squares (at most 2^14 of them) is accurate in float32: no square was infinite, and
// squares below 2^-126, which lose digits as subnormals, are negligible.
bool is_in_range(double sum) { return sum > 0x1p-80 && sum < 0x1p126; }

template <class T>
double squared_norm(const T* gradient, int64_t size) {
  const double sum = squared_norm_in<Arithmetic<T>>(gradient, size);
  return is_in_range(sum) ? sum : squared_norm_in<double>(gradient, size);
}

template <class T>
double adaptive_squared_norm(const T* gradient, const T* weight, double eta, int64_t size) {
  using A = Arithmetic<T>;
  const double sum = adaptive_squared_norm_in<A>(gradient, weight, static_cast<A>(eta), size);
  return is_in_range(sum) ? sum : adaptive_squared_norm_in<double>(gradient, weight, eta, size);
}

template <bool kIsAdaptive, bool kCounts, class T>
int64_t perturb_to_nearest(T* weight, const T* gradient, T* backup, const Ascent<T>& ascent, bool streams,
                           int64_t size) {
  int64_t unchanged = 0;
  write_each(streams, backup, size,
             [=, &unchanged, scale = ascent.scale, eta = ascent.eta](int64_t i, T& saved) {
               saved = weight[i];
               store(perturbed(load(saved), load(gradient[i]), scale, eta, kIsAdaptive), weight[i]);
               if (kCounts) unchanged += load(saved) == load(weight[i]) && load(gradient[i]) != 0;
             });
  return unchanged;
}

template <class T>
int64_t perturb_at_random(T* weight, const T* gradient, T* backup, const Ascent<T>& ascent_reference,
                          bool streams, int64_t size) {
  const Ascent<T> ascent = ascent_reference;  // a copy cannot alias the operands
  uint32_t words[kChunkElements / 2] = {};    // random bits of all counters of the chunk, four words each
  const int64_t first = ascent.begin / kRoundedPerCounter;
  const int64_t counters = (size + kRoundedPerCounter - 1) / kRoundedPerCounter;
  FASTSAM_INDEPENDENT
  for (int64_t i = 0; i < counters; ++i) random_words(ascent.key, first + i, words + 4 * i);
  int64_t unchanged = 0;
  write_each(streams, backup, size, [=, &words, &unchanged](int64_t i, T& saved) {
    saved = weight[i];
    store_at_random(perturbed(load(saved), load(gradient[i]), ascent.scale, ascent.eta, ascent.adaptive),
                    rounding_bits(words, i), weight[i]);
    unchanged += load(saved) == load(weight[i]) && load(gradient[i]) != 0;
  });
  return ascent.counts ? unchanged : 0;
}

template <class T>
int64_t perturb(T* weight, const T* gradient, T* backup, const Ascent<T>& ascent, bool streams,
                int64_t size) {
  if (ascent.stochastic) return perturb_at_random(weight, gradient, backup, ascent, streams, size);
  if (ascent.counts) {
    return ascent.adaptive ? perturb_to_nearest<true, true>(weight, gradient, backup, ascent, streams, size)
                           : perturb_to_nearest<false, true>(weight, gradient, backup, ascent, streams, size);
  }
  return ascent.adaptive ? perturb_to_nearest<true, false>(weight, gradient, backup, ascent, streams, size)
                         : perturb_to_nearest<false, false>(weight, gradient, backup, ascent, streams, size);
}

template <class T>
bool all_finite(const T* gradient, int64_t size) {
  // x * 0 is NaN if x is inf or NaN, else 0, so the sum is 0 only if all are finite. The loop has no branch.
  using A = Arithmetic<T>;
  A lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] += load(gradient[i + lane]) * A(0);
  }
  for (; i < size; ++i) lanes[i % kLanes] += load(gradient[i]) * A(0);
  A sum = 0;
  for (int64_t lane = 0; lane < kLanes; ++lane) sum += lanes[lane];
  return sum == 0;
}

template <class T>
void copy(const T* from, T* to, bool streams, int64_t size) {
  write_each(streams, to, size, [=](int64_t i, T& copied) { copied = from[i]; });
}

template <bool kHasMomentum, bool kIsNesterov, bool kDecays, class T>
void sgd_with(T* weight, const T* backup, const T* gradient, T* momentum, bool first,
              const SgdSettings<Arithmetic<T>>& settings_reference, bool streams, int64_t size) {
  SgdSettings<Arithmetic<T>> settings = settings_reference;  // a copy cannot alias the operands
  settings.nesterov = kIsNesterov;                           // constants, so that the loop has no branch
  settings.decays = kDecays;
  write_each(streams, weight, size, [=](int64_t i, T& updated) {
    Arithmetic<T> buffer = kHasMomentum && !first ? load(momentum[i]) : Arithmetic<T>(0);
    const auto result = sgd_step(load(backup[i]), load(gradient[i]), buffer, kHasMomentum, first, settings);
    if (kHasMomentum) store(buffer, momentum[i]);
    store(result, updated);
  });
}

template <class T>
void sgd(T* weight, const T* backup, const T* gradient, T* momentum, bool first,
         const SgdSettings<Arithmetic<T>>& s, bool streams, int64_t size) {
  if (momentum == nullptr) {
    s.decays ? sgd_with<false, false, true>(weight, backup, gradient, momentum, first, s, streams, size)
             : sgd_with<false, false, false>(weight, backup, gradient, momentum, first, s, streams, size);
  } else if (s.nesterov) {
    s.decays ? sgd_with<true, true, true>(weight, backup, gradient, momentum, first, s, streams, size)
             : sgd_with<true, true, false>(weight, backup, gradient, momentum, first, s, streams, size);
  } else {
    s.decays ? sgd_with<true, false, true>(weight, backup, gradient, momentum, first, s, streams, size)
             : sgd_with<true, false, false>(weight, backup, gradient, momentum, first, s, streams, size);
  }
}

template <bool kIsAmsgrad, class T>
void adam_with(T* weight, const T* backup, const T* gradient, T* first, T* second, T* maximum,
               const AdamSettings<Arithmetic<T>>& settings_reference, bool streams, int64_t size) {
  const AdamSettings<Arithmetic<T>> settings = settings_reference;
  write_each(streams, weight, size, [=](int64_t i, T& updated) {
    Arithmetic<T> m = load(first[i]);
    Arithmetic<T> v = load(second[i]);
    Arithmetic<T> v_max = kIsAmsgrad ? load(maximum[i]) : Arithmetic<T>(0);
    const auto result = adam_step(load(backup[i]), load(gradient[i]), m, v, v_max, kIsAmsgrad, settings);
    store(m, first[i]);
    store(v, second[i]);
    if (kIsAmsgrad) store(v_max, maximum[i]);
    store(result, updated);
  });
}

template <class T>
void adam(T* weight, const T* backup, const T* gradient, T* first, T* second, T* maximum,
          const AdamSettings<Arithmetic<T>>& settings, bool streams, int64_t size) {
  if (maximum != nullptr) {
    adam_with<true>(weight, backup, gradient, first, second, maximum, settings, streams, size);
  } else {
    adam_with<false>(weight, backup, gradient, first, second, maximum, settings, streams, size);
  }
}

}  // namespace

namespace FASTSAM_ISA {

#define FASTSAM_DEFINE_CHUNKS(T)                                                                         \
  const SamChunks<T>& chunks_of(T) {                                                                     \
    static constexpr SamChunks<T> chunks = {                                                             \
        squared_norm<T>, adaptive_squared_norm<T>, perturb<T>, all_finite<T>, copy<T>, sgd<T>, adam<T>}; \
    return chunks;                                                                                       \
  }
FASTSAM_DEFINE_CHUNKS(float)
FASTSAM_DEFINE_CHUNKS(double)
FASTSAM_DEFINE_CHUNKS(BFloat16)
FASTSAM_DEFINE_CHUNKS(Float16)
#undef FASTSAM_DEFINE_CHUNKS

}  // namespace FASTSAM_ISA
}  // namespace fastsam::cpu
