#include <type_traits>

#include "arguments.cuh"
#include "dispatch.h"
#include "fastsam/sam.h"
#include "launch.cuh"
#include "sam_math.h"

namespace fastsam::cuda {
namespace {

// --- element loops --------------------------------------------------------------------------------------

// Blocks of 256 threads per multiprocessor, for dtypes of 4 or 8 bytes, bfloat16 and float16: the largest
// number whose registers (40 per thread for six blocks, 48 for five, 64 for four, 80 for three) suffice
// without spills. 0 sets no bound; for these kernels the compiler then reaches more blocks than with any
// bound.
template <class T>
constexpr int blocks_of(int wide, int bfloat16, int float16) {
  return std::is_same_v<T, BFloat16> ? bfloat16 : std::is_same_v<T, Float16> ? float16 : wide;
}
template <class T>
constexpr int kPerturbBlocks = blocks_of<T>(6, 4, 0);

template <class T, int kSize>
struct alignas(sizeof(T) * kSize) Pack {
  T value[kSize];
};

// Calls element.load(i, registers) and then element.apply(i, registers) for all elements of a chunk. If all
// operands are aligned (`addresses` is the bitwise or of their addresses), elements are processed in packs of
// 16 bytes, of which kUnroll are loaded before the first is used, so that enough bytes are in flight. Other
// elements are processed one at a time.
template <class T, int kUnroll = 2, class Element>
__device__ void sweep(Element& element, int64_t size, int64_t addresses) {
  constexpr int kPack = 16 / sizeof(T);
  const int64_t packs = addresses % 16 == 0 ? size / kPack : 0;
#pragma unroll 1
  for (int64_t first = threadIdx.x; first < packs; first += kThreads * kUnroll) {
    typename Element::template Registers<kPack> registers[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t pack = first + u * kThreads;
      if (pack < packs) element.load(pack * kPack, registers[u]);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t pack = first + u * kThreads;
      if (pack < packs) element.apply(pack * kPack, registers[u]);
    }
  }
#pragma unroll 1
  for (int64_t i = packs * kPack + threadIdx.x; i < size; i += kThreads) {
    typename Element::template Registers<1> registers;
    element.load(i, registers);
    element.apply(i, registers);
  }
}

template <int kPack, class T>
__device__ Pack<T, kPack> read(const T* address) {
  return *reinterpret_cast<const Pack<T, kPack>*>(address);
}

template <int kPack, class T>
__device__ void write(T* address, const Pack<T, kPack>& pack) {
  *reinterpret_cast<Pack<T, kPack>*>(address) = pack;
}

template <class T>
__device__ T* at(int64_t address, int64_t begin) {
  return address == 0 ? nullptr : reinterpret_cast<T*>(address) + begin;
}

__device__ bool has_flag(int32_t group_and_flags, Flag flag) { return (group_and_flags & flag) != 0; }

__device__ const double* hyper_row(const double* hyper, int32_t group_and_flags) {
  return hyper + (group_and_flags >> kFlagBits) * kHyperColumns;
}

__device__ double loss_scale(const SamScalars& scalars) {
  return scalars.grad_scale == nullptr ? 1.0 : static_cast<double>(*scalars.grad_scale);
}

// --- norm -----------------------------------------------------------------------------------------------

// Bounds within which a float32 sum of squares is accurate. Outside, squares overflow or lose bits as
// subnormals. NaN is outside.
constexpr float kSmallestSquares = 0x1p-100f;
constexpr float kLargestSquares = 0x1p127f;

// Adds up (T_w g)^2, in type A within a pack and in float64 across packs.
template <class T, class A>
struct NormElement {
  const T* gradient;  // [size]
  const T* weight;    // [size]; null if the norm is not adaptive
  A eta;
  double sum;
  bool in_range;  // whether the sums of all packs were within the bounds

  template <int kPack>
  struct Registers {
    Pack<T, kPack> g, w;
  };

