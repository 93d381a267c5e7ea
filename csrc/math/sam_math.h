// Per-element formulas of SAM, ASAM and the base optimizers that are fused with the restore.
#pragma once

#include <math.h>

#include "fastsam/sam.h"
#include "noise_math.h"
#include "scalar.h"

namespace fastsam {

// ASAM's normalization operator T_w (Kwon et al. 2021, section 3): |w| + eta for adaptive tensors, else 1.
template <class A>
FASTSAM_HD A normalization(A weight, A eta) {
  return (weight < A(0) ? -weight : weight) + eta;
}

// rho / (||T_w g|| + 1e-12), not finite if the step must be skipped. The 1e-12 is the epsilon of the
// reference implementation. Gradients and norm still contain the loss scale `grad_scale`: one division
// removes it from the norm, the other from the gradient that this factor is multiplied by.
FASTSAM_HD double ascent_scale(double squared_norm, double rho, double grad_scale) {
  return rho / (sqrt(squared_norm) / grad_scale + 1e-12) / grad_scale;
}

// w + T_w^2 g * scale.
template <class A>
FASTSAM_HD A perturbed(A weight, A gradient, A scale, A eta, bool adaptive) {
  const A t = adaptive ? normalization(weight, eta) : A(1);
  return multiply_add(t * t * gradient, scale, weight);
}

// Number of elements that are rounded stochastically with one counter: 16 of its 128 bits each.
constexpr int kRoundedPerCounter = 8;

// Key of the stochastic rounding of an ascent. The seed is the squared norm of the step's gradient: it
// differs from step to step, replicas of a parameter agree on it, and no counter has to be stored, saved or
// advanced.
FASTSAM_HD NoiseKey rounding_key(double squared_norm, int64_t row) {
  uint64_t seed;
  memcpy(&seed, &squared_norm, sizeof seed);
  return {seed, 0u, static_cast<uint32_t>(row)};
}

// The 16 random bits of element `k` in the words of one or more consecutive counters.
FASTSAM_HD uint32_t rounding_bits(const uint32_t* words, int64_t k) {
  return (words[k / 2] >> (16 * (k % 2))) & 0xffffu;
}

// One row of the block of hyperparameters, converted to the arithmetic type once per chunk.
template <class A>
struct SgdSettings {
  A lr, weight_decay, momentum, undamped, gradient_factor;
  bool nesterov, decays;
};

template <class A>
FASTSAM_HD SgdSettings<A> sgd_settings(const double* row, double grad_scale) {
  SgdSettings<A> s;
  s.lr = static_cast<A>(row[kLr]);
  s.weight_decay = static_cast<A>(row[kWeightDecay]);
  s.momentum = static_cast<A>(row[kMomentum]);
  s.undamped = static_cast<A>(1.0 - row[kDampening]);
  s.gradient_factor = static_cast<A>((row[kMaximize] != 0.0 ? -1.0 : 1.0) / grad_scale);
  s.nesterov = row[kNesterov] != 0.0;
  s.decays = row[kWeightDecay] != 0.0;
  return s;
}

// torch.optim.SGD, rounded where torch rounds. In the `first` update the buffer becomes the gradient, without
// dampening.
template <class A>
FASTSAM_HD A sgd_step(A weight, A gradient, A& buffer, bool has_momentum, bool first,
                      const SgdSettings<A>& s) {
  A direction = product(gradient, s.gradient_factor);
  if (s.decays) direction = multiply_add(s.weight_decay, weight, direction);
  if (has_momentum) {
    buffer = first ? direction : multiply_add(s.undamped, direction, product(s.momentum, buffer));
    direction = s.nesterov ? multiply_add(s.momentum, buffer, direction) : buffer;
  }
  return multiply_add(-s.lr, direction, weight);
}

template <class A>
struct AdamSettings {
  A beta1, beta2, one_minus_beta1, one_minus_beta2, eps, gradient_factor;
  A l2, shrink;              // coupled decay added to the gradient; decoupled decay's factor on the weight
  A step_size, root_bias_2;  // lr / (1 - beta1^t) and sqrt(1 - beta2^t)
};

// `step` is the index of this update, from 1. The powers are float64: in float32, 1 - 0.999^t loses digits.
template <class A>
FASTSAM_HD AdamSettings<A> adam_settings(const double* row, double step, double grad_scale) {
  AdamSettings<A> s;
  const double beta1 = row[kBeta1], beta2 = row[kBeta2], lr = row[kLr], decay = row[kWeightDecay];
  const bool decoupled = row[kDecoupled] != 0.0;
  s.beta1 = static_cast<A>(beta1);
  s.beta2 = static_cast<A>(beta2);
  s.one_minus_beta1 = static_cast<A>(1.0 - beta1);
  s.one_minus_beta2 = static_cast<A>(1.0 - beta2);
  s.eps = static_cast<A>(row[kEps]);
  s.gradient_factor = static_cast<A>((row[kMaximize] != 0.0 ? -1.0 : 1.0) / grad_scale);
  s.l2 = static_cast<A>(decoupled ? 0.0 : decay);
  s.shrink = static_cast<A>(decoupled ? 1.0 - lr * decay : 1.0);
  s.step_size = static_cast<A>(lr / (1.0 - pow(beta1, step)));
  s.root_bias_2 = static_cast<A>(sqrt(1.0 - pow(beta2, step)));
  return s;
}

FASTSAM_HD float square_root(float value) { return sqrtf(value); }
FASTSAM_HD double square_root(double value) { return sqrt(value); }

// torch.optim.Adam and AdamW, rounded where torch rounds. With amsgrad, `maximum` is the running maximum of
// `second`.
template <class A>
FASTSAM_HD A adam_step(A weight, A gradient, A& first, A& second, A& maximum, bool amsgrad,
                       const AdamSettings<A>& s) {
  const A direction = multiply_add(s.l2, weight, product(gradient, s.gradient_factor));
  first = multiply_add(s.one_minus_beta1, direction - first, first);
  second = multiply_add(product(s.one_minus_beta2, direction), direction, product(s.beta2, second));
  A scale = second;
  if (amsgrad) {
    maximum = second > maximum ? second : maximum;
    scale = maximum;
  }
  const A denominator = square_root(scale) / s.root_bias_2 + s.eps;
  return product(weight, s.shrink) - product(s.step_size, first) / denominator;
}

}  // namespace fastsam
