// Marks a per-element formula that the CPU and the CUDA kernels share.
#pragma once

#if defined(__CUDACC__)
#define FASTSAM_HD __host__ __device__ __forceinline__
#elif defined(__GNUC__)
// Never a function of its own: the linker keeps one of those, and which instruction set it was compiled for
// is a matter of luck.
#define FASTSAM_HD inline __attribute__((always_inline))
#else
#define FASTSAM_HD inline
#endif