  template <int kPack>
  __device__ void load(int64_t i, Registers<kPack>& r) const {
    r.g = read<kPack>(gradient + i);
    if (weight != nullptr) r.w = read<kPack>(weight + i);
  }

  // As load(), for addresses that are not aligned.
  template <int kPack>
  __device__ void gather(int64_t i, Registers<kPack>& r) const {
    for (int k = 0; k < kPack; ++k) {
      r.g.value[k] = gradient[i + k];
      if (weight != nullptr) r.w.value[k] = weight[i + k];
    }
  }

  template <int kPack>
  __device__ void apply(int64_t, const Registers<kPack>& r) {
    A squares = 0;
    bool zero = true;
    for (int k = 0; k < kPack; ++k) {
      A value = fastsam::load(r.g.value[k]);
      zero = zero && value == 0;
      if (weight != nullptr) value *= normalization<A>(fastsam::load(r.w.value[k]), eta);
      squares += value * value;
    }
    sum += static_cast<double>(squares);
    if constexpr (std::is_same_v<A, float>) {
      in_range = in_range && (zero || (squares >= kSmallestSquares && squares <= kLargestSquares));
    }
  }
};

// As sweep(), for operands that are not aligned: the same thread adds the same packs in the same order, so
// that equal gradients have equal norms wherever they lie. Not inlined, because few gradients need it and its
// registers should not burden the kernel.
template <class T, class A>
FASTSAM_NOINLINE __device__ NormElement<T, A> gathered_squares(NormElement<T, A> element, int64_t size) {
  constexpr int kPack = 16 / sizeof(T);
  const int64_t packs = size / kPack;
#pragma unroll 1
  for (int64_t pack = threadIdx.x; pack < packs; pack += kThreads) {
    typename NormElement<T, A>::template Registers<kPack> registers;
    element.gather(pack * kPack, registers);
    element.apply(pack * kPack, registers);
  }
#pragma unroll 1
  for (int64_t i = packs * kPack + threadIdx.x; i < size; i += kThreads) {
    typename NormElement<T, A>::template Registers<1> registers;
    element.gather(i, registers);
    element.apply(i, registers);
  }
  return element;
}

// Writes the sum of each chunk to partials [phase_chunks]. The last block of the last launch, found by
// counter [1], adds them in a fixed order; floating-point atomics would add in the order of arrival.
template <class T, class Table>
__global__ void __launch_bounds__(kThreads)
    norm_kernel(const __grid_constant__ Table table, const double* hyper, double* partials,
                unsigned int* counter, int64_t phase_chunks, double* squared_norm) {
  FASTSAM_SHARED(double, warp_sums, kWarps);
  FASTSAM_SHARED(int, flag, 1);
  const BlockChunk chunk = block_chunk(table);
  double sum = 0.0;
  if (chunk.size > 0) {
    const int32_t group_and_flags = table.group_and_flags[chunk.row];
    const int64_t gradient = table.template at<kGradient>(chunk.row);
    const int64_t weight = has_flag(group_and_flags, kAdaptive) ? table.template at<kWeight>(chunk.row) : 0;
    if (gradient != 0) {
      const T* const g = at<const T>(gradient, chunk.begin);
      const T* const w = at<const T>(weight, chunk.begin);
      const double eta = hyper_row(hyper, group_and_flags)[kEta];
      NormElement<T, Arithmetic<T>> element{g, w, static_cast<Arithmetic<T>>(eta), 0.0, true};
      if ((gradient | weight) % 16 == 0) {
        sweep<T>(element, chunk.size, 0);
      } else {
        element = gathered_squares(element, chunk.size);
      }
      if (!element.in_range) {
        sum = gathered_squares(NormElement<T, double>{g, w, eta, 0.0, true}, chunk.size).sum;
      } else {
        sum = element.sum;
      }
    }
  }
  sum = block_sum(sum, warp_sums);
  if (threadIdx.x == 0 && chunk.size > 0) partials[table.first_chunk + blockIdx.x] = sum;
  if (!table.last_run || !is_last_block(counter, gridDim.x, flag)) return;
  double total = 0.0;
  for (int64_t i = threadIdx.x; i < phase_chunks; i += kThreads) total += partials[i];
  total = block_sum(total, warp_sums);
  if (threadIdx.x == 0) *squared_norm = total;
}

// --- perturb --------------------------------------------------------------------------------------------

// Settings of the ascent for one block, computed from the device scalars.
template <class A>
struct AscentSettings {
  A scale, eta;
  bool skip;
  double squared_norm;
};

// The settings for the hyperparameters `row` (null for a block without a tensor), valid in the first thread.
// One warp calls it for its block and distributes the groups over its lanes. No other thread may run it,
// because float64 is slow on most GPUs.
template <class A>
FASTSAM_NOINLINE __device__ AscentSettings<A> ascent_settings(const SamScalars& scalars, const double* row) {
  double squared_norm = 0.0;
  for (int64_t i = 0; i < scalars.norm_count; ++i) squared_norm += scalars.squared_norms[i];
  const double grad_scale = loss_scale(scalars);
  int skip = is_finite(squared_norm) ? 0 : 1;
  for (int64_t group = threadIdx.x; group < scalars.group_count; group += kWarp) {
    const double rho = scalars.hyper[group * kHyperColumns + kRho];
    if (!is_finite(ascent_scale(squared_norm, rho, grad_scale))) skip = 1;
  }
  for (int offset = kWarp / 2; offset > 0; offset /= 2) skip |= __shfl_down_sync(0xffffffffu, skip, offset);
  if (row == nullptr) return {0, 0, skip != 0, squared_norm};
  return {static_cast<A>(ascent_scale(squared_norm, row[kRho], grad_scale)), static_cast<A>(row[kEta]),
          skip != 0, squared_norm};
}

template <class T>
struct PerturbElement {
  T* weight;          // [size]
  const T* gradient;  // [size]
  T* backup;          // [size]
  Arithmetic<T> scale, eta;
  bool skip, adaptive, stochastic;
  NoiseKey key;   // key of the stochastic rounding
  int64_t begin;  // index of the chunk's first element in its tensor
  int32_t unchanged;

