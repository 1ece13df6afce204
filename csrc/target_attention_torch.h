// What the torch operators of target attention share: a call that is safe to run, and its pieces.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "buffers_torch.h"
#include "prefix_torch.h"
#include "target_attention.h"

namespace livrec {

// Items of a piece, for every 256 candidates: what a piece gives is small beside what it reads.
constexpr int64_t kPieceItems = 1024;

inline Activation activation_of(const Text& name) {
  STD_TORCH_CHECK(name == "softmax" || name == "none" || name == "silu" || name == "sigmoid",
                  "activation: must be softmax, none, silu or sigmoid, got ", name);
  return name == "softmax" ? Activation::softmax
         : name == "none"  ? Activation::none
         : name == "silu"  ? Activation::silu
                           : Activation::sigmoid;
}

// A piece of a user's history, and where what it gives lies among that of all pieces.
struct Task {
  int64_t user, begin, end;
  int64_t columns_before;  // columns of earlier pieces
};

// The arguments of a call, checked, and as the kernels read them. k [T, H, d] and v [T, H, dv], or
// one tensor of features for both, [T, d].
class AttentionCall {
 public:
  Tensor q, k, v;
  Optional bias;
  TableType type;
  Activation activation;
  int64_t users, items, asked, heads, dim, value_dim, padded, value_padded, bias_heads, groups;
  float scale;
  bool shared;  // one tensor of features
  std::vector<Task> tasks;
  std::vector<int64_t> first_task;  // [users + 1]
  int64_t columns = 0;              // of all pieces

  AttentionCall(const Tensor& q_given, const Tensor& k_given, const Tensor& v_given,
                const Tensor& offsets_given, const Optional& bias_given, double scale_given,
                const Text& activation_given, const Optional& q_offsets_given) {
    const bool jagged = q_offsets_given.has_value();
    shared = k_given.dim() == 2;
    STD_TORCH_CHECK(q_given.dim() == (jagged ? 3 : 4), "q: must be [B, C, H, d], or [Q, H, d]");
    q = contiguous_of(q_given);
    k = contiguous_of(k_given);
    v = shared ? k : contiguous_of(v_given);
    type = float_type(q.scalar_type(), "q");
    heads = q.size(-2), dim = q.size(-1), items = k.size(0);
    groups = shared ? 1 : heads;
    value_dim = v.size(-1);
    STD_TORCH_CHECK(heads > 0 && dim > 0 && value_dim > 0, "q, v: H, d and dv must be at least 1");
    STD_TORCH_CHECK(
        k.size(-1) == dim && v.size(0) == items &&
            (shared ? k_given.const_data_ptr() == v_given.const_data_ptr()
                    : (k.dim() == 3 && v.dim() == 3 && k.size(1) == heads && v.size(1) == heads)) &&
            k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(),
        "k, v: must be [T, H, d] and [T, H, dv] of q's dtype");
    activation = activation_of(activation_given);
    scale = static_cast<float>(scale_given);
    asked = jagged ? q.size(0) : q.size(0) * q.size(1);
    offsets_ = std::make_unique<Offsets>(offsets_given, items);
    users = offsets_->histories;
    if (jagged) {
      q_offsets_ = std::make_unique<Offsets>(*q_offsets_given, asked, "q_offsets");
      STD_TORCH_CHECK(q_offsets_->histories == users, "q_offsets: must be [B + 1]");
    } else {
      STD_TORCH_CHECK(users == q.size(0), "offsets: must be [B + 1]");
      each_ = q.size(1);
    }
    bias_heads = 0;
    if (bias_given) {
      bias = contiguous_of(*bias_given);
      bias_heads = bias->dim() == 2 ? heads : 1;
      STD_TORCH_CHECK(bias->scalar_type() == ScalarType::Float && bias->size(0) == items &&
                          (bias->dim() == 1 || (bias->dim() == 2 && bias->size(1) == heads)),
                      "bias: must be float32 [T] or [T, H]");
    }
    const int64_t pad = LIVREC_CALL_BF16(target_attention_pad);
    padded = (dim + pad - 1) / pad * pad, value_padded = (value_dim + pad - 1) / pad * pad;
    cut();
  }

