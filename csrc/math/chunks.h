// Splits the tensors of a table into chunks: the unit of work of a thread block or a CPU thread, and the
// unit of partial sums. The split depends only on the sizes, not on the number of threads or blocks, so
// reductions always add in the same order.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "fastsam/table.h"

namespace fastsam {

struct Chunk {
  int64_t tensor;
  int64_t begin;  // first element
  int64_t size;   // elements
};

class Chunks {
 public:
  Chunks(const TensorTable& table, int64_t chunk_size) : table_(table), chunk_size_(chunk_size) {
    ends_.reserve(static_cast<size_t>(table.count));
    int64_t end = 0;
    for (int64_t i = 0; i < table.count; ++i) {
      const int64_t size = table.at(kSize, i);
      elements_ += size;
      end += (size + chunk_size - 1) / chunk_size;
      ends_.push_back(end);
    }
  }

  int64_t count() const { return ends_.empty() ? 0 : ends_.back(); }
  int64_t elements() const { return elements_; }
  // Number of chunks of tensors [0, tensor].
  int64_t end(int64_t tensor) const { return ends_[static_cast<size_t>(tensor)]; }

  Chunk operator[](int64_t index) const {
    const int64_t tensor = std::upper_bound(ends_.begin(), ends_.end(), index) - ends_.begin();
    const int64_t first = tensor == 0 ? 0 : end(tensor - 1);
    const int64_t begin = (index - first) * chunk_size_;
    return {tensor, begin, std::min(chunk_size_, table_.at(kSize, tensor) - begin)};
  }

 private:
  const TensorTable& table_;
  int64_t chunk_size_;
  int64_t elements_ = 0;
  std::vector<int64_t> ends_;
};

}  // namespace fastsam