  template <int kPack>
  struct Registers {
    Pack<T, kPack> w, g;
  };

  template <int kPack>
  __device__ void load(int64_t i, Registers<kPack>& r) const {
    r.w = read<kPack>(weight + i);
    r.g = read<kPack>(gradient + i);
  }

  template <int kPack>
  __device__ void apply(int64_t i, const Registers<kPack>& r) {
    write<kPack>(backup + i, r.w);
    if (skip) return;
    // All elements of a pack share one counter: a pack of 16-bit elements has kRoundedPerCounter elements and
    // begins at a multiple of that.
    uint32_t words[4];
    if (stochastic) random_words(key, (begin + i) / kRoundedPerCounter, words);
    Pack<T, kPack> result;
    for (int k = 0; k < kPack; ++k) {
      const Arithmetic<T> w = fastsam::load(r.w.value[k]);
      const Arithmetic<T> g = fastsam::load(r.g.value[k]);
      const Arithmetic<T> top = perturbed(w, g, scale, eta, adaptive);
      if (stochastic) {
        store_at_random(top, rounding_bits(words, (begin + i + k) % kRoundedPerCounter), result.value[k]);
      } else {
        store(top, result.value[k]);
      }
      unchanged += fastsam::load(result.value[k]) == w && g != 0 ? 1 : 0;
    }
    write<kPack>(weight + i, result);
  }
};

template <class T, class Table>
__global__ void __launch_bounds__(kThreads, kPerturbBlocks<T>)
    perturb_kernel(const __grid_constant__ Table table, const __grid_constant__ SamScalars scalars) {
  FASTSAM_SHARED(int32_t, warp_sums, kWarps);
  FASTSAM_SHARED(AscentSettings<Arithmetic<T>>, ascent, 1);
  const BlockChunk chunk = block_chunk(table);
  const int32_t group_and_flags = chunk.size == 0 ? 0 : table.group_and_flags[chunk.row];
  if (threadIdx.x < kWarp) {
    const double* const row = chunk.size == 0 ? nullptr : hyper_row(scalars.hyper, group_and_flags);
    const AscentSettings<Arithmetic<T>> settings = ascent_settings<Arithmetic<T>>(scalars, row);
    if (threadIdx.x == 0) {
      *ascent = settings;
      if (blockIdx.x == 0 && table.first_run) *scalars.found_inf = settings.skip ? 1.0f : 0.0f;
    }
  }
  if (chunk.size == 0) return;
  const int64_t gradient = table.template at<kGradient>(chunk.row);
  if (gradient == 0) return;
  __syncthreads();
  const int64_t weight = table.template at<kWeight>(chunk.row);
  const int64_t backup = table.template at<kBackup>(chunk.row);
  PerturbElement<T> element{at<T>(weight, chunk.begin),
                            at<const T>(gradient, chunk.begin),
                            at<T>(backup, chunk.begin),
                            ascent->scale,
                            ascent->eta,
                            ascent->skip,
                            has_flag(group_and_flags, kAdaptive),
                            sizeof(T) == 2 && has_flag(group_and_flags, kStochastic),
                            rounding_key(ascent->squared_norm, table.first_row + chunk.row),
                            chunk.begin,
                            0};
  sweep<T>(element, chunk.size, weight | gradient | backup);
  if (scalars.unchanged == nullptr) return;
  // One atomic per block: one per thread, all on the same address, would cost more than the perturbation.
  const int32_t unchanged = block_sum(element.unchanged, warp_sums);
  if (threadIdx.x == 0 && unchanged != 0) {
    atomicAdd(reinterpret_cast<unsigned long long*>(scalars.unchanged),
              static_cast<unsigned long long>(unchanged));
  }
}

// --- check ----------------------------------------------------------------------------------------------

template <class T>
struct CheckElement {
  const T* gradient;  // [size]
  bool finite;

