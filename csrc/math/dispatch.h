// Conversion of a run-time dtype to a template argument.
#pragma once

#include <stdexcept>

#include "fastsam/types.h"
#include "scalar.h"

namespace fastsam {

template <class T>
struct TypeTag {
  using type = T;
};

// Calls body(TypeTag<T>{}) with the storage type T of `dtype`.
template <class Body>
void dispatch(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(TypeTag<float>{});
    case DType::kFloat64:
      return body(TypeTag<double>{});
    case DType::kBFloat16:
      return body(TypeTag<BFloat16>{});
    case DType::kFloat16:
      return body(TypeTag<Float16>{});
  }
  throw std::invalid_argument("unknown dtype code; expected 0 to 3 (float32, float64, bfloat16, float16)");
}

}  // namespace fastsam
