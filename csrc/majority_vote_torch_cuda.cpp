#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <string>

#include "majority_vote_cuda.h"
#include "torch_glue.h"

namespace livrec {
namespace {

Integer integer_type(const Tensor& codes) {
  const auto type = codes.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Byte || type == ScalarType::Short || type == ScalarType::Int,
                  "codes: must be uint8, int16 or int32");
  return type == ScalarType::Byte    ? Integer::u8
         : type == ScalarType::Short ? Integer::i16
                                     : Integer::i32;
}

Tensor majority_vote(const Tensor& codes_given, const Tensor& offsets_given,
                     const std::vector<int64_t>& levels, const Text& rule) {
  STD_TORCH_CHECK(rule == "per_level", "rule: must be \"per_level\"");
  const int64_t depth = static_cast<int64_t>(levels.size());
  STD_TORCH_CHECK(depth > 0 && codes_given.dim() == 2 && codes_given.size(1) == depth,
                  "codes: must be [T, L] with L levels");
  STD_TORCH_CHECK(offsets_given.dim() == 1 && offsets_given.size(0) > 0 &&
                      offsets_given.scalar_type() == ScalarType::Long &&
                      offsets_given.device() == codes_given.device(),
                  "offsets: must be int64 [B + 1] on the device of codes");
  const torch::stable::accelerator::DeviceGuard guard(codes_given.get_device_index());
  const Tensor codes = contiguous_of(codes_given);
  const Tensor offsets = contiguous_of(offsets_given);
  const int64_t histories = offsets.size(0) - 1;
  const bool narrow = *std::max_element(levels.begin(), levels.end()) <= 32767;
  Tensor voted =
      torch::stable::empty({histories, depth}, narrow ? ScalarType::Short : ScalarType::Int,
                           std::nullopt, codes.device());
  const MajorityVoteCuda job{codes.const_data_ptr(),
                             integer_type(codes),
                             codes.size(0),
                             offsets.const_data_ptr<int64_t>(),
                             histories,
                             levels.data(),
                             depth,
                             voted.mutable_data_ptr(),
                             narrow ? Integer::i16 : Integer::i32};
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(codes.get_device_index(), &stream));
  const cudaError_t error = majority_vote_cuda(job, static_cast<cudaStream_t>(stream));
  STD_TORCH_CHECK(error == cudaSuccess, "majority_vote: ", cudaGetErrorString(error));
  return voted;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(livrec, CUDA, m) {
  m.impl("majority_vote.cuda", TORCH_BOX(&majority_vote));
}

}  // namespace livrec
