// Compares the CUDA kernels, compiled for the host, with plain float64 loops on random data. The tests build
// it with sanitizers. Exits with 1 if a check failed, else 0. Arguments: a seed, and "few" for the short list
// of cases that ThreadSanitizer can run in reasonable time.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "fastsam/lanczos.h"
#include "fastsam/noise.h"
#include "fastsam/sam.h"
#include "noise_math.h"
#include "sam_math.h"
#include "simt.h"

namespace {

using namespace fastsam;

std::mt19937_64 generator;
int failures = 0;

double normal() { return std::normal_distribution<double>()(generator); }

void expect(bool holds, const std::string& what) {
  if (holds) return;
  ++failures;
  std::printf("FAILED: %s\n", what.c_str());
}

bool close(double actual, double expected, double tolerance, double scale = 1.0) {
  return std::fabs(actual - expected) <= tolerance * (scale + std::fabs(expected));
}

template <class T>
double tolerance();
template <>
double tolerance<float>() {
  return 1e-5;
}
template <>
double tolerance<double>() {
  return 1e-12;
}
template <>
double tolerance<BFloat16>() {
  return 2e-2;
}
template <>
double tolerance<Float16>() {
  return 4e-3;
}

template <class T>
DType dtype_code();
template <>
DType dtype_code<float>() {
  return DType::kFloat32;
}
template <>
DType dtype_code<double>() {
  return DType::kFloat64;
}
template <>
DType dtype_code<BFloat16>() {
  return DType::kBFloat16;
}
template <>
DType dtype_code<Float16>() {
  return DType::kFloat16;
}

// `size` elements at the end of a heap allocation, after `offset` unused ones: AddressSanitizer detects
// overruns, and an offset makes the address unaligned.
template <class T>
class Vector {
 public:
  Vector(int64_t size, int64_t offset, const std::function<double()>& value)
      : size_(size), offset_(offset), memory_(static_cast<size_t>(size + offset)) {
    for (T& element : memory_) store(static_cast<Arithmetic<T>>(value()), element);
  }
  // An empty tensor has no memory, but an address other than 0 must mark its gradient as present.
  int64_t address() {
    if (size_ == 0) return 16;
    return reinterpret_cast<int64_t>(memory_.data() + offset_);
  }
  double operator[](int64_t i) const { return load(memory_[static_cast<size_t>(offset_ + i)]); }
  void set(int64_t i, double value) {
    store(static_cast<Arithmetic<T>>(value), memory_[static_cast<size_t>(offset_ + i)]);
  }
  int64_t size() const { return size_; }

