// Conversion of Python's arguments to the plain structs of the launch API.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "fastsam/table.h"
#include "fastsam/types.h"

namespace fastsam::bindings {

// An address that Python passes as an integer.
template <class T>
T* pointer(int64_t address) {
  return reinterpret_cast<T*>(address);
}

inline DType dtype_of(int64_t code) {
  if (code < 0 || code > static_cast<int64_t>(DType::kFloat16)) {
    throw std::invalid_argument("unknown dtype code " + std::to_string(code) +
                                "; expected 0 (float32), 1 (float64), 2 (bfloat16) or 3 (float16)");
  }
  return static_cast<DType>(code);
}

// Python name of an enumerator: kRowSize becomes "row_size".
inline std::string python_name(const char* enumerator) {
  std::string name;
  for (const char* letter = enumerator + 1; *letter != 0; ++letter) {
    const bool upper = *letter >= 'A' && *letter <= 'Z';
    if (upper && !name.empty()) name += '_';
    name += static_cast<char>(upper ? *letter - 'A' + 'a' : *letter);
  }
  return name;
}

// A table in a Python buffer, which this object keeps alive while a launch reads it.
class TableArgument {
 public:
  explicit TableArgument(const pybind11::buffer& buffer) : info_(buffer.request()) {
    const bool contiguous = info_.ndim == 1 && (info_.size <= 1 || info_.strides[0] == info_.itemsize);
    if (!info_.item_type_is_equivalent_to<int64_t>() || !contiguous || info_.size % kColumns != 0) {
      std::string shape;
      for (size_t i = 0; i < info_.shape.size(); ++i) {
        shape += (i == 0 ? "" : ", ") + std::to_string(info_.shape[i]) + " (stride " +
                 std::to_string(info_.strides[i]) + " bytes)";
      }
      throw std::invalid_argument("table must be a one-dimensional, contiguous int64 buffer of " +
                                  std::to_string(kColumns) + " * count cells, got format '" + info_.format +
                                  "', items of " + std::to_string(info_.itemsize) + " bytes, shape [" +
                                  shape + "]; pass array('q', ...)");
    }
  }
  TensorTable table() const { return {info_.size / kColumns, static_cast<const int64_t*>(info_.ptr)}; }

 private:
  pybind11::buffer_info info_;
};

}  // namespace fastsam::bindings
