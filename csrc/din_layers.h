// Layers of DIN's unit over a block of items, one item per lane; see vectors.h for how it is
// included.
#pragma once

#include "din_attention.h"
#include "tiles.h"

namespace livrec {
namespace LIVREC_ISA {
namespace {

constexpr int kVectors = 2;
constexpr int64_t kBlock = kVectors * kLanes;
constexpr int kTile = kLanes == 16 ? 8 : 4;  // units at a time: what registers hold

LIVREC_INLINE Floats sigmoid(Floats x) {
  const Floats small = exponential<kLanes>(x < 0.0f ? x : -x);
  return (x < 0.0f ? small : Floats{} + 1.0f) / (1.0f + small);
}

// What a unit needs for its activation.
struct Gate {
  float slope, gain, shift;
  Gate(const DinLayer& layer, int64_t unit)
      : slope(layer.slope ? layer.slope[unit] : 0.0f),
        gain(layer.gain ? layer.gain[unit] : 0.0f),
        shift(layer.shift ? layer.shift[unit] : 0.0f) {}
};

template <DinActivation kKind>
LIVREC_INLINE Floats activate(Floats x, const Gate& gate) {
  if (kKind == DinActivation::sigmoid) return sigmoid(x);
  if (kKind == DinActivation::relu) return x < 0.0f ? Floats{} : x;
  if (kKind == DinActivation::silu) return x * sigmoid(x);
  if (kKind == DinActivation::prelu) return x > 0.0f ? x : gate.slope * x;
  const Floats open = sigmoid(gate.gain * x + gate.shift);
  return x * (open + gate.slope * (1.0f - open));
}

// Products of a tile of units with V vectors of items: out[r][v] += sum_i weights[i][r] x[i][v];
// runs of terms by themselves: errors grow with runs and their number.
template <int V>
LIVREC_INLINE void multiply(const float* weights, const float* x, int64_t in, Floats (*out)[V]) {
  constexpr int64_t kRun = 64;
  for (int64_t first = 0; first < in; first += kRun) {
    const int64_t end = first + kRun < in ? first + kRun : in;
    Floats sums[kTile][V] = {};
    for (int64_t i = first; i < end; ++i) {
      Floats items[V];
      for (int v = 0; v < V; ++v) items[v] = load(x + i * kBlock + v * kLanes);
      const float* own = weights + i * kTile;
#pragma GCC unroll 8
      for (int r = 0; r < kTile; ++r)
        for (int v = 0; v < V; ++v) sums[r][v] += own[r] * items[v];
    }
    for (int r = 0; r < kTile; ++r)
      for (int v = 0; v < V; ++v) out[r][v] += sums[r][v];
  }
}

// f(W^T x + b) for V vectors of items, x [in, block] and out [wide, block]; before f to `raw`, too,
// where it is given.
template <DinActivation kKind, int V>
LIVREC_INLINE void forward(const DinLayer& layer, const float* weights, const float* bias,
                           const float* x, float* out, float* raw) {
  for (int64_t first = 0; first < layer.out; first += kTile) {
    Floats sums[kTile][V];
    for (int r = 0; r < kTile; ++r)
      for (int v = 0; v < V; ++v) sums[r][v] = Floats{} + bias[first + r];
    multiply<V>(weights + first * layer.in, x, layer.in, sums);
    for (int r = 0; r < kTile; ++r) {
      const Gate gate(layer, first + r);
      const int64_t at = (first + r) * kBlock;
      for (int v = 0; v < V; ++v) {
        if (raw) store(raw + at + v * kLanes, sums[r][v]);
        store(out + at + v * kLanes, activate<kKind>(sums[r][v], gate));
      }
    }
  }
}

template <int V>
LIVREC_INLINE void last_layer(const DinUnit& unit, const float* x, Floats* logits) {
  const int64_t count = unit.layers[unit.depth - 1].out;
  for (int v = 0; v < V; ++v) logits[v] = Floats{} + unit.last_bias;
  for (int64_t j = 0; j < count; ++j)
    for (int v = 0; v < V; ++v) logits[v] += unit.last[j] * load(x + j * kBlock + v * kLanes);
}

// Calls visit.block<kind, vectors>(first) for every block of items, with as many vectors as it
// needs.
template <DinActivation kKind, typename Visit>
LIVREC_INLINE void each_block(int64_t items, const Visit& visit) {
  for (int64_t first = 0; first < items; first += kBlock)
    if (items - first > kLanes)
      visit.template block<kKind, kVectors>(first);
    else
      visit.template block<kKind, 1>(first);
}

// The same, for the unit's activation.
template <typename Visit>
LIVREC_INLINE void each_block(DinActivation kind, int64_t items, const Visit& visit) {
  switch (kind) {
    case DinActivation::sigmoid:
      return each_block<DinActivation::sigmoid>(items, visit);
    case DinActivation::relu:
      return each_block<DinActivation::relu>(items, visit);
    case DinActivation::silu:
      return each_block<DinActivation::silu>(items, visit);
    case DinActivation::prelu:
      return each_block<DinActivation::prelu>(items, visit);
    default:
      return each_block<DinActivation::dice>(items, visit);
  }
}

}  // namespace
}  // namespace LIVREC_ISA
}  // namespace livrec
