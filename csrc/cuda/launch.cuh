// Common parts of the CUDA translation units: launch macro, device guard, error checks, block-wide sums. With
// FASTSAM_SIMT the same sources compile as host C++20 against the emulation in testing/simt.h.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "fastsam/types.h"

#if defined(FASTSAM_SIMT)
#include "simt.h"
#else
#include <cuda_runtime.h>
// kernel<<<grid, block, 0, stream>>>(arguments...)
#define FASTSAM_LAUNCH(kernel, grid, block, stream, ...) kernel<<<grid, block, 0, stream>>>(__VA_ARGS__)
// An array in shared memory.
#define FASTSAM_SHARED(type, name, count) __shared__ type name[count]
// Keeps a function that few threads call out of line, so that its registers do not count for all threads.
#define FASTSAM_NOINLINE __noinline__
#endif

namespace fastsam::cuda {

#if defined(FASTSAM_SIMT)
constexpr int kThreads = 64;  // each is a host thread: enough for two warps
#else
constexpr int kThreads = 256;
#endif
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string("fastsam: ") + what + " failed: " + cudaGetErrorString(status));
  }
}

// Whether this process has a context on `device`; true if the driver cannot be asked.
inline bool has_context(int device) {
  using PrimaryContextState = int (*)(int, unsigned int*, int*);
  static const PrimaryContextState state = [] {
    void* address = nullptr;
#if CUDART_VERSION >= 12050
    const cudaError_t status =
        cudaGetDriverEntryPointByVersion("cuDevicePrimaryCtxGetState", &address, 7000, cudaEnableDefault);
#else
    const cudaError_t status =
        cudaGetDriverEntryPoint("cuDevicePrimaryCtxGetState", &address, cudaEnableDefault);
#endif
    return status == cudaSuccess ? reinterpret_cast<PrimaryContextState>(address) : nullptr;
  }();
  unsigned int flags = 0;
  int active = 0;
  return state == nullptr || state(device, &flags, &active) != 0 || active != 0;
}

// Makes a device current and restores the former one. Since CUDA 12, cudaSetDevice creates a context of some
// hundreds of megabytes, so a former device without a context is not restored; torch does the same.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&former_), "cudaGetDevice");
    if (device != former_) check(cudaSetDevice(device), "cudaSetDevice");
    device_ = device;
  }
  ~DeviceGuard() {
    if (device_ != former_ && has_context(former_)) cudaSetDevice(former_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int former_ = 0;
  int device_ = 0;
};

inline cudaStream_t stream_of(const Execution& execution) {
  return static_cast<cudaStream_t>(execution.stream);
}

// Sum over the threads of a block in a fixed order; valid in thread 0. `partials` is shared memory with
// kWarps entries. Ends with a barrier, so that `partials` can be reused.
template <class V>
__device__ V block_sum(V value, V* partials) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_down_sync(0xffffffffu, value, offset);
  if (threadIdx.x % kWarp == 0) partials[threadIdx.x / kWarp] = value;
  __syncthreads();
  V sum = 0;
  if (threadIdx.x == 0) {
    for (int warp = 0; warp < kWarps; ++warp) sum += partials[warp];
  }
  __syncthreads();
  return sum;
}

// Returns true in all threads of the last of `blocks` blocks to arrive, to which all global writes that the
// other blocks made before the call are then visible. The first barrier collects the writes of the block, the
// first fence publishes them before the counter, and the second fence keeps later reads behind it. Resets the
// counter to 0 for the next launch. `flag` is one int in shared memory.
__device__ inline bool is_last_block(unsigned int* counter, unsigned int blocks, int* flag) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    const bool last = atomicAdd(counter, 1u) == blocks - 1;
    if (last) {
      __threadfence();
      atomicExch(counter, 0u);
    }
    *flag = last ? 1 : 0;
  }
  __syncthreads();
  return *flag != 0;
}

}  // namespace fastsam::cuda
