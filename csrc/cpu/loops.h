// Attributes that let every compiler vectorize the loops over elements.
#pragma once

// Inlines a function, so that it is compiled for the caller's instruction set.
#if defined(__GNUC__)
#define FASTSAM_INLINE inline __attribute__((always_inline))
#else
#define FASTSAM_INLINE inline
#endif

// Declares the iterations of a loop independent: operands of a launch either do not overlap or are identical.
#if defined(__GNUC__) && !defined(__clang__)
#define FASTSAM_INDEPENDENT _Pragma("GCC ivdep")
#elif defined(__clang__)
#define FASTSAM_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define FASTSAM_INDEPENDENT
#endif
