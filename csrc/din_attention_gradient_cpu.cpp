#include "din_attention_gradient.h"

#include "din_layers.h"

namespace livrec {
namespace LIVREC_ISA {
namespace {

LIVREC_INLINE int64_t in_tiles(int64_t size) { return (size + kTile - 1) / kTile * kTile; }

// Sums of a unit over V vectors of items.
template <int V>
struct UnitSums {
  Floats bias{}, slope{}, gain{}, shift{};
};

// The gradient of what enters a unit, from that of what leaves it.
template <DinActivation kKind, int V>
LIVREC_INLINE Floats steepness(Floats raw, Floats out, Floats grad, const Gate& gate,
                               UnitSums<V>& sums) {
  Floats found = grad;
  if (kKind == DinActivation::sigmoid) {
    found = grad * out * (1.0f - out);
  } else if (kKind == DinActivation::relu) {
    found = raw <= 0.0f ? Floats{} : grad;
  } else if (kKind == DinActivation::silu) {
    const Floats open = sigmoid(raw);
    found = grad * open * (1.0f + raw * (1.0f - open));
  } else if (kKind == DinActivation::prelu) {
    found = raw > 0.0f ? grad : gate.slope * grad;
    sums.slope += raw > 0.0f ? Floats{} : grad * raw;
  } else {
    const Floats open = sigmoid(gate.gain * raw + gate.shift), shut = 1.0f - open;
    const Floats moved = grad * raw * (1.0f - gate.slope) * open * shut;
    found = grad * (open + gate.slope * shut) + gate.gain * moved;
    sums.slope += grad * raw * shut;
    sums.gain += moved * raw;
    sums.shift += moved;
  }
  sums.bias += found;
  return found;
}

// sums [rows, stride] += a [rows, block] x b [items, stride], W vectors at a time.
template <int W>
LIVREC_INLINE void outer(const float* a, const float* b, int64_t items, int64_t stride,
                         float* sums) {
  Floats found[kTile][W] = {};
  for (int64_t t = 0; t < items; ++t) {
    Floats row[W];
    for (int w = 0; w < W; ++w) row[w] = load(b + t * stride + w * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kTile; ++r)
      for (int w = 0; w < W; ++w) found[r][w] += a[r * kBlock + t] * row[w];
  }
  for (int r = 0; r < kTile; ++r)
    for (int w = 0; w < W; ++w) {
      float* to = sums + r * stride + w * kLanes;
      store(to, load(to) + found[r][w]);
    }
}

void outer_sums(const float* a, int64_t rows, const float* b, int64_t items, int64_t stride,
                float* sums) {
  for (int64_t r = 0; r < rows; r += kTile) {
    int64_t d = 0;
    for (; d + 2 * kLanes <= stride; d += 2 * kLanes)
      outer<2>(a + r * kBlock, b + d, items, stride, sums + r * stride + d);
    for (; d < stride; d += kLanes)
      outer<1>(a + r * kBlock, b + d, items, stride, sums + r * stride + d);
  }
}

// out [in in tiles, block] (+)= weights_back x grad [out, block].
template <int V, bool kAdd>
LIVREC_INLINE void back(const float* weights, int64_t in, int64_t out, const float* grad,
                        float* to) {
  for (int64_t first = 0; first < in; first += kTile) {
    Floats sums[kTile][V] = {};
    multiply<V>(weights + first * out, grad, out, sums);
    for (int r = 0; r < kTile; ++r)
      for (int v = 0; v < V; ++v) {
        float* own = to + (first + r) * kBlock + v * kLanes;
        store(own, kAdd ? load(own) + sums[r][v] : sums[r][v]);
      }
  }
}

struct Backward {
  const DinUnit& unit;
  const DinGradient& gradient;
  const float *matrix, *matrix_back, *start;
  const DinHistory& history;
  const float* flow;
  const DinSums& sums;
  float *columns, *logits, *space;

  float* raw(int64_t layer) const { return space + 2 * layer * unit.widest * kBlock; }
  float* out(int64_t layer) const { return raw(layer) + unit.widest * kBlock; }
  float* grad(int64_t which) const { return raw(unit.depth) + which * unit.widest * kBlock; }

