// What every `<op>_torch.cpp` needs of torch's stable ABI, and nothing else.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "huge_pages.h"

namespace livrec {

// A text among an operator's arguments. torch's conversion to std::string never frees the string
// that it makes (2.11 to 2.13): 48 bytes a call, and between them room for no large tensor.
struct Text : std::string {
  using std::string::string;
};

}  // namespace livrec

template <>
struct torch::stable::detail::ToImpl<livrec::Text> {
  template <class... Versions>
  static livrec::Text call(StableIValue value, Versions...) {
    const auto handle = to<StringHandle>(value);
    size_t length;
    const char* characters;
    TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &characters));
    livrec::Text text(characters, length);
    TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return text;
  }
};

namespace livrec {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// torch's dispatcher takes a microsecond a call: these two go around it where they can.

inline Tensor contiguous_of(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline Tensor empty_cpu(torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType type) {
  std::vector<int64_t> strides(sizes.size());
  for (size_t dim = sizes.size(), stride = 1; dim-- > 0; stride *= std::max<int64_t>(sizes[dim], 1))
    strides[dim] = static_cast<int64_t>(stride);
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)),
      aoti_torch_device_type_cpu(), 0, &made));
  const Tensor tensor(made);
  ask_for_huge_pages(tensor.const_data_ptr(),
                     static_cast<uint64_t>(tensor.numel()) * tensor.element_size());
  return tensor;
}

inline Tensor zeros_like_cpu(const Tensor& tensor) {
  Tensor zeros = empty_cpu(tensor.sizes(), tensor.scalar_type());
  std::memset(zeros.mutable_data_ptr(), 0,
              static_cast<size_t>(zeros.numel()) * zeros.element_size());
  return zeros;
}

// needs: whether the gradient of each tensor is wanted, in the order of the arguments.
inline void check_needs(const std::vector<bool>& needs, size_t tensors) {
  STD_TORCH_CHECK(needs.size() == tensors, "needs: must be one per tensor, ",
                  static_cast<int64_t>(tensors), ", got ", static_cast<int64_t>(needs.size()));
}

// The least row that any thread found bad; kernels tell of one by its number, of none by -1.
class FirstBad {
 public:
  void note(int64_t row) {
    int64_t known = first_.load();
    while (row >= 0 && row < known && !first_.compare_exchange_weak(known, row)) {
    }
  }
  bool any() const { return first_.load() != INT64_MAX; }
  int64_t first() const { return first_.load(); }

 private:
  std::atomic<int64_t> first_{INT64_MAX};
};

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