 private:
  int64_t size_;
  int64_t offset_;
  std::vector<T> memory_;
};

struct Options {
  bool adaptive = false;
  bool stochastic = false;
  bool unaligned = false;
  bool nonfinite_gradient = false;
  bool amsgrad = false;
  bool count_unchanged = false;  // also makes the first tensor too large for a perturbation to change it
  float grad_scale = 1.0f;       // loss scale that multiplies the gradients
  int64_t without_gradient = -1;
};

constexpr double kPoison = std::numeric_limits<double>::quiet_NaN();

// Compares each phase of a SAM step over tensors of `sizes` with float64 loops.
template <class T>
void check_sam(const std::vector<int64_t>& sizes, const Options& options, const std::string& name) {
  const int64_t count = static_cast<int64_t>(sizes.size());
  const double tol = tolerance<T>();
  const double loss_scale = options.grad_scale;
  std::vector<Vector<T>> weight, gradient, backup, first, second, maximum;
  std::vector<float> steps(sizes.size(), 0.0f);
  for (const int64_t size : sizes) {
    const int64_t offset = options.unaligned ? 1 : 0;
    const double heavy =
        options.count_unchanged && weight.empty() ? 1e4 / std::numeric_limits<float>::epsilon() : 1;
    weight.emplace_back(size, offset, [&] { return heavy * normal(); });
    gradient.emplace_back(size, offset, [&] { return loss_scale * normal(); });
    backup.emplace_back(size, offset, [] { return kPoison; });
    first.emplace_back(size, offset, normal);
    second.emplace_back(size, offset, [] { return std::fabs(normal()); });
    maximum.emplace_back(size, offset, [] { return std::fabs(normal()); });
  }
  std::vector<int64_t> cells(static_cast<size_t>(kColumns * count));
  const auto cell = [&](Column column, int64_t row) -> int64_t& {
    return cells[static_cast<size_t>(column * count + row)];
  };
  for (int64_t row = 0; row < count; ++row) {
    const size_t i = static_cast<size_t>(row);
    cell(kSize, row) = sizes[i];
    cell(kGroup, row) = row % 2;
    cell(kFlags, row) = (options.adaptive && row % 3 != 1 ? int64_t{kAdaptive} : 0) +
                        (options.stochastic ? int64_t{kStochastic} : 0);
    cell(kWeight, row) = weight[i].address();
    cell(kGradient, row) = row == options.without_gradient ? 0 : gradient[i].address();
    cell(kBackup, row) = backup[i].address();
    cell(kState0, row) = first[i].address();
    cell(kState1, row) = second[i].address();
    cell(kState2, row) = options.amsgrad ? maximum[i].address() : 0;
    cell(kStep, row) = reinterpret_cast<int64_t>(&steps[i]);
  }
  const TensorTable table{count, cells.data()};
  std::vector<double> hyper(2 * kHyperColumns, 0.0);
  for (int64_t group = 0; group < 2; ++group) {
    double* const row = hyper.data() + group * kHyperColumns;
    row[kRho] = 0.05 * static_cast<double>(group + 1);
    row[kEta] = 0.01;
    row[kLr] = 0.1;
    row[kWeightDecay] = group == 0 ? 0.0 : 1e-2;
    row[kMomentum] = 0.9;
    row[kDampening] = 0.1;
    row[kNesterov] = static_cast<double>(group);
    row[kBeta1] = 0.9;
    row[kBeta2] = 0.999;
    row[kEps] = 1e-8;
  }
  if (options.nonfinite_gradient && sizes.back() > 0) {
    gradient.back().set(sizes.back() - 1, std::numeric_limits<double>::infinity());
  }
  const Execution execution{0, nullptr, 1};
  std::vector<double> scratch(static_cast<size_t>(cuda::sam_scratch_bytes(table) / 8 + 1), 0.0);
  double squared_norm = kPoison;
  float found_inf = 7.0f;
  int64_t skipped = 0;
  int64_t unchanged = 0;
  const SamScalars scalars{hyper.data(),  2,
                           &squared_norm, 1,
                           &found_inf,    loss_scale == 1.0 ? nullptr : &options.grad_scale,
                           &skipped,      options.count_unchanged ? &unchanged : nullptr};

  // norm, twice: the second run starts with the counter that the first run must have reset
  const double norm_tolerance = std::is_same_v<T, double> ? 1e-12 : 2e-7;  // of the square: 1e-7 of the norm
  double expected = 0.0;
  for (int64_t row = 0; row < count; ++row) {
    const size_t i = static_cast<size_t>(row);
    if (row == options.without_gradient) continue;
    for (int64_t k = 0; k < sizes[i]; ++k) {
      const double t = (cell(kFlags, row) & kAdaptive) != 0 ? std::fabs(weight[i][k]) + 0.01 : 1.0;
      expected += t * gradient[i][k] * t * gradient[i][k];
    }
  }
  for (int run = 0; run < 2; ++run) {
    squared_norm = kPoison;
    cuda::sam_norm(execution, dtype_code<T>(), table, hyper.data(), &squared_norm, scratch.data());
    expect(std::isfinite(expected) ? close(squared_norm, expected, norm_tolerance, 0.0)
                                   : !std::isfinite(squared_norm),
           name + ": norm");
  }

  // perturb
  const std::vector<Vector<T>> before = weight;
  cuda::sam_perturb(execution, dtype_code<T>(), table, scalars);
  int64_t expected_unchanged = 0;
  expect(found_inf == (options.nonfinite_gradient ? 1.0f : 0.0f), name + ": flag of the ascent");
  for (int64_t row = 0; row < count; ++row) {
    const size_t i = static_cast<size_t>(row);
    const double scale = hyper[static_cast<size_t>(row % 2 * kHyperColumns + kRho)] /
                         (std::sqrt(expected) / loss_scale + 1e-12) / loss_scale;
    for (int64_t k = 0; k < sizes[i]; ++k) {
      const double w = before[i][k];
      const double t = (cell(kFlags, row) & kAdaptive) != 0 ? std::fabs(w) + 0.01 : 1.0;
      const bool moves = row != options.without_gradient && !options.nonfinite_gradient;
      expect(close(weight[i][k], moves ? w + t * t * gradient[i][k] * scale : w, moves ? tol : 0.0),
             name + ": perturb");
      if (row != options.without_gradient) expect(backup[i][k] == w, name + ": backup");
      if (moves && weight[i][k] == w && gradient[i][k] != 0.0) ++expected_unchanged;
    }
  }
  if (options.count_unchanged) {
    expect(unchanged == expected_unchanged, name + ": unchanged elements");
    expect(unchanged > 0, name + ": no element was unchanged");
  }

  // check finds the gradient that is not finite
  found_inf = 0.0f;
  cuda::sam_check(execution, dtype_code<T>(), table, &found_inf);
  expect((found_inf != 0.0f) == options.nonfinite_gradient, name + ": check");

  if (options.without_gradient >= 0) {  // it was not perturbed, so it is its own backup
    cell(kBackup, options.without_gradient) = weight[static_cast<size_t>(options.without_gradient)].address();
  }

  // update with SGD: the first without dampening, the second with it
  for (int turn = 0; turn < 2; ++turn) {
    const std::vector<Vector<T>> momentum = first;
    cuda::sam_update_sgd(execution, dtype_code<T>(), table, scalars, scratch.data());
    for (int64_t row = 0; row < count; ++row) {
      const size_t i = static_cast<size_t>(row);
      const bool moves = row != options.without_gradient && !options.nonfinite_gradient;
      expect(steps[i] == (moves ? static_cast<float>(turn + 1) : 0.0f), name + ": step counter");
      const double* const h = hyper.data() + row % 2 * kHyperColumns;
      for (int64_t k = 0; k < sizes[i]; ++k) {
        const double w = before[i][k];
        const double d = gradient[i][k] / loss_scale + h[kWeightDecay] * w;
        const double m = turn == 0 ? d : h[kMomentum] * momentum[i][k] + (1.0 - h[kDampening]) * d;
        const double step = h[kNesterov] != 0.0 ? d + h[kMomentum] * m : m;
        expect(close(weight[i][k], moves ? w - h[kLr] * step : w, moves ? tol : 0.0), name + ": sgd");
        expect(close(first[i][k], moves ? m : momentum[i][k], moves ? tol : 0.0), name + ": momentum");
      }
    }
  }
  expect(skipped == (options.nonfinite_gradient ? 2 : 0), name + ": skipped steps");

  // update with Adam and coupled weight decay
  {
    const std::vector<Vector<T>> m = first, v = second, v_max = maximum;
    const std::vector<float> taken = steps;
    cuda::sam_update_adam(execution, dtype_code<T>(), table, scalars, scratch.data());
    for (int64_t row = 0; row < count; ++row) {
      const size_t i = static_cast<size_t>(row);
      const bool moves = row != options.without_gradient && !options.nonfinite_gradient;
      const double* const h = hyper.data() + row % 2 * kHyperColumns;
      const double t = taken[i] + 1.0;
      for (int64_t k = 0; k < sizes[i]; ++k) {
        const double w = before[i][k];
        const double d = gradient[i][k] / loss_scale + h[kWeightDecay] * w;
        const double m1 = h[kBeta1] * m[i][k] + (1.0 - h[kBeta1]) * d;
        const double v1 = h[kBeta2] * v[i][k] + (1.0 - h[kBeta2]) * d * d;
        const double largest = options.amsgrad ? std::max(v1, v_max[i][k]) : v1;
        const double denominator = std::sqrt(largest / (1.0 - std::pow(h[kBeta2], t))) + h[kEps];
        const double updated = w - h[kLr] * m1 / (1.0 - std::pow(h[kBeta1], t)) / denominator;
        expect(close(weight[i][k], moves ? updated : w, moves ? 10 * tol : 0.0), name + ": adam");
        expect(close(second[i][k], moves ? v1 : v[i][k], moves ? tol : 0.0), name + ": second moment");
        expect(close(maximum[i][k], moves && options.amsgrad ? largest : v_max[i][k], moves ? tol : 0.0),
               name + ": maximum");
      }
    }
  }

  // restore is bit-exact
  cuda::sam_restore(execution, dtype_code<T>(), table);
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (static_cast<int64_t>(i) == options.without_gradient) continue;
    for (int64_t k = 0; k < sizes[i]; ++k) expect(weight[i][k] == before[i][k], name + ": restore");
  }
}

