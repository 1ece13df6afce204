// What the torch operators of DIN attention share: a call that is safe to run, its layers packed,
// and one user's items.
#pragma once

#include <string>
#include <vector>

#include "buffers_torch.h"
#include "din_attention.h"
#include "prefix_torch.h"

namespace livrec {

inline int64_t round_up(int64_t size, int64_t step) { return (size + step - 1) / step * step; }

// A matrix in float32, [rows, columns].
struct DinMatrix {
  int64_t rows = 0, columns = 0;
  std::vector<float> data;
  float at(int64_t i, int64_t j) const { return data[static_cast<size_t>(i * columns + j)]; }

  DinMatrix() = default;
  DinMatrix(int64_t r, int64_t c) : rows(r), columns(c), data(static_cast<size_t>(r * c)) {}
  explicit DinMatrix(const Tensor& given)
      : DinMatrix(given.size(0), given.dim() == 2 ? given.size(1) : 1) {
    const Tensor held = contiguous_of(given);
    LIVREC_CALL(din_widen, held.const_data_ptr(), table_type(held.scalar_type()), rows, columns,
                columns, data.data());
  }

  // sign x rows [from, from + d) of this plus rows [other, other + d).
  DinMatrix combined(int64_t from, float sign, int64_t other, int64_t d) const {
    DinMatrix made(d, columns);
    for (int64_t i = 0; i < d * columns; ++i)
      made.data[static_cast<size_t>(i)] =
          data[static_cast<size_t>(from * columns + i)] +
          sign * (other < 0 ? 0.0f : data[static_cast<size_t>(other * columns + i)]);
    return made;
  }
  DinMatrix transposed() const {
    DinMatrix made(columns, rows);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j) made.data[static_cast<size_t>(j * rows + i)] = at(i, j);
    return made;
  }
  // [rows to a multiple of high, columns to one of wide], zeros beyond.
  DinMatrix padded(int64_t high, int64_t wide) const {
    DinMatrix made(round_up(rows, high), round_up(columns, wide));
    for (int64_t i = 0; i < rows; ++i)
      std::copy_n(data.data() + i * columns, columns, made.data.data() + i * made.columns);
    return made;
  }
  // [columns in tiles, rows, tile].
  DinMatrix tiled(int64_t wide, int64_t tile) const {
    DinMatrix made(round_up(columns, wide), rows);
    for (int64_t j = 0; j < columns; ++j)
      for (int64_t i = 0; i < rows; ++i)
        made.data[static_cast<size_t>((j / tile * rows + i) * tile + j % tile)] = at(i, j);
    return made;
  }
};

// What a unit is made of, as it is given.
struct DinParts {
  const std::vector<Tensor>&weights, &biases, &slopes, &gains, &shifts;
  const Text& activation;

  std::vector<const std::vector<Tensor>*> lists() const {
    return {&weights, &biases, &slopes, &gains, &shifts};
  }
};

inline DinActivation din_activation(const Text& name) {
  STD_TORCH_CHECK(
      name == "sigmoid" || name == "relu" || name == "silu" || name == "prelu" || name == "dice",
      "activation: must be sigmoid, relu, silu, prelu or dice, got ", name);
  return name == "sigmoid" ? DinActivation::sigmoid
         : name == "relu"  ? DinActivation::relu
         : name == "silu"  ? DinActivation::silu
         : name == "prelu" ? DinActivation::prelu
                           : DinActivation::dice;
}

// The first layer as a candidate takes it: B - D, P and A + D, [d, h_1] each; see din_attention.h.
struct DinFirstLayer {
  DinMatrix plain, product, query;

  DinFirstLayer(const Tensor& weights, int64_t dim) {
    const DinMatrix all(weights);
    plain = all.combined(dim, -1.0f, 2 * dim, dim);
    product = all.combined(3 * dim, 0.0f, -1, dim);
    query = all.combined(0, 1.0f, 2 * dim, dim);
  }
};

