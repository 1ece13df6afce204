#include "contrastive_gradient_torch.h"

namespace livrec {
namespace {

Tensor scalar_like(const Tensor& x, double value) {
  const Tensor out = empty_cpu({}, x.scalar_type());
  void* to = out.mutable_data_ptr();
  if (x.scalar_type() == ScalarType::Double)
    *static_cast<double*>(to) = value;
  else if (x.scalar_type() == ScalarType::Float)
    *static_cast<float*>(to) = static_cast<float>(value);
  else if (x.scalar_type() == ScalarType::Half)
    *static_cast<torch::headeronly::Half*>(to) = static_cast<float>(value);
  else
    *static_cast<torch::headeronly::BFloat16*>(to) = static_cast<float>(value);
  return out;
}

Tensor zeros_like(const Tensor& x) {
  const Tensor out = empty_cpu(x.sizes(), x.scalar_type());
  std::memset(out.mutable_data_ptr(), 0, static_cast<size_t>(x.numel() * x.element_size()));
  return out;
}

// needs: of query, key, temperature and those of the optional tensors that are given.
std::vector<Tensor> in_batch_contrastive_backward(
    const std::vector<Optional>& grads, const Tensor& query, const Tensor& key,
    const Tensor& temperature, bool normalize, bool symmetric, const Optional& query_ids,
    const Optional& key_ids, const Optional& group_ids, std::optional<double> threshold,
    const Optional& pair_vectors, bool keep_pairs, const Optional& log_q, Text log_q_rule,
    const Optional& valid, const Optional& extra_keys, Text precision,
    const std::vector<Tensor>& outputs, const std::vector<bool>& needs) {
  ContrastiveCall called({query, key, temperature, normalize, symmetric, query_ids, key_ids,
                          group_ids, threshold, pair_vectors, keep_pairs, log_q, log_q_rule, valid,
                          extra_keys, precision});
  const int64_t batch = called.batch;
  STD_TORCH_CHECK(outputs.size() == 3 && grads.size() == 3 &&
                      (!grads[0] || grads[0]->numel() == batch) &&
                      outputs[1].numel() == called.kept_sums() * batch &&
                      outputs[1].scalar_type() == ScalarType::Double &&
                      outputs[2].numel() == batch * called.pair_words() &&
                      outputs[2].scalar_type() == ScalarType::Long,
                  "outputs, grads: must be losses, lse and pairs, as the forward pass gives them");
  if (called.keeps_pairs) called.use_pairs(torch::stable::contiguous(outputs[2]));
  size_t at = 3;
  const auto next = [&](const Optional& x) { return x && needs[at++]; };
  next(query_ids), next(key_ids), next(group_ids);
  const bool of_pairs = next(pair_vectors);
  const bool of_log_q = next(log_q);
  next(valid);
  Optional grad;
  if (grads[0]) grad = torch::stable::contiguous(*grads[0]);
  const Tensor lse = torch::stable::contiguous(outputs[1]);
  ContrastiveGradient gradient(called, grad ? grad->const_data_ptr<float>() : nullptr,
                               lse.const_data_ptr<double>(),
                               {needs[0], needs[1], needs[2], of_log_q, next(extra_keys)});
  gradient.run();
  std::vector<Tensor> found;
  double of_temperature = 0.0;
  if (needs[0] || needs[2]) {
    const Tensor of_query = gradient.query(of_temperature);
    if (needs[0]) found.push_back(of_query);
  }
  if (needs[1]) found.push_back(gradient.key());
  if (needs[2]) found.push_back(scalar_like(temperature, of_temperature));
  if (of_pairs) found.push_back(zeros_like(*pair_vectors));
  if (of_log_q) found.push_back(gradient.log_q());
  if (extra_keys && needs.back()) found.push_back(gradient.extra_keys());
  return found;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(livrec, CPU, m) {
  m.impl("in_batch_contrastive_backward.native", TORCH_BOX(&in_batch_contrastive_backward));
}

}  // namespace livrec
