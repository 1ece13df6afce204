#include "target_attention_torch.h"

namespace livrec {
namespace {

using Results = std::tuple<Tensor, Tensor, Tensor>;  // out, lse, and what lse lost to rounding

std::vector<int64_t> shape_of(const Tensor& q, int64_t last) {
  std::vector<int64_t> shape(q.sizes().begin(), q.sizes().end());
  shape.back() = last;
  return shape;
}

class Forward {
 public:
  explicit Forward(const AttentionCall& call)
      : call_(call),
        out_(empty_cpu(shape_of(call.q, call.value_dim), call.q.scalar_type())),
        lse_(call.activation == Activation::softmax ? lse_like(call.q)
                                                    : empty_cpu({0}, ScalarType::Float)),
        rest_(empty_cpu(lse_.sizes(), ScalarType::Float)),
        sums_(call.columns * call.value_padded * 4),
        peaks_(call.columns * 4),
        totals_(call.columns * 4) {}

  Results run() {
    call_.each_task([&](int64_t begin, int64_t end) {
      Buffer q, scratch;
      for (int64_t t = begin; t < end; ++t) {
        const Task& task = call_.tasks[static_cast<size_t>(t)];
        float* wide = q.of(call_.columns_of(task.user) * call_.padded);
        call_.widen(call_.q, task.user, call_.dim, call_.padded, call_.scale, wide);
        LIVREC_CALL_BF16(target_attention_forward, call_.piece_of(task, wide, scratch, false),
                         sums(task), peaks(task), totals(task));
      }
    });
    call_.each_user([&](int64_t begin, int64_t end) {
      for (int64_t user = begin; user < end; ++user) finish(user);
    });
    return {out_, lse_, rest_};
  }

 private:
  static Tensor lse_like(const Tensor& q) {
    return empty_cpu(q.sizes().slice(0, static_cast<size_t>(q.dim()) - 1), ScalarType::Float);
  }
  static float* part(const Scratch& scratch, const Task& task, int64_t width) {
    return static_cast<float*>(scratch.data()) + task.columns_before * width;
  }
  float* sums(const Task& task) const { return part(sums_, task, call_.value_padded); }
  float* peaks(const Task& task) const { return part(peaks_, task, 1); }
  float* totals(const Task& task) const { return part(totals_, task, 1); }

  // Adds up the pieces of a user's history, in their order, in the place of the first.
  void finish(int64_t user) {
    const int64_t first = call_.first_task[static_cast<size_t>(user)],
                  last = call_.first_task[static_cast<size_t>(user) + 1],
                  columns = call_.columns_of(user), width = call_.value_padded;
    if (columns == 0) return;
    const Task& head = call_.tasks[static_cast<size_t>(first)];
    const bool softmax = call_.activation == Activation::softmax;
    for (int64_t c = 0; c < columns; ++c) {
      float most = -INFINITY, total = 0.0f, *sum = sums(head) + c * width;
      if (softmax)
        for (int64_t t = first; t < last; ++t) {
          const float peak = peaks(call_.tasks[static_cast<size_t>(t)])[c];
          most = peak > most ? peak : most;
        }
      for (int64_t t = first; t < last; ++t) {
        const Task& task = call_.tasks[static_cast<size_t>(t)];
        const float own = peaks(task)[c], *from = sums(task) + c * width;
        const float factor = !softmax || own == most ? 1.0f : std::exp(own - most);
        total += factor * totals(task)[c];
        if (task.begin != head.begin)
          for (int64_t d = 0; d < width; ++d) sum[d] += factor * from[d];
        else if (factor != 1.0f)
          for (int64_t d = 0; d < width; ++d) sum[d] *= factor;
      }
      totals(head)[c] = !softmax ? 1.0f : total == 0.0f ? 0.0f : 1.0f / total;
      if (softmax) note_lse(call_.place_of(user, c), most, total);
    }
    call_.narrow(sums(head), totals(head), 1.0f, user, call_.value_dim, width, out_);
  }

  void note_lse(int64_t place, float most, float total) {
    const bool held = most > -INFINITY && most < INFINITY && total > 0.0f;
    const double lse = most + std::log(static_cast<double>(total));
    float* to = lse_.mutable_data_ptr<float>() + place;
    *to = most == INFINITY ? most : static_cast<float>(lse);
    rest_.mutable_data_ptr<float>()[place] = held ? static_cast<float>(lse - *to) : 0.0f;
  }

  const AttentionCall& call_;
  Tensor out_, lse_, rest_;
  Scratch sums_, peaks_, totals_;
};

Results target_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& offsets,
                         const Optional& bias, double scale, const Text& activation,
                         const Optional& q_offsets) {
  return Forward(AttentionCall(q, k, v, offsets, bias, scale, activation, q_offsets)).run();
}

Results shared_attention(const Tensor& q, const Tensor& x, const Tensor& offsets,
                         const Optional& bias, double scale, const Text& activation,
                         const Optional& q_offsets) {
  return Forward(AttentionCall(q, x, x, offsets, bias, scale, activation, q_offsets)).run();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(livrec, CPU, m) {
  m.impl("target_attention.native", TORCH_BOX(&target_attention));
  m.impl("shared_attention.native", TORCH_BOX(&shared_attention));
}

}  // namespace livrec
