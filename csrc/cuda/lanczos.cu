#include <algorithm>
#include <type_traits>

#include "fastsam/lanczos.h"
#include "lanczos_math.h"
#include "launch.cuh"

namespace fastsam::cuda {
namespace {

// A tile is the part of a row of Q that one warp reads at once: four neighboring columns per lane, 512 bytes
// of float32. The second sweep reads a tile of Q twice, and a narrow tile is still in the first-level cache
// the second time: 100 rows take 51 KB per block, and four blocks share a cache of 256 KB.
constexpr int kLaneColumns = 4;
constexpr int kTileColumns = kWarp * kLaneColumns;
// Number of blocks over all probes. Each block processes several tiles, so that there are few partial sums.
// It is a constant and not the size of the device, so that sums have the same order, and bits, on every
// device.
constexpr int64_t kBlocks = 528;
// Blocks per multiprocessor: 32 warps with four rows in flight each, about 64 KB, hide the memory latency.
constexpr int kBlocksPerProcessor = 4;
// Number of rows whose sums over the tiles of a block are in shared memory; those of further rows are in
// global memory.
constexpr int64_t kResidentRows = 512;
// Rows that a warp processes together: enough loads are in flight, and their sums share one tree of shuffles.
constexpr int kRowsAtOnce = 4;
// Range of divisors that round to normal float32 numbers.
constexpr double kSmallestDivisor = 0x1p-126;
constexpr double kLargestDivisor = 0x1p127;

int64_t blocks_per_probe(int64_t probes, int64_t size) {
  const int64_t tiles = (size + kTileColumns - 1) / kTileColumns;
  return std::max<int64_t>(1, std::min(tiles, kBlocks / std::max<int64_t>(probes, 1)));
}

// Coefficients Q w of one Gram-Schmidt pass.
template <class T>
struct Coefficients {
  double* value;  // [probes, count]
  T* rounded;     // [probes, count]; rounded to T for the product with the basis vectors
};

// Views of the scratch memory.
template <class T>
struct Scratch {
  unsigned int* counters;  // [probes], padded to 8 bytes
  double* partials;        // [probes, count, blocks]
  Coefficients<T> first, second;

  static int64_t counter_bytes(int64_t probes) { return (probes + 1) / 2 * 8; }
  static int64_t bytes(int64_t probes, int64_t blocks, int64_t count) {
    return counter_bytes(probes) + static_cast<int64_t>(sizeof(double)) * probes * count * (blocks + 4);
  }

  Scratch(void* memory, int64_t probes, int64_t blocks, int64_t count)
      : counters(static_cast<unsigned int*>(memory)),
        partials(reinterpret_cast<double*>(static_cast<unsigned char*>(memory) + counter_bytes(probes))),
        first{partials + probes * blocks * count,
              reinterpret_cast<T*>(partials + probes * (blocks + 1) * count)},
        second{partials + probes * (blocks + 2) * count,
               reinterpret_cast<T*>(partials + probes * (blocks + 3) * count)} {}
};

// Calls body(begin, columns) for the tiles of this block: tile blockIdx.x, and every gridDim.x-th after it.
template <class Body>
__device__ void for_each_tile(int64_t size, const Body& body) {
  for (int64_t begin = blockIdx.x * int64_t{kTileColumns}; begin < size;
       begin += gridDim.x * int64_t{kTileColumns}) {
    const int64_t left = size - begin;
    body(begin, left < kTileColumns ? static_cast<int>(left) : kTileColumns);
  }
}

// This lane's columns of a tile, 0 beyond its end. Uses 16-byte loads if the address is aligned.
template <class T>
struct LaneColumns {
  T value[kLaneColumns];

