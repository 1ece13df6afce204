#include "target_attention_torch.h"

namespace livrec {
namespace {

// What a user's queries and their gradients are to the kernels; memory stays for the next user.
struct Asked {
  Buffer q_space, grad_space, base_space, scratch, less_space;
  float *q = nullptr, *grad = nullptr, *base = nullptr;
};

constexpr int64_t kPastCaches = 1 << 20;  // bytes of a gradient, as a core's own cache holds
constexpr float kPlainLse = 16.0f;  // logits at which rounding of out still shows in no gradient

struct Wanted {
  bool q, k, v, bias;
};

class Gradient {
 public:
  Gradient(const AttentionCall& call, const Tensor& grad, const Optional& grad_lse,
           const std::vector<Tensor>& outputs, const Wanted& wanted)
      : call_(call),
        grad_(contiguous_of(grad)),
        out_(contiguous_of(outputs[0])),
        lse_(contiguous_of(outputs[1])),
        rest_(contiguous_of(outputs[2])),
        softmax_(call.activation == Activation::softmax),
        slopes_(3 * call.columns * 4),
        dq_(call.columns * call.padded * 4),
        sums_(call.columns * 4),
        keys_(softmax_ ? call.columns * call.padded * 4 : 0) {
    if (grad_lse) grad_lse_ = contiguous_of(*grad_lse);
    const auto type = call.q.scalar_type();
    grad_q = empty_cpu(call.q.sizes(), type);
    if (wanted.k) grad_k = empty_cpu(call.k.sizes(), type);
    if (wanted.v) grad_v = call.shared ? grad_k : empty_cpu(call.v.sizes(), type);
    if (wanted.bias) grad_bias = empty_cpu(call.bias->sizes(), ScalarType::Float);
  }

  void run() {
    for (int64_t user = 0; user < call_.users; ++user)
      plain_.push_back(softmax_ && takes_lse(user));
    if (softmax_) {
      each_piece(false, [&](const Task& task, Asked& asked, const AttentionPiece& piece) {
        float* found = slopes(task);
        const int64_t columns = call_.columns_of(task.user);
        LIVREC_CALL_BF16(target_attention_slopes, piece, asked.grad, asked.base, found,
                         found + columns, found + 2 * columns);
      });
      call_.each_user([&](int64_t begin, int64_t end) {
        for (int64_t user = begin; user < end; ++user) join_slopes(user);
      });
    }
    each_piece(true, [&](const Task& task, Asked& asked, const AttentionPiece& piece) {
      add(task, asked, piece);
    });
    call_.each_user([&](int64_t begin, int64_t end) {
      for (int64_t user = begin; user < end; ++user) finish(user);
    });
  }

  Tensor grad_q;
  Optional grad_k, grad_v, grad_bias;

 private:
  // Visits the pieces, those of plain users or not.
  template <typename Visit>
  void each_piece(bool of_plain, const Visit& visit) {
    call_.each_task([&](int64_t begin, int64_t end) {
      Asked asked;
      for (int64_t t = begin; t < end; ++t) {
        const Task& task = call_.tasks[static_cast<size_t>(t)];
        if (plain(task.user) && !of_plain) continue;
        ask(task.user, asked);
        visit(task, asked, call_.piece_of(task, asked.q, asked.scratch, true));
      }
    });
  }

  void ask(int64_t user, Asked& asked) const {
    const int64_t columns = call_.columns_of(user), width = call_.value_padded;
    asked.q = asked.q_space.of(columns * call_.padded);
    call_.widen(call_.q, user, call_.dim, call_.padded, call_.scale, asked.q);
    asked.grad = asked.grad_space.of(columns * width);
    asked.base = asked.base_space.of(columns);
    float* out = asked.less_space.of(columns * width);
    call_.widen(out_, user, call_.value_dim, width, 1.0f, out);
    call_.widen(grad_, user, call_.value_dim, width, 1.0f, asked.grad);
    for (int64_t c = 0; c < columns; ++c) {
      double sum = 0.0;
      for (int64_t d = 0; d < width; ++d)
        sum += static_cast<double>(asked.grad[c * width + d]) * out[c * width + d];
      asked.base[c] = static_cast<float>(sum);
    }
  }

  // [3, columns]: peaks, sums, slopes of a piece; of the first, after join_slopes, of all.
  float* slopes(const Task& task) const {
    return static_cast<float*>(slopes_.data()) + 3 * task.columns_before;
  }
  // Of dS, by column.
  float* sums(const Task& task) const {
    return static_cast<float*>(sums_.data()) + task.columns_before;
  }
  // Of w k, as dq.
  float* keys(const Task& task) const {
    return static_cast<float*>(keys_.data()) + task.columns_before * call_.padded;
  }
  float* dq(const Task& task) const {
    return static_cast<float*>(dq_.data()) + task.columns_before * call_.padded;
  }
  const Task& head_of(int64_t user) const {
    return call_.tasks[static_cast<size_t>(call_.first_task[static_cast<size_t>(user)])];
  }