// The arguments of a call, checked, and as the kernels read them.
class DinCall {
 public:
  DinCall(const Tensor& q_given, const Tensor& k_given, const Optional& v_given,
          const Tensor& offsets_given, const DinParts& parts, bool softmax_given,
          const Optional& q_offsets_given)
      : q(contiguous_of(q_given)),
        k(contiguous_of(k_given)),
        has_values(v_given.has_value()),
        v(has_values ? contiguous_of(*v_given) : k),
        offsets(offsets_given, k.size(0)),
        type(float_type(q.scalar_type(), "q")),
        shape(LIVREC_CALL(din_shape)),
        softmax(softmax_given) {
    STD_TORCH_CHECK(q.dim() == (q_offsets_given ? 2 : 3) && k.dim() == 2 && v.dim() == 2,
                    "q: must be [B, C, d], or [Q, d] with q_offsets; k, v: [T, d] and [T, dv]");
    users = offsets.histories, dim = k.size(1), value_dim = v.size(1);
    asking = q.numel() / std::max<int64_t>(dim, 1);
    STD_TORCH_CHECK(dim > 0 && value_dim > 0 && q.size(q.dim() - 1) == dim &&
                        v.size(0) == k.size(0) && k.scalar_type() == q.scalar_type() &&
                        v.scalar_type() == q.scalar_type(),
                    "k, v: must be rows of q's dtype");
    if (q_offsets_given) {
      const Offsets jagged(q_offsets_given, asking);
      STD_TORCH_CHECK(jagged.histories == users, "q_offsets: must be [B + 1]");
      starts.assign(jagged.data, jagged.data + users + 1);
    } else {
      STD_TORCH_CHECK(q.size(0) == users, "offsets: must be [B + 1]");
      for (int64_t user = 0; user <= users; ++user) starts.push_back(user * q.size(1));
    }
    read_layers(parts);
  }

  int64_t items_of(int64_t user) const { return offsets.data[user + 1] - offsets.data[user]; }
  int64_t padded(int64_t size) const { return round_up(size, shape.lanes); }

  Tensor q, k;
  bool has_values;
  Tensor v;
  Offsets offsets;
  TableType type;
  DinShape shape;
  bool softmax;
  int64_t users = 0, dim = 0, value_dim = 0, asking = 0;
  std::vector<int64_t> starts;  // of each user's candidates
  DinUnit unit{};

 protected:
  // Checks that parts are as many and as typed as the activation and q have them.
  void check_parts(const DinParts& parts) const {
    const size_t depth = parts.weights.size() - 1;
    const bool gated = unit.activation == DinActivation::dice,
               sloped = gated || unit.activation == DinActivation::prelu;
    STD_TORCH_CHECK(parts.weights.size() >= 2 && parts.biases.size() == parts.weights.size() &&
                        parts.slopes.size() == (sloped ? depth : 0) &&
                        parts.gains.size() == (gated ? depth : 0) &&
                        parts.shifts.size() == parts.gains.size(),
                    "weights: must be two or more, with a bias each; slopes, gains, shifts: one "
                    "per hidden layer where the activation has them");
    for (const std::vector<Tensor>* list : parts.lists())
      for (const Tensor& one : *list)
        STD_TORCH_CHECK(
            one.scalar_type() == q.scalar_type() && one.dim() == (list == &parts.weights ? 2 : 1),
            "weights, biases, slopes, gains, shifts: must be [in, out] and [out] of q's dtype");
  }

  void read_layers(const DinParts& parts) {
    unit.activation = din_activation(parts.activation);
    check_parts(parts);
    const std::vector<Tensor>& weights = parts.weights;
    const size_t depth = weights.size() - 1;
    held_.reserve(16 * weights.size());
    int64_t in = 4 * dim;
    for (size_t l = 0; l < weights.size(); ++l) {
      STD_TORCH_CHECK(weights[l].size(0) == in && weights[l].size(1) > 0 &&
                          parts.biases[l].size(0) == weights[l].size(1),
                      "weights: layer ", static_cast<int64_t>(l), " must take what is given it");
      in = weights[l].size(1);
      if (l == depth) break;
      const auto row = [&](const std::vector<Tensor>& given) -> const float* {
        if (given.empty()) return nullptr;
        STD_TORCH_CHECK(given[l].size(0) == in, "slopes, gains, shifts: must be one per unit");
        return hold(DinMatrix(given[l]).padded(shape.lanes, 1));
      };
      layers_.push_back({l == 0 ? dim : weights[l].size(0), in, padded(in), nullptr, nullptr,
                         row(parts.biases), row(parts.slopes), row(parts.gains),
                         row(parts.shifts)});
      unit.widest = std::max(unit.widest, layers_.back().wide);
    }
    STD_TORCH_CHECK(in == 1, "weights: the last must give one number");
    pack(weights);
    unit.last = hold(DinMatrix(weights[depth]).padded(shape.lanes, 1));
    unit.last_bias = DinMatrix(parts.biases[depth]).data[0];
    unit.dim = dim, unit.padded = padded(dim);
    unit.layers = layers_.data(), unit.depth = static_cast<int64_t>(depth);
  }