  template <int kPack>
  struct Registers {
    Pack<T, kPack> g;
  };

  template <int kPack>
  __device__ void load(int64_t i, Registers<kPack>& r) const {
    r.g = read<kPack>(gradient + i);
  }

  template <int kPack>
  __device__ void apply(int64_t, const Registers<kPack>& r) {
    for (int k = 0; k < kPack; ++k) finite = finite && is_finite(fastsam::load(r.g.value[k]));
  }
};

template <class T, class Table>
__global__ void __launch_bounds__(kThreads)
    check_kernel(const __grid_constant__ Table table, float* found_inf) {
  const BlockChunk chunk = block_chunk(table);
  if (chunk.size == 0) return;
  const int64_t gradient = table.template at<kGradient>(chunk.row);
  if (gradient == 0) return;
  CheckElement<T> element{at<const T>(gradient, chunk.begin), true};
  sweep<T>(element, chunk.size, gradient);
  if (!element.finite) atomicExch(found_inf, 1.0f);
}

// --- restore and update ---------------------------------------------------------------------------------

template <class T>
struct RestoreElement {
  T* weight;        // [size]
  const T* backup;  // [size]

  template <int kPack>
  struct Registers {
    Pack<T, kPack> w;
  };

  template <int kPack>
  __device__ void load(int64_t i, Registers<kPack>& r) const {
    r.w = read<kPack>(backup + i);
  }

  template <int kPack>
  __device__ void apply(int64_t i, const Registers<kPack>& r) const {
    write<kPack>(weight + i, r.w);
  }
};

template <class T, class Table>
__device__ void restore_block(const Table& table, const BlockChunk& chunk) {
  const int64_t weight = table.template at<kWeight>(chunk.row);
  const int64_t backup = table.template at<kBackup>(chunk.row);
  if (backup == 0 || backup == weight) return;
  RestoreElement<T> element{at<T>(weight, chunk.begin), at<const T>(backup, chunk.begin)};
  sweep<T>(element, chunk.size, weight | backup);
}

template <class T, class Table>
__global__ void __launch_bounds__(kThreads) restore_kernel(const __grid_constant__ Table table) {
  const BlockChunk chunk = block_chunk(table);
  if (chunk.size > 0) restore_block<T>(table, chunk);
}

template <class T>
struct SgdElement {
  T* weight;          // [size]
  const T* backup;    // [size]
  const T* gradient;  // [size]
  T* momentum;        // [size]; null without momentum
  SgdSettings<Arithmetic<T>> settings;
  bool first;

