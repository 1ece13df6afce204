#include "din_attention.h"

#include "din_layers.h"
#include "halves.h"

namespace livrec {
namespace LIVREC_ISA {
namespace {

struct Logits {
  const DinUnit& unit;
  const float *matrix, *start;
  const DinHistory& history;
  float *space, *logits;

  template <DinActivation kKind, int V>
  void block(int64_t first) const {
    const float* x = history.columns + first * unit.dim;
    float *out = space, *other = space + unit.widest * kBlock;
    forward<kKind, V>(unit.layers[0], matrix, start, x, out, nullptr);
    for (int64_t l = 1; l < unit.depth; ++l) {
      const DinLayer& layer = unit.layers[l];
      forward<kKind, V>(layer, layer.weights, layer.bias, out, other, nullptr);
      float* swapped = out;
      out = other, other = swapped;
    }
    Floats found[V];
    last_layer<V>(unit, out, found);
    for (int v = 0; v < V; ++v)
      for (int64_t i = 0; i < kLanes && first + v * kLanes + i < history.items; ++i)
        logits[first + v * kLanes + i] = found[v][i];
  }
};

// Sums for V vectors of dimensions; runs of items by themselves: errors grow with runs.
template <int V>
LIVREC_INLINE void sum_values(const DinHistory& history, const float* weights, int64_t d,
                              float* out) {
  constexpr int64_t kRun = 64;
  Floats sums[V] = {};
  for (int64_t first = 0; first < history.items; first += kRun) {
    Floats run[V] = {};
    const int64_t end = first + kRun < history.items ? first + kRun : history.items;
    for (int64_t t = first; t < end; ++t) {
      const float* row = history.values + t * history.value_padded + d;
      for (int v = 0; v < V; ++v) run[v] += weights[t] * load(row + v * kLanes);
    }
    for (int v = 0; v < V; ++v) sums[v] += run[v];
  }
  for (int v = 0; v < V; ++v) store(out + d + v * kLanes, sums[v]);
}

}  // namespace

DinShape din_shape() { return {kLanes, kTile, kBlock}; }

void din_widen(const void* x, TableType type, int64_t count, int64_t dim, int64_t padded,
               float* out) {
  for (int64_t i = 0; i < count; ++i) pad_row(x, type, i, dim, padded, out + i * padded);
}

void din_narrow(const float* x, TableType type, int64_t count, int64_t dim, int64_t padded,
                void* out) {
  narrow_padded(x, type, count, dim, padded, out);
}

void din_columns(const float* rows, int64_t items, int64_t dim, int64_t padded, float* out) {
  for (int64_t first = 0; first < items; first += kBlock, out += dim * kBlock) {
    const int64_t some = items - first < kBlock ? items - first : kBlock;
    for (int64_t d = 0; d < dim; ++d) {
      for (int64_t i = 0; i < some; ++i) out[d * kBlock + i] = rows[(first + i) * padded + d];
      for (int64_t i = some; i < kBlock; ++i) out[d * kBlock + i] = 0.0f;
    }
  }
}

void din_begin(const DinUnit& unit, const float* q, float* matrix, float* start) {
  const DinLayer& layer = unit.layers[0];
  for (int64_t j = 0; j < layer.wide; j += kLanes) {
    Floats sum = load(layer.bias + j);
    for (int64_t i = 0; i < unit.dim; ++i) sum += q[i] * load(unit.query + i * layer.wide + j);
    store(start + j, sum);
  }
  const int64_t tiles = layer.wide / kTile;
  for (int64_t tile = 0, at = 0; tile < tiles; ++tile)
    for (int64_t i = 0; i < unit.dim; ++i)
      for (int r = 0; r < kTile; ++r, ++at) matrix[at] = unit.plain[at] + q[i] * unit.product[at];
}

void din_logits(const DinUnit& unit, const float* matrix, const float* start,
                const DinHistory& history, float* space, float* logits) {
  each_block(unit.activation, history.items, Logits{unit, matrix, start, history, space, logits});
}

void din_softmax(float* weights, int64_t items) {
  float most = -kInfinity, sum = 0.0f;
  for (int64_t t = 0; t < items; ++t) most = weights[t] > most ? weights[t] : most;
  for (int64_t t = 0; t < items; t += kLanes) {
    Floats part{};
    const int64_t some = items - t < kLanes ? items - t : kLanes;
    for (int64_t i = 0; i < some; ++i) part[i] = weights[t + i] - most;
    part = exponential<kLanes>(part);
    for (int64_t i = 0; i < some; ++i) weights[t + i] = part[i], sum += part[i];
  }
  for (int64_t t = 0; t < items; ++t) weights[t] /= sum;
}

void din_sum(const DinHistory& history, const float* weights, float* out) {
  int64_t d = 0;
  for (; d + 2 * kLanes <= history.value_padded; d += 2 * kLanes)
    sum_values<2>(history, weights, d, out);
  for (; d < history.value_padded; d += kLanes) sum_values<1>(history, weights, d, out);
}

}  // namespace LIVREC_ISA
}  // namespace livrec
