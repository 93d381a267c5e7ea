// The scalar part of a Lanczos step, shared by both backends.
#pragma once

#include <math.h>

#include "fastsam/lanczos.h"
#include "host_device.h"

namespace fastsam {

// A Krylov space is exhausted at beta <= 64 eps ||T||: the residual is then rounding noise.
constexpr double kBreakdownFactor = 64.0;

// Writes column `step` of T of one probe from alpha and ||w||^2, and updates bound, active and steps_taken.
FASTSAM_HD void advance_recurrence(const Recurrence& recurrence, int64_t probe, int64_t step, double alpha,
                                   double squared_norm, double eps) {
  double* const alphas = recurrence.alpha + probe * recurrence.steps;
  double* const betas = recurrence.beta + probe * recurrence.steps;
  if (!recurrence.active[probe]) {
    alphas[step] = 0.0;
    betas[step] = 0.0;
    return;
  }
  const double beta = sqrt(squared_norm);
  const double previous = step > 0 ? betas[step - 1] : 0.0;
  const double row_sum = fabs(alpha) + previous + beta;
  // This order of the comparison keeps a NaN, so that the run can report it; fmax would drop it.
  const double bound = row_sum <= recurrence.bound[probe] ? recurrence.bound[probe] : row_sum;
  const bool continues = !(beta <= kBreakdownFactor * eps * bound);
  recurrence.bound[probe] = bound;
  alphas[step] = alpha;
  betas[step] = continues ? beta : 0.0;
  recurrence.active[probe] = continues ? 1 : 0;
  recurrence.steps_taken[probe] += 1;
}

}  // namespace fastsam
