#include "contrastive_torch.h"

namespace livrec {
namespace {

struct Wanted {
  bool query, key, temperature, log_q, extra_keys;
};

class Gradient {
 public:
  Gradient(const ContrastiveCall& called, const Optional& grad, const Tensor& lse,
           const Wanted& wanted)
      : called_(called),
        wanted_(wanted),
        lse_(torch::stable::contiguous(lse)),
        rows_(called.batch, called.batch),
        columns_(called.symmetric ? called.batch : 0, called.symmetric ? called.padded_columns : 0),
        factors_(static_cast<size_t>(called.batch)),
        of_log_q_(static_cast<size_t>(wanted.log_q ? called.padded_columns : 0)) {
    if (grad) grad_ = torch::stable::contiguous(*grad);
    if (wanted.query || wanted.temperature) dq_.zeros(called.batch * called.stride);
    if (wanted.key || wanted.extra_keys) dk_.zeros(called.columns * called.stride);
    for (int64_t i = 0; i < called.batch; ++i) ask(i);
  }

  void run() {
    ContrastiveSlopes slopes{};
    slopes.row_shifts = rows_.shifts.data(), slopes.row_factors = rows_.factors.data();
    slopes.column_shifts = columns_.shifts.data(), slopes.column_factors = columns_.factors.data();
    slopes.row_means = rows_.means.data(), slopes.column_means = columns_.means.data();
    slopes.dq = dq_.data(), slopes.dk = dk_.data();
    slopes.row_weights = wanted_.log_q ? of_log_q_.data() : nullptr;
    called_.each_part([&](const ContrastivePart& part, float* scratch) {
      LIVREC_CALL(contrastive_backward, called_.call, part, scratch, slopes);
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
    finish(called_.key, called_.batch, called_.units_of(0), dk_.data(), true,
           out.mutable_data_ptr(), nullptr);
    return out;
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
      if (out.scalar_type() == ScalarType::Double)
        out.mutable_data_ptr<double>()[j] = found;
      else
        out.mutable_data_ptr<float>()[j] = static_cast<float>(found);
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

  // The part of a row's own log Q that its positive, or its other negatives, see.
  double own_log_q(int64_t i) const {
    const double missed = rows_.missed[static_cast<size_t>(i)];
    if (!called_.unsampled || missed == 0.0) return missed;
    return -missed / std::expm1(-called_.log_q_of(i));
  }

  void ask(int64_t i) {
    if (!called_.counts(i)) return;
    const double* lse = lse_.const_data_ptr<double>();
    double grad = grad_ ? grad_->const_data_ptr<float>()[i] : 0.0;
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
              void* out, double* slopes) const {
    ContrastiveRows rows{};
    rows.x = x.const_data_ptr(), rows.type = called_.type;
    rows.units = called_.units_of(first);
    rows.norms = called_.normalize ? called_.norms.data() + first : nullptr;
    rows.du = du, rows.other = other, rows.factors = of_batch ? factors_.data() : nullptr;
    rows.valid = of_batch ? called_.call.valid : nullptr;
    rows.scale = called_.call.per_temperature;
    rows.dim = called_.dim, rows.stride = called_.stride;
    ContrastiveCall::each_rows(x.size(0), [&](int64_t begin, int64_t end) {
      Buffer scratch;
      LIVREC_CALL(contrastive_finish, rows, begin, end, out, slopes,
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
  Wanted wanted_;
  Tensor lse_;
  Optional grad_;
  Side rows_, columns_;
  std::vector<float> factors_, of_log_q_;
  Zeros dq_, dk_;
};

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
    const Optional& pair_vectors, bool keep_pairs, const Optional& log_q, std::string log_q_rule,
    const Optional& valid, const Optional& extra_keys, std::string precision,
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
  Gradient gradient(called, grads[0], outputs[1],
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
