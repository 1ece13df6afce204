#include "code_attention_torch_cuda.h"

#include <tuple>

namespace livrec {
namespace {

std::tuple<Tensor, Tensor> code_attention(const Tensor& q, const Tensor& codes,
                                          const std::vector<Tensor>& key_tables,
                                          const std::vector<Tensor>& value_tables,
                                          const Tensor& offsets, const Optional& bias, double scale,
                                          const std::vector<int64_t>& levels,
                                          const std::vector<int64_t>& groups, const Text& hashing,
                                          bool packed) {
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  CudaCall call(q, codes, key_tables, value_tables, offsets, bias, scale, levels, groups, packed);
  CodeAttentionCuda& job = call.job;
  Tensor out = call.empty({job.users, job.candidates, job.heads, job.value_dim}, q.scalar_type());
  Tensor lse = call.empty({job.users, job.candidates, job.heads}, ScalarType::Float);
  job.out = out.mutable_data_ptr(), job.lse = lse.mutable_data_ptr<float>();
  int64_t bytes = 0;
  check_done(code_attention_cuda_space(job, &bytes));
  const Tensor space = call.empty({bytes}, ScalarType::Byte);
  check_done(code_attention_cuda(job, space.mutable_data_ptr(), call.stream()));
  return {out, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(livrec, CUDA, m) {
  m.impl("code_attention.cuda", TORCH_BOX(&code_attention));
}

}  // namespace livrec
