#include "contrastive_loss_torch.h"

namespace livrec {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> in_batch_contrastive(
    const Tensor& query, const Tensor& key, const Tensor& temperature, bool normalize,
    bool symmetric, const Optional& query_ids, const Optional& key_ids, const Optional& group_ids,
    std::optional<double> threshold, const Optional& pair_vectors, bool keep_pairs,
    int64_t keep_products, const Optional& log_q, Text log_q_rule, const Optional& valid,
    const Optional& extra_keys, Text precision) {
  ContrastiveCall called({query, key, temperature, normalize, symmetric, query_ids, key_ids,
                          group_ids, threshold, pair_vectors, keep_pairs, keep_products, log_q,
                          log_q_rule, valid, extra_keys, precision});
  const int64_t batch = called.batch;
  const Tensor pairs = empty_cpu(called.kept_shape(), ScalarType::Long);
  if (called.keeps_pairs) called.find_pairs(pairs);
  const Tensor products = empty_cpu(called.products_shape(), ScalarType::Float);
  if (products.numel() > 0) called.call.keeps = products.mutable_data_ptr<float>();
  const Tensor losses = empty_cpu({batch}, ScalarType::Float);
  const Tensor lse = empty_cpu({called.kept_sums(), batch}, ScalarType::Double);
  find_losses({&called}, losses.mutable_data_ptr<float>(), lse.mutable_data_ptr<double>());
  return {losses, lse, pairs, products};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(livrec, CPU, m) {
  m.impl("in_batch_contrastive.native", TORCH_BOX(&in_batch_contrastive));
}

}  // namespace livrec