  int64_t first_row(int64_t user) const {
    return q_offsets_ ? q_offsets_->data[user] : user * each_;
  }
  int64_t candidates(int64_t user) const {
    return q_offsets_ ? q_offsets_->data[user + 1] - q_offsets_->data[user] : each_;
  }
  std::pair<int64_t, int64_t> history(int64_t user) const {
    return {offsets_->data[user], offsets_->data[user + 1]};
  }
  int64_t columns_of(int64_t user) const { return candidates(user) * heads; }
  // Where a column, (head, candidate), lies in arrays [asked, heads].
  int64_t place_of(int64_t user, int64_t column) const {
    const int64_t count = candidates(user);
    return (first_row(user) + column % count) * heads + column / count;
  }

  AttentionPiece piece_of(const Task& task, const float* q_wide, Buffer& scratch,
                          bool gradient) const {
    AttentionPiece piece{};
    piece.shared = shared;
    piece.k = at(k, task.begin), piece.v = at(v, task.begin);
    piece.bias = bias ? bias->const_data_ptr<float>() + task.begin * bias_heads : nullptr;
    piece.type = type, piece.activation = activation;
    piece.items = task.end - task.begin, piece.groups = groups;
    piece.rows = columns_of(task.user) / groups, piece.candidates = candidates(task.user);
    piece.bias_heads = bias_heads;
    piece.dim = dim, piece.value_dim = value_dim;
    piece.padded = padded, piece.value_padded = value_padded;
    piece.q = q_wide, piece.scale = scale;
    piece.scratch = scratch.of(LIVREC_CALL_BF16(target_attention_space, piece, gradient));
    return piece;
  }

  // x [asked, heads, dim] of a user in float32, times a factor, head by head: [columns, padded].
  void widen(const Tensor& x, int64_t user, int64_t dim_of, int64_t padded_of, float factor,
             float* out) const {
    const int64_t count = candidates(user);
    LIVREC_CALL_BF16(target_attention_widen, at(x, first_row(user), heads * dim_of), type, count,
                     heads, dim_of, padded_of, factor, out);
  }
  void narrow(const float* x, const float* factors, float factor, int64_t user, int64_t dim_of,
              int64_t padded_of, const Tensor& out) const {
    LIVREC_CALL_BF16(target_attention_narrow, x, factors, factor, type, candidates(user), heads,
                     dim_of, padded_of, at(out, first_row(user), heads * dim_of));
  }

  static char* at(const Tensor& x, int64_t row) {
    return at(x, row, x.size(0) == 0 ? 0 : x.numel() / x.size(0));
  }
  static char* at(const Tensor& x, int64_t row, int64_t size) {
    return static_cast<char*>(const_cast<void*>(x.const_data_ptr())) +
           row * size * static_cast<int64_t>(x.element_size());
  }

  template <typename Run>
  void each_task(const Run& run) const {
    torch::stable::parallel_for(0, static_cast<int64_t>(tasks.size()), 1, run);
  }
  template <typename Run>
  void each_user(const Run& run) const {
    torch::stable::parallel_for(0, users, 1, run);
  }

 private:
  void cut() {
    for (int64_t user = 0; user < users; ++user) {
      first_task.push_back(static_cast<int64_t>(tasks.size()));
      const int64_t step = kPieceItems * std::max<int64_t>(1, (candidates(user) + 255) / 256);
      const int64_t begin = offsets_->data[user], end = offsets_->data[user + 1];
      if (candidates(user) == 0) continue;
      for (int64_t from = begin; from == begin || from < end; from += step) {
        tasks.push_back({user, from, std::min(end, from + step), columns});
        columns += columns_of(user);
      }
    }
    first_task.push_back(static_cast<int64_t>(tasks.size()));
  }

  std::unique_ptr<Offsets> offsets_, q_offsets_;
  int64_t each_ = 0;
};

}  // namespace livrec