  template <int kPack>
  struct Registers {
    Pack<T, kPack> w, g, m;
  };

  template <int kPack>
  __device__ void load(int64_t i, Registers<kPack>& r) const {
    r.w = read<kPack>(backup + i);
    r.g = read<kPack>(gradient + i);
    if (momentum != nullptr && !first) r.m = read<kPack>(momentum + i);
  }

  template <int kPack>
  __device__ void apply(int64_t i, Registers<kPack>& r) const {
    const bool has_momentum = momentum != nullptr;
    for (int k = 0; k < kPack; ++k) {
      Arithmetic<T> buffer = has_momentum && !first ? fastsam::load(r.m.value[k]) : Arithmetic<T>(0);
      store(sgd_step(fastsam::load(r.w.value[k]), fastsam::load(r.g.value[k]), buffer, has_momentum, first,
                     settings),
            r.w.value[k]);
      store(buffer, r.m.value[k]);
    }
    if (has_momentum) write<kPack>(momentum + i, r.m);
    write<kPack>(weight + i, r.w);
  }
};

template <class T>
struct AdamElement {
  T* weight;          // [size]
  const T* backup;    // [size]
  const T* gradient;  // [size]
  T* first;           // [size]
  T* second;          // [size]
  T* maximum;         // [size]; null without amsgrad
  AdamSettings<Arithmetic<T>> settings;

  template <int kPack>
  struct Registers {
    Pack<T, kPack> w, g, m, v, v_max;
  };

  template <int kPack>
  __device__ void load(int64_t i, Registers<kPack>& r) const {
    r.w = read<kPack>(backup + i);
    r.g = read<kPack>(gradient + i);
    r.m = read<kPack>(first + i);
    r.v = read<kPack>(second + i);
    if (maximum != nullptr) r.v_max = read<kPack>(maximum + i);
  }

  template <int kPack>
  __device__ void apply(int64_t i, Registers<kPack>& r) const {
    for (int k = 0; k < kPack; ++k) {
      Arithmetic<T> m = fastsam::load(r.m.value[k]);
      Arithmetic<T> v = fastsam::load(r.v.value[k]);
      Arithmetic<T> v_max = maximum != nullptr ? fastsam::load(r.v_max.value[k]) : Arithmetic<T>(0);
      const Arithmetic<T> w = fastsam::load(r.w.value[k]);
      const Arithmetic<T> g = fastsam::load(r.g.value[k]);
      store(adam_step(w, g, m, v, v_max, maximum != nullptr, settings), r.w.value[k]);
      store(m, r.m.value[k]);
      store(v, r.v.value[k]);
      if (maximum != nullptr) store(v_max, r.v_max.value[k]);
    }
    write<kPack>(first + i, r.m);
    write<kPack>(second + i, r.v);
    if (maximum != nullptr) write<kPack>(maximum + i, r.v_max);
    write<kPack>(weight + i, r.w);
  }
};

struct Sgd {
  template <class A>
  using Settings = SgdSettings<A>;

  // One thread calls it for its block. No other thread may run it, because float64 is slow on most GPUs.
  template <class A, class Table>
  static FASTSAM_NOINLINE __device__ SgdSettings<A> settings(const Table&, const BlockChunk&,
                                                             const double* row, double grad_scale) {
    return sgd_settings<A>(row, grad_scale);
  }