  __device__ LaneColumns(const T* tile, int columns) {
    struct alignas(16) Pack {
      T value[kLaneColumns];
    };
    const int first = threadIdx.x % kWarp * kLaneColumns;
    if (first + kLaneColumns <= columns && reinterpret_cast<uintptr_t>(tile) % 16 == 0) {
      const Pack pack = *reinterpret_cast<const Pack*>(tile + first);
#pragma unroll
      for (int c = 0; c < kLaneColumns; ++c) value[c] = pack.value[c];
    } else {
#pragma unroll
      for (int c = 0; c < kLaneColumns; ++c) value[c] = first + c < columns ? tile[first + c] : T(0);
    }
  }
};

// Adds up each of kRowsAtOnce values over the lanes of a warp; lane 8 r returns the sum of value r. Lanes
// first exchange half of their values, so that each continues with fewer: four sums take six shuffles instead
// of twenty.
__device__ double warp_sums_of_rows(const double (&value)[kRowsAtOnce]) {
  const bool upper = (threadIdx.x & 16u) != 0u;
  double pair[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const double given = __shfl_xor_sync(0xffffffffu, upper ? value[r] : value[r + 2], 16);
    pair[r] = (upper ? value[r + 2] : value[r]) + given;
  }
  const bool odd = (threadIdx.x & 8u) != 0u;
  const double given = __shfl_xor_sync(0xffffffffu, odd ? pair[0] : pair[1], 8);
  double sum = (odd ? pair[1] : pair[0]) + given;
  for (int mask = 4; mask > 0; mask /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, mask);
  return sum;
}

// sum_of(k) += rows[k, :columns] . tile[:columns] for the rows k of this warp. Adds in T over the columns of
// a lane, and in float64 across lanes.
template <class T, class SumOf>
__device__ void project_tile(const T* rows, int64_t row_stride, int64_t count, const T* tile, int columns,
                             const SumOf& sum_of) {
  const LaneColumns<T> vector(tile, columns);
  const int lane = threadIdx.x % kWarp;
#pragma unroll 1
  for (int64_t first = threadIdx.x / kWarp; first < count; first += kRowsAtOnce * kWarps) {
    double sums[kRowsAtOnce];
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; ++r) {
      const int64_t k = first + r * kWarps;
      T sum = 0;
      if (k < count) {
        const LaneColumns<T> row(rows + k * row_stride, columns);
#pragma unroll
        for (int c = 0; c < kLaneColumns; ++c) sum += row.value[c] * vector.value[c];
      }
      sums[r] = static_cast<double>(sum);
    }
    const double sum = warp_sums_of_rows(sums);
    const int64_t k = first + lane / 8 * kWarps;
    if (lane % 8 == 0 && k < count) sum_of(k) += sum;
  }
}

// vector -= coefficients . rows over a tile. Each warp adds up its rows into `warp_sums` [kWarps,
// kTileColumns], in T over kRowsAtOnce rows and in float64 across these sums. One thread per column then
// writes the result and calls store(i, value). Ends without a barrier.
template <class T, class Store>
__device__ void subtract_tile(const T* rows, int64_t row_stride, const T* coefficients, int64_t count,
                              T* vector, int columns, double* warp_sums, const Store& store) {
  const int warp = threadIdx.x / kWarp;
  double sums[kLaneColumns] = {};
#pragma unroll 1
  for (int64_t first = warp; first < count; first += kRowsAtOnce * kWarps) {
    T partial[kLaneColumns] = {};
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; ++r) {
      const int64_t k = first + r * kWarps;
      if (k < count) {
        const LaneColumns<T> row(rows + k * row_stride, columns);
        const T coefficient = coefficients[k];
#pragma unroll
        for (int c = 0; c < kLaneColumns; ++c) partial[c] += coefficient * row.value[c];
      }
    }
#pragma unroll
    for (int c = 0; c < kLaneColumns; ++c) sums[c] += static_cast<double>(partial[c]);
  }
#pragma unroll
  for (int c = 0; c < kLaneColumns; ++c) {
    warp_sums[warp * kTileColumns + threadIdx.x % kWarp * kLaneColumns + c] = sums[c];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < columns; i += kThreads) {
    double sum = 0.0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += warp_sums[w * kTileColumns + i];
    const T value = static_cast<T>(static_cast<double>(vector[i]) - sum);
    vector[i] = value;
    store(i, value);
  }
}

