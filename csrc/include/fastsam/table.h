// The table of tensors that a multi-tensor launch works on.
#pragma once

#include <cstdint>

namespace fastsam {

// The columns of a table of tensors: int64 [kColumns, count] on the host. An address of 0 means "none".
enum Column : int64_t {
  kSize = 0,  // elements
  kGroup,     // row of the block of hyper-parameters
  kFlags,     // of enum Flag, added up
  kWeight,    // address of w       [size], overwritten
  kGradient,  // address of g       [size]; 0: no gradient in this pass
  kBackup,    // address of backup  [size]; equal to kWeight: the weight was not perturbed
  kState0,    // address of momentum buffer or first moment [size]; 0: none
  kState1,    // address of second moment                   [size]; 0: none
  kState2,    // address of amsgrad's maximum               [size]; 0: none
  kStep,      // address of the float32 scalar that counts updates; 0: none
  kScale,     // address of the standard deviations of noise, float64 [size / row size]
  kRowSize,   // elements that share one standard deviation
  kStream,    // number of the tensor's stream of random numbers
  kColumns
};

enum Flag : int64_t {
  kAdaptive = 1,    // ASAM's normalisation applies
  kStochastic = 2,  // 16-bit weights are rounded stochastically in the ascent
  kFlagBits = 2
};

struct TensorTable {
  int64_t count;
  const int64_t* cells;  // [kColumns, count]

  int64_t at(Column column, int64_t row) const { return cells[column * count + row]; }
};

}  // namespace fastsam