// Compares one Lanczos step on a random, nearly orthonormal basis with float64 loops.
template <class T>
void check_lanczos(int64_t probes, int64_t count, int64_t size, bool breakdown, const std::string& name) {
  const int64_t capacity = count + 2;  // unused rows in the basis, so that wrong strides show
  Vector<T> basis(probes * capacity * size, 0,
                  [&] { return normal() / std::sqrt(static_cast<double>(size)); });
  Vector<T> vector(probes * size, 0, normal);
  const auto q = [&](int64_t p, int64_t k, int64_t i) { return basis[(p * capacity + k) * size + i]; };
  if (breakdown) {
    for (int64_t i = 0; i < probes * size; ++i) vector.set(i, 0.0);
  }
  std::vector<double> alpha(static_cast<size_t>(probes * count), kPoison),
      beta = alpha, bound(static_cast<size_t>(probes), 0.0);
  std::vector<uint8_t> active(static_cast<size_t>(probes), 1);
  std::vector<int64_t> taken(static_cast<size_t>(probes), 0);
  for (int64_t p = 0; p < probes; ++p) {
    if (count > 1) beta[static_cast<size_t>(p * count + count - 2)] = 0.5;
  }

  std::vector<double> w(static_cast<size_t>(probes * size)), alphas, betas;
  for (int64_t p = 0; p < probes; ++p) {
    double last = 0.0;
    for (int64_t i = 0; i < size; ++i) w[static_cast<size_t>(p * size + i)] = vector[p * size + i];
    for (int pass = 0; pass < 2; ++pass) {
      std::vector<double> c(static_cast<size_t>(count), 0.0);
      for (int64_t k = 0; k < count; ++k) {
        for (int64_t i = 0; i < size; ++i)
          c[static_cast<size_t>(k)] += q(p, k, i) * w[static_cast<size_t>(p * size + i)];
      }
      for (int64_t i = 0; i < size; ++i) {
        double sum = 0.0;
        for (int64_t k = 0; k < count; ++k) sum += c[static_cast<size_t>(k)] * q(p, k, i);
        T stored;
        store(static_cast<Arithmetic<T>>(w[static_cast<size_t>(p * size + i)] - sum), stored);
        w[static_cast<size_t>(p * size + i)] = load(stored);
      }
      last += c[static_cast<size_t>(count - 1)];
    }
    double squares = 0.0;
    for (int64_t i = 0; i < size; ++i)
      squares += w[static_cast<size_t>(p * size + i)] * w[static_cast<size_t>(p * size + i)];
    alphas.push_back(last);
    betas.push_back(std::sqrt(squares));
  }

  std::vector<double> scratch(
      static_cast<size_t>(cuda::orthogonalize_scratch_bytes(probes, count, size) / 8 + 1), 0.0);
  T* const memory = reinterpret_cast<T*>(basis.address());
  const LanczosStep step{memory,
                         capacity * size,
                         size,
                         reinterpret_cast<void*>(vector.address()),
                         memory + count * size,
                         capacity * size,
                         probes,
                         count,
                         size,
                         count - 1,
                         static_cast<double>(std::numeric_limits<T>::epsilon())};
  const Recurrence recurrence{alpha.data(), beta.data(), bound.data(), active.data(), taken.data(), count};
  cuda::orthogonalize({0, nullptr, 1}, dtype_code<T>(), step, recurrence, scratch.data());

  const double tol = tolerance<T>() * 10.0;
  for (int64_t p = 0; p < probes; ++p) {
    const size_t column = static_cast<size_t>(p * count + count - 1);
    const double b = betas[static_cast<size_t>(p)];
    expect(close(alpha[column], alphas[static_cast<size_t>(p)], tol), name + ": alpha");
    expect(close(beta[column], breakdown ? 0.0 : b, tol), name + ": beta");
    expect(active[static_cast<size_t>(p)] == (breakdown ? 0 : 1) && taken[static_cast<size_t>(p)] == 1,
           name + ": activity");
    for (int64_t i = 0; i < size; ++i) {
      const double residual = w[static_cast<size_t>(p * size + i)];
      expect(close(vector[p * size + i], residual, tol), name + ": residual");
      // The direction of a residual of the size of rounding errors is arbitrary, so it is not compared.
      if (breakdown || b > 1e-3)
        expect(close(q(p, count, i), breakdown ? 0.0 : residual / b, 10.0 * tol), name + ": successor");
    }
  }
}