  template <class T, class Table>
  static __device__ void update(const Table& table, const BlockChunk& chunk,
                                const SgdSettings<Arithmetic<T>>& settings) {
    const int64_t weight = table.template at<kWeight>(chunk.row);
    const int64_t backup = table.template at<kBackup>(chunk.row);
    const int64_t gradient = table.template at<kGradient>(chunk.row);
    const int64_t momentum = table.template at<kState0>(chunk.row);
    const int64_t step = table.template at<kStep>(chunk.row);
    SgdElement<T> element{at<T>(weight, chunk.begin),
                          at<const T>(backup, chunk.begin),
                          at<const T>(gradient, chunk.begin),
                          at<T>(momentum, chunk.begin),
                          settings,
                          step != 0 && *reinterpret_cast<const float*>(step) == 0.0f};
    sweep<T>(element, chunk.size, weight | backup | gradient | momentum);
  }
};

struct Adam {
  template <class A>
  using Settings = AdamSettings<A>;

  // One thread calls it for its block, as above: each power takes about a hundred float64 operations.
  template <class A, class Table>
  static FASTSAM_NOINLINE __device__ AdamSettings<A> settings(const Table& table, const BlockChunk& chunk,
                                                              const double* row, double grad_scale) {
    const double step = *reinterpret_cast<const float*>(table.template at<kStep>(chunk.row)) + 1.0;
    return adam_settings<A>(row, step, grad_scale);
  }

  template <class T, class Table>
  static __device__ void update(const Table& table, const BlockChunk& chunk,
                                const AdamSettings<Arithmetic<T>>& settings) {
    const int64_t weight = table.template at<kWeight>(chunk.row);
    const int64_t backup = table.template at<kBackup>(chunk.row);
    const int64_t gradient = table.template at<kGradient>(chunk.row);
    const int64_t first = table.template at<kState0>(chunk.row);
    const int64_t second = table.template at<kState1>(chunk.row);
    const int64_t maximum = table.template at<kState2>(chunk.row);
    AdamElement<T> element{at<T>(weight, chunk.begin),
                           at<const T>(backup, chunk.begin),
                           at<const T>(gradient, chunk.begin),
                           at<T>(first, chunk.begin),
                           at<T>(second, chunk.begin),
                           at<T>(maximum, chunk.begin),
                           settings};
    // kUnroll is 1: the four or five operands of a pack are enough bytes in flight, and two packs would
    // spill.
    sweep<T, 1>(element, chunk.size, weight | backup | gradient | first | second | maximum);
  }
};

template <class Optimizer, class T>
constexpr int kUpdateBlocks =
    std::is_same_v<Optimizer, Adam> ? blocks_of<T>(sizeof(T) == 8 ? 3 : 5, 4, 4) : blocks_of<T>(5, 4, 0);

template <class Optimizer, class T, class Table>
__global__ void __launch_bounds__(kThreads, kUpdateBlocks<Optimizer, T>)
    update_kernel(const __grid_constant__ Table table, const __grid_constant__ SamScalars scalars,
                  unsigned int* counter) {
  FASTSAM_SHARED(typename Optimizer::template Settings<Arithmetic<T>>, settings, 1);
  FASTSAM_SHARED(int, flag, 1);
  const bool skip = *scalars.found_inf != 0.0f;
  const BlockChunk chunk = block_chunk(table);
  if (chunk.size > 0) {
    if (skip || table.template at<kGradient>(chunk.row) == 0) {
      restore_block<T>(table, chunk);
    } else {
      if (threadIdx.x == 0) {
        const double* const row = hyper_row(scalars.hyper, table.group_and_flags[chunk.row]);
        *settings = Optimizer::template settings<Arithmetic<T>>(table, chunk, row, loss_scale(scalars));
      }
      __syncthreads();
      Optimizer::template update<T>(table, chunk, *settings);
    }
  }
  // The update counters may change only after every block has read them, so the last block increments them.
  if (!is_last_block(counter, gridDim.x, flag)) return;
  if (skip) {
    if (threadIdx.x == 0 && table.first_run && scalars.skipped_steps != nullptr) *scalars.skipped_steps += 1;
    return;
  }
  for (int row = threadIdx.x; row < table.rows; row += kThreads) {
    const int64_t step = table.template at<kStep>(row);
    if (step != 0 && table.template at<kGradient>(row) != 0) *reinterpret_cast<float*>(step) += 1.0f;
  }
}

// --- scratch memory: the block counter in the first 16 bytes, then the partial sums -----------------------

constexpr int64_t kCounterBytes = 16;

unsigned int* counter_of(void* scratch) { return static_cast<unsigned int*>(scratch); }
double* partials_of(void* scratch) {
  return reinterpret_cast<double*>(static_cast<unsigned char*>(scratch) + kCounterBytes);
}

}  // namespace

int64_t sam_scratch_bytes(const TensorTable& table) {
  return kCounterBytes + Chunks(table, kChunkElements).count() * static_cast<int64_t>(sizeof(double));
}

void sam_norm(const Execution& execution, DType dtype, const TensorTable& table, const double* hyper,
              double* squared_norm, void* scratch) {
  const DeviceGuard guard(execution.device);
  const int64_t chunks = Chunks(table, kChunkElements).count();
  dispatch(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    launch_phase<kGradient, kWeight>(table, [&](const auto& arguments, unsigned int grid) {
      FASTSAM_LAUNCH_RUN((norm_kernel<T, std::decay_t<decltype(arguments)>>), grid, execution, arguments,
                         hyper, partials_of(scratch), counter_of(scratch), chunks, squared_norm);
    });
  });
}

