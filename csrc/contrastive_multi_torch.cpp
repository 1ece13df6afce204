#include "contrastive_gradient_torch.h"
#include "contrastive_loss_torch.h"

namespace livrec {
namespace {

// The calls of several terms. The first holds what is of the anchor alone: its units, and masks.
class Terms {
 public:
  Terms(const Tensor& anchor, const Tensor& keys, const Tensor& temperatures, bool normalize,
        bool symmetric, const Optional& query_ids, const Optional& key_ids,
        std::optional<double> threshold, bool keep_pairs, const Optional& valid,
        const Text& precision)
      : keys_(contiguous_of(keys)) {
    const int64_t count = keys.dim() == 3 ? keys.size(0) : 0, batch = anchor.size(0);
    STD_TORCH_CHECK(
        count > 0 && temperatures.dim() == 1 && temperatures.size(0) == count &&
            (!key_ids || (key_ids->dim() == 2 && key_ids->size(0) == count)) &&
            (!valid || (valid->dim() == 2 && valid->size(0) == count && valid->size(1) == batch &&
                        valid->scalar_type() == ScalarType::Bool)),
        "keys: must be [T, B, D], T at least 1, and temperatures, key_ids and valid of T terms");
    if (valid) any_of(contiguous_of(*valid), count, batch);
    const Optional none;
    const Text standard = "standard";
    for (int64_t t = 0; t < count; ++t) {
      Optional ids, rows;
      if (key_ids) ids = torch::stable::select(*key_ids, 0, t);
      if (valid) rows = torch::stable::select(*valid, 0, t);
      const Tensor key = torch::stable::select(keys_, 0, t),
                   temperature = torch::stable::select(temperatures, 0, t);
      held_.push_back(std::make_unique<ContrastiveCall>(
          ContrastiveArguments{anchor, key, temperature, normalize, symmetric, query_ids, ids, none,
                               threshold, none, keep_pairs, 0, none, standard, rows, none,
                               precision},
          t == 0 ? nullptr : held_[0].get(), any_valid()));
      calls.push_back(held_.back().get());
    }
  }

  ContrastiveCall& first() const { return *held_[0]; }
  const bool* any_valid() const {
    return any_.empty() ? nullptr : reinterpret_cast<const bool*>(any_.data());
  }

  ContrastiveCalls calls;

 private:
  // Anchors that some term reads.
  void any_of(const Tensor& valid, int64_t count, int64_t batch) {
    any_.assign(static_cast<size_t>(batch), 0);
    const bool* from = valid.const_data_ptr<bool>();
    for (int64_t t = 0; t < count; ++t)
      for (int64_t i = 0; i < batch; ++i) any_[static_cast<size_t>(i)] |= from[t * batch + i];
  }

  Tensor keys_;
  std::vector<uint8_t> any_;
  std::vector<std::unique_ptr<ContrastiveCall>> held_;
};

std::tuple<Tensor, Tensor, Tensor> in_batch_contrastive_multi(
    const Tensor& anchor, const Tensor& keys, const Tensor& temperatures, bool normalize,
    bool symmetric, const Optional& query_ids, const Optional& key_ids,
    std::optional<double> threshold, bool keep_pairs, const Optional& valid, Text precision) {
  const Terms terms(anchor, keys, temperatures, normalize, symmetric, query_ids, key_ids, threshold,
                    keep_pairs, valid, precision);
  ContrastiveCall& first = terms.first();
  const Tensor pairs = empty_cpu(first.kept_shape(), ScalarType::Long);
  if (first.keeps_pairs) first.find_pairs(pairs);
  const int64_t count = keys.size(0), batch = first.batch;
  const Tensor losses = empty_cpu({count, batch}, ScalarType::Float);
  const Tensor lse = empty_cpu({count, first.kept_sums(), batch}, ScalarType::Double);
  find_losses(terms.calls, losses.mutable_data_ptr<float>(), lse.mutable_data_ptr<double>());
  return {losses, lse, pairs};
}

// The gradients of all terms, whose dq is one.
class MultiGradient {
 public:
  MultiGradient(const Terms& terms, const float* grad, const double* lse,
                const ContrastiveWanted& wanted)
      : terms_(terms) {
    const ContrastiveCall& first = terms.first();
    float* dq = held_.zeros(first.batch * first.stride);
    for (const ContrastiveCall* called : terms.calls) {
      gradients_.push_back(std::make_unique<ContrastiveGradient>(
          *called, grad, lse, wanted, dq, first.temperature / called->temperature,
          first.call.per_temperature));
      if (grad) grad += first.batch;
      lse += first.kept_sums() * first.batch;
    }
    std::vector<ContrastiveGradient*> all;
    for (const auto& gradient : gradients_) all.push_back(gradient.get());
    ContrastiveGradient::run(all);
  }

