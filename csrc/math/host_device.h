// Marks a per-element formula that the CPU and the CUDA kernels share.
#pragma once

#if defined(__CUDACC__)
#define FASTSAM_HD __host__ __device__ __forceinline__
#else
#define FASTSAM_HD inline
#endif
