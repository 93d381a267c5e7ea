// Launch API of the noise: normal random numbers that are a function of seed, step, stream and index. The
// namespaces fastsam::cpu and fastsam::cuda define the same functions.
#pragma once

#include "table.h"
#include "types.h"

namespace fastsam {

#define FASTSAM_DECLARE_NOISE_LAUNCHES                                                                     \
  /* w[i] += scale[i / row size] * z(seed, step, stream, i) for every row of the table, z standard normal. \
     seed_and_step [2] is read on the device, so that every replay of a captured step adds new noise. */   \
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