void sam_perturb(const Execution& execution, DType dtype, const TensorTable& table,
                 const SamScalars& scalars) {
  const DeviceGuard guard(execution.device);
  dispatch(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    launch_phase<kWeight, kGradient, kBackup>(table, [&](const auto& arguments, unsigned int grid) {
      FASTSAM_LAUNCH_RUN((perturb_kernel<T, std::decay_t<decltype(arguments)>>), grid, execution, arguments,
                         scalars);
    });
  });
}

void sam_check(const Execution& execution, DType dtype, const TensorTable& table, float* found_inf) {
  const DeviceGuard guard(execution.device);
  dispatch(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    launch_phase<kGradient>(table, [&](const auto& arguments, unsigned int grid) {
      FASTSAM_LAUNCH_RUN((check_kernel<T, std::decay_t<decltype(arguments)>>), grid, execution, arguments,
                         found_inf);
    });
  });
}

void sam_restore(const Execution& execution, DType dtype, const TensorTable& table) {
  const DeviceGuard guard(execution.device);
  dispatch(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    launch_phase<kWeight, kBackup>(table, [&](const auto& arguments, unsigned int grid) {
      FASTSAM_LAUNCH_RUN((restore_kernel<T, std::decay_t<decltype(arguments)>>), grid, execution, arguments);
    });
  });
}

void sam_update_sgd(const Execution& execution, DType dtype, const TensorTable& table,
                    const SamScalars& scalars, void* scratch) {
  const DeviceGuard guard(execution.device);
  dispatch(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    launch_phase<kWeight, kGradient, kBackup, kState0, kStep>(
        table, [&](const auto& arguments, unsigned int grid) {
          FASTSAM_LAUNCH_RUN((update_kernel<Sgd, T, std::decay_t<decltype(arguments)>>), grid, execution,
                             arguments, scalars, counter_of(scratch));
        });
  });
}

void sam_update_adam(const Execution& execution, DType dtype, const TensorTable& table,
                     const SamScalars& scalars, void* scratch) {
  const DeviceGuard guard(execution.device);
  dispatch(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    launch_phase<kWeight, kGradient, kBackup, kState0, kState1, kState2, kStep>(
        table, [&](const auto& arguments, unsigned int grid) {
          FASTSAM_LAUNCH_RUN((update_kernel<Adam, T, std::decay_t<decltype(arguments)>>), grid, execution,
                             arguments, scalars, counter_of(scratch));
        });
  });
}

}  // namespace fastsam::cuda
