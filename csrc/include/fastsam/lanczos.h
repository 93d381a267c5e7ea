// Launch API of the Lanczos step. The namespaces fastsam::cpu and fastsam::cuda define the same functions.
#pragma once

#include "types.h"

namespace fastsam {

// The tridiagonal matrices of all probes, on the device.
struct Recurrence {
  double* alpha;         // [probes, steps]
  double* beta;          // [probes, steps]
  double* bound;         // [probes] running bound on ||T||
  uint8_t* active;       // [probes] 0 after breakdown
  int64_t* steps_taken;  // [probes]
  int64_t steps;
};

struct LanczosStep {
  const void* rows;      // Q [probes, count, size], the last row current; last dimension contiguous
  int64_t probe_stride;  // elements between probes of Q
  int64_t row_stride;    // elements between rows of Q
  void* vector;          // w [probes, size], contiguous; overwritten by the residual
  void* successor;       // [probes, size] with successor_stride between probes, or null at the last step
  int64_t successor_stride;
  int64_t probes;
  int64_t count;
  int64_t size;
  int64_t step;  // column of the recurrence that is written
  double eps;    // machine epsilon of the product's dtype
};

#define FASTSAM_DECLARE_LANCZOS_LAUNCHES                                                          \
  /* Bytes of scratch memory for orthogonalize. The caller zero-fills it before its first use. */ \
  int64_t orthogonalize_scratch_bytes(int64_t probes, int64_t count, int64_t size);               \
                                                                                                  \
  /* c1 = Q w; w -= Q^T c1, c2 = Q w; w -= Q^T c2, beta = ||w||; alpha = c1 + c2 at the last row; \
     successor = w / beta, or 0 for a probe after a breakdown. Dtypes: float32, float64. */       \
  void orthogonalize(const Execution& execution, DType dtype, const LanczosStep& step,            \
                     const Recurrence& recurrence, void* scratch);

namespace cpu {
FASTSAM_DECLARE_LANCZOS_LAUNCHES
}  // namespace cpu

namespace cuda {
FASTSAM_DECLARE_LANCZOS_LAUNCHES
}  // namespace cuda

#undef FASTSAM_DECLARE_LANCZOS_LAUNCHES

}  // namespace fastsam
