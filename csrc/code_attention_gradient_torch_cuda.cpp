#include "code_attention_gradient_cuda.h"
#include "code_attention_torch_cuda.h"

namespace livrec {
namespace {

constexpr int64_t kRoom = 64 << 20;  // bytes of sums by row at a time

// Where each field's results begin: rows that items name, and the sums of all rows.
struct Found {
  Tensor keys, values, rows, counts;
};

// Copies the rows that items name, once the host knows how many they are.
void take_rows(const CudaCall& call, const Found& found, std::vector<Tensor>& results) {
  const CodeAttentionCuda& job = call.job;
  const cudaStream_t stream = call.stream();
  std::vector<int64_t> counts(static_cast<size_t>(job.fields));
  check_done(cudaMemcpyAsync(counts.data(), found.counts.const_data_ptr(), counts.size() * 8,
                             cudaMemcpyDeviceToHost, stream));
  check_done(cudaStreamSynchronize(stream));
  const int64_t key_size = job.heads * job.dim, value_size = job.heads * job.value_dim;
  const auto* rows = found.rows.const_data_ptr<int64_t>();
  const auto* keys = found.keys.const_data_ptr<float>();
  const auto* values = found.values.const_data_ptr<float>();
  for (size_t f = 0; f < counts.size(); ++f) {
    const int64_t count = counts[f];
    Tensor own = call.empty({count}, ScalarType::Long);
    Tensor own_keys = call.empty({count, job.heads, job.dim}, ScalarType::Float);
    Tensor own_values = call.empty({count, job.heads, job.value_dim}, ScalarType::Float);
    if (count)
      check_done(cudaMemcpyAsync(own.mutable_data_ptr(), rows, static_cast<size_t>(count) * 8,
                                 cudaMemcpyDeviceToDevice, stream));
    check_done(code_take_rows_cuda(keys, rows, count, key_size, own_keys.mutable_data_ptr<float>(),
                                   stream));
    check_done(code_take_rows_cuda(values, rows, count, value_size,
                                   own_values.mutable_data_ptr<float>(), stream));
    rows += job.rows[f], keys += job.rows[f] * key_size, values += job.rows[f] * value_size;
    results.push_back(own), results.push_back(own_keys), results.push_back(own_values);
  }
}

std::vector<Tensor> code_attention_gradient(
    const Tensor& grad_given, const Optional& grad_lse, const Tensor& q, const Tensor& codes,
    const std::vector<Tensor>& key_tables, const std::vector<Tensor>& value_tables,
    const Tensor& offsets, const Optional& bias, double scale, const std::vector<int64_t>& levels,
    const std::vector<int64_t>& groups, const Text& hashing, bool packed, const Tensor& out_given,
    const Tensor& lse) {
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  CudaCall call(q, codes, key_tables, value_tables, offsets, bias, scale, levels, groups, packed);
  const CodeAttentionCuda& attention = call.job;
  const Tensor grad = contiguous_of(grad_given), out = contiguous_of(out_given);
  for (const Tensor* x : {&grad, &out})
    STD_TORCH_CHECK(x->dim() == 4 && x->size(0) == attention.users &&
                        x->size(1) == attention.candidates && x->size(2) == attention.heads &&
                        x->size(3) == attention.value_dim && x->scalar_type() == q.scalar_type() &&
                        x->device() == q.device(),
                    "grad, out: must be [B, C, H, dv] of q's dtype and device");
  Optional lse_slopes;
  if (grad_lse) {
    lse_slopes = contiguous_of(*grad_lse);
    STD_TORCH_CHECK(lse_slopes->numel() == q.numel() / attention.dim &&
                        lse_slopes->scalar_type() == ScalarType::Float &&
                        lse_slopes->device() == q.device(),
                    "grad_lse: must be float32 [B, C, H] on the device of q");
  }
  int64_t rows = 0;
  for (int64_t level : levels) rows += level;
  const Found found{call.empty({rows, attention.heads, attention.dim}, ScalarType::Float),
                    call.empty({rows, attention.heads, attention.value_dim}, ScalarType::Float),
                    call.empty({rows}, ScalarType::Long),
                    call.empty({attention.fields}, ScalarType::Long)};
  Tensor grad_q = call.empty(q.sizes(), q.scalar_type());
  Tensor grad_bias =
      bias ? call.empty(bias->sizes(), ScalarType::Float) : call.empty({0}, ScalarType::Float);
  const CodeAttentionGradientCuda job{attention,
                                      grad.const_data_ptr(),
                                      out.const_data_ptr(),
                                      lse_slopes ? lse_slopes->const_data_ptr<float>() : nullptr,
                                      grad_q.mutable_data_ptr(),
                                      grad_bias.mutable_data_ptr<float>(),
                                      found.keys.mutable_data_ptr<float>(),
                                      found.values.mutable_data_ptr<float>(),
                                      found.rows.mutable_data_ptr<int64_t>(),
                                      found.counts.mutable_data_ptr<int64_t>(),
                                      kRoom};
  int64_t bytes = 0;
  check_done(code_attention_gradient_cuda_space(job, &bytes));
  const Tensor space = call.empty({bytes}, ScalarType::Byte);
  check_done(code_attention_gradient_cuda(job, space.mutable_data_ptr(), call.stream()));
  std::vector<Tensor> results{grad_q, grad_bias};
  take_rows(call, found, results);
  return results;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(livrec, CUDA, m) {
  m.impl("code_attention_gradient.cuda", TORCH_BOX(&code_attention_gradient));
}

}  // namespace livrec
