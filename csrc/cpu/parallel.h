// Threads, instruction sets and sums of the CPU kernels.
#pragma once

#include <algorithm>
#include <cstdint>

#include "loops.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

// Compiles a function for several instruction sets, of which the dynamic loader picks one, so that one binary
// runs on every x86-64. Under sanitizers the function is compiled once: their instrumentation would run in
// the loader's selection, before the sanitizer is initialized.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && \
    __GNUC__ >= 12 && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define FASTSAM_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FASTSAM_CLONES
#endif

namespace fastsam::cpu {

// Smaller launches run on one thread: waking another takes 5 to 50 us, more than it saves.
constexpr int64_t kSerialElements = 1 << 16;

// Orders this thread's streaming stores (stream.h) before all later stores; ordinary stores need no fence.
inline void store_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// Runs body(i) for i in [0, count) on at most `threads` threads. Each body writes only its own output, so the
// assignment of indices to threads does not affect the result.
template <class Body>
void parallel_for(int threads, int64_t count, int64_t elements, const Body& body) {
  const int64_t wanted = elements < kSerialElements ? 1 : std::min<int64_t>(threads, count);
#if defined(_OPENMP)
  if (wanted > 1) {
#pragma omp parallel num_threads(static_cast<int>(wanted))
    {
#pragma omp for schedule(dynamic, 4) nowait
      for (int64_t i = 0; i < count; ++i) body(i);
      store_fence();
    }
    return;
  }
#endif
  (void)wanted;
  for (int64_t i = 0; i < count; ++i) body(i);
  store_fence();
}

// Sum of term(i) over [0, count) in float64, as 16 interleaved sums that are added in a fixed order. They are
// enough to vectorize, and because they are explicit, the order does not depend on the vector width.
template <class Term>
FASTSAM_INLINE double interleaved_sum(int64_t count, const Term& term) {
  constexpr int64_t kLanes = 16;
  double lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] += term(i + lane);
  }
  for (int64_t lane = 0; i < count; ++i, ++lane) lanes[lane] += term(i);
  double sum = 0.0;
  for (int64_t lane = 0; lane < kLanes; ++lane) sum += lanes[lane];
  return sum;
}

}  // namespace fastsam::cpu
