// The table of tensors of a multi-tensor launch.
#pragma once

#include <cstdint>

namespace fastsam {

// The columns of a table of tensors: int64 [kColumns, count] on the host. An address of 0 means "none".
// Python reads the names and their order from this list: kRowSize becomes "row_size".
#define FASTSAM_TABLE_COLUMNS(COLUMN)                                                               \
  COLUMN(kSize)     /* elements */                                                                  \
  COLUMN(kGroup)    /* row of the block of hyperparameters */                                       \
  COLUMN(kFlags)    /* sum of values of enum Flag */                                                \
  COLUMN(kWeight)   /* address of w       [size], overwritten */                                    \
  COLUMN(kGradient) /* address of g       [size]; 0: no gradient in this pass */                    \
  COLUMN(kBackup)   /* address of backup  [size]; equal to kWeight: the weight was not perturbed */ \
  COLUMN(kState0)   /* address of momentum buffer or first moment [size]; 0: none */                \
  COLUMN(kState1)   /* address of second moment                   [size]; 0: none */                \
  COLUMN(kState2)   /* address of amsgrad's maximum               [size]; 0: none */                \
  COLUMN(kStep)     /* address of the float32 scalar that counts updates; 0: none */                \
  COLUMN(kScale)    /* address of the standard deviations of noise, float64 [size / row size] */    \
  COLUMN(kRowSize)  /* elements that share one standard deviation */                                \
  COLUMN(kStream)   /* index of the tensor's stream of random numbers */

#define FASTSAM_ENUMERATOR(name) name,
enum Column : int64_t { FASTSAM_TABLE_COLUMNS(FASTSAM_ENUMERATOR) kColumns };

enum Flag : int64_t {
  kAdaptive = 1,    // ASAM's normalization applies
  kStochastic = 2,  // 16-bit weights are rounded stochastically in the ascent
  kFlagBits = 2
};

struct TensorTable {
  int64_t count;
  const int64_t* cells;  // [kColumns, count]

  int64_t at(Column column, int64_t row) const { return cells[column * count + row]; }
};

}  // namespace fastsam
