// Types that all launches share.
#pragma once

#include <cstdint>

namespace fastsam {

enum class DType : int64_t { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };

// Execution context of a launch. Only the CUDA backend reads `device` and `stream`, only the CPU backend
// reads `threads`.
struct Execution {
  int device;    // CUDA device index
  void* stream;  // cudaStream_t
  int threads;   // maximum number of OpenMP threads
};

}  // namespace fastsam