  template <DinActivation kKind, int V>
  void block(int64_t first) const {
    const int64_t items = least(history.items - first, kBlock);
    forward<kKind, V>(unit.layers[0], matrix, start, history.columns + first * unit.dim, out(0),
                      raw(0));
    for (int64_t l = 1; l < unit.depth; ++l) {
      const DinLayer& layer = unit.layers[l];
      forward<kKind, V>(layer, layer.weights, layer.bias, out(l - 1), out(l), raw(l));
    }
    float *own = grad(0), *before = grad(1), *turned = grad(2);
    leave<V>(first, items, own);
    for (int64_t l = unit.depth - 1; l > 0; --l) {
      const DinLayer& layer = unit.layers[l];
      enter<kKind, V>(l, own);
      turn_over(own, layer, items, turned);
      outer_sums(out(l - 1), layer.in, turned, items, layer.wide, sums.layers[l].weights);
      back<V, false>(layer.weights_back, layer.in, layer.out, own, before);
      float* swapped = own;
      own = before, before = swapped;
    }
    enter<kKind, V>(0, own);
    const int64_t units = unit.layers[0].out;
    outer_sums(own, units, gradient.rows + first * unit.padded, items, unit.padded,
               sums.layers[0].weights);
    back<V, true>(matrix_back, unit.dim, units, own, columns + first * in_tiles(unit.dim));
  }

  // The last layer: w, its weights' gradient, and that of what it takes.
  template <int V>
  void leave(int64_t first, int64_t items, float* own) const {
    const int64_t last = unit.depth - 1, count = unit.layers[last].out;
    Floats grads[V];
    for (int v = 0; v < V; ++v) grads[v] = load(flow + first + v * kLanes);
    for (int64_t j = 0; j < count; ++j) {
      Floats sum{};
      for (int v = 0; v < V; ++v) {
        const int64_t at = j * kBlock + v * kLanes;
        sum += grads[v] * load(out(last) + at);
        store(own + at, unit.last[j] * grads[v]);
      }
      sums.last[j] += sum_of(sum);
    }
    if (!logits) return;
    Floats found[V];
    last_layer<V>(unit, out(last), found);
    for (int64_t i = 0; i < items; ++i) logits[first + i] = found[i / kLanes][i % kLanes];
  }

  // Through the activation of a layer, in place; zeros in units that are none.
  template <DinActivation kKind, int V>
  void enter(int64_t l, float* own) const {
    const DinLayer& layer = unit.layers[l];
    const DinLayerSums& to = sums.layers[l];
    for (int64_t j = 0; j < layer.out; ++j) {
      const Gate gate(layer, j);
      UnitSums<V> found;
      for (int v = 0; v < V; ++v) {
        const int64_t at = j * kBlock + v * kLanes;
        store(own + at, steepness<kKind, V>(load(raw(l) + at), load(out(l) + at), load(own + at),
                                            gate, found));
      }
      to.bias[j] += sum_of(found.bias);
      if (kKind == DinActivation::prelu || kKind == DinActivation::dice)
        to.slope[j] += sum_of(found.slope);
      if (kKind == DinActivation::dice) {
        to.gain[j] += sum_of(found.gain);
        to.shift[j] += sum_of(found.shift);
      }
    }
    for (int64_t i = layer.out * kBlock; i < in_tiles(layer.out) * kBlock; ++i) own[i] = 0.0f;
  }

