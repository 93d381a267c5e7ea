// Launch API of the noise: normal random numbers that depend on a seed, a step, a stream and an index, and on
// nothing else. fastsam::cpu and fastsam::cuda hold functions of the same names and meanings.
#pragma once

#include "table.h"
#include "types.h"

namespace fastsam {

#define FASTSAM_DECLARE_NOISE_LAUNCHES                                                                     \
  /* w[i] += scale[i / row size] * z(seed, step, stream, i) for every row of the table, z standard normal. \
     seed_and_step [2] is read on the device, so that a captured step draws anew in every replay. */       \
  void add_noise(const Execution& execution, DType dtype, const TensorTable& table,                        \
                 const int64_t* seed_and_step);

namespace cpu {
FASTSAM_DECLARE_NOISE_LAUNCHES
}  // namespace cpu

namespace cuda {
FASTSAM_DECLARE_NOISE_LAUNCHES
}  // namespace cuda

#undef FASTSAM_DECLARE_NOISE_LAUNCHES

}  // namespace fastsam
