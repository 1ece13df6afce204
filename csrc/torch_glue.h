// What every `<op>_torch.cpp` needs of torch's stable ABI, and nothing else.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <vector>

namespace livrec {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Tensor empty_cpu(torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType type) {
  return torch::stable::empty(sizes, type, std::nullopt,
                              torch::stable::Device(torch::headeronly::DeviceType::CPU));
}

// Scratch memory on a 64-byte boundary, from torch's allocator, so that torch's memory statistics
// see it.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) : tensor_(empty_cpu({bytes + 64}, ScalarType::Byte)) {}
  void* data() const {
    const auto address = reinterpret_cast<uintptr_t>(tensor_.mutable_data_ptr());
    return reinterpret_cast<void*>((address + 63) / 64 * 64);
  }

 private:
  Tensor tensor_;
};

}  // namespace livrec