  // [out, block] to [items, wide].
  static void turn_over(const float* from, const DinLayer& layer, int64_t items, float* to) {
    for (int64_t t = 0; t < items; ++t) {
      for (int64_t j = 0; j < layer.out; ++j) to[t * layer.wide + j] = from[j * kBlock + t];
      for (int64_t j = layer.out; j < layer.wide; ++j) to[t * layer.wide + j] = 0.0f;
    }
  }
};

}  // namespace

void din_begin_back(const DinUnit& unit, const DinGradient& gradient, const float* q,
                    float* matrix_back) {
  const int64_t units = unit.layers[0].out;
  for (int64_t first = 0, at = 0; first < unit.dim; first += kTile)
    for (int64_t j = 0; j < units; ++j)
      for (int r = 0; r < kTile; ++r, ++at)
        matrix_back[at] = gradient.plain_back[at] + q[first + r] * gradient.product_back[at];
}

int64_t din_space(const DinUnit& unit) { return (2 * unit.depth + 3) * unit.widest * kBlock; }

void din_backward(const DinUnit& unit, const DinGradient& gradient, const float* matrix,
                  const float* matrix_back, const float* start, const DinHistory& history,
                  const float* flow, const DinSums& sums, float* columns, float* logits,
                  float* space) {
  each_block(unit.activation, history.items,
             Backward{unit, gradient, matrix, matrix_back, start, history, flow, sums, columns,
                      logits, space});
}

double din_dots(const DinHistory& history, const float* grad, float* out) {
  double total = 0.0;
  for (int64_t t = 0; t < history.items; ++t) {
    const float* row = history.values + t * history.value_padded;
    Doubles lanes{};
    for (int64_t d = 0; d < history.value_padded; d += kLanes)
      lanes += __builtin_convertvector(load(row + d), Doubles) *
               __builtin_convertvector(load(grad + d), Doubles);
    double sum = 0.0;
    for (int i = 0; i < kLanes; ++i) sum += lanes[i];
    out[t] = static_cast<float>(sum);
    total += sum;
  }
  return total;
}

double din_softmax_back(const float* weights, int64_t items, float* dots) {
  double mean = 0.0, total = 0.0, left = 0.0;
  for (int64_t t = 0; t < items; ++t) {
    total += weights[t];
    mean += static_cast<double>(weights[t]) * dots[t];
  }
  mean /= total;  // weights are rounded, and add up to about 1
  for (int64_t t = 0; t < items; ++t) {
    const double found = weights[t] * (dots[t] - mean);
    left += found;
    dots[t] = static_cast<float>(found);
  }
  return left;
}

void din_spread(const float* weights, const float* grad, int64_t items, int64_t padded,
                float* rows) {
  for (int64_t t = 0; t < items; ++t)
    for (int64_t d = 0; d < padded; d += kLanes) {
      float* to = rows + t * padded + d;
      store(to, load(to) + weights[t] * load(grad + d));
    }
}

void din_query(const DinUnit& unit, const DinGradient& gradient, const DinSums& sums, float* out) {
  const DinLayerSums& first = sums.layers[0];
  for (int64_t d = 0; d < unit.padded; d += kLanes) {
    Floats sum{};
    for (int64_t j = 0; j < unit.layers[0].out; ++j) {
      const int64_t at = j * unit.padded + d;
      sum += load(gradient.product_rows + at) * load(first.weights + at) +
             first.bias[j] * load(gradient.query_rows + at);
    }
    store(out + d, sum);
  }
}

void din_fold(const DinUnit& unit, const float* q, const float* from, int64_t count,
              const DinSums& sums, float* to, float* product, float* query) {
  for (int64_t i = 0; i < count; i += kLanes) store(to + i, load(to + i) + load(from + i));
  const DinLayerSums& first = sums.layers[0];
  for (int64_t j = 0; j < unit.layers[0].out; ++j)
    for (int64_t d = 0; d < unit.padded; d += kLanes) {
      const int64_t at = j * unit.padded + d;
      store(product + at, load(product + at) + load(q + d) * load(first.weights + at));
      store(query + at, load(query + at) + first.bias[j] * load(q + d));
    }
}

void din_rows(const float* columns, int64_t items, int64_t dim, int64_t padded, float* rows) {
  const int64_t high = in_tiles(dim);
  for (int64_t t = 0; t < items; ++t) {
    const float* from = columns + t / kBlock * high * kBlock + t % kBlock;
    for (int64_t d = 0; d < dim; ++d) rows[t * padded + d] += from[d * kBlock];
  }
}

}  // namespace LIVREC_ISA
}  // namespace livrec
