#include "fastsam/lanczos.h"

#include <stdexcept>

#include "lanczos_math.h"
#include "parallel.h"

namespace fastsam::cpu {
namespace {

// Columns of one task. 100 rows of 2048 float32 columns fit in a second-level cache, so the second sweep,
// which uses a tile of Q twice, reads it from memory once.
constexpr int64_t kTileColumns = 2048;
// Columns of w - Q^T c that are summed together, in float64 registers.
constexpr int64_t kStripColumns = 32;

int64_t tiles_of(int64_t size) { return (size + kTileColumns - 1) / kTileColumns; }

template <class T>
FASTSAM_CLONES double dot(const T* row, const T* vector, int64_t size) {
  return interleaved_sum(
      size, [=](int64_t i) { return static_cast<double>(row[i]) * static_cast<double>(vector[i]); });
}

// vector[i] -= sum over k of coefficients[k] * rows[k, i], with rows [count, size] at stride row_stride.
template <class T>
FASTSAM_CLONES void subtract_projection(const T* rows, int64_t row_stride, const double* coefficients,
                                        int64_t count, T* vector, int64_t size) {
  int64_t begin = 0;
  for (; begin + kStripColumns <= size; begin += kStripColumns) {
    double sums[kStripColumns] = {};
    for (int64_t k = 0; k < count; ++k) {
      const T* const row = rows + k * row_stride + begin;
      const double coefficient = coefficients[k];
      for (int64_t i = 0; i < kStripColumns; ++i) sums[i] += coefficient * static_cast<double>(row[i]);
    }
    for (int64_t i = 0; i < kStripColumns; ++i) {
      vector[begin + i] = static_cast<T>(static_cast<double>(vector[begin + i]) - sums[i]);
    }
  }
  for (int64_t i = begin; i < size; ++i) {
    double sum = 0.0;
    for (int64_t k = 0; k < count; ++k)
      sum += coefficients[k] * static_cast<double>(rows[k * row_stride + i]);
    vector[i] = static_cast<T>(static_cast<double>(vector[i]) - sum);
  }
}

template <class T>
FASTSAM_CLONES void divide(const T* vector, double divisor, T* quotient, int64_t size) {
  FASTSAM_INDEPENDENT
  for (int64_t i = 0; i < size; ++i) quotient[i] = static_cast<T>(static_cast<double>(vector[i]) / divisor);
}

// Views of the scratch memory, all float64.
struct Scratch {
  double* partials;  // [probes, tiles, count]
  double* first;     // [probes, count]
  double* second;    // [probes, count]

  Scratch(void* memory, const LanczosStep& s)
      : partials(static_cast<double*>(memory)),
        first(partials + s.probes * tiles_of(s.size) * s.count),
        second(first + s.probes * s.count) {}
};

// out[p, k] = sum over tiles of partials[p, tile, k], in the order of the tiles.
void add_tiles(const double* partials, int64_t probes, int64_t tiles, int64_t count, double* out) {
  for (int64_t probe = 0; probe < probes; ++probe) {
    for (int64_t k = 0; k < count; ++k) out[probe * count + k] = 0.0;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const double* const partial = partials + (probe * tiles + tile) * count;
      for (int64_t k = 0; k < count; ++k) out[probe * count + k] += partial[k];
    }
  }
}

template <class T>
void orthogonalize_typed(const Execution& execution, const LanczosStep& s, const Recurrence& recurrence,
                         const Scratch& scratch) {
  const int64_t tiles = tiles_of(s.size);
  // Calls body(probe, its rows from the tile's first column, w from there, columns, index of the partial
  // sums) for all tiles of all probes.
  const auto sweep = [&](const auto& body) {
    parallel_for(execution.threads, s.probes * tiles, s.probes * s.size * s.count, [&](int64_t index) {
      const int64_t probe = index / tiles;
      const int64_t begin = index % tiles * kTileColumns;
      body(probe, static_cast<const T*>(s.rows) + probe * s.probe_stride + begin,
           static_cast<T*>(s.vector) + probe * s.size + begin, std::min(kTileColumns, s.size - begin), index);
    });
  };
  const auto project = [&](const T* rows, const T* vector, int64_t columns, int64_t index) {
    double* const partial = scratch.partials + index * s.count;
    for (int64_t k = 0; k < s.count; ++k) partial[k] = dot(rows + k * s.row_stride, vector, columns);
  };

  // First read of Q: c1 = Q w.
  sweep([&](int64_t, const T* rows, T* vector, int64_t columns, int64_t index) {
    project(rows, vector, columns, index);
  });
  add_tiles(scratch.partials, s.probes, tiles, s.count, scratch.first);

  // Second read: w -= Q^T c1 and c2 = Q w. A tile of the new w needs only the same tile of Q, so both fit in
  // one sweep; one Gram-Schmidt pass alone would lose orthogonality by cancellation.
  sweep([&](int64_t probe, const T* rows, T* vector, int64_t columns, int64_t index) {
    subtract_projection(rows, s.row_stride, scratch.first + probe * s.count, s.count, vector, columns);
    project(rows, vector, columns, index);
  });
  add_tiles(scratch.partials, s.probes, tiles, s.count, scratch.second);

  // Third read: w -= Q^T c2 and ||w||^2, which exists only after this sweep; the division is a separate pass.
  sweep([&](int64_t probe, const T* rows, T* vector, int64_t columns, int64_t index) {
    subtract_projection(rows, s.row_stride, scratch.second + probe * s.count, s.count, vector, columns);
    scratch.partials[index] = dot(vector, vector, columns);
  });
  for (int64_t probe = 0; probe < s.probes; ++probe) {
    double squared_norm = 0.0;
    for (int64_t tile = 0; tile < tiles; ++tile) squared_norm += scratch.partials[probe * tiles + tile];
    const int64_t last = probe * s.count + s.count - 1;
    advance_recurrence(recurrence, probe, s.step, scratch.first[last] + scratch.second[last], squared_norm,
                       s.eps);
  }

  if (s.successor == nullptr) return;
  sweep([&](int64_t probe, const T*, T* vector, int64_t columns, int64_t index) {
    T* const quotient =
        static_cast<T*>(s.successor) + probe * s.successor_stride + index % tiles * kTileColumns;
    if (recurrence.active[probe]) {
      divide(vector, recurrence.beta[probe * recurrence.steps + s.step], quotient, columns);
    } else {
      std::fill(quotient, quotient + columns, T(0));
    }
  });
}

}  // namespace

int64_t orthogonalize_scratch_bytes(int64_t probes, int64_t count, int64_t size) {
  return static_cast<int64_t>(sizeof(double)) * probes * count * (tiles_of(size) + 2);
}

void orthogonalize(const Execution& execution, DType dtype, const LanczosStep& step,
                   const Recurrence& recurrence, void* memory) {
  const Scratch scratch(memory, step);
  switch (dtype) {
    case DType::kFloat32:
      return orthogonalize_typed<float>(execution, step, recurrence, scratch);
    case DType::kFloat64:
      return orthogonalize_typed<double>(execution, step, recurrence, scratch);
    default:
      throw std::invalid_argument("orthogonalize: the basis must be float32 or float64");
  }
}

}  // namespace fastsam::cpu