// Checks the norm of gradients whose squares overflow, underflow or lose digits in float32.
template <class T>
void check_norm_range(double largest, bool adaptive, const std::string& name) {
  Vector<T> weight(1025, 0, normal);
  int64_t i = 0;
  // Zeros, elements near `largest`, and elements that are smaller by 1e-20.
  Vector<T> gradient(1025, 0,
                     [&] { return ++i % 3 == 0 ? 0.0 : (i % 5 == 0 ? 1e-20 : 1.0) * largest * normal(); });
  std::vector<int64_t> cells(static_cast<size_t>(kColumns), 0);
  cells[kSize] = 1025;
  cells[kFlags] = adaptive ? int64_t{kAdaptive} : 0;
  cells[kWeight] = weight.address();
  cells[kGradient] = gradient.address();
  const TensorTable table{1, cells.data()};
  std::vector<double> hyper(kHyperColumns, 0.0);
  hyper[kEta] = 0.01;
  std::vector<double> scratch(static_cast<size_t>(cuda::sam_scratch_bytes(table) / 8 + 1), 0.0);
  double squared_norm = kPoison;
  cuda::sam_norm({0, nullptr, 1}, dtype_code<T>(), table, hyper.data(), &squared_norm, scratch.data());
  double expected = 0.0;
  for (int64_t k = 0; k < 1025; ++k) {
    const double value = gradient[k] * (adaptive ? std::fabs(weight[k]) + 0.01 : 1.0);
    expected += value * value;
  }
  expect(close(squared_norm, expected, 2e-7, 0.0), name);
}

