#include "din_attention_gradient.h"

#include <numeric>
#include <utility>

#include "din_attention_torch.h"

namespace livrec {
namespace {

constexpr int64_t kGroups = 16;  // sums are added up in so many parts, whatever the threads

// A call whose unit is packed for the way back, too.
class DinBackCall : public DinCall {
 public:
  DinBackCall(const Tensor& q_given, const Tensor& k_given, const Optional& v_given,
              const Tensor& offsets_given, const DinParts& parts, bool softmax_given,
              const Optional& q_offsets_given)
      : DinCall(q_given, k_given, v_given, offsets_given, parts, softmax_given, q_offsets_given) {
    const DinFirstLayer first(parts.weights[0], dim);
    const DinMatrix product = first.product.transposed(), query = first.query.transposed();
    gradient.plain_back = hold(first.plain.transposed().tiled(shape.lanes, shape.tile));
    gradient.product_back = hold(product.tiled(shape.lanes, shape.tile));
    gradient.product_rows = hold(product.padded(shape.lanes, shape.lanes));
    gradient.query_rows = hold(query.padded(shape.lanes, shape.lanes));
    for (size_t l = 1; l < layers_.size(); ++l)
      layers_[l].weights_back =
          hold(DinMatrix(parts.weights[l]).transposed().tiled(shape.lanes, shape.tile));
  }
  DinGradient gradient{};
};

// Where the sums of a candidate or a group lie, one after the other.
class Sums {
 public:
  explicit Sums(const DinCall& call) {
    const DinUnit& unit = call.unit;
    const auto take = [&](int64_t count) { return std::exchange(size, size + count); };
    for (int64_t l = 0; l < unit.depth; ++l) {
      const int64_t wide = unit.layers[l].wide;
      const int64_t other = l == 0 ? unit.padded : unit.layers[l - 1].wide;
      places_.push_back({take(wide * other), take(wide), take(wide), take(wide), take(wide)});
    }
    last_ = take(unit.layers[unit.depth - 1].wide);
  }

  // Points into `data` [size].
  DinSums in(float* data, std::vector<DinLayerSums>& layers) const {
    layers.clear();
    for (const Places& p : places_)
      layers.push_back(
          {data + p.weights, data + p.bias, data + p.slope, data + p.gain, data + p.shift});
    return {layers.data(), data + last_};
  }

  int64_t size = 0;

 private:
  struct Places {
    int64_t weights, bias, slope, gain, shift;
  };
  std::vector<Places> places_;
  int64_t last_ = 0;
};

class Gradient {
 public:
  Gradient(const DinBackCall& call, const Tensor& grad)
      : call_(call),
        sums_(call),
        grad_(contiguous_of(grad)),
        grad_q(zeros_like_cpu(call.q)),
        grad_k(zeros_like_cpu(call.k)),
        grad_v(call.has_values ? zeros_like_cpu(call.v) : grad_k),
        plan_(call,
              call.users >= kGroups ? INT64_MAX / 2
                                    : std::max<int64_t>((call.asking + kGroups - 1) / kGroups, 1),
              kGroups),
        kept_(plan_.tasks.size()) {
    STD_TORCH_CHECK(grad_.numel() == call.asking * call.value_dim &&
                        grad_.size(-1) == call.value_dim &&
                        grad_.scalar_type() == call.q.scalar_type(),
                    "grads: must be of the output's shape and dtype");
    first_ = call.unit.layers[0].wide * call.unit.padded;
    group_size_ = sums_.size + 2 * first_;
  }

  void run() {
    float* groups = groups_.zeros(kGroups * group_size_);
    torch::stable::parallel_for(0, kGroups, 1, [&](int64_t begin, int64_t end) {
      Space space(call_);
      for (int64_t g = begin; g < end; ++g) {
        const int64_t last = plan_.begins[static_cast<size_t>(g) + 1];
        for (int64_t t = plan_.begins[static_cast<size_t>(g)]; t < last; ++t)
          add(space, t, groups + g * group_size_, last_bias_[static_cast<size_t>(g)]);
      }
    });
    join_parts();
    for (int64_t i = 0; i < group_size_; ++i) {  // what groups have may nearly cancel
      double sum = 0.0;
      for (int64_t g = 0; g < kGroups; ++g) sum += groups[g * group_size_ + i];
      groups[i] = static_cast<float>(sum);
    }
    total = sums_.in(groups, total_layers_);
    product = groups + sums_.size, query = product + first_;
    last_bias = static_cast<float>(std::accumulate(last_bias_.begin(), last_bias_.end(), 0.0));
  }

  const DinBackCall& call_;
  const Sums sums_;
  const Tensor grad_;
  Tensor grad_q, grad_k, grad_v;  // v's is k's where there is no v
  DinSums total{};
  const float *product = nullptr, *query = nullptr;
  float last_bias = 0.0f;

