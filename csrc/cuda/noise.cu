#include "arguments.cuh"
#include "dispatch.h"
#include "fastsam/noise.h"
#include "launch.cuh"
#include "noise_math.h"

namespace fastsam::cuda {
namespace {

// Each thread computes the numbers of one counter at a time and adds them to its kPerCounter elements.
template <class T, class Table>
__global__ void __launch_bounds__(kThreads)
    noise_kernel(const __grid_constant__ Table table, const int64_t* seed_and_step) {
  const BlockChunk chunk = block_chunk(table);
  if (chunk.size == 0) return;
  const NoiseKey key = noise_key(seed_and_step, table.template at<kStream>(chunk.row));
  T* const weight = reinterpret_cast<T*>(table.template at<kWeight>(chunk.row));
  const double* const scale = reinterpret_cast<const double*>(table.template at<kScale>(chunk.row));
  const int64_t row_size = table.template at<kRowSize>(chunk.row);
  const int64_t end = chunk.begin + chunk.size;
  for (int64_t first = chunk.begin + threadIdx.x * kPerCounter; first < end;
       first += kThreads * kPerCounter) {
    float z[kPerCounter];
    standard_normals(key, first / kPerCounter, z);
#pragma unroll
    for (int k = 0; k < kPerCounter; ++k) {
      const int64_t i = first + k;
      if (i < end) {
        const Arithmetic<T> step =
            static_cast<Arithmetic<T>>(scale[i / row_size]) * static_cast<Arithmetic<T>>(z[k]);
        store(load(weight[i]) + step, weight[i]);
      }
    }
  }
}

}  // namespace

void add_noise(const Execution& execution, DType dtype, const TensorTable& table,
               const int64_t* seed_and_step) {
  const DeviceGuard guard(execution.device);
  dispatch(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    launch_phase<kWeight, kScale, kRowSize, kStream>(table, [&](const auto& arguments, unsigned int grid) {
      FASTSAM_LAUNCH_RUN((noise_kernel<T, std::decay_t<decltype(arguments)>>), grid, execution, arguments,
                         seed_and_step);
    });
  });
}

}  // namespace fastsam::cuda
