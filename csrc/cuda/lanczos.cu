#include <algorithm>

#include "fastsam/lanczos.h"
#include "lanczos_math.h"
#include "launch.cuh"

namespace fastsam::cuda {
namespace {

// Columns of one tile: what a block holds in shared memory while it walks over the rows of Q.
constexpr int kColumnsPerThread = 4;
constexpr int64_t kTileColumns = kThreads * kColumnsPerThread;
// Blocks over all probes; a block takes several tiles, so that partial sums stay few. A constant, not the
// size of the device: the order of the sums, and so their bits, are the same on every device.
constexpr int64_t kBlocks = 528;

int64_t blocks_per_probe(int64_t probes, int64_t size) {
  const int64_t tiles = (size + kTileColumns - 1) / kTileColumns;
  return std::max<int64_t>(1, std::min(tiles, kBlocks / std::max<int64_t>(probes, 1)));
}

// Views of the scratch memory.
struct Scratch {
  unsigned int* counters;  // [probes], padded to 8 bytes
  double* partials;        // [probes, blocks, count]
  double* first;           // [probes, count]
  double* second;          // [probes, count]

  static int64_t counter_bytes(int64_t probes) { return (probes + 1) / 2 * 8; }

  Scratch(void* memory, int64_t probes, int64_t blocks, int64_t count)
      : counters(static_cast<unsigned int*>(memory)),
        partials(reinterpret_cast<double*>(static_cast<unsigned char*>(memory) + counter_bytes(probes))),
        first(partials + probes * blocks * count),
        second(first + probes * count) {}
};

// Calls body(begin, columns) for the tiles of this block: tile blockIdx.x, and every gridDim.x-th after it.
template <class Body>
__device__ void for_each_tile(int64_t size, const Body& body) {
  for (int64_t begin = blockIdx.x * kTileColumns; begin < size; begin += gridDim.x * kTileColumns) {
    const int64_t left = size - begin;
    body(begin, left < kTileColumns ? left : kTileColumns);
  }
}

// partial[k] += rows[k, begin:begin + columns] . tile for all k, one row a warp at a time; tile [columns]
// shared.
template <class T>
__device__ void project_tile(const T* rows, int64_t row_stride, int64_t count, const T* tile, int64_t columns,
                             double* partial) {
  const int lane = threadIdx.x % kWarp;
  for (int64_t k = threadIdx.x / kWarp; k < count; k += kWarps) {
    const T* const row = rows + k * row_stride;
    double sum = 0.0;
    for (int64_t i = lane; i < columns; i += kWarp) {
      sum += static_cast<double>(row[i]) * static_cast<double>(tile[i]);
    }
    for (int offset = kWarp / 2; offset > 0; offset /= 2) sum += __shfl_down_sync(0xffffffffu, sum, offset);
    if (lane == 0) partial[k] += sum;
  }
}

// vector[i] -= coefficients . rows[:, i] over a tile; a copy of the result goes to `tile` unless it is null.
template <class T>
__device__ void subtract_tile(const T* rows, int64_t row_stride, const double* coefficients, int64_t count,
                              T* vector, int64_t columns, T* tile) {
  double sums[kColumnsPerThread] = {};
  for (int64_t k = 0; k < count; ++k) {
    const T* const row = rows + k * row_stride;
    const double coefficient = coefficients[k];
#pragma unroll
    for (int c = 0; c < kColumnsPerThread; ++c) {
      const int64_t i = threadIdx.x + c * kThreads;
      if (i < columns) sums[c] += coefficient * static_cast<double>(row[i]);
    }
  }
#pragma unroll
  for (int c = 0; c < kColumnsPerThread; ++c) {
    const int64_t i = threadIdx.x + c * kThreads;
    if (i < columns) {
      const T value = static_cast<T>(static_cast<double>(vector[i]) - sums[c]);
      vector[i] = value;
      if (tile != nullptr) tile[i] = value;
    }
  }
}

// The last block of a probe adds partials[blocks, count] to out[count], block after block.
__device__ void add_blocks(const double* partials, int64_t count, double* out) {
  for (int64_t k = threadIdx.x; k < count; k += kThreads) {
    double sum = 0.0;
    for (unsigned int block = 0; block < gridDim.x; ++block) sum += partials[block * count + k];
    out[k] = sum;
  }
}

// One of the first two sweeps: out = Q w, after w -= Q^T coefficients when there are coefficients.
// Grid: (blocks, probes).
template <class T>
__global__ void project_kernel(LanczosStep s, const double* coefficients, double* partials,
                               unsigned int* counters, double* out) {
  FASTSAM_SHARED(T, tile, kTileColumns);
  FASTSAM_SHARED(int, flag, 1);
  const int64_t probe = blockIdx.y;
  const T* const rows = static_cast<const T*>(s.rows) + probe * s.probe_stride;
  T* const vector = static_cast<T*>(s.vector) + probe * s.size;
  double* const partial = partials + (probe * gridDim.x + blockIdx.x) * s.count;
  for (int64_t k = threadIdx.x; k < s.count; k += kThreads) partial[k] = 0.0;
  for_each_tile(s.size, [&](int64_t begin, int64_t columns) {
    if (coefficients == nullptr) {
      for (int64_t i = threadIdx.x; i < columns; i += kThreads) tile[i] = vector[begin + i];
    } else {
      subtract_tile(rows + begin, s.row_stride, coefficients + probe * s.count, s.count, vector + begin,
                    columns, tile);
    }
    __syncthreads();
    project_tile(rows + begin, s.row_stride, s.count, tile, columns, partial);
    __syncthreads();
  });
  if (!is_last_block(counters + probe, gridDim.x, flag)) return;
  add_blocks(partials + probe * gridDim.x * s.count, s.count, out + probe * s.count);
}

// The third sweep: w -= Q^T second, then the norm, and with it the recurrence. Grid: (blocks, probes).
template <class T>
__global__ void finish_kernel(LanczosStep s, Recurrence recurrence, const double* first, const double* second,
                              double* partials, unsigned int* counters) {
  FASTSAM_SHARED(double, warp_sums, kWarps);
  FASTSAM_SHARED(int, flag, 1);
  const int64_t probe = blockIdx.y;
  const T* const rows = static_cast<const T*>(s.rows) + probe * s.probe_stride;
  T* const vector = static_cast<T*>(s.vector) + probe * s.size;
  double squares = 0.0;
  for_each_tile(s.size, [&](int64_t begin, int64_t columns) {
    subtract_tile<T>(rows + begin, s.row_stride, second + probe * s.count, s.count, vector + begin, columns,
                     nullptr);
    for (int64_t i = threadIdx.x; i < columns; i += kThreads) {  // the elements that this thread just wrote
      squares += static_cast<double>(vector[begin + i]) * static_cast<double>(vector[begin + i]);
    }
  });
  squares = block_sum(squares, warp_sums);
  if (threadIdx.x == 0) partials[probe * gridDim.x + blockIdx.x] = squares;
  if (!is_last_block(counters + probe, gridDim.x, flag)) return;
  if (threadIdx.x == 0) {
    double squared_norm = 0.0;
    for (unsigned int block = 0; block < gridDim.x; ++block)
      squared_norm += partials[probe * gridDim.x + block];
    const int64_t last = probe * s.count + s.count - 1;
    advance_recurrence(recurrence, probe, s.step, first[last] + second[last], squared_norm, s.eps);
  }
}

// successor = w / beta by selection: a probe that broke down may hold inf or NaN. Grid: (blocks, probes).
template <class T>
__global__ void divide_kernel(LanczosStep s, Recurrence recurrence) {
  const int64_t probe = blockIdx.y;
  const bool active = recurrence.active[probe] != 0;
  const double beta = recurrence.beta[probe * recurrence.steps + s.step];
  const T* const vector = static_cast<const T*>(s.vector) + probe * s.size;
  T* const successor = static_cast<T*>(s.successor) + probe * s.successor_stride;
  for_each_tile(s.size, [&](int64_t begin, int64_t columns) {
    for (int64_t i = begin + threadIdx.x; i < begin + columns; i += kThreads) {
      successor[i] = active ? static_cast<T>(static_cast<double>(vector[i]) / beta) : T(0);
    }
  });
}

template <class T>
void launch(const Execution& execution, const LanczosStep& s, const Recurrence& recurrence, void* memory) {
  const int64_t blocks = blocks_per_probe(s.probes, s.size);
  const Scratch scratch(memory, s.probes, blocks, s.count);
  const dim3 grid(static_cast<unsigned int>(blocks), static_cast<unsigned int>(s.probes));
  const cudaStream_t stream = stream_of(execution);
  const double* const no_coefficients = nullptr;
  FASTSAM_LAUNCH(project_kernel<T>, grid, kThreads, stream, s, no_coefficients, scratch.partials,
                 scratch.counters, scratch.first);
  FASTSAM_LAUNCH(project_kernel<T>, grid, kThreads, stream, s, static_cast<const double*>(scratch.first),
                 scratch.partials, scratch.counters, scratch.second);
  FASTSAM_LAUNCH(finish_kernel<T>, grid, kThreads, stream, s, recurrence,
                 static_cast<const double*>(scratch.first), static_cast<const double*>(scratch.second),
                 scratch.partials, scratch.counters);
  if (s.successor != nullptr) FASTSAM_LAUNCH(divide_kernel<T>, grid, kThreads, stream, s, recurrence);
  check(cudaGetLastError(), "a Lanczos kernel launch");
}

}  // namespace

int64_t orthogonalize_scratch_bytes(int64_t probes, int64_t count, int64_t size) {
  return Scratch::counter_bytes(probes) +
         static_cast<int64_t>(sizeof(double)) * probes * count * (blocks_per_probe(probes, size) + 2);
}

void orthogonalize(const Execution& execution, DType dtype, const LanczosStep& step,
                   const Recurrence& recurrence, void* memory) {
  const DeviceGuard guard(execution.device);
  switch (dtype) {
    case DType::kFloat32:
      return launch<float>(execution, step, recurrence, memory);
    case DType::kFloat64:
      return launch<double>(execution, step, recurrence, memory);
    default:
      throw std::invalid_argument("orthogonalize: the basis must be float32 or float64");
  }
}

}  // namespace fastsam::cuda