 private:
  // Memory of one thread.
  struct Space {
    explicit Space(const DinCall& call) : items(call) {}
    DinItems items;
    Buffer queries, grads, matrix, back, start, layers, flow, weights, columns, rows, values, sums,
        query;
    std::vector<DinLayerSums> pointers;
  };

  void add(Space& space, int64_t at, float* group, double& last_bias) {
    const DinTask& task = plan_.tasks[static_cast<size_t>(at)];
    const DinUnit& unit = call_.unit;
    const DinHistory& history = space.items.of(task.user);
    if (history.items == 0) return;  // whose gradients are zeros
    DinGradient gradient = call_.gradient;
    gradient.rows = space.items.rows;
    const int64_t items = history.items, whole = round_up(items, call_.shape.block),
                  count = task.end - task.begin;
    const float* q = space.items.widened(space.queries, call_.q, task.begin, count);
    float* matrix = space.matrix.of(unit.layers[0].wide * unit.dim);
    float* back = space.back.of(unit.layers[0].wide * unit.padded);
    float* start = space.start.of(unit.layers[0].wide);
    float* layers = space.layers.of(LIVREC_CALL(din_space, unit));
    float* flow = space.flow.zeros(whole);
    float* weights = space.weights.of(items);
    float* columns = space.columns.zeros(whole * round_up(unit.dim, call_.shape.tile));
    float* values = space.values.zeros(items * history.value_padded);
    float* grad_query = space.query.of(unit.padded);
    float* sums = space.sums.of(sums_.size);
    const DinSums own = sums_.in(sums, space.pointers);
    const float* grads = space.items.widened(space.grads, grad_, task.begin, count);
    for (int64_t c = task.begin; c < task.end; ++c) {
      std::fill_n(sums, sums_.size, 0.0f);
      LIVREC_CALL(din_begin, unit, q, matrix, start);
      LIVREC_CALL(din_begin_back, unit, gradient, q, back);
      double bias = LIVREC_CALL(din_dots, history, grads, flow);
      if (call_.softmax) {
        LIVREC_CALL(din_logits, unit, matrix, start, history, layers, weights);
        LIVREC_CALL(din_softmax, weights, items);
        bias = LIVREC_CALL(din_softmax_back, weights, items, flow);
      }
      last_bias += bias;
      LIVREC_CALL(din_backward, unit, gradient, matrix, back, start, history, flow, own, columns,
                  call_.softmax ? nullptr : weights, layers);
      LIVREC_CALL(din_spread, weights, grads, items, history.value_padded, values);
      LIVREC_CALL(din_query, unit, gradient, own, grad_query);
      LIVREC_CALL(din_narrow, grad_query, call_.type, 1, unit.dim, unit.padded,
                  DinItems::row(grad_q, c));
      LIVREC_CALL(din_fold, unit, q, sums, sums_.size, own, group, group + sums_.size,
                  group + sums_.size + first_);
      q += unit.padded, grads += history.value_padded;
    }
    finish(space, at, columns, values);
  }

  // Brings a task's gradients of k and v into rows, and writes them if they are all of the user's.
  void finish(Space& space, int64_t at, const float* columns, float* values) {
    const DinTask& task = plan_.tasks[static_cast<size_t>(at)];
    const int64_t items = call_.items_of(task.user), padded = call_.unit.padded;
    float* rows = call_.has_values ? space.rows.zeros(items * padded) : values;
    LIVREC_CALL(din_rows, columns, items, call_.unit.dim, padded, rows);
    if (is_whole(task)) return write(task.user, rows, values);
    auto& kept = kept_[static_cast<size_t>(at)];
    kept.assign(rows, rows + items * padded);
    if (call_.has_values)
      kept.insert(kept.end(), values, values + items * call_.padded(call_.value_dim));
  }

  bool is_whole(const DinTask& task) const {
    const auto user = static_cast<size_t>(task.user);
    return task.begin == call_.starts[user] && task.end == call_.starts[user + 1];
  }

  // Adds the parts of users whose candidates are in several tasks, task after task.
  void join_parts() {
    for (size_t t = 0; t < kept_.size(); ++t) {
      if (kept_[t].empty()) continue;
      const int64_t user = plan_.tasks[t].user;
      size_t next = t + 1;
      for (; next < kept_.size() && plan_.tasks[next].user == user; ++next) {
        for (size_t i = 0; i < kept_[t].size(); ++i) kept_[t][i] += kept_[next][i];
        kept_[next].clear();
      }
      float* rows = kept_[t].data();
      write(user, rows, rows + call_.items_of(user) * call_.unit.padded);
    }
  }

  void write(int64_t user, const float* rows, const float* values) {
    const int64_t items = call_.items_of(user), from = call_.offsets.data[user];
    LIVREC_CALL(din_narrow, rows, call_.type, items, call_.dim, call_.unit.padded,
                DinItems::row(grad_k, from));
    if (call_.has_values)
      LIVREC_CALL(din_narrow, values, call_.type, items, call_.value_dim,
                  call_.padded(call_.value_dim), DinItems::row(grad_v, from));
  }

