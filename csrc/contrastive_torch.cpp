#include "contrastive_torch.h"

namespace livrec {
namespace {

// Of rows or of columns: the greatest logit of their negatives, and the sum of exponentials.
struct Sums {
  std::vector<float> peaks, sums;
  explicit Sums(int64_t count)
      : peaks(static_cast<size_t>(count), -INFINITY), sums(static_cast<size_t>(count)) {}

  // The loss beside a positive; 0 where there are no negatives.
  double loss(int64_t at, double positive) const {
    const double sum = sums[static_cast<size_t>(at)];
    if (sum == 0.0) return 0.0;
    const double x = std::log(sum) + peaks[static_cast<size_t>(at)] - positive;
    return x > 0.0 ? x + std::log1p(std::exp(-x)) : std::log1p(std::exp(x));
  }
};

std::tuple<Tensor, Tensor, Tensor> in_batch_contrastive(
    const Tensor& query, const Tensor& key, const Tensor& temperature, bool normalize,
    bool symmetric, const Optional& query_ids, const Optional& key_ids,
    std::optional<double> threshold, bool keep_pairs, const Optional& log_q, const Optional& valid,
    const Optional& extra_keys) {
  ContrastiveCall called({query, key, temperature, normalize, symmetric, query_ids, key_ids,
                          threshold, log_q, valid, extra_keys});
  const int64_t batch = called.batch, words = (batch + kPairsPerWord - 1) / kPairsPerWord;
  const bool kept = threshold && keep_pairs;
  const Tensor pairs = empty_cpu({kept ? batch : 0, kept ? words : 0}, ScalarType::Long);
  if (kept) called.find_pairs(pairs);
  Sums rows(batch), all_columns(symmetric ? called.padded_columns : 0);
  called.each_part([&](const ContrastivePart& part, float* scratch) {
    LIVREC_CALL(contrastive_forward, called.call, part, scratch, rows.peaks.data(),
                rows.sums.data(), all_columns.peaks.data(), all_columns.sums.data());
  });
  const Tensor losses = empty_cpu({batch}, ScalarType::Float);
  const Tensor lse = empty_cpu({symmetric ? 2 : 1, batch}, ScalarType::Double);
  double* lses = lse.mutable_data_ptr<double>();
  for (int64_t i = 0; i < batch; ++i) {
    const double own = called.positive(i, false), loss = rows.loss(i, own);
    lses[i] = own + loss;
    double both = loss;
    if (symmetric) {
      const double other = called.positive(i, true), back = all_columns.loss(i, other);
      lses[batch + i] = other + back;
      both = (loss + back) / 2;
    }
    losses.mutable_data_ptr<float>()[i] = static_cast<float>(both);
  }
  return {losses, lse, pairs};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(livrec, CPU, m) {
  m.impl("in_batch_contrastive.native", TORCH_BOX(&in_batch_contrastive));
}

}  // namespace livrec
