// The table of tensors that is passed by value in the arguments of a kernel, the search for a block's chunk
// in it, and the loop that splits a table into as few launches as the size limit of kernel arguments allows.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "chunks.h"
#include "host_device.h"
#include "launch.cuh"

namespace fastsam::cuda {

// Elements of a chunk, the work of one block: 16 per thread, which are four 16-byte accesses in float32.
constexpr int64_t kChunkElements = 16 * kThreads;

// 1 if the compiler accepts kernels with 32 KB of parameters. Older compilers reject the large form.
#if !defined(FASTSAM_LARGE_ARGUMENTS)
#if CUDART_VERSION >= 12010
#define FASTSAM_LARGE_ARGUMENTS 1
#else
#define FASTSAM_LARGE_ARGUMENTS 0
#endif
#endif

// Limits on the parameters of a kernel together: 4 KB everywhere, and 32,764 bytes from CUDA 12.1 and sm_70
// on.
constexpr int64_t kSmallParameters = 4096;
constexpr int64_t kLargeParameters = 32764;
// Bytes reserved for a kernel's other parameters.
constexpr int64_t kOtherParameters = 256;

// Rows of a TensorTable with only the operands of one phase: the first parameter of a kernel whose parameters
// may take kLimit bytes.
template <int64_t kLimit, Column... kOperands>
struct Arguments {
  static constexpr int64_t kParameterLimit = kLimit;
  static constexpr int64_t kCapacity =
      (kLimit - kOtherParameters - 32) /
      static_cast<int64_t>((sizeof...(kOperands) + 1) * sizeof(int64_t) + 2 * sizeof(int32_t));

  int64_t first_chunk;  // index of this launch's first chunk within the phase
  bool first_run, last_run;
  int32_t first_row;  // index of this launch's first row within the table
  int32_t rows;
  int64_t size[kCapacity];
  int64_t address[sizeof...(kOperands)][kCapacity];
  int32_t chunk_end[kCapacity];        // number of chunks of rows [0, i]
  int32_t group_and_flags[kCapacity];  // group << kFlagBits | flags

  FASTSAM_HD static constexpr int index_of(Column column) {
    const Column operands[] = {kOperands...};
    int index = 0;
    while (operands[index] != column) ++index;
    return index;
  }

  template <Column kColumn>
  __device__ int64_t at(int row) const {
    constexpr int index = index_of(kColumn);
    return address[index][row];
  }
};

// Bytes of consecutive parameters, each at its alignment.
template <class... Parameters>
constexpr int64_t parameter_bytes() {
  int64_t end = 0;
  const auto add = [&end](int64_t size, int64_t alignment) {
    end = (end + alignment - 1) / alignment * alignment + size;
  };
  (add(sizeof(Parameters), alignof(Parameters)), ...);
  return end;
}

// Whether all parameters of a kernel fit the limit of its table.
template <class Table, class... Others>
constexpr bool parameters_fit(void (*)(Table, Others...)) {
  static_assert(std::is_trivially_copyable_v<std::remove_cv_t<Table>>,
                "the driver copies the table byte by byte");
  return parameter_bytes<Table, Others...>() <= std::remove_cv_t<Table>::kParameterLimit;
}

// Launches `kernel` (in parentheses) over one run of rows, which is the first of the variadic arguments.
#define FASTSAM_LAUNCH_RUN(kernel, grid, execution, ...)                                              \
  do {                                                                                                \
    static_assert(parameters_fit(kernel), "the kernel's parameters exceed the limit of their table"); \
    FASTSAM_LAUNCH(kernel, grid, kThreads, stream_of(execution), __VA_ARGS__);                        \
  } while (false)

// A block's part of a launch: elements [begin, begin + size) of one row; size 0 for a block without work.
struct BlockChunk {
  int row;
  int64_t begin;
  int64_t size;
};

template <class Table>
__device__ inline BlockChunk block_chunk(const Table& table) {
  const int32_t block = static_cast<int32_t>(blockIdx.x);
  if (table.rows == 0 || block >= table.chunk_end[table.rows - 1]) return {0, 0, 0};
  int low = 0;
  int high = table.rows - 1;
  while (low < high) {  // first row whose chunks end after this block
    const int middle = (low + high) / 2;
    if (table.chunk_end[middle] > block) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  const int32_t first = low == 0 ? 0 : table.chunk_end[low - 1];
  const int64_t begin = (block - first) * kChunkElements;
  const int64_t left = table.size[low] - begin;
  return {low, begin, left < kChunkElements ? left : kChunkElements};
}

#if FASTSAM_LARGE_ARGUMENTS
// Whether the driver accepts 32 KB of kernel arguments on the current device.
inline bool takes_large_arguments() {
  int driver = 0;
  int device = 0;
  int major = 0;
  check(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute");
  return driver >= 12010 && major >= 7;
}
#endif

// Calls launch(arguments, blocks) for each run of rows in order. An empty table gives one launch, because a
// launch may also write scalars.
template <int64_t kLimit, Column... kOperands, class Launch>
void launch_in_runs(const TensorTable& table, const Launch& launch) {
  using Table = Arguments<kLimit, kOperands...>;
  const Column operands[] = {kOperands...};
  const Chunks chunks(table, kChunkElements);
  int64_t row = 0;
  do {
    Table arguments;
    arguments.rows = static_cast<int32_t>(std::min(Table::kCapacity, table.count - row));
    arguments.first_run = row == 0;
    arguments.first_row = static_cast<int32_t>(row);
    arguments.last_run = row + arguments.rows == table.count;
    arguments.first_chunk = row == 0 ? 0 : chunks.end(row - 1);
    for (int32_t i = 0; i < arguments.rows; ++i) {
      arguments.size[i] = table.at(kSize, row + i);
      arguments.chunk_end[i] = static_cast<int32_t>(chunks.end(row + i) - arguments.first_chunk);
      arguments.group_and_flags[i] =
          static_cast<int32_t>(table.at(kGroup, row + i) << kFlagBits | table.at(kFlags, row + i));
      for (size_t k = 0; k < sizeof...(kOperands); ++k)
        arguments.address[k][i] = table.at(operands[k], row + i);
    }
    const int32_t blocks = arguments.rows == 0 ? 0 : arguments.chunk_end[arguments.rows - 1];
    launch(arguments, static_cast<unsigned int>(std::max(blocks, 1)));
    row += arguments.rows;
  } while (row < table.count);
}

// Launches a phase with its operands, in the large argument form if that saves launches and is accepted.
template <Column... kOperands, class Launch>
void launch_phase(const TensorTable& table, const Launch& launch) {
#if FASTSAM_LARGE_ARGUMENTS
  if (table.count > Arguments<kSmallParameters, kOperands...>::kCapacity && takes_large_arguments()) {
    launch_in_runs<kLargeParameters, kOperands...>(table, launch);
    check(cudaGetLastError(), "a multi-tensor kernel launch");
    return;
  }
#endif
  launch_in_runs<kSmallParameters, kOperands...>(table, launch);
  check(cudaGetLastError(), "a multi-tensor kernel launch");
}

}  // namespace fastsam::cuda