  void anchor(const Tensor& out) const {
    for (const auto& gradient : gradients_) gradient->add_own();
    gradients_[0]->query_of_all(terms_.any_valid(), out.mutable_data_ptr());
  }

  // Of keys [T, B, D], and by the way of temperatures [T].
  void keys(const Tensor& out, const Tensor& temperatures) const {
    const ContrastiveCall& first = terms_.first();
    const int64_t bytes = first.batch * first.dim * static_cast<int64_t>(out.element_size());
    std::vector<double> slopes(static_cast<size_t>(first.batch));
    for (size_t t = 0; t < gradients_.size(); ++t) {
      const auto at = static_cast<int64_t>(t);
      gradients_[t]->key(static_cast<char*>(out.mutable_data_ptr()) + at * bytes, slopes.data());
      double slope = 0.0;
      for (const double of : slopes) slope -= of;
      put_number(temperatures, at, slope / terms_.calls[t]->temperature);
    }
  }

 private:
  const Terms& terms_;
  Buffer held_;
  std::vector<std::unique_ptr<ContrastiveGradient>> gradients_;
};

// needs: of anchor, keys, temperatures and those of the optional tensors that are given.
std::vector<Tensor> in_batch_contrastive_multi_backward(
    const std::vector<Optional>& grads, const Tensor& anchor, const Tensor& keys,
    const Tensor& temperatures, bool normalize, bool symmetric, const Optional& query_ids,
    const Optional& key_ids, std::optional<double> threshold, bool keep_pairs,
    const Optional& valid, Text precision, const std::vector<Tensor>& outputs,
    const std::vector<bool>& needs) {
  const Terms terms(anchor, keys, temperatures, normalize, symmetric, query_ids, key_ids, threshold,
                    keep_pairs, valid, precision);
  check_kept(terms.calls, grads, outputs, 3);
  if (terms.first().keeps_pairs) terms.first().use_pairs(contiguous_of(outputs[2]));
  ContrastiveNeeds asked(needs);
  const bool of_anchor = asked.next(), of_keys = asked.next(), of_temperatures = asked.next();
  asked.next(query_ids), asked.next(key_ids), asked.next(valid);
  asked.end();
  Optional grad;
  if (grads[0]) grad = contiguous_of(*grads[0]);
  const Tensor lse = contiguous_of(outputs[1]);
  const MultiGradient gradient(terms, grad ? grad->const_data_ptr<float>() : nullptr,
                               lse.const_data_ptr<double>(),
                               {of_anchor, of_keys || of_temperatures, false, false, false});
  std::vector<Tensor> found;
  if (of_anchor) {
    found.push_back(empty_cpu(anchor.sizes(), anchor.scalar_type()));
    gradient.anchor(found.back());
  }
  if (!of_keys && !of_temperatures) return found;
  const Tensor key_grads = empty_cpu(keys.sizes(), keys.scalar_type()),
               slopes = empty_cpu(temperatures.sizes(), temperatures.scalar_type());
  gradient.keys(key_grads, slopes);
  if (of_keys) found.push_back(key_grads);
  if (of_temperatures) found.push_back(slopes);
  return found;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(livrec, CPU, m) {
  m.impl("in_batch_contrastive_multi.native", TORCH_BOX(&in_batch_contrastive_multi));
  m.impl("in_batch_contrastive_multi_backward.native",
         TORCH_BOX(&in_batch_contrastive_multi_backward));
}

}  // namespace livrec
