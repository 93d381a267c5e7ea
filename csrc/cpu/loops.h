// What a loop over elements needs so that every compiler vectorizes it.
#pragma once

// Inlined into its caller, so that it is compiled for the caller's instruction set.
#if defined(__GNUC__)
#define FASTSAM_INLINE inline __attribute__((always_inline))
#else
#define FASTSAM_INLINE inline
#endif

// The operands of one launch never overlap except element on element, so the loop may be vectorized.
#if defined(__GNUC__) && !defined(__clang__)
#define FASTSAM_INDEPENDENT _Pragma("GCC ivdep")
#elif defined(__clang__)
#define FASTSAM_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define FASTSAM_INDEPENDENT
#endif
