#include "fastsam/sam.h"

#include <atomic>
#include <cstring>

#include "chunks.h"
#include "dispatch.h"
#include "parallel.h"
#include "sam_math.h"

namespace fastsam::cpu {
namespace {

constexpr int64_t kChunkElements = 16384;  // a multiple of kRoundedPerCounter: chunks share no counter

// Address of the chunk's first element in one operand, or null where the table has no such operand.
template <class T>
T* operand(const TensorTable& table, Column column, const Chunk& chunk) {
  const int64_t address = table.at(column, chunk.tensor);
  return address == 0 ? nullptr : reinterpret_cast<T*>(address) + chunk.begin;
}

const double* hyper_row(const double* hyper, const TensorTable& table, const Chunk& chunk) {
  return hyper + table.at(kGroup, chunk.tensor) * kHyperColumns;
}

bool has_flag(const TensorTable& table, const Chunk& chunk, Flag flag) {
  return (table.at(kFlags, chunk.tensor) & flag) != 0;
}

template <class Body>
void for_each_chunk(const Execution& execution, const TensorTable& table, const Body& body) {
  const Chunks chunks(table, kChunkElements);
  parallel_for(execution.threads, chunks.count(), chunks.elements(), [&](int64_t i) { body(chunks[i], i); });
}

// --- one chunk of each phase; w, g, backup and state are [size] ---------------------------------------

template <class T>
FASTSAM_CLONES double squared_norm_chunk(const T* gradient, int64_t size) {
  return interleaved_sum(size, [=](int64_t i) {
    const double g = load(gradient[i]);
    return g * g;
  });
}

template <class T>
FASTSAM_CLONES double adaptive_squared_norm_chunk(const T* gradient, const T* weight, double eta,
                                                  int64_t size) {
  return interleaved_sum(size, [=](int64_t i) {
    const double g = normalisation<double>(load(weight[i]), eta) * load(gradient[i]);
    return g * g;
  });
}

template <bool kIsAdaptive, class T>
FASTSAM_CLONES void perturb_chunk(T* weight, const T* gradient, T* backup, Arithmetic<T> scale,
                                  Arithmetic<T> eta, int64_t size) {
  FASTSAM_INDEPENDENT
  for (int64_t i = 0; i < size; ++i) {
    const T stored = weight[i];
    backup[i] = stored;
    store(perturbed(load(stored), load(gradient[i]), scale, eta, kIsAdaptive), weight[i]);
  }
}

// words [4 * counters]: the random bits of the counters from `first` on.
FASTSAM_CLONES void fill_words(const NoiseKey& key_reference, int64_t first, int64_t counters,
                               uint32_t* words) {
  const NoiseKey key = key_reference;
  FASTSAM_INDEPENDENT
  for (int64_t i = 0; i < counters; ++i) random_words(key, first + i, words + 4 * i);
}

// perturb_chunk with stochastic rounding; `begin` is the place of the chunk in its tensor.
template <class T>
FASTSAM_CLONES void perturb_chunk_at_random(T* weight, const T* gradient, T* backup, Arithmetic<T> scale,
                                            Arithmetic<T> eta, bool adaptive, const NoiseKey& key,
                                            int64_t begin, int64_t size) {
  uint32_t words[kChunkElements / 2] = {};
  fill_words(key, begin / kRoundedPerCounter, (size + kRoundedPerCounter - 1) / kRoundedPerCounter, words);
  FASTSAM_INDEPENDENT
  for (int64_t i = 0; i < size; ++i) {
    const T stored = weight[i];
    backup[i] = stored;
    store_at_random(perturbed(load(stored), load(gradient[i]), scale, eta, adaptive), rounding_bits(words, i),
                    weight[i]);
  }
}

// Elements that a non-zero perturbation left as they were: `before` and `after` are [size].
template <class T>
int64_t unchanged_chunk(const T* before, const T* after, const T* gradient, int64_t size) {
  int64_t unchanged = 0;
  for (int64_t i = 0; i < size; ++i) {
    unchanged += load(before[i]) == load(after[i]) && load(gradient[i]) != 0;
  }
  return unchanged;
}

template <class T>
FASTSAM_CLONES bool all_finite_chunk(const T* gradient, int64_t size) {
  // A sum of zeros is NaN as soon as one term came from inf or NaN: x * 0 has no branch to predict.
  Arithmetic<T> lanes[16] = {};
  int64_t i = 0;
  for (; i + 16 <= size; i += 16) {
    for (int64_t lane = 0; lane < 16; ++lane) lanes[lane] += load(gradient[i + lane]) * Arithmetic<T>(0);
  }
  for (; i < size; ++i) lanes[0] += load(gradient[i]) * Arithmetic<T>(0);
  Arithmetic<T> sum = 0;
  for (int64_t lane = 0; lane < 16; ++lane) sum += lanes[lane];
  return sum == 0;
}

template <bool kHasMomentum, bool kIsNesterov, bool kDecays, class T>
FASTSAM_CLONES void sgd_chunk(T* weight, const T* backup, const T* gradient, T* momentum, bool first,
                              const SgdSettings<Arithmetic<T>>& settings_reference, int64_t size) {
  SgdSettings<Arithmetic<T>> settings = settings_reference;  // a copy cannot alias the operands
  settings.nesterov = kIsNesterov;                           // constants leave no branch in the loop
  settings.decays = kDecays;
  FASTSAM_INDEPENDENT
  for (int64_t i = 0; i < size; ++i) {
    Arithmetic<T> buffer = kHasMomentum && !first ? load(momentum[i]) : Arithmetic<T>(0);
    const auto updated = sgd_step(load(backup[i]), load(gradient[i]), buffer, kHasMomentum, first, settings);
    if (kHasMomentum) store(buffer, momentum[i]);
    store(updated, weight[i]);
  }
}

template <bool kIsAmsgrad, class T>
FASTSAM_CLONES void adam_chunk(T* weight, const T* backup, const T* gradient, T* first, T* second, T* maximum,
                               const AdamSettings<Arithmetic<T>>& settings_reference, int64_t size) {
  const AdamSettings<Arithmetic<T>> settings = settings_reference;
  FASTSAM_INDEPENDENT
  for (int64_t i = 0; i < size; ++i) {
    Arithmetic<T> m = load(first[i]);
    Arithmetic<T> v = load(second[i]);
    Arithmetic<T> v_max = kIsAmsgrad ? load(maximum[i]) : Arithmetic<T>(0);
    const auto updated = adam_step(load(backup[i]), load(gradient[i]), m, v, v_max, kIsAmsgrad, settings);
    store(m, first[i]);
    store(v, second[i]);
    if (kIsAmsgrad) store(v_max, maximum[i]);
    store(updated, weight[i]);
  }
}

template <class T>
void sgd_dispatch(T* weight, const T* backup, const T* gradient, T* momentum, bool first,
                  const SgdSettings<Arithmetic<T>>& s, int64_t size) {
  if (momentum == nullptr) {
    s.decays ? sgd_chunk<false, false, true>(weight, backup, gradient, momentum, first, s, size)
             : sgd_chunk<false, false, false>(weight, backup, gradient, momentum, first, s, size);
  } else if (s.nesterov) {
    s.decays ? sgd_chunk<true, true, true>(weight, backup, gradient, momentum, first, s, size)
             : sgd_chunk<true, true, false>(weight, backup, gradient, momentum, first, s, size);
  } else {
    s.decays ? sgd_chunk<true, false, true>(weight, backup, gradient, momentum, first, s, size)
             : sgd_chunk<true, false, false>(weight, backup, gradient, momentum, first, s, size);
  }
}

// --- what the two updates share -----------------------------------------------------------------------

double loss_scale(const SamScalars& scalars) {
  return scalars.grad_scale == nullptr ? 1.0 : static_cast<double>(*scalars.grad_scale);
}

template <class T>
void restore_chunk(const TensorTable& table, const Chunk& chunk) {
  T* const weight = operand<T>(table, kWeight, chunk);
  const T* const backup = operand<T>(table, kBackup, chunk);
  if (backup != nullptr && backup != weight)
    memcpy(weight, backup, static_cast<size_t>(chunk.size) * sizeof(T));
}

// Restores everything and counts one skipped step, or calls update(chunk) where there is a gradient and
// afterwards advances the update counters of the tensors that had one.
template <class T, class Update>
void restore_and_update(const Execution& execution, const TensorTable& table, const SamScalars& scalars,
                        const Update& update) {
  const bool skip = *scalars.found_inf != 0.0f;
  for_each_chunk(execution, table, [&](const Chunk& chunk, int64_t) {
    if (skip || table.at(kGradient, chunk.tensor) == 0) {
      restore_chunk<T>(table, chunk);
    } else {
      update(chunk);
    }
  });
  if (skip) {
    if (scalars.skipped_steps != nullptr) *scalars.skipped_steps += 1;
    return;
  }
  for (int64_t i = 0; i < table.count; ++i) {
    const int64_t step = table.at(kStep, i);
    if (step != 0 && table.at(kGradient, i) != 0) *reinterpret_cast<float*>(step) += 1.0f;
  }
}

}  // namespace

int64_t sam_scratch_bytes(const TensorTable& table) {
  return Chunks(table, kChunkElements).count() * static_cast<int64_t>(sizeof(double));
}

void sam_norm(const Execution& execution, DType dtype, const TensorTable& table, const double* hyper,
              double* squared_norm, void* scratch) {
  double* const partials = static_cast<double*>(scratch);
  dispatch(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    for_each_chunk(execution, table, [&](const Chunk& chunk, int64_t index) {
      const T* const gradient = operand<const T>(table, kGradient, chunk);
      if (gradient == nullptr) {
        partials[index] = 0.0;
      } else if (has_flag(table, chunk, kAdaptive)) {
        partials[index] = adaptive_squared_norm_chunk(gradient, operand<const T>(table, kWeight, chunk),
                                                      hyper_row(hyper, table, chunk)[kEta], chunk.size);
      } else {
        partials[index] = squared_norm_chunk(gradient, chunk.size);
      }
    });
  });
  double sum = 0.0;
  const int64_t count = Chunks(table, kChunkElements).count();
  for (int64_t i = 0; i < count; ++i) sum += partials[i];
  *squared_norm = sum;
}

