#include "fastsam/sam.h"

#include <atomic>

#include "chunks.h"
#include "dispatch.h"
#include "parallel.h"
#include "sam_chunks.h"
#include "stream.h"

namespace fastsam::cpu {

// --- choice of the instruction set ----------------------------------------------------------------------

#define FASTSAM_DECLARE_CHUNKS(isa)               \
  namespace isa {                                 \
  const SamChunks<float>& chunks_of(float);       \
  const SamChunks<double>& chunks_of(double);     \
  const SamChunks<BFloat16>& chunks_of(BFloat16); \
  const SamChunks<Float16>& chunks_of(Float16);   \
  }
FASTSAM_DECLARE_CHUNKS(baseline)
#if defined(FASTSAM_X86_LEVELS)
FASTSAM_DECLARE_CHUNKS(x86_64_v3)
FASTSAM_DECLARE_CHUNKS(x86_64_v4)
#endif
#undef FASTSAM_DECLARE_CHUNKS

template <class T>
const SamChunks<T>& sam_chunks() {
#if defined(FASTSAM_X86_LEVELS)
  static const bool v3 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  static const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                         __builtin_cpu_supports("avx512cd");
  if (v4) return x86_64_v4::chunks_of(T{});
  if (v3) return x86_64_v3::chunks_of(T{});
#endif
  return baseline::chunks_of(T{});
}

namespace {

// Address of the chunk's first element in an operand, or null if the table has no such operand.
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

// Whether one operand of all tensors together is too large to stay in the cache until its next reader.
template <class T>
bool exceeds_cache(const TensorTable& table) {
  int64_t elements = 0;
  for (int64_t i = 0; i < table.count; ++i) elements += table.at(kSize, i);
  return elements * static_cast<int64_t>(sizeof(T)) >= kStreamedBytes;
}

template <class Body>
void for_each_chunk(const Execution& execution, const TensorTable& table, const Body& body) {
  const Chunks chunks(table, kChunkElements);
  parallel_for(execution.threads, chunks.count(), chunks.elements(), [&](int64_t i) { body(chunks[i], i); });
}

// --- common parts of the updates ------------------------------------------------------------------------

double loss_scale(const SamScalars& scalars) {
  return scalars.grad_scale == nullptr ? 1.0 : static_cast<double>(*scalars.grad_scale);
}

template <class T>
void restore_chunk(const TensorTable& table, const Chunk& chunk, bool streams) {
  T* const weight = operand<T>(table, kWeight, chunk);
  const T* const backup = operand<T>(table, kBackup, chunk);
  if (backup != nullptr && backup != weight) sam_chunks<T>().copy(backup, weight, streams, chunk.size);
}

// If the step is skipped, restores everything and counts one skipped step. Otherwise calls update(chunk,
// streams) for tensors with a gradient, restores the others, and afterwards increments the update counters:
// they are shared by the chunks of a tensor, which must all read the old value.
template <class T, class Update>
void restore_and_update(const Execution& execution, const TensorTable& table, const SamScalars& scalars,
                        const Update& update) {
  const bool skip = *scalars.found_inf != 0.0f;
  const bool streams = exceeds_cache<T>(table);
  for_each_chunk(execution, table, [&](const Chunk& chunk, int64_t) {
    if (skip || table.at(kGradient, chunk.tensor) == 0) {
      restore_chunk<T>(table, chunk, streams);
    } else {
      // A weight that was not perturbed is its own backup: it is read before it is written, so its cache
      // lines are loaded anyway and streaming stores would gain nothing.
      update(chunk, streams && table.at(kBackup, chunk.tensor) != table.at(kWeight, chunk.tensor));
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
        partials[index] =
            sam_chunks<T>().adaptive_squared_norm(gradient, operand<const T>(table, kWeight, chunk),
                                                  hyper_row(hyper, table, chunk)[kEta], chunk.size);
      } else {
        partials[index] = sam_chunks<T>().squared_norm(gradient, chunk.size);
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
    const bool streams = exceeds_cache<T>(table);
    for_each_chunk(execution, table, [&](const Chunk& chunk, int64_t) {
      const T* const gradient = operand<const T>(table, kGradient, chunk);
      if (gradient == nullptr) return;
      T* const weight = operand<T>(table, kWeight, chunk);
      T* const backup = operand<T>(table, kBackup, chunk);
      if (skip) {
        sam_chunks<T>().copy(weight, backup, streams, chunk.size);
        return;
      }
      const double* const row = hyper_row(scalars.hyper, table, chunk);
      const Ascent<T> ascent{static_cast<A>(ascent_scale(squared_norm, row[kRho], grad_scale)),
                             static_cast<A>(row[kEta]),
                             has_flag(table, chunk, kAdaptive),
                             has_flag(table, chunk, kStochastic),
                             scalars.unchanged != nullptr,
                             rounding_key(squared_norm, chunk.tensor),
                             chunk.begin};
      const int64_t of_chunk = sam_chunks<T>().perturb(weight, gradient, backup, ascent, streams, chunk.size);
      if (of_chunk != 0) unchanged.fetch_add(of_chunk, std::memory_order_relaxed);
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
      if (gradient != nullptr && !sam_chunks<T>().all_finite(gradient, chunk.size)) {
        found.store(true, std::memory_order_relaxed);
      }
    });
  });
  if (found.load()) *found_inf = 1.0f;
}

void sam_restore(const Execution& execution, DType dtype, const TensorTable& table) {
  dispatch(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const bool streams = exceeds_cache<T>(table);
    for_each_chunk(execution, table,
                   [&](const Chunk& chunk, int64_t) { restore_chunk<T>(table, chunk, streams); });
  });
}

void sam_update_sgd(const Execution& execution, DType dtype, const TensorTable& table,
                    const SamScalars& scalars, void*) {
  const double grad_scale = loss_scale(scalars);
  dispatch(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    restore_and_update<T>(execution, table, scalars, [&](const Chunk& chunk, bool streams) {
      const int64_t step = table.at(kStep, chunk.tensor);
      const bool first = step != 0 && *reinterpret_cast<const float*>(step) == 0.0f;
      sam_chunks<T>().sgd(operand<T>(table, kWeight, chunk), operand<const T>(table, kBackup, chunk),
                          operand<const T>(table, kGradient, chunk), operand<T>(table, kState0, chunk), first,
                          sgd_settings<Arithmetic<T>>(hyper_row(scalars.hyper, table, chunk), grad_scale),
                          streams, chunk.size);
    });
  });
}

void sam_update_adam(const Execution& execution, DType dtype, const TensorTable& table,
                     const SamScalars& scalars, void*) {
  const double grad_scale = loss_scale(scalars);
  dispatch(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    restore_and_update<T>(execution, table, scalars, [&](const Chunk& chunk, bool streams) {
      const double step =
          static_cast<double>(*reinterpret_cast<const float*>(table.at(kStep, chunk.tensor))) + 1.0;
      const auto settings =
          adam_settings<Arithmetic<T>>(hyper_row(scalars.hyper, table, chunk), step, grad_scale);
      sam_chunks<T>().adam(operand<T>(table, kWeight, chunk), operand<const T>(table, kBackup, chunk),
                           operand<const T>(table, kGradient, chunk), operand<T>(table, kState0, chunk),
                           operand<T>(table, kState1, chunk), operand<T>(table, kState2, chunk), settings,
                           streams, chunk.size);
    });
  });
}

}  // namespace fastsam::cpu
