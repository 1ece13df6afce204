// Memory of tasks that run one after the other.
#pragma once

#include <algorithm>
#include <memory>

#include "torch_glue.h"

namespace livrec {

// Memory that grows to what is needed, and stays.
class Buffer {
 public:
  float* of(int64_t count) {
    if (count > count_) scratch_ = std::make_unique<Scratch>((count_ = count) * 4);
    return static_cast<float*>(scratch_->data());
  }
  float* zeros(int64_t count) {
    float* data = of(count);
    std::fill_n(data, count, 0.0f);
    return data;
  }

 private:
  int64_t count_ = -1;
  std::unique_ptr<Scratch> scratch_;
};

}  // namespace livrec
