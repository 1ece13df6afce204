#include "contrastive_gradient_torch.h"
#include "contrastive_loss_torch.h"

namespace livrec {
namespace {

// The calls of several terms. The first holds what is of the anchor alone: its units, and pairs.
class Terms {
 public:
  Terms(const Tensor& anchor, const Tensor& keys, const Tensor& temperatures, bool normalize,
        bool symmetric, const Optional& query_ids, const Optional& key_ids,
        std::optional<double> threshold, bool keep_pairs, const Optional& valid,
        const Text& precision, const Optional& pairs)
      : keys_(torch::stable::contiguous(keys)) {
    const int64_t count = keys.size(0), batch = anchor.size(0);
    STD_TORCH_CHECK(
        keys.dim() == 3 && count > 0 && temperatures.dim() == 1 && temperatures.size(0) == count &&
            (!key_ids || (key_ids->dim() == 2 && key_ids->size(0) == count)) &&
            (!valid || (valid->dim() == 2 && valid->size(0) == count && valid->size(1) == batch)),
        "keys: must be [T, B, D], T at least 1, and temperatures, key_ids and valid of T terms");
    if (valid) any_of(torch::stable::contiguous(*valid), count, batch);
    const Optional none;
    const Text standard = "standard";
    for (int64_t t = 0; t < count; ++t) {
      Optional ids, rows;
      if (key_ids) ids = torch::stable::select(*key_ids, 0, t);
      if (valid) rows = torch::stable::select(*valid, 0, t);
      const Tensor key = torch::stable::select(keys_, 0, t),
                   temperature = torch::stable::select(temperatures, 0, t);
      calls.push_back(std::make_unique<ContrastiveCall>(
          ContrastiveArguments{anchor, key, temperature, normalize, symmetric, query_ids, ids, none,
                               threshold, none, keep_pairs, none, standard, rows, none, precision},
          t == 0 ? nullptr : calls[0].get(), any_valid()));
      if (t > 0 || !calls[0]->keeps_pairs) continue;
      found = pairs ? torch::stable::contiguous(*pairs)
                    : empty_cpu({batch, calls[0]->pair_words()}, ScalarType::Long);
      STD_TORCH_CHECK(found->numel() == batch * calls[0]->pair_words(), "pairs: wrong size");
      pairs ? calls[0]->use_pairs(*found) : calls[0]->find_pairs(*found);
    }
  }

  const bool* any_valid() const { return reinterpret_cast<const bool*>(any_.data()); }

  std::vector<std::unique_ptr<ContrastiveCall>> calls;
  Optional found;

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
};

std::tuple<Tensor, Tensor, Tensor> in_batch_contrastive_multi(
    const Tensor& anchor, const Tensor& keys, const Tensor& temperatures, bool normalize,
    bool symmetric, const Optional& query_ids, const Optional& key_ids,
    std::optional<double> threshold, bool keep_pairs, const Optional& valid, Text precision) {
  const Terms terms(anchor, keys, temperatures, normalize, symmetric, query_ids, key_ids, threshold,
                    keep_pairs, valid, precision, Optional{});
  const int64_t count = keys.size(0), batch = anchor.size(0), sums = 1 + symmetric;
  const Tensor losses = empty_cpu({count, batch}, ScalarType::Float);
  const Tensor lse = empty_cpu({count, sums, batch}, ScalarType::Double);
  for (int64_t t = 0; t < count; ++t)
    find_losses(*terms.calls[static_cast<size_t>(t)], losses.mutable_data_ptr<float>() + t * batch,
                lse.mutable_data_ptr<double>() + t * sums * batch);
  return {losses, lse, terms.found ? *terms.found : empty_cpu({0, 0}, ScalarType::Long)};
}

// needs: of anchor, keys, temperatures and those of the optional tensors that are given.
std::vector<Tensor> in_batch_contrastive_multi_backward(
    const std::vector<Optional>& grads, const Tensor& anchor, const Tensor& keys,
    const Tensor& temperatures, bool normalize, bool symmetric, const Optional& query_ids,
    const Optional& key_ids, std::optional<double> threshold, bool keep_pairs,
    const Optional& valid, Text precision, const std::vector<Tensor>& outputs,
    const std::vector<bool>& needs) {
  const int64_t count = keys.size(0), batch = anchor.size(0), sums = 1 + symmetric;
  STD_TORCH_CHECK(outputs.size() == 3 && grads.size() == 3 &&
                      (!grads[0] || grads[0]->numel() == count * batch) &&
                      outputs[1].numel() == count * sums * batch &&
                      outputs[1].scalar_type() == ScalarType::Double &&
                      outputs[2].scalar_type() == ScalarType::Long,
                  "outputs, grads: must be losses, lse and pairs, as the forward pass gives them");
  const Terms terms(anchor, keys, temperatures, normalize, symmetric, query_ids, key_ids, threshold,
                    keep_pairs, valid, precision, outputs[2]);
  Optional grad;
  if (grads[0]) grad = torch::stable::contiguous(*grads[0]);
  const Tensor lse = torch::stable::contiguous(outputs[1]);
  const ContrastiveCall& first = *terms.calls[0];
  Buffer held;
  float* dq = held.zeros(batch * first.stride);
  const Tensor of_keys = empty_cpu(keys.sizes(), keys.scalar_type()),
               of_anchor = empty_cpu(anchor.sizes(), anchor.scalar_type()),
               of_temperatures = empty_cpu({count}, temperatures.scalar_type());
  for (int64_t t = 0; t < count; ++t) {
    const ContrastiveCall& called = *terms.calls[static_cast<size_t>(t)];
    ContrastiveGradient gradient(called, grad ? grad->const_data_ptr<float>() + t * batch : nullptr,
                                 lse.const_data_ptr<double>() + t * sums * batch,
                                 {needs[0], needs[1] || needs[2], needs[2], false, false}, dq,
                                 first.temperature / called.temperature,
                                 first.call.per_temperature);
    gradient.run();
    gradient.add_own();
    std::vector<double> slopes(static_cast<size_t>(batch));
    if (needs[1] || needs[2])
      gradient.key(static_cast<char*>(of_keys.mutable_data_ptr()) +
                       t * batch * called.dim * static_cast<int64_t>(keys.element_size()),
                   slopes.data());
    double slope = 0.0;
    for (const double of : slopes) slope -= of;
    if (of_temperatures.scalar_type() == ScalarType::Double)
      of_temperatures.mutable_data_ptr<double>()[t] = slope / called.temperature;
    else
      of_temperatures.mutable_data_ptr<float>()[t] = static_cast<float>(slope / called.temperature);
    if (t + 1 == count && needs[0])
      gradient.query_of_all(terms.any_valid(), of_anchor.mutable_data_ptr());
  }
  std::vector<Tensor> found;
  if (needs[0]) found.push_back(of_anchor);
  if (needs[1]) found.push_back(of_keys);
  if (needs[2]) found.push_back(of_temperatures);
  return found;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(livrec, CPU, m) {
  m.impl("in_batch_contrastive_multi.native", TORCH_BOX(&in_batch_contrastive_multi));
  m.impl("in_batch_contrastive_multi_backward.native",
         TORCH_BOX(&in_batch_contrastive_multi_backward));
}

}  // namespace livrec