// Adds partials [count, blocks] over the blocks, one row per warp at a time. Runs in the last block of a
// probe.
template <class T>
__device__ void add_blocks(const double* partials, int64_t count, double* out, T* rounded) {
  const unsigned int lane = threadIdx.x % kWarp;
  for (int64_t k = threadIdx.x / kWarp; k < count; k += kWarps) {
    double sum = 0.0;
#pragma unroll 4
    for (unsigned int block = lane; block < gridDim.x; block += kWarp) sum += partials[k * gridDim.x + block];
    for (int offset = kWarp / 2; offset > 0; offset /= 2) sum += __shfl_down_sync(0xffffffffu, sum, offset);
    if (lane == 0) {
      out[k] = sum;
      rounded[k] = static_cast<T>(sum);
    }
  }
}

// One of the first two sweeps: w -= Q^T coefficients if they are given, then out = Q w. Grid: (blocks,
// probes).
template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    project_kernel(LanczosStep s, const T* coefficients, double* partials, unsigned int* counters,
                   Coefficients<T> out) {
  FASTSAM_SHARED(T, tile, kTileColumns);
  FASTSAM_SHARED(double, warp_sums, kWarps* kTileColumns);
  FASTSAM_SHARED(double, resident, kResidentRows);
  FASTSAM_SHARED(int, flag, 1);
  const int64_t probe = blockIdx.y;
  const T* const rows = static_cast<const T*>(s.rows) + probe * s.probe_stride;
  T* const vector = static_cast<T*>(s.vector) + probe * s.size;
  double* const partial = partials + probe * s.count * gridDim.x + blockIdx.x;
  const auto sum_of = [&](int64_t k) -> double& {
    return k < kResidentRows ? resident[k] : partial[k * gridDim.x];
  };
  for (int64_t k = threadIdx.x; k < s.count; k += kThreads) sum_of(k) = 0.0;
  __syncthreads();
  for_each_tile(s.size, [&](int64_t begin, int columns) {
    if (coefficients == nullptr) {
      project_tile(rows + begin, s.row_stride, s.count, vector + begin, columns, sum_of);
      return;
    }
    subtract_tile(rows + begin, s.row_stride, coefficients + probe * s.count, s.count, vector + begin,
                  columns, warp_sums, [&](int i, T value) { tile[i] = value; });
    __syncthreads();
    project_tile(rows + begin, s.row_stride, s.count, tile, columns, sum_of);
  });
  __syncthreads();
  for (int64_t k = threadIdx.x; k < s.count && k < kResidentRows; k += kThreads) {
    partial[k * gridDim.x] = resident[k];
  }
  if (!is_last_block(counters + probe, gridDim.x, flag)) return;
  add_blocks(partials + probe * s.count * gridDim.x, s.count, out.value + probe * s.count,
             out.rounded + probe * s.count);
}

// The third sweep: w -= Q^T second, then ||w||^2 and the step of the recurrence. Grid: (blocks, probes).
template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    finish_kernel(LanczosStep s, Recurrence recurrence, Coefficients<T> first, Coefficients<T> second,
                  double* partials, unsigned int* counters) {
  FASTSAM_SHARED(double, warp_sums, kWarps* kTileColumns);
  FASTSAM_SHARED(int, flag, 1);
  const int64_t probe = blockIdx.y;
  const T* const rows = static_cast<const T*>(s.rows) + probe * s.probe_stride;
  T* const vector = static_cast<T*>(s.vector) + probe * s.size;
  double squares = 0.0;
  for_each_tile(s.size, [&](int64_t begin, int columns) {
    subtract_tile(rows + begin, s.row_stride, second.rounded + probe * s.count, s.count, vector + begin,
                  columns, warp_sums,
                  [&](int, T value) { squares += static_cast<double>(value) * static_cast<double>(value); });
    __syncthreads();
  });
  squares = block_sum(squares, warp_sums);
  if (threadIdx.x == 0) partials[probe * gridDim.x + blockIdx.x] = squares;
  if (!is_last_block(counters + probe, gridDim.x, flag)) return;
  double squared_norm = 0.0;
  for (unsigned int block = threadIdx.x; block < gridDim.x; block += kThreads) {
    squared_norm += partials[probe * gridDim.x + block];
  }
  squared_norm = block_sum(squared_norm, warp_sums);
  if (threadIdx.x == 0) {
    const int64_t last = probe * s.count + s.count - 1;
    advance_recurrence(recurrence, probe, s.step, first.value[last] + second.value[last], squared_norm,
                       s.eps);
  }
}

