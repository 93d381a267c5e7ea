// A small host emulation of the part of CUDA that the kernels use. The same .cu files compile as C++20 and
// run without a GPU, under AddressSanitizer, UBSan and ThreadSanitizer. Each CUDA thread of a block is a
// std::thread;
// __syncthreads is a barrier, a shuffle is an exchange within a warp, and atomics are std::atomic_ref.
// FASTSAM_SIMT_LIVE_BLOCKS (default 1) is the number of blocks that run concurrently: ThreadSanitizer detects
// races between blocks only if at least two do. Kernels may use only plain loads and stores, shuffles,
// barriers and atomics, and must launch full warps whose threads all reach every barrier.
#pragma once

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define FASTSAM_NOINLINE

struct dim3 {
  unsigned int x, y, z;
  constexpr dim3(unsigned int x_ = 1, unsigned int y_ = 1, unsigned int z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace fastsam::simt {

constexpr unsigned int kLanes = 32;

// Replaces std::barrier, because libstdc++ keeps the waiters of all barriers in shared tables. Those tables
// would order the memory accesses of different blocks, which a device does not, and so hide races from
// ThreadSanitizer.
class Barrier {
 public:
  explicit Barrier(unsigned int threads) { pthread_barrier_init(&barrier_, nullptr, threads); }
  ~Barrier() { pthread_barrier_destroy(&barrier_); }
  Barrier(const Barrier&) = delete;
  Barrier& operator=(const Barrier&) = delete;

  void arrive_and_wait() { pthread_barrier_wait(&barrier_); }

 private:
  pthread_barrier_t barrier_;
};

struct Warp {
  Barrier barrier{kLanes};
  uint64_t slots[kLanes] = {};
};

class Block {
 public:
  explicit Block(unsigned int threads) : barrier(threads), warps(threads / kLanes) {}

  // The `index`-th shared array that the kernel declares, in a separate allocation to detect overruns.
  void* shared(size_t index, size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    while (arrays_.size() <= index) arrays_.push_back(nullptr);
    if (!arrays_[index]) {
      arrays_[index] = std::make_unique<unsigned char[]>(bytes);
      memset(arrays_[index].get(), 0xff, bytes);  // NaN, because shared memory is uninitialized
    }
    return arrays_[index].get();
  }

  Barrier barrier;
  std::vector<Warp> warps;

 private:
  std::mutex mutex_;
  std::vector<std::unique_ptr<unsigned char[]>> arrays_;
};

struct ThreadState {
  dim3 thread_index, block_index, block_size, grid_size;
  Block* block = nullptr;
  size_t shared_arrays = 0;
  bool made_atomic = false;  // whether the thread has made an atomic operation in this block
};

inline thread_local ThreadState current;

inline unsigned int live_blocks() {
  const char* const value = std::getenv("FASTSAM_SIMT_LIVE_BLOCKS");
  return value == nullptr ? 1u : std::max(1u, static_cast<unsigned int>(std::atoi(value)));
}

// Arguments are copied at the launch, as in CUDA. Each host thread runs one CUDA thread index of every
// live_blocks()-th block. It may enter its next block before other threads have left the last one.
template <class... Parameters, class... Arguments>
void launch(dim3 grid, dim3 threads, void (*kernel)(Parameters...), Arguments... arguments) {
  std::vector<std::unique_ptr<Block>> blocks(static_cast<size_t>(grid.x) * grid.y * grid.z);
  for (std::unique_ptr<Block>& block : blocks) block = std::make_unique<Block>(threads.x);
  const size_t lanes = std::min<size_t>(live_blocks(), blocks.size());
  std::vector<std::thread> pool;
  for (size_t lane = 0; lane < lanes; ++lane) {
    for (unsigned int thread = 0; thread < threads.x; ++thread) {
      pool.emplace_back([&, lane, thread] {
        for (size_t index = lane; index < blocks.size(); index += lanes) {
          const dim3 block_index(static_cast<unsigned int>(index % grid.x),
                                 static_cast<unsigned int>(index / grid.x % grid.y),
                                 static_cast<unsigned int>(index / grid.x / grid.y));
          current = ThreadState{dim3(thread), block_index, threads, grid, blocks[index].get()};
          kernel(arguments...);
        }
      });
    }
  }
  for (std::thread& thread : pool) thread.join();
}

template <class T>
T* shared_array(size_t count) {
  return static_cast<T*>(current.block->shared(current.shared_arrays++, count * sizeof(T)));
}

}  // namespace fastsam::simt

#define threadIdx (::fastsam::simt::current.thread_index)
#define blockIdx (::fastsam::simt::current.block_index)
#define blockDim (::fastsam::simt::current.block_size)
#define gridDim (::fastsam::simt::current.grid_size)

#define FASTSAM_LAUNCH(kernel, grid, block, stream, ...) \
  ((void)(stream), ::fastsam::simt::launch(grid, block, kernel, __VA_ARGS__))
#define FASTSAM_SHARED(type, name, count) type* const name = ::fastsam::simt::shared_array<type>(count)

inline void __syncthreads() { ::fastsam::simt::current.block->barrier.arrive_and_wait(); }

// As on the device, atomics are relaxed and order no other accesses. A fence is a read-modify-write of one
// location that all threads share: it releases the thread's earlier writes. It acquires the writes that other
// fences released only after the thread has made an atomic operation, because on the device a fence orders
// through atomics, and a fence before all of them makes no writes of other threads visible. ThreadSanitizer
// models this, but not std::atomic_thread_fence, and so reports a missing fence on either side.
namespace fastsam::simt {
inline std::atomic<unsigned int> fences{0};
}
inline void __threadfence() {
  // Two calls, because ThreadSanitizer requires constant memory orders.
  if (fastsam::simt::current.made_atomic) {
    fastsam::simt::fences.fetch_add(1, std::memory_order_acq_rel);
  } else {
    fastsam::simt::fences.fetch_add(1, std::memory_order_release);
  }
}

namespace fastsam::simt {

template <class T>
T shuffle(T value, unsigned int source) {
  static_assert(sizeof(T) <= sizeof(uint64_t) && std::is_trivially_copyable_v<T>);
  auto& warp = fastsam::simt::current.block->warps[threadIdx.x / fastsam::simt::kLanes];
  const unsigned int lane = threadIdx.x % fastsam::simt::kLanes;
  memcpy(&warp.slots[lane], &value, sizeof(T));
  warp.barrier.arrive_and_wait();
  T result;
  memcpy(&result, &warp.slots[source < fastsam::simt::kLanes ? source : lane], sizeof(T));
  warp.barrier.arrive_and_wait();
  return result;
}

}  // namespace fastsam::simt

template <class T>
T __shfl_down_sync(unsigned int, T value, int offset) {
  return fastsam::simt::shuffle(value,
                                threadIdx.x % fastsam::simt::kLanes + static_cast<unsigned int>(offset));
}

template <class T>
T __shfl_xor_sync(unsigned int, T value, int mask) {
  return fastsam::simt::shuffle(value, threadIdx.x % fastsam::simt::kLanes ^ static_cast<unsigned int>(mask));
}

template <class T>
T atomicAdd(T* address, T value) {
  fastsam::simt::current.made_atomic = true;
  return std::atomic_ref<T>(*address).fetch_add(value, std::memory_order_relaxed);
}

template <class T>
T atomicExch(T* address, T value) {
  fastsam::simt::current.made_atomic = true;
  return std::atomic_ref<T>(*address).exchange(value, std::memory_order_relaxed);
}

// --- runtime calls of the launch code ---------------------------------------------------------------------

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0 };
enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor };

// With FASTSAM_SIMT_SMALL_ARGUMENTS the emulated driver is too old for 32 KB of kernel arguments.
#if !defined(CUDART_VERSION)
#define CUDART_VERSION 13000
#endif
inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = std::getenv("FASTSAM_SIMT_SMALL_ARGUMENTS") == nullptr ? 13000 : 12000;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 9;
  return cudaSuccess;
}

// Two devices, without contexts at first. As in CUDA 12 and later, cudaSetDevice creates a context.
namespace fastsam::simt {
inline int current_device = 0;
inline bool has_context[2] = {false, false};
inline int primary_context_state(int device, unsigned int*, int* active) {
  *active = has_context[device] ? 1 : 0;
  return 0;
}
}  // namespace fastsam::simt

constexpr unsigned long long cudaEnableDefault = 0;
#if CUDART_VERSION >= 12050
inline cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** address, unsigned int,
                                                    unsigned long long) {
#else
inline cudaError_t cudaGetDriverEntryPoint(const char*, void** address, unsigned long long) {
#endif
  *address = reinterpret_cast<void*>(&fastsam::simt::primary_context_state);
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = fastsam::simt::current_device;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  fastsam::simt::current_device = device;
  fastsam::simt::has_context[device] = true;
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
