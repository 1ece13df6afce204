// The forward pass of the contrastive loss, for the operators of one term and of several.
#pragma once

#include "contrastive_torch.h"

namespace livrec {

// Of rows or of columns: the greatest logit of all but the own one, the sum of exponentials, and
// where it is asked how many negatives there are and the sum of the products of positives.
struct Sums {
  std::vector<float> peaks, sums;
  std::vector<int32_t> negatives;
  std::vector<double> positives;
  Sums(int64_t count, bool counts, bool groups)
      : peaks(static_cast<size_t>(count), -INFINITY),
        sums(static_cast<size_t>(count)),
        negatives(static_cast<size_t>(counts ? count : 0)),
        positives(static_cast<size_t>(groups ? count : 0)) {}

  ContrastiveSums given() {
    return {peaks.data(), sums.data(), negatives.empty() ? nullptr : negatives.data(),
            positives.empty() ? nullptr : positives.data()};
  }

  // log of the sum; -inf where there is nothing.
  double log_sum(int64_t i) const {
    const auto at = static_cast<size_t>(i);
    return sums[at] == 0.0f ? -INFINITY : std::log(static_cast<double>(sums[at])) + peaks[at];
  }

  // logsumexp less the own logit; 0 where there is nothing else.
  double above(int64_t i, double own) const {
    const double x = log_sum(i) - own;
    if (x == -INFINITY) return 0.0;
    return x > 0.0 ? x + std::log1p(std::exp(-x)) : std::log1p(std::exp(x));
  }
};

// The loss of a row or column, and its logsumexp: infinite where there are positives but nothing to
// tell them from, as then there is no gradient.
inline double loss_of(const ContrastiveCall& called, const Sums& all, int64_t i, bool of_column,
                      double& lse) {
  const double own = called.positive(i, of_column), above = all.above(i, own);
  lse = own + above;
  if (!called.has_groups() || !called.counts(i)) return above;
  const auto at = static_cast<size_t>(i);
  if (all.negatives[at] > 0)
    return above + (own - called.mean_positive(i, of_column, all.positives[at]));
  if (called.positives_of(i, of_column) > 1) lse = INFINITY;
  return 0.0;
}

// The loss of a row whose positive is no sample; lse: the log of its negatives' sum.
inline double unsampled_loss(const ContrastiveCall& called, const Sums& all, int64_t i, double& lse,
                             double& weight) {
  const int32_t count = all.negatives[static_cast<size_t>(i)];
  lse = weight = 0.0;
  if (count == 0) return 0.0;
  lse = all.log_sum(i);
  const double odds = lse + std::log1p(-std::exp(called.log_q_of(i))) - called.positive(i, false);
  weight = 1.0 / (1.0 + std::exp(std::log(static_cast<double>(count)) - odds));
  return weight * odds;
}

// losses [batch]; lses [kept_sums, batch]: what the backward pass needs.
inline void losses_of(const ContrastiveCall& called, const Sums& rows, const Sums& columns,
                      float* losses, double* lses) {
  const int64_t batch = called.batch;
  for (int64_t i = 0; i < batch; ++i) {
    double loss = called.unsampled ? unsampled_loss(called, rows, i, lses[i],
                                                    lses[batch * (1 + called.symmetric) + i])
                                   : loss_of(called, rows, i, false, lses[i]);
    if (called.symmetric) loss = (loss + loss_of(called, columns, i, true, lses[batch + i])) / 2;
    losses[i] = static_cast<float>(loss);
  }
}

// Likewise of every term: losses [terms, batch], lses [terms, kept_sums, batch].
inline void find_losses(const ContrastiveCalls& calls, float* losses, double* lses) {
  std::vector<Sums> rows, columns;
  for (const ContrastiveCall* called : calls) {
    const bool groups = called->has_groups();
    rows.emplace_back(called->batch, groups || called->unsampled, groups);
    columns.emplace_back(called->symmetric ? called->padded_columns : 0, groups, groups);
  }
  std::vector<ContrastiveSums> of_rows, of_columns;
  for (Sums& sums : rows) of_rows.push_back(sums.given());
  for (Sums& sums : columns) of_columns.push_back(sums.given());
  ContrastiveCall::each_part(calls, [&](const ContrastiveTerms& terms, const ContrastivePart& part,
                                        float* scratch) {
    LIVREC_CALL_AMX(contrastive_forward, terms, part, scratch, of_rows.data(), of_columns.data());
  });
  for (size_t t = 0; t < calls.size(); ++t) {
    losses_of(*calls[t], rows[t], columns[t], losses, lses);
    losses += calls[t]->batch, lses += calls[t]->kept_sums() * calls[t]->batch;
  }
}

}  // namespace livrec