  void pack(const std::vector<Tensor>& weights) {
    const DinFirstLayer first(weights[0], dim);
    unit.plain = hold(first.plain.tiled(shape.lanes, shape.tile));
    unit.product = hold(first.product.tiled(shape.lanes, shape.tile));
    unit.query = hold(first.query.padded(1, shape.lanes));
    for (size_t l = 1; l < layers_.size(); ++l)
      layers_[l].weights = hold(DinMatrix(weights[l]).tiled(shape.lanes, shape.tile));
  }

  const float* hold(DinMatrix matrix) {
    held_.push_back(std::move(matrix));
    return held_.back().data.data();
  }

  std::vector<DinLayer> layers_;
  std::vector<DinMatrix> held_;
};

// Some candidates of one user.
struct DinTask {
  int64_t user, begin, end;  // rows of q
};

// The candidates of all users, at most `most` in a task, and tasks in groups of about as much work.
struct DinPlan {
  std::vector<DinTask> tasks;
  std::vector<int64_t> begins;  // [groups + 1]

  DinPlan(const DinCall& call, int64_t most, int64_t groups) {
    std::vector<int64_t> work{0};
    for (int64_t user = 0; user < call.users; ++user) {
      const int64_t last = call.starts[static_cast<size_t>(user) + 1];
      for (int64_t c = call.starts[static_cast<size_t>(user)]; c < last; c += most) {
        tasks.push_back({user, c, std::min(c + most, last)});
        work.push_back(work.back() + (tasks.back().end - c) * (call.items_of(user) + 16));
      }
    }
    for (int64_t g = 0; g <= groups; ++g) {
      const auto share = static_cast<int64_t>(static_cast<double>(work.back()) *
                                              static_cast<double>(g) / static_cast<double>(groups));
      begins.push_back(std::lower_bound(work.begin(), work.end(), share) - work.begin());
    }
    begins.back() = static_cast<int64_t>(tasks.size());
  }
};

// The items of one user after the other, in float32; memory stays for the next.
class DinItems {
 public:
  explicit DinItems(const DinCall& call) : call_(call) {}

  const DinHistory& of(int64_t user) {
    if (user == user_) return history;
    user_ = user;
    const int64_t items = call_.items_of(user), from = call_.offsets.data[user];
    rows = widened(rows_, call_.k, from, items);
    float* columns = columns_.of(round_up(items, call_.shape.block) * call_.dim);
    LIVREC_CALL(din_columns, rows, items, call_.dim, call_.padded(call_.dim), columns);
    const float* values = call_.has_values ? widened(values_, call_.v, from, items) : rows;
    history = {items, columns, values, call_.padded(call_.value_dim)};
    return history;
  }
  // Rows of x in float32, padded.
  float* widened(Buffer& buffer, const Tensor& x, int64_t from, int64_t count) const {
    const int64_t width = x.size(x.dim() - 1);
    float* out = buffer.of(count * call_.padded(width));
    LIVREC_CALL(din_widen, row(x, from), call_.type, count, width, call_.padded(width), out);
    return out;
  }
  static const void* row(const Tensor& x, int64_t at) {
    const int64_t bytes = at * x.size(x.dim() - 1) * static_cast<int64_t>(x.element_size());
    return static_cast<const char*>(x.const_data_ptr()) + bytes;
  }
  static void* row(Tensor& x, int64_t at) {
    const int64_t bytes = at * x.size(x.dim() - 1) * static_cast<int64_t>(x.element_size());
    return static_cast<char*>(x.mutable_data_ptr()) + bytes;
  }

  DinHistory history{};
  float* rows = nullptr;  // [items, padded dim]

 private:
  const DinCall& call_;
  int64_t user_ = -1;
  Buffer rows_, columns_, values_;
};

}  // namespace livrec
