// What every CUDA translation unit needs: the launch macro, the device guard and error checks. With
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
// An array in the memory that the threads of a block share.
#define FASTSAM_SHARED(type, name, count) __shared__ type name[count]
// Keeps a function that few threads run, and its registers, out of the code that all threads run.
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

// True where this process has a context on `device`, or where the driver does not say.
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

// Makes a device current and puts the former one back. Since CUDA 12 cudaSetDevice creates a context, some
// hundreds of megabytes, so a former device on which the process has none stays as it is; torch does the
// same.
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

// Sum over the threads of a block, in a fixed order; the result is valid in thread 0. `partials` is shared
// memory of kWarps entries. Ends with a barrier, so that `partials` may be used again.
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

// True in every thread of the block that arrives last of `blocks`, after which all their global writes made
// before the call are visible to it. Leaves the counter at 0 for the next launch. `flag` is one shared int.
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