  bool plain(int64_t user) const { return plain_[static_cast<size_t>(user)]; }

  // Whether logits are so small that one pass will do.
  bool takes_lse(int64_t user) const {
    const float* lse = lse_.const_data_ptr<float>() + call_.first_row(user) * call_.heads;
    return std::all_of(lse, lse + call_.columns_of(user),
                       [](float one) { return one == -INFINITY || std::fabs(one) <= kPlainLse; });
  }

  float lse_flow(int64_t place) const {
    return grad_lse_ ? grad_lse_->const_data_ptr<float>()[place] : 0.0f;
  }

  // Of all pieces: the greatest logit, 1 / Z, and what is to be subtracted from D - base.
  void join_slopes(int64_t user) {
    const int64_t columns = call_.columns_of(user);
    if (columns == 0) return;
    const int64_t first = call_.first_task[static_cast<size_t>(user)],
                  last = call_.first_task[static_cast<size_t>(user) + 1];
    float* joined = slopes(head_of(user));
    for (int64_t c = 0; c < columns && plain(user); ++c) {
      const int64_t place = call_.place_of(user, c);
      const float lse = lse_.const_data_ptr<float>()[place];
      joined[c] = lse, joined[2 * columns + c] = 0.0f;
      joined[columns + c] =
          lse == -INFINITY ? 0.0f : std::exp(-rest_.const_data_ptr<float>()[place]);
    }
    for (int64_t c = 0; c < columns && !plain(user); ++c) {
      float most = -INFINITY, total = 0.0f, slope = 0.0f;
      for (int64_t t = first; t < last; ++t) {
        const float peak = slopes(call_.tasks[static_cast<size_t>(t)])[c];
        most = peak > most ? peak : most;
      }
      for (int64_t t = first; t < last; ++t) {
        const float* own = slopes(call_.tasks[static_cast<size_t>(t)]);
        const float factor = own[c] == most ? 1.0f : std::exp(own[c] - most);
        total += factor * own[columns + c];
        slope += factor * own[2 * columns + c];
      }
      const float factor = total == 0.0f ? 0.0f : 1.0f / total;
      joined[c] = most, joined[columns + c] = factor, joined[2 * columns + c] = slope * factor;
    }
  }

  void add(const Task& task, Asked& asked, const AttentionPiece& piece) {
    const int64_t columns = call_.columns_of(task.user);
    AttentionSlopes to{};
    to.grad = asked.grad;
    float* less = asked.less_space.of(columns);
    if (softmax_) {
      const float* joined = slopes(head_of(task.user));
      to.peaks = joined, to.factors = joined + columns, to.less = less;
      for (int64_t c = 0; c < columns; ++c) {
        less[c] = asked.base[c] + joined[2 * columns + c] - lse_flow(call_.place_of(task.user, c));
      }
    }
    to.dq = dq(task);
    if (plain(task.user)) {
      to.sums = sums(task);
      to.keys = keys(task);
    }
    to.past_caches = call_.items * call_.groups * std::max(call_.dim, call_.value_dim) *
                         static_cast<int64_t>(call_.k.element_size()) >=
                     kPastCaches;
    to.dk = grad_k ? AttentionCall::at(*grad_k, task.begin) : nullptr;
    to.dv = grad_v ? AttentionCall::at(*grad_v, task.begin) : nullptr;
    to.dbias =
        grad_bias ? grad_bias->mutable_data_ptr<float>() + task.begin * call_.bias_heads : nullptr;
    LIVREC_CALL_BF16(target_attention_backward, piece, to);
  }

  void finish(int64_t user) {
    const int64_t count = call_.columns_of(user) * call_.padded;
    if (count == 0) return forget(user);
    const int64_t first = call_.first_task[static_cast<size_t>(user)],
                  last = call_.first_task[static_cast<size_t>(user) + 1];
    float* sum = dq(head_of(user));
    for (int64_t t = first + 1; t < last; ++t) {
      const float* own = dq(call_.tasks[static_cast<size_t>(t)]);
      for (int64_t i = 0; i < count; ++i) sum[i] += own[i];
    }
    if (plain(user)) center(user, sum);
    call_.narrow(sum, nullptr, call_.scale, user, call_.dim, call_.padded, grad_q);
  }