void sam_perturb(const Execution& execution, DType dtype, const TensorTable& table,
                 const SamScalars& scalars) {
  double squared_norm = 0.0;
  for (int64_t i = 0; i < scalars.norm_count; ++i) squared_norm += scalars.squared_norms[i];
  const double grad_scale = loss_scale(scalars);
  bool skip = !is_finite(squared_norm);
  for (int64_t group = 0; group < scalars.group_count; ++group) {
    skip = skip ||
           !is_finite(ascent_scale(squared_norm, scalars.hyper[group * kHyperColumns + kRho], grad_scale));
  }
  *scalars.found_inf = skip ? 1.0f : 0.0f;
  std::atomic<int64_t> unchanged{0};
  dispatch(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Arithmetic<T>;
    for_each_chunk(execution, table, [&](const Chunk& chunk, int64_t) {
      const T* const gradient = operand<const T>(table, kGradient, chunk);
      if (gradient == nullptr) return;
      T* const weight = operand<T>(table, kWeight, chunk);
      T* const backup = operand<T>(table, kBackup, chunk);
      if (skip) {
        memcpy(backup, weight, static_cast<size_t>(chunk.size) * sizeof(T));
        return;
      }
      const double* const row = hyper_row(scalars.hyper, table, chunk);
      const A scale = static_cast<A>(ascent_scale(squared_norm, row[kRho], grad_scale));
      const A eta = static_cast<A>(row[kEta]);
      const bool adaptive = has_flag(table, chunk, kAdaptive);
      if (has_flag(table, chunk, kStochastic)) {
        perturb_chunk_at_random(weight, gradient, backup, scale, eta, adaptive,
                                rounding_key(squared_norm, chunk.tensor), chunk.begin, chunk.size);
      } else if (adaptive) {
        perturb_chunk<true>(weight, gradient, backup, scale, eta, chunk.size);
      } else {
        perturb_chunk<false>(weight, gradient, backup, scale, eta, chunk.size);
      }
      if (scalars.unchanged != nullptr) {
        unchanged.fetch_add(unchanged_chunk(backup, weight, gradient, chunk.size), std::memory_order_relaxed);
      }
    });
  });
  if (scalars.unchanged != nullptr) *scalars.unchanged += unchanged.load();
}

