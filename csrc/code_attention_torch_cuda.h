// What the torch operators of attention over codes on a GPU share: a call that is safe to run.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "code_attention_cuda.h"
#include "prefix_torch.h"

namespace livrec {

// Contiguous, at a multiple of the 16 bytes that kernels read at once.
inline Tensor aligned(const Tensor& given) {
  const Tensor tensor = contiguous_of(given);
  const auto address = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  return address % 16 == 0 ? tensor : torch::stable::clone(tensor);
}

// The arguments of a call, checked, and as the kernel reads them.
struct CudaCall {
  Tensor q, codes, offsets;
  Optional bias;
  std::vector<Tensor> tables;
  std::vector<const void*> keys, values;
  CodeAttentionCuda job;

  CudaCall(const Tensor& q_given, const Tensor& codes_given, const std::vector<Tensor>& key_tables,
           const std::vector<Tensor>& value_tables, const Tensor& offsets_given,
           const Optional& bias_given, double scale, const std::vector<int64_t>& levels,
           const std::vector<int64_t>& groups, bool packed) {
    const size_t fields = key_tables.size();
    STD_TORCH_CHECK(q_given.dim() == 4 && fields > 0 && value_tables.size() == fields &&
                        levels.size() == fields && codes_given.dim() == 2 &&
                        codes_given.size(1) == static_cast<int64_t>(fields),
                    "q: must be [B, C, H, d], codes [T, F], with F levels and tables of each kind");
    STD_TORCH_CHECK(!packed && groups.size() == fields,
                    "codes: must not be packed, and each be a field by itself");
    q = aligned(q_given), codes = contiguous_of(codes_given);
    job = {};
    job.users = q.size(0), job.candidates = q.size(1), job.heads = q.size(2), job.dim = q.size(3);
    job.type = float_type(q.scalar_type(), "q");
    job.items = codes.size(0), job.fields = static_cast<int64_t>(fields);
    job.code_type = code_type(codes, false);
    STD_TORCH_CHECK(job.code_type == CodeType::u8 || job.code_type == CodeType::i16 ||
                        job.code_type == CodeType::i32,
                    "codes: must be uint8, int16 or int32");
    STD_TORCH_CHECK(offsets_given.dim() == 1 && offsets_given.size(0) == job.users + 1 &&
                        offsets_given.scalar_type() == ScalarType::Long && on_device(offsets_given),
                    "offsets: must be int64 [B + 1] on the device of q");
    STD_TORCH_CHECK(on_device(codes), "codes: must be on the device of q");
    offsets = contiguous_of(offsets_given);
    job.value_dim = value_tables[0].dim() == 3 ? value_tables[0].size(2) : 0;
    for (size_t f = 0; f < fields; ++f) {
      keys.push_back(table(key_tables[f], levels[f], job.dim));
      values.push_back(table(value_tables[f], levels[f], job.value_dim));
    }
    read_bias(bias_given);
    job.q = q.const_data_ptr(), job.codes = codes.const_data_ptr();
    job.keys = keys.data(), job.values = values.data(), job.rows = levels.data();
    job.offsets = offsets.const_data_ptr<int64_t>();
    job.scale = static_cast<float>(scale);
  }
  CudaCall(const CudaCall&) = delete;

  Tensor empty(torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType type) const {
    return torch::stable::empty(sizes, type, std::nullopt, q.device());
  }
  cudaStream_t stream() const {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(q.get_device_index(), &stream));
    return static_cast<cudaStream_t>(stream);
  }

 private:
  bool on_device(const Tensor& tensor) const { return tensor.device() == q.device(); }

  const void* table(const Tensor& given, int64_t level, int64_t dim) {
    STD_TORCH_CHECK(given.dim() == 3 && level >= 1 && given.size(0) >= level &&
                        given.size(1) == job.heads && given.size(2) == dim &&
                        given.scalar_type() == q.scalar_type() && on_device(given),
                    "tables: must be [N, H, d], of q's dtype and device, with a row for each code");
    tables.push_back(aligned(given));
    return tables.back().const_data_ptr();
  }

  void read_bias(const Optional& given) {
    if (!given) return;
    job.bias_heads = given->dim() == 2 ? job.heads : 1;
    STD_TORCH_CHECK(given->scalar_type() == ScalarType::Float && on_device(*given) &&
                        given->numel() == job.items * job.bias_heads &&
                        (given->dim() == 1 || given->size(1) == job.heads),
                    "bias: must be float32 [T] or [T, H] on the device of q");
    bias = contiguous_of(*given);
    job.bias = bias->const_data_ptr<float>();
  }
};

inline void check_done(cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, "code_attention: ", cudaGetErrorString(error));
}

}  // namespace livrec
