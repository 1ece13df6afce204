#include "din_attention_torch.h"

namespace livrec {
namespace {

constexpr int64_t kCandidates = 16;  // in a task
constexpr int64_t kShares = 4;       // groups of tasks per thread

Tensor din_attention(const Tensor& q, const Tensor& k, const Optional& v, const Tensor& offsets,
                     const std::vector<Tensor>& weights, const std::vector<Tensor>& biases,
                     const std::vector<Tensor>& slopes, const std::vector<Tensor>& gains,
                     const std::vector<Tensor>& shifts, const Text& activation, bool softmax,
                     const Optional& q_offsets) {
  const DinCall call(q, k, v, offsets, {weights, biases, slopes, gains, shifts, activation},
                     softmax, q_offsets);
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i + 1 < q.dim(); ++i) sizes.push_back(q.size(i));
  sizes.push_back(call.value_dim);
  Tensor out = empty_cpu(torch::headeronly::IntHeaderOnlyArrayRef(sizes.data(), sizes.size()),
                         q.scalar_type());
  const int64_t groups = kShares * torch::stable::get_num_threads();
  const DinPlan plan(call, kCandidates, groups);
  const DinUnit& unit = call.unit;
  torch::stable::parallel_for(0, groups, 1, [&](int64_t first, int64_t last) {
    DinItems items(call);
    Buffer asking, matrix, start, space, logits, sums;
    float* layer = matrix.of(unit.layers[0].wide * call.dim);
    float* begin = start.of(unit.layers[0].wide);
    float* blocks = space.of(2 * unit.widest * call.shape.block);
    float* sum = sums.of(call.padded(call.value_dim));
    const int64_t end = plan.begins[static_cast<size_t>(last)];
    for (int64_t t = plan.begins[static_cast<size_t>(first)]; t < end; ++t) {
      const DinTask& task = plan.tasks[static_cast<size_t>(t)];
      const DinHistory& history = items.of(task.user);
      const float* queries = items.widened(asking, call.q, task.begin, task.end - task.begin);
      float* found = logits.of(history.items);
      for (int64_t c = task.begin; c < task.end; ++c, queries += call.padded(call.dim)) {
        if (history.items > 0) LIVREC_CALL(din_begin, unit, queries, layer, begin);
        LIVREC_CALL(din_logits, unit, layer, begin, history, blocks, found);
        if (softmax) LIVREC_CALL(din_softmax, found, history.items);
        LIVREC_CALL(din_sum, history, found, sum);
        LIVREC_CALL(din_narrow, sum, call.type, 1, call.value_dim, call.padded(call.value_dim),
                    DinItems::row(out, c));
      }
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(livrec, CPU, m) {
  m.impl("din_attention.native", TORCH_BOX(&din_attention));
}

}  // namespace livrec
