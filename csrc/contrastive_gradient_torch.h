// The backward pass of the contrastive loss, for the operators of one term and of several.
#pragma once

#include "contrastive_torch.h"

namespace livrec {

struct ContrastiveWanted {
  bool query, key, temperature, log_q, extra_keys;
};

// That a gradient is given what the forward pass gives, of all terms.
inline void check_kept(const ContrastiveCalls& calls, const std::vector<Optional>& grads,
                       const std::vector<Tensor>& outputs, size_t count) {
  const ContrastiveCall& first = *calls[0];
  const int64_t rows = static_cast<int64_t>(calls.size()) * first.batch;
  const auto [kept, words] = first.kept_shape();
  STD_TORCH_CHECK(
      outputs.size() == count && grads.size() == count &&
          (!grads[0] ||
           (grads[0]->numel() == rows && grads[0]->scalar_type() == ScalarType::Float)) &&
          outputs[1].numel() == first.kept_sums() * rows &&
          outputs[1].scalar_type() == ScalarType::Double && outputs[2].numel() == kept * words &&
          outputs[2].scalar_type() == ScalarType::Long,
      "outputs, grads: must be losses, lse and pairs, as the forward pass gives them");
}

class ContrastiveGradient {
 public:
  // dq: of several terms, added up; their logits are weighed by `ratio`, what 1 / T is to `scale`,
  // so that one scale serves all.
  ContrastiveGradient(const ContrastiveCall& called, const float* grad, const double* lse,
                      const ContrastiveWanted& wanted, float* dq = nullptr, double ratio = 1.0,
                      float scale = 0.0f)
      : called_(called),
        wanted_(wanted),
        lse_(lse),
        grad_(grad),
        ratio_(ratio),
        scale_(dq ? scale : called.call.per_temperature),
        rows_(called.batch, called.batch),
        columns_(called.symmetric ? called.batch : 0, called.symmetric ? called.padded_columns : 0),
        factors_(static_cast<size_t>(called.batch)),
        of_log_q_(static_cast<size_t>(wanted.log_q ? called.padded_columns : 0)) {
    if (dq)
      dq_.from = dq;
    else if (wanted.query || wanted.temperature)
      dq_.zeros(called.batch * called.stride);
    if (wanted.key || wanted.extra_keys) dk_.zeros(called.columns * called.stride);
    for (int64_t i = 0; i < called.batch; ++i) ask(i);
  }

  // Those of all terms at once.
  static void run(const std::vector<ContrastiveGradient*>& gradients) {
    ContrastiveCalls calls;
    std::vector<ContrastiveSlopes> slopes;
    for (ContrastiveGradient* gradient : gradients) {
      calls.push_back(&gradient->called_);
      slopes.push_back(gradient->slopes());
    }
    ContrastiveCall::each_part(
        calls, [&](const ContrastiveTerms& terms, const ContrastivePart& part, float* scratch) {
          LIVREC_CALL_AMX(contrastive_backward, terms, part, scratch, slopes.data());
        });
  }

  Tensor query(double& of_temperature) {
    const int64_t batch = called_.batch;
    const Tensor out = wanted_.query ? empty_cpu(called_.query.sizes(), called_.query.scalar_type())
                                     : empty_cpu({0}, called_.query.scalar_type());
    std::vector<double> slopes(static_cast<size_t>(batch));
    finish(called_.query, 0, called_.units_of(called_.batch), dq_.data(), true,
           wanted_.query ? out.mutable_data_ptr() : nullptr, slopes.data());
    of_temperature = 0.0;
    for (const double slope : slopes) of_temperature -= slope;
    of_temperature /= called_.temperature;
    return out;
  }

  Tensor key() {
    const Tensor out = empty_cpu(called_.key.sizes(), called_.key.scalar_type());
    key(out.mutable_data_ptr(), nullptr);
    return out;
  }
  // slopes [batch], or null: <k_j, dk_j>.
  void key(void* out, double* slopes) const {
    finish(called_.key, called_.batch, called_.units_of(0), dk_.data(), true, out, slopes);
  }