  // Takes out of dq what was left in dS in sum: see target_attention.h.
  void center(int64_t user, float* dq_of_user) const {
    const int64_t first = call_.first_task[static_cast<size_t>(user)],
                  last = call_.first_task[static_cast<size_t>(user) + 1];
    for (int64_t c = 0; c < call_.columns_of(user); ++c) {
      if (slopes(head_of(user))[call_.columns_of(user) + c] == 0.0f) continue;  // no item counts
      double left = -lse_flow(call_.place_of(user, c));
      for (int64_t t = first; t < last; ++t) left += sums(call_.tasks[static_cast<size_t>(t)])[c];
      for (int64_t t = first; t < last; ++t) {
        const float* own = keys(call_.tasks[static_cast<size_t>(t)]) + c * call_.padded;
        for (int64_t d = 0; d < call_.padded; ++d)
          dq_of_user[c * call_.padded + d] -= static_cast<float>(left) * own[d];
      }
    }
  }

  // Nobody asked of this history.
  void forget(int64_t user) {
    const auto [begin, end] = call_.history(user);
    for (const Optional& grad : {grad_k, grad_v, grad_bias})
      if (grad && begin < end)
        std::memset(
            AttentionCall::at(*grad, begin), 0,
            static_cast<size_t>(AttentionCall::at(*grad, end) - AttentionCall::at(*grad, begin)));
  }

  const AttentionCall& call_;
  Tensor grad_, out_, lse_, rest_;
  std::vector<char> plain_;  // [users]
  Optional grad_lse_;
  bool softmax_;
  Scratch slopes_, dq_, sums_, keys_;
};

using Grads = std::vector<Optional>;

Tensor given_grad(const Grads& grads, const Tensor& out) {
  return grads[0] ? *grads[0] : zeros_like_cpu(out);
}

Optional lse_grad(const Grads& grads, const AttentionCall& call) {
  return call.activation == Activation::softmax ? grads[1] : std::nullopt;
}

void check_outputs(const AttentionCall& call, const Grads& grads,
                   const std::vector<Tensor>& outputs) {
  const int64_t logits = call.activation == Activation::softmax ? call.asked * call.heads : 0;
  const auto fits = [&](const Optional& out, const Optional& lse) {
    return (!out || (out->numel() == call.asked * call.heads * call.value_dim &&
                     out->scalar_type() == call.q.scalar_type())) &&
           (!lse || (lse->numel() == logits && lse->scalar_type() == ScalarType::Float));
  };
  STD_TORCH_CHECK(outputs.size() == 3 && grads.size() == 3 && fits(outputs[0], outputs[1]) &&
                      fits(grads[0], grads[1]) && fits(std::nullopt, outputs[2]),
                  "outputs, grads: must be out, lse and rest, as the forward pass gives them");
}

std::vector<Tensor> backward(const AttentionCall& call, const Grads& grads,
                             const std::vector<Tensor>& outputs, const Wanted& wanted) {
  check_outputs(call, grads, outputs);
  Gradient gradient(call, given_grad(grads, outputs[0]), lse_grad(grads, call), outputs, wanted);
  gradient.run();
  std::vector<Tensor> found;
  if (wanted.q) found.push_back(gradient.grad_q);
  if (wanted.k) found.push_back(*gradient.grad_k);
  if (wanted.v && !call.shared) found.push_back(*gradient.grad_v);
  if (wanted.bias) found.push_back(*gradient.grad_bias);
  return found;
}

// needs: of q, k, v, offsets and those of bias and q_offsets that are given.
std::vector<Tensor> target_attention_backward(const Grads& grads, const Tensor& q, const Tensor& k,
                                              const Tensor& v, const Tensor& offsets,
                                              const Optional& bias, double scale,
                                              const Text& activation, const Optional& q_offsets,
                                              const std::vector<Tensor>& outputs,
                                              const std::vector<bool>& needs) {
  check_needs(needs, size_t{4} + bias.has_value() + q_offsets.has_value());
  return backward(AttentionCall(q, k, v, offsets, bias, scale, activation, q_offsets), grads,
                  outputs, {needs[0], needs[1], needs[2], bias && needs[4]});
}

// needs: of q, x, offsets and those of bias and q_offsets that are given.
std::vector<Tensor> shared_attention_backward(const Grads& grads, const Tensor& q, const Tensor& x,
                                              const Tensor& offsets, const Optional& bias,
                                              double scale, const Text& activation,
                                              const Optional& q_offsets,
                                              const std::vector<Tensor>& outputs,
                                              const std::vector<bool>& needs) {
  check_needs(needs, size_t{3} + bias.has_value() + q_offsets.has_value());
  return backward(AttentionCall(q, x, x, offsets, bias, scale, activation, q_offsets), grads,
                  outputs, {needs[0], needs[1], needs[1], bias && needs[3]});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(livrec, CPU, m) {
  m.impl("target_attention_backward.native", TORCH_BOX(&target_attention_backward));
  m.impl("shared_attention_backward.native", TORCH_BOX(&shared_attention_backward));
}

}  // namespace livrec
