// Launch API of the SAM phases: gradient norm, perturbation with backup, finite check, restore, and the
// restore fused with the base optimizer's update. One call covers all parameters of one dtype and device.
// The namespaces fastsam::cpu and fastsam::cuda define the same functions.
#pragma once

#include "table.h"
#include "types.h"

namespace fastsam {

// Columns of the block of hyperparameters, float64 [groups, kHyperColumns] on the device. Python reads the
// names and their order from this list.
#define FASTSAM_HYPER_COLUMNS(COLUMN) \
  COLUMN(kRho)                        \
  COLUMN(kEta)                        \
  COLUMN(kLr)                         \
  COLUMN(kWeightDecay)                \
  COLUMN(kMomentum)                   \
  COLUMN(kDampening)                  \
  COLUMN(kNesterov)                   \
  COLUMN(kMaximize)                   \
  COLUMN(kBeta1)                      \
  COLUMN(kBeta2)                      \
  COLUMN(kEps)                        \
  COLUMN(kDecoupled)

enum Hyper : int64_t { FASTSAM_HYPER_COLUMNS(FASTSAM_ENUMERATOR) kHyperColumns };

// Device scalars of one optimizer.
struct SamScalars {
  const double* hyper;  // [group_count, kHyperColumns]
  int64_t group_count;
  const double* squared_norms;  // [norm_count]; their sum is ||T_w g||^2 over all buckets
  int64_t norm_count;
  float* found_inf;         // 1 if this step must be skipped; written by perturb and check
  const float* grad_scale;  // loss scale by which the gradients are still multiplied, or null for 1
  int64_t* skipped_steps;   // incremented once by an update that is skipped, or null
  int64_t* unchanged;       // += elements that a nonzero perturbation did not change, or null
};

#define FASTSAM_DECLARE_SAM_LAUNCHES                                                                         \
  /* Bytes of scratch memory for sam_norm and the updates. The caller zero-fills it before its first use. */ \
  int64_t sam_scratch_bytes(const TensorTable& table);                                                       \
                                                                                                             \
  /* squared_norm[0] = sum over tensors with a gradient of ||T_w g||^2, in float64, in a fixed order. */     \
  void sam_norm(const Execution& execution, DType dtype, const TensorTable& table, const double* hyper,      \
                double* squared_norm, void* scratch);                                                        \
                                                                                                             \
  /* backup = w; w += T_w^2 g rho / (norm + 1e-12), for tensors with a gradient. If the factor is not        \
     finite, w stays the same and found_inf is set to 1, else to 0. The random bits of stochastic            \
     rounding are a function of the squared norm, the row in the table and the offset in memory. */          \
  void sam_perturb(const Execution& execution, DType dtype, const TensorTable& table,                        \
                   const SamScalars& scalars);                                                               \
                                                                                                             \
  /* found_inf = 1 if any gradient is inf or NaN; never sets it to 0. */                                     \
  void sam_check(const Execution& execution, DType dtype, const TensorTable& table, float* found_inf);       \
                                                                                                             \
  /* w = backup, bit for bit. */                                                                             \
  void sam_restore(const Execution& execution, DType dtype, const TensorTable& table);                       \
                                                                                                             \
  /* w = update(backup, g, state), or only w = backup without a gradient or if found_inf is set. */          \
  void sam_update_sgd(const Execution& execution, DType dtype, const TensorTable& table,                     \
                      const SamScalars& scalars, void* scratch);                                             \
  void sam_update_adam(const Execution& execution, DType dtype, const TensorTable& table,                    \
                       const SamScalars& scalars, void* scratch);

namespace cpu {
FASTSAM_DECLARE_SAM_LAUNCHES
}  // namespace cpu

namespace cuda {
FASTSAM_DECLARE_SAM_LAUNCHES
}  // namespace cuda

#undef FASTSAM_DECLARE_SAM_LAUNCHES

}  // namespace fastsam