// Checks that a launch on the second device creates no context on the first, and restores the first device as
// the current one if it has a context.
void check_device_guard() {
  const TensorTable table{0, nullptr};
  float found_inf = 0.0f;
  cuda::sam_check({0, nullptr, 1}, DType::kFloat32, table, &found_inf);
  expect(!simt::has_context[0], "device guard: set the device that was already current");
  cuda::sam_check({1, nullptr, 1}, DType::kFloat32, table, &found_inf);
  expect(simt::has_context[1] && !simt::has_context[0],
         "device guard: created a context on the former device");
  cudaSetDevice(0);
  cuda::sam_check({1, nullptr, 1}, DType::kFloat32, table, &found_inf);
  expect(simt::current_device == 0, "device guard: did not restore the former device");
}

// Compares noise on the rows of a weight with the same numbers computed one counter at a time.
void check_noise(int64_t rows, int64_t row_size, const std::string& name) {
  const int64_t size = rows * row_size;
  Vector<float> weight(size, 1, normal);
  const Vector<float> before = weight;
  Vector<double> scale(rows, 0, normal);
  const int64_t seed_and_step[2] = {static_cast<int64_t>(generator() >> 1), 3};
  std::vector<int64_t> cells(static_cast<size_t>(kColumns), 0);
  cells[kSize] = size;
  cells[kWeight] = weight.address();
  cells[kScale] = scale.address();
  cells[kRowSize] = row_size;
  cells[kStream] = 5;
  cuda::add_noise({0, nullptr, 1}, DType::kFloat32, {1, cells.data()}, seed_and_step);
  for (int64_t i = 0; i < size; ++i) {
    float z[kPerCounter];
    standard_normals(noise_key(seed_and_step, 5), i / kPerCounter, z);
    expect(close(weight[i], before[i] + scale[i / row_size] * z[i % kPerCounter], 1e-5), name);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const uint64_t seed = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 0;
  const bool few = argc > 2 && std::string(argv[2]) == "few";
  generator.seed(seed);

  check_device_guard();
  const std::vector<int64_t> odd = {1, 0, 3, 1025, 64, 2049, 7};
  check_sam<float>(odd, {}, "odd sizes");
  check_sam<float>({1000, 1500}, {.adaptive = true, .without_gradient = 0}, "adaptive, one without gradient");
  check_sam<float>({300, 1300}, {.amsgrad = true, .count_unchanged = true, .grad_scale = 1024.0f},
                   "amsgrad, loss scale, unchanged elements");
  check_lanczos<float>(2, 3, 700, false, "lanczos");
  check_noise(7, 301, "noise");
  if (!few) {
    check_sam<float>(odd, {.adaptive = true, .unaligned = true}, "adaptive, unaligned");
    check_sam<float>(odd, {.nonfinite_gradient = true}, "not finite");
    check_sam<float>({}, {}, "no tensor");
    check_sam<float>({0, 0}, {}, "empty tensors");
    check_sam<double>(odd, {.adaptive = true, .amsgrad = true, .grad_scale = 512.0f}, "float64");
    for (const bool adaptive : {false, true}) {
      for (const double largest : {1e25, 1e15, 1.0, 1e-18, 1e-30}) {
        check_norm_range<float>(largest, adaptive, "norm of float32 near " + std::to_string(largest));
        check_norm_range<BFloat16>(largest, adaptive, "norm of bfloat16 near " + std::to_string(largest));
      }
    }
    check_sam<BFloat16>(odd, {.amsgrad = true, .count_unchanged = true}, "bfloat16");
    check_sam<Float16>(odd, {.unaligned = true}, "float16, unaligned");
    check_sam<BFloat16>(odd, {.stochastic = true}, "bfloat16, stochastic");
    check_sam<Float16>(odd, {.adaptive = true, .stochastic = true, .unaligned = true}, "float16, stochastic");
    check_sam<float>(std::vector<int64_t>(90, 5), {}, "several launches");
    for (const int64_t size : {1, 255, 257, 1300}) {
      for (const int64_t count : {1, 4}) {
        check_lanczos<float>(1, count, size, false, "lanczos float32");
        check_lanczos<double>(3, count, size, false, "lanczos float64");
      }
    }
    check_lanczos<double>(2, 3, 300, true, "lanczos breakdown");
    check_lanczos<double>(1, 520, 130, false, "lanczos, more rows than fit in shared memory");
  }
  std::printf("seed %llu: %d failed\n", static_cast<unsigned long long>(seed), failures);
  return failures == 0 ? 0 : 1;
}