// The quotient by a divisor that is not a normal number of T. Not inlined, because it is rarely needed and
// its float64 division would take registers in every thread.
template <class T>
FASTSAM_NOINLINE __device__ T quotient_in_float64(T value, double divisor) {
  return static_cast<T>(static_cast<double>(value) / divisor);
}

// successor = w / beta, or 0 for an inactive probe. Selects instead of multiplying by 0, because a probe
// after a breakdown may have inf or NaN. Grid: (blocks, probes).
template <class T>
__global__ void __launch_bounds__(kThreads) divide_kernel(LanczosStep s, Recurrence recurrence) {
  const int64_t probe = blockIdx.y;
  const bool active = recurrence.active[probe] != 0;
  const double beta = recurrence.beta[probe * recurrence.steps + s.step];
  const T* const vector = static_cast<const T*>(s.vector) + probe * s.size;
  T* const successor = static_cast<T*>(s.successor) + probe * s.successor_stride;
  const auto fill = [&](const auto& quotient) {
    for (int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x; i < s.size;
         i += gridDim.x * int64_t{kThreads}) {
      successor[i] = active ? quotient(vector[i]) : T(0);
    }
  };
  // Divide in T if beta is in its range: float64 division is about thirty times slower on most GPUs.
  const bool in_range = beta >= kSmallestDivisor && beta <= kLargestDivisor;
  if (std::is_same_v<T, double> || in_range) {
    const T divisor = static_cast<T>(beta);
    fill([divisor](T value) { return value / divisor; });
  } else {
    fill([beta](T value) { return quotient_in_float64(value, beta); });
  }
}

// Three sweeps read Q once each: c1 = Q w; then w -= Q^T c1 with c2 = Q w; then w -= Q^T c2 with ||w||^2. A
// sweep needs the sums of the one before over all blocks, so each is a launch. beta exists only after the
// third, so the division is a fourth, light pass over w.
template <class T>
void launch(const Execution& execution, const LanczosStep& s, const Recurrence& recurrence, void* memory) {
  const int64_t blocks = blocks_per_probe(s.probes, s.size);
  const Scratch<T> scratch(memory, s.probes, blocks, s.count);
  const dim3 grid(static_cast<unsigned int>(blocks), static_cast<unsigned int>(s.probes));
  const cudaStream_t stream = stream_of(execution);
  const T* const no_coefficients = nullptr;
  FASTSAM_LAUNCH(project_kernel<T>, grid, kThreads, stream, s, no_coefficients, scratch.partials,
                 scratch.counters, scratch.first);
  FASTSAM_LAUNCH(project_kernel<T>, grid, kThreads, stream, s, static_cast<const T*>(scratch.first.rounded),
                 scratch.partials, scratch.counters, scratch.second);
  FASTSAM_LAUNCH(finish_kernel<T>, grid, kThreads, stream, s, recurrence, scratch.first, scratch.second,
                 scratch.partials, scratch.counters);
  if (s.successor != nullptr) FASTSAM_LAUNCH(divide_kernel<T>, grid, kThreads, stream, s, recurrence);
  check(cudaGetLastError(), "a Lanczos kernel launch");
}

}  // namespace

int64_t orthogonalize_scratch_bytes(int64_t probes, int64_t count, int64_t size) {
  // The layout of float64, the widest type, in which every member takes 8 bytes per coefficient.
  return Scratch<double>::bytes(probes, blocks_per_probe(probes, size), count);
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