void sam_check(const Execution& execution, DType dtype, const TensorTable& table, float* found_inf) {
  std::atomic<bool> found{false};
  dispatch(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    for_each_chunk(execution, table, [&](const Chunk& chunk, int64_t) {
      const T* const gradient = operand<const T>(table, kGradient, chunk);
      if (gradient != nullptr && !all_finite_chunk(gradient, chunk.size)) {
        found.store(true, std::memory_order_relaxed);
      }
    });
  });
  if (found.load()) *found_inf = 1.0f;
}

void sam_restore(const Execution& execution, DType dtype, const TensorTable& table) {
  dispatch(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    for_each_chunk(execution, table, [&](const Chunk& chunk, int64_t) { restore_chunk<T>(table, chunk); });
  });
}

void sam_update_sgd(const Execution& execution, DType dtype, const TensorTable& table,
                    const SamScalars& scalars, void*) {
  const double grad_scale = loss_scale(scalars);
  dispatch(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    restore_and_update<T>(execution, table, scalars, [&](const Chunk& chunk) {
      const int64_t step = table.at(kStep, chunk.tensor);
      const bool first = step != 0 && *reinterpret_cast<const float*>(step) == 0.0f;
      sgd_dispatch(operand<T>(table, kWeight, chunk), operand<const T>(table, kBackup, chunk),
                   operand<const T>(table, kGradient, chunk), operand<T>(table, kState0, chunk), first,
                   sgd_settings<Arithmetic<T>>(hyper_row(scalars.hyper, table, chunk), grad_scale),
                   chunk.size);
    });
  });
}

void sam_update_adam(const Execution& execution, DType dtype, const TensorTable& table,
                     const SamScalars& scalars, void*) {
  const double grad_scale = loss_scale(scalars);
  dispatch(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    restore_and_update<T>(execution, table, scalars, [&](const Chunk& chunk) {
      const double step =
          static_cast<double>(*reinterpret_cast<const float*>(table.at(kStep, chunk.tensor))) + 1.0;
      const auto settings =
          adam_settings<Arithmetic<T>>(hyper_row(scalars.hyper, table, chunk), step, grad_scale);
      T* const weight = operand<T>(table, kWeight, chunk);
      const T* const backup = operand<const T>(table, kBackup, chunk);
      const T* const gradient = operand<const T>(table, kGradient, chunk);
      T* const first = operand<T>(table, kState0, chunk);
      T* const second = operand<T>(table, kState1, chunk);
      T* const maximum = operand<T>(table, kState2, chunk);
      if (maximum != nullptr) {
        adam_chunk<true>(weight, backup, gradient, first, second, maximum, settings, chunk.size);
      } else {
        adam_chunk<false>(weight, backup, gradient, first, second, maximum, settings, chunk.size);
      }
    });
  });
}

}  // namespace fastsam::cpu