  const DinPlan plan_;
  std::vector<std::vector<float>> kept_;
  std::vector<DinLayerSums> total_layers_;
  std::vector<double> last_bias_ = std::vector<double>(kGroups);
  Buffer groups_;
  int64_t first_ = 0, group_size_ = 0;
};

Tensor narrowed(const DinMatrix& from, const Tensor& like, TableType type) {
  Tensor made = like.dim() == 2 ? empty_cpu({from.rows, from.columns}, like.scalar_type())
                                : empty_cpu({from.rows}, like.scalar_type());
  LIVREC_CALL(din_narrow, from.data.data(), type, from.rows, from.columns, from.columns,
              made.mutable_data_ptr());
  return made;
}

// The gradient of the first layer's weights, [4 d, h_1], from its three sums [wide, padded d].
DinMatrix first_weights(const Gradient& gradient, int64_t units) {
  const int64_t dim = gradient.call_.dim, padded = gradient.call_.unit.padded;
  DinMatrix made(4 * dim, units);
  const float* plain = gradient.total.layers[0].weights;
  for (int64_t i = 0; i < dim; ++i)
    for (int64_t j = 0; j < units; ++j) {
      const int64_t at = j * padded + i;
      float* to = made.data.data() + i * units + j;
      to[0] = gradient.query[at];
      to[dim * units] = plain[at];
      to[2 * dim * units] = gradient.query[at] - plain[at];
      to[3 * dim * units] = gradient.product[at];
    }
  return made;
}

// A part [rows, columns] of sums with `stride` numbers a row.
DinMatrix part(const float* from, int64_t rows, int64_t columns, int64_t stride) {
  DinMatrix made(rows, columns);
  for (int64_t i = 0; i < rows; ++i)
    std::copy_n(from + i * stride, columns, made.data.data() + i * columns);
  return made;
}

// needs: of q, k, v if given, offsets, the parts list by list, and q_offsets if given.
std::vector<Tensor> din_attention_backward(
    const std::vector<Optional>& grads, const Tensor& q, const Tensor& k, const Optional& v,
    const Tensor& offsets, const std::vector<Tensor>& weights, const std::vector<Tensor>& biases,
    const std::vector<Tensor>& slopes, const std::vector<Tensor>& gains,
    const std::vector<Tensor>& shifts, const Text& activation, bool softmax,
    const Optional& q_offsets, const std::vector<Tensor>& outputs, const std::vector<bool>& needs) {
  STD_TORCH_CHECK(grads.size() == 1 && grads[0].has_value() && outputs.size() == 1,
                  "grads: must be that of the output");
  const DinParts parts{weights, biases, slopes, gains, shifts, activation};
  size_t tensors = size_t{3} + v.has_value() + q_offsets.has_value();
  for (const std::vector<Tensor>* list : parts.lists()) tensors += list->size();
  check_needs(needs, tensors);
  const DinBackCall call(q, k, v, offsets, parts, softmax, q_offsets);
  Gradient gradient(call, *grads[0]);
  gradient.run();
  std::vector<Tensor> found;
  size_t number = 0;
  const auto give = [&](const auto& make) {
    if (needs[number++]) found.push_back(make());
  };
  give([&] { return gradient.grad_q; });
  give([&] { return gradient.grad_k; });
  if (v) give([&] { return gradient.grad_v; });
  give([&] { return offsets; });  // never wanted
  const DinUnit& unit = call.unit;
  const auto layers = static_cast<size_t>(unit.depth);
  for (size_t l = 0; l <= layers; ++l)
    give([&] {
      if (l == layers)
        return narrowed(part(gradient.total.last, weights[l].size(0), 1, 1), weights[l], call.type);
      const DinLayer& layer = unit.layers[l];
      if (l == 0) return narrowed(first_weights(gradient, layer.out), weights[l], call.type);
      const float* sums = gradient.total.layers[l].weights;
      return narrowed(part(sums, layer.in, layer.out, layer.wide), weights[l], call.type);
    });
  const auto rows = [&](const std::vector<Tensor>& given, const auto& sums) {
    for (size_t l = 0; l < given.size(); ++l)
      give([&] { return narrowed(part(sums(l), given[l].size(0), 1, 1), given[l], call.type); });
  };
  const DinSums& total = gradient.total;
  rows(biases, [&](size_t l) -> const float* {
    return l == layers ? &gradient.last_bias : total.layers[l].bias;
  });
  rows(slopes, [&](size_t l) { return total.layers[l].slope; });
  rows(gains, [&](size_t l) { return total.layers[l].gain; });
  rows(shifts, [&](size_t l) { return total.layers[l].shift; });
  return found;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(livrec, CPU, m) {
  m.impl("din_attention_backward.native", TORCH_BOX(&din_attention_backward));
}

}  // namespace livrec
