// Types that every launch of the native core shares.
#pragma once

#include <cstdint>

namespace fastsam {

enum class DType : int64_t { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };

// Where and how a launch runs. `stream` and `device` are read by the CUDA backend only, `threads` by the
// CPU backend only.
struct Execution {
  int device;    // CUDA device index
  void* stream;  // cudaStream_t
  int threads;   // most OpenMP threads to use
};

}  // namespace fastsam
