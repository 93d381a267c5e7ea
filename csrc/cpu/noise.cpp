#include "fastsam/noise.h"

#include "chunks.h"
#include "dispatch.h"
#include "noise_math.h"
#include "parallel.h"

namespace fastsam::cpu {
namespace {

constexpr int64_t kChunkElements = 4096;  // a multiple of kPerCounter, so that chunks share no counter

// Fills z [kPerCounter * counters] with the numbers of the counters from `first` on.
FASTSAM_CLONES void fill_normals(const NoiseKey& key_reference, int64_t first, int64_t counters, float* z) {
  const NoiseKey key = key_reference;
  FASTSAM_INDEPENDENT
  for (int64_t i = 0; i < counters; ++i) standard_normals(key, first + i, z + i * kPerCounter);
}

template <class T>
FASTSAM_CLONES void add_scaled(T* weight, const float* z, Arithmetic<T> scale, int64_t size) {
  FASTSAM_INDEPENDENT
  for (int64_t i = 0; i < size; ++i)
    store(load(weight[i]) + scale * static_cast<Arithmetic<T>>(z[i]), weight[i]);
}

template <class T>
void add_noise_chunk(const TensorTable& table, const Chunk& chunk, const int64_t* seed_and_step) {
  float z[kChunkElements];
  fill_normals(noise_key(seed_and_step, table.at(kStream, chunk.tensor)), chunk.begin / kPerCounter,
               (chunk.size + kPerCounter - 1) / kPerCounter, z);
  T* const weight = reinterpret_cast<T*>(table.at(kWeight, chunk.tensor));
  const double* const scale = reinterpret_cast<const double*>(table.at(kScale, chunk.tensor));
  const int64_t row_size = table.at(kRowSize, chunk.tensor);
  const int64_t end = chunk.begin + chunk.size;
  for (int64_t begin = chunk.begin; begin < end;) {  // the part of each row within the chunk
    const int64_t row = begin / row_size;
    const int64_t stop = std::min(end, (row + 1) * row_size);
    add_scaled(weight + begin, z + (begin - chunk.begin), static_cast<Arithmetic<T>>(scale[row]),
               stop - begin);
    begin = stop;
  }
}

}  // namespace

void add_noise(const Execution& execution, DType dtype, const TensorTable& table,
               const int64_t* seed_and_step) {
  const Chunks chunks(table, kChunkElements);
  dispatch(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    parallel_for(execution.threads, chunks.count(), chunks.elements(),
                 [&](int64_t i) { add_noise_chunk<T>(table, chunks[i], seed_and_step); });
  });
}

}  // namespace fastsam::cpu
