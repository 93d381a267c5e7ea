// FASTSAM_HD marks the per-element formulas that the CPU and CUDA kernels share.
#pragma once

#if defined(__CUDACC__)
#define FASTSAM_HD __host__ __device__ __forceinline__
#elif defined(__GNUC__)
// Always inlined: of an out-of-line function the linker would keep one copy for all translation units, which
// may be the copy for an instruction set that the processor does not have.
#define FASTSAM_HD inline __attribute__((always_inline))
#else
#define FASTSAM_HD inline
#endif
