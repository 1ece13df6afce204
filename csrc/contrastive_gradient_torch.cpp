#include "contrastive_gradient_torch.h"

namespace livrec {
namespace {

Tensor scalar_like(const Tensor& x, double value) {
  const Tensor out = empty_cpu({}, x.scalar_type());
  put_number(out, 0, value);
  return out;
}

// needs: of query, key, temperature and those of the optional tensors that are given.
std::vector<Tensor> in_batch_contrastive_backward(
    const std::vector<Optional>& grads, const Tensor& query, const Tensor& key,
    const Tensor& temperature, bool normalize, bool symmetric, const Optional& query_ids,
    const Optional& key_ids, const Optional& group_ids, std::optional<double> threshold,
    const Optional& pair_vectors, bool keep_pairs, int64_t keep_products, const Optional& log_q,
    Text log_q_rule, const Optional& valid, const Optional& extra_keys, Text precision,
    const std::vector<Tensor>& outputs, const std::vector<bool>& needs) {
  ContrastiveCall called({query, key, temperature, normalize, symmetric, query_ids, key_ids,
                          group_ids, threshold, pair_vectors, keep_pairs, keep_products, log_q,
                          log_q_rule, valid, extra_keys, precision});
  check_kept({&called}, grads, outputs, 4);
  if (called.keeps_pairs) called.use_pairs(contiguous_of(outputs[2]));
  const Tensor products = contiguous_of(outputs[3]);
  STD_TORCH_CHECK(products.numel() == called.call.kept_rows * called.columns &&
                      products.scalar_type() == ScalarType::Float,
                  "outputs: products must be as the forward pass gives them");
  if (products.numel() > 0) called.call.kept = products.const_data_ptr<float>();
  ContrastiveNeeds asked(needs);
  const bool of_query = asked.next(), of_key = asked.next(), of_temperature = asked.next();
  asked.next(query_ids), asked.next(key_ids), asked.next(group_ids);
  const bool of_pairs = asked.next(pair_vectors), of_log_q = asked.next(log_q);
  asked.next(valid);
  const bool of_extra_keys = asked.next(extra_keys);
  asked.end();
  Optional grad;
  if (grads[0]) grad = contiguous_of(*grads[0]);
  const Tensor lse = contiguous_of(outputs[1]);
  ContrastiveGradient gradient(called, grad ? grad->const_data_ptr<float>() : nullptr,
                               lse.const_data_ptr<double>(),
                               {of_query, of_key, of_temperature, of_log_q, of_extra_keys});
  ContrastiveGradient::run({&gradient});
  std::vector<Tensor> found;
  double slope = 0.0;
  if (of_query || of_temperature) {
    const Tensor made = gradient.query(slope);
    if (of_query) found.push_back(made);
  }
  if (of_key) found.push_back(gradient.key());
  if (of_temperature) found.push_back(scalar_like(temperature, slope));
  if (of_pairs) found.push_back(zeros_like_cpu(*pair_vectors));
  if (of_log_q) found.push_back(gradient.log_q());
  if (of_extra_keys) found.push_back(gradient.extra_keys());
  return found;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(livrec, CPU, m) {
  m.impl("in_batch_contrastive_backward.native", TORCH_BOX(&in_batch_contrastive_backward));
}

}  // namespace livrec
