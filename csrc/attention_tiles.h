// Tiles of histories and their logits, for the CPU kernels of target attention; see vectors.h for
// how it is included.
#pragma once

#include "halves.h"
#include "products.h"
#include "target_attention.h"

namespace livrec {
namespace LIVREC_ISA {
namespace {

// Some items of one group's keys or values, as they lie.
struct Stretch {
  const void* first;
  TableType type;
  int64_t stride, count, dim, padded;

  LIVREC_INLINE const float* floats(int64_t i) const {
    return static_cast<const float*>(first) + i * stride;
  }
  LIVREC_INLINE const uint16_t* halves(int64_t i) const {
    return static_cast<const uint16_t*>(first) + i * stride;
  }
  LIVREC_INLINE const void* at(int64_t i) const {
    if (type == TableType::f32) return floats(i);
    return halves(i);
  }
};

// Items [at, at + count) of a group of x [items, groups, dim].
inline Stretch stretch_of(const void* x, TableType type, int64_t groups, int64_t group, int64_t at,
                          int64_t count, int64_t dim, int64_t padded) {
  const int64_t stride = groups * dim, bytes = type == TableType::f32 ? 4 : 2;
  const char* first = static_cast<const char*>(x) + (at * stride + group * dim) * bytes;
  return {first, type, stride, count, dim, padded};
}

inline Stretch keys_of(const AttentionPiece& piece, int64_t group, int64_t at, int64_t count) {
  return stretch_of(piece.k, piece.type, piece.groups, group, at, count, piece.dim, piece.padded);
}

inline Stretch values_of(const AttentionPiece& piece, int64_t group, int64_t at, int64_t count) {
  return stretch_of(piece.v, piece.type, piece.groups, group, at, count, piece.value_dim,
                    piece.value_padded);
}

struct Panel {
  const float* rows;
  int64_t stride;
};

// In float32 and whole vectors: as they lie, or padded with zeros in `space` [count, padded].
inline Panel panel_of(const Stretch& x, float* space) {
  if (x.type == TableType::f32 && x.dim == x.padded) return {x.floats(0), x.stride};
  for (int64_t i = 0; i < x.count; ++i)
    pad_row(x.at(i), x.type, 0, x.dim, x.padded, space + i * x.padded);
  return {space, x.padded};
}

// Cache lines to ask for at a time: after a block is transposed, and before a row is weighed.
constexpr int64_t kLinesPerTurn = 12, kLinesPerRow = 4;

// A group's share of the tile that comes next, asked of memory a few lines at a time between other
// work: the processor holds few requests, and one too many stops all that comes after it.
struct Ahead {
  const char *next[2], *end[2];  // of keys, and of values

  // Of x [items, groups, dim].
  LIVREC_INLINE void share(int place, const void* x, TableType type, int64_t groups, int64_t group,
                           int64_t dim, int64_t at, int64_t items) {
    const int64_t size = groups * dim * (type == TableType::f32 ? 4 : 2);
    const int64_t left = items - at - kTile, count = left < 0 ? 0 : least(left, kTile);
    const char* first = static_cast<const char*>(x) + (at + kTile) * size;
    next[place] = first + count * size * group / groups;
    end[place] = first + count * size * (group + 1) / groups;
  }

  LIVREC_INLINE void ask(int64_t lines) {
    for (int place = 0; place < 2; ++place)
      for (; lines > 0 && next[place] < end[place]; --lines, next[place] += 64)
        __builtin_prefetch(next[place], 0, 2);  // to the second cache: the first is full
  }