  // The positives' own part of dq, for several terms.
  void add_own() {
    const int64_t stride = called_.stride;
    ContrastiveCall::each_rows(called_.batch, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const float factor = factors_[static_cast<size_t>(i)];
        if (factor == 0.0f) continue;
        const float* key = called_.units_of(called_.batch + i);
        for (int64_t d = 0; d < stride; ++d) dq_.data()[i * stride + d] += factor * key[d];
      }
    });
  }
  // Gradients of rows of queries that are read, from all terms' dq.
  void query_of_all(const bool* valid, void* out) const {
    finish(called_.query, 0, nullptr, dq_.data(), false, out, nullptr, valid);
  }

  Tensor extra_keys() {
    const Tensor& given = *called_.extra_keys;
    const Tensor out = empty_cpu(given.sizes(), given.scalar_type());
    finish(given, 2 * called_.batch, nullptr, dk_.data() + called_.batch * called_.stride, false,
           out.mutable_data_ptr(), nullptr);
    return out;
  }

  Tensor log_q() const {
    const Tensor out = empty_cpu(called_.log_q->sizes(), called_.log_q->scalar_type());
    for (int64_t j = 0; j < out.numel(); ++j) {
      const auto at = static_cast<size_t>(j);
      const double found = (j < called_.batch ? own_log_q(j) : 0.0) - of_log_q_[at];
      put_number(out, j, found);
    }
    return out;
  }

 private:
  // What weights need of rows or columns; `missed` is the factor of the positive's own weight.
  struct Side {
    std::vector<float> shifts, factors, means;
    std::vector<double> missed;
    Side(int64_t count, int64_t padded)
        : shifts(static_cast<size_t>(padded)),
          factors(static_cast<size_t>(padded)),
          means(static_cast<size_t>(padded)),
          missed(static_cast<size_t>(count)) {}
    // exp(s - lse) = exp(s - shift) exp(shift - lse), where the shift is rounded.
    void shift(size_t at, double grad, double lse) {
      shifts[at] = static_cast<float>(lse);
      factors[at] = static_cast<float>(grad * std::exp(shifts[at] - lse));
    }
    void set(int64_t i, double grad, double lse, double positive, double positives) {
      if (lse == INFINITY) return;  // of positives alone: no gradient
      const auto at = static_cast<size_t>(i);
      shift(at, grad, lse);
      means[at] = static_cast<float>(grad / positives);
      missed[at] = positives == 1.0 ? -grad * std::expm1(positive - lse)
                                    : grad * (1.0 / positives - std::exp(positive - lse));
    }
    void set_unsampled(int64_t i, double grad, double lse) {
      const auto at = static_cast<size_t>(i);
      shift(at, grad, lse);
      missed[at] = grad;
    }
  };

  ContrastiveSlopes slopes() {
    ContrastiveSlopes made{};
    made.row_shifts = rows_.shifts.data(), made.row_factors = rows_.factors.data();
    made.column_shifts = columns_.shifts.data(), made.column_factors = columns_.factors.data();
    made.row_means = rows_.means.data(), made.column_means = columns_.means.data();
    made.dq = wanted_.query || wanted_.temperature ? dq_.data() : nullptr;
    made.dk = dk_.data();
    made.row_weights = wanted_.log_q ? of_log_q_.data() : nullptr;
    return made;
  }

  // The part of a row's own log Q that its positive, or its other negatives, see.
  double own_log_q(int64_t i) const {
    const double missed = rows_.missed[static_cast<size_t>(i)];
    if (!called_.unsampled || missed == 0.0) return missed;
    return -missed / std::expm1(-called_.log_q_of(i));
  }

  void ask(int64_t i) {
    if (!called_.counts(i)) return;
    const double* lse = lse_;
    double grad = grad_ ? ratio_ * grad_[i] : 0.0;
    if (called_.symmetric) grad /= 2;
    if (called_.unsampled)
      rows_.set_unsampled(i, grad * lse[called_.batch * (1 + called_.symmetric) + i], lse[i]);
    else
      rows_.set(i, grad, lse[i], called_.positive(i, false), called_.positives_of(i, false));
    double all = rows_.missed[static_cast<size_t>(i)];
    if (called_.symmetric) {
      columns_.set(i, grad, lse[called_.batch + i], called_.positive(i, true),
                   called_.positives_of(i, true));
      all += columns_.missed[static_cast<size_t>(i)];
    }
    factors_[static_cast<size_t>(i)] = static_cast<float>(-all);
  }

  void finish(const Tensor& x, int64_t first, const float* other, const float* du, bool of_batch,
              void* out, double* slopes, const bool* valid = nullptr) const {
    ContrastiveRows rows{};
    rows.x = x.const_data_ptr(), rows.type = called_.type;
    rows.units = called_.units_of(first);
    rows.norms = called_.normalize ? called_.norms.data() + first : nullptr;
    rows.du = du, rows.other = other, rows.factors = of_batch ? factors_.data() : nullptr;
    rows.valid = of_batch ? called_.call.valid : valid;
    rows.scale = scale_;
    rows.dim = called_.dim, rows.stride = called_.stride;
    ContrastiveCall::each_rows(x.size(0), [&](int64_t begin, int64_t end) {
      Buffer scratch;
      LIVREC_CALL_AMX(contrastive_finish, rows, begin, end, out, slopes,
                      scratch.of(2 * called_.stride));
    });
  }

  struct Zeros {
    Buffer held;
    float* from = nullptr;
    void zeros(int64_t count) { from = held.zeros(count); }
    float* data() const { return from; }
  };

  const ContrastiveCall& called_;
  ContrastiveWanted wanted_;
  const double* lse_;
  const float* grad_;
  double ratio_;
  float scale_;
  Side rows_, columns_;
  std::vector<float> factors_, of_log_q_;
  Zeros dq_, dk_;
};

}  // namespace livrec