  LIVREC_INLINE void ask_rest() { ask(INT64_MAX); }
};

LIVREC_INLINE Ahead ahead_of(const AttentionPiece& piece, int64_t group, int64_t at) {
  Ahead ahead{};
  ahead.share(0, piece.k, piece.type, piece.groups, group, piece.dim, at, piece.items);
  if (!piece.shared)
    ahead.share(1, piece.v, piece.type, piece.groups, group, piece.value_dim, at, piece.items);
  return ahead;
}

LIVREC_INLINE Halves load_halves(const uint16_t* from) {
  return *reinterpret_cast<const LooseHalves*>(from);
}

// Item after item to number after number: [padded, kTile]; `space` [count, padded].
inline void turn(const Stretch& x, float* space, float* out, Ahead& ahead) {
  if (x.type == TableType::f32 || x.dim != x.padded) {
    const Panel panel = panel_of(x, space);
    return transpose([&](int64_t i, int64_t d) { return load(panel.rows + i * panel.stride + d); },
                     x.count, x.padded, out, kTile, [&] { ahead.ask(kLinesPerTurn); });
  }
  if (x.type == TableType::f16)
    return transpose([&](int64_t i, int64_t d) { return widen_f16(load_halves(x.halves(i) + d)); },
                     x.count, x.dim, out, kTile, [&] { ahead.ask(kLinesPerTurn); });
  transpose([&](int64_t i, int64_t d) { return widen_bf16(load_halves(x.halves(i) + d)); }, x.count,
            x.dim, out, kTile, [&] { ahead.ask(kLinesPerTurn); });
}

// The bias of a tile, head by head: [bias_heads, kTile].
inline void turn_bias(const AttentionPiece& piece, int64_t at, int64_t count, float* out) {
  for (int64_t h = 0; h < piece.bias_heads; ++h)
    for (int64_t t = 0; t < kTile; ++t)
      out[h * kTile + t] = t < count ? piece.bias[(at + t) * piece.bias_heads + h] : 0.0f;
}

LIVREC_INLINE int64_t bias_row(const AttentionPiece& piece, int64_t row) {
  return piece.bias_heads > 1 ? row / piece.candidates * kTile : 0;
}

inline void add_bias(const AttentionPiece& piece, int64_t first, int64_t rows, const float* bias,
                     float* s) {
  if (piece.bias_heads == 0) return;
  for (int64_t r = 0; r < rows; ++r) {
    const float* own = bias + bias_row(piece, first + r);
    for (int64_t t = 0; t < kTile; t += kLanes)
      store(s + r * kTile + t, load(s + r * kTile + t) + load(own + t));
  }
}

// Logits of rows [first, first + rows), counted over all groups: s [rows, kTile].
inline void logits_of(const AttentionPiece& piece, int64_t first, int64_t rows, const float* turned,
                      const float* bias, float* s) {
  multiply<true>({piece.q + first * piece.padded, piece.padded, 1}, rows, turned, kTile, piece.dim,
                 s, kTile, kTile, false);
  add_bias(piece, first, rows, bias, s);
}

// Items past the tile's last weigh nothing.
LIVREC_INLINE void end_row(float* s, int64_t count) {
  for (int64_t t = count; t < kTile; ++t) s[t] = -kInfinity;
}

LIVREC_INLINE float greatest_in(const float* s, float known) {
  Floats most = Floats{} + known;
  for (int64_t t = 0; t < kTile; t += kLanes) most = greater<kLanes>(load(s + t), most);
  if (bits_of_lanes<kLanes>(most > known) == 0) return known;  // as it mostly is
  return greatest_of(most);
}

// The weight of a logit that an activation other than the softmax gives, and its derivative.
struct Weight {
  Floats value, slope;
};

LIVREC_INLINE Weight weight_of(Activation activation, Floats s) {
  const Floats one = Floats{} + 1.0f;
  if (activation == Activation::none) return {s, one};
  const auto positive = s >= 0.0f;
  const Floats e = exponential<kLanes>(positive ? -s : s), whole = one / (one + e),
               part = e * whole;
  const Floats gate = positive ? whole : part, rest = positive ? part : whole;
  if (activation == Activation::sigmoid) return {gate, gate * rest};
  return {s * gate, gate * (one + s * rest)};
}

// Logits of one row to weights (and slopes); where the bias is -inf, to 0.
LIVREC_INLINE void weigh_row(const AttentionPiece& piece, const float* bias, float* s,
                             float* slopes) {
  for (int64_t t = 0; t < kTile; t += kLanes) {
    Weight weight = weight_of(piece.activation, load(s + t));
    if (piece.bias_heads > 0) {
      const auto gone = load(bias + t) == -kInfinity;
      weight.value = gone ? Floats{} : weight.value;
      weight.slope = gone ? Floats{} : weight.slope;
    }
    store(s + t, weight.value);
    if (slopes != nullptr) store(slopes + t, load(slopes + t) * weight.slope);
  }
}

// Floats that hold a tile of all groups' dk or dv in 16 bits; 0: it is too large, or in float32.
LIVREC_INLINE int64_t narrow_space(const AttentionPiece& piece, int64_t dim) {
  const int64_t numbers = kTile * piece.groups * dim;
  return piece.type == TableType::f32 || numbers > kNarrowTile ? 0 : numbers / 2;
}

// Writes bytes down for good, past the caches if that can be.
LIVREC_INLINE void put_down(const float* from, int64_t bytes, void* to) {
  if (streamable(to, bytes))
    stream(reinterpret_cast<const char*>(from), bytes, static_cast<char*>(to));
  else
    __builtin_memcpy(to, from, static_cast<size_t>(bytes));
}

// Takes scratch memory apart.
struct Space {
  float* next;
  LIVREC_INLINE float* take(int64_t count) {
    float* taken = next;
    next += (count + 15) / 16 * 16;
    return taken;
  }
};

}  // namespace
}  // namespace LIVREC_ISA
}  // namespace livrec
