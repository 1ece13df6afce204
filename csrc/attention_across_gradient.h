// The gradient of attention across candidates; see attention_across.h.
#pragma once

#include "attention_across.h"

namespace livrec {
namespace LIVREC_ISA {
namespace {

#if defined(LIVREC_ACROSS)
// Tiles of which one is looked at for the sums of w k: they serve only to take what rounding left
// in dS out of dq, which a part of the items does nearly as well as all.
constexpr int64_t kSampledTiles = 4;
constexpr int kAcrossSums = 6;  // vectors that are kept of a group

// Where gradients of a tile's items go: to their rows at once, past the caches if they are large
// and in float32. In 16 bits, where a row may be less than a line of memory, those of all groups
// then wait in `held` until the tile is complete.
template <typename Kind>
struct Sink {
  typedef typename Kind::Type Type;
  static constexpr bool kFloats = sizeof(Type) == 4;
  Type* to;
  bool past_caches;
  float factor;  // of all rows in 16 bits

  Sink(void* x, float* held, int64_t dim, bool large, const AttentionPiece& piece, int64_t group,
       int64_t at, float times)
      : factor(times) {
    const int64_t place = at * piece.groups * dim;
    const bool waits = !kFloats && large && narrow_space(piece, dim) > 0;
    to = waits ? reinterpret_cast<Type*>(held) : static_cast<Type*>(x) + place;
    to += group * dim;
    past_caches = kFloats && large && streamable(to, dim * 4);
  }
  LIVREC_INLINE void put(int64_t place, Floats sum) const {
    if constexpr (kFloats)
      if (past_caches) return stream(to + place, sum);
    Kind::store_row(to + place, sum, factor);
  }
};

// Writes down what waited, if it did.
template <typename Kind>
inline void release(void* x, const float* held, int64_t dim, bool large,
                    const AttentionPiece& piece, int64_t at) {
  if (sizeof(typename Kind::Type) == 4 || !large || narrow_space(piece, dim) == 0) return;
  const int64_t row = piece.groups * dim * 2, bytes = least(kTile, piece.items - at) * row;
  put_down(held, bytes, static_cast<char*>(x) + at * row);
}

// sink_t = sum_r w_tr y_r, for words y [R / kStep, dim].
template <typename Kind, int R, int W>
__attribute__((noinline)) void spread_items(const float* w, const float* y,
                                            const Items<Kind>& items, const Sink<Kind>& given) {
  constexpr int kRows = (R + Kind::kStep - 1) / Kind::kStep;
  const Sink<Kind> sink = given;
  const int64_t stride = items.stride, count = items.count, dim = items.dim;
  for (int64_t d = 0; d < dim; d += kLanes) {
    Floats rows[kRows];
    for (int r = 0; r < kRows; ++r) rows[r] = load(y + r * dim + d);
    const float* weights = w;
    int64_t place = d;
    for (int64_t t = 0; t < count;
         ++t, place += stride, weights += (W + Kind::kStep - 1) / Kind::kStep) {
      Floats sum{};
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) sum = Kind::template add<kLanes>(sum, weights[r], rows[r]);
      sink.put(place, sum);
    }
  }
}

// The same, and to_r += sum_t w_tr x_t at once, as registers allow for few candidates: half as many
// loads of weights.
template <int R, int W>
__attribute__((noinline)) void exchange_items(const float* w, const float* y,
                                              const Items<FloatItems>& items,
                                              const Sink<FloatItems>& given, float* to) {
  const Sink<FloatItems> sink = given;
  const int64_t stride = items.stride, count = items.count, dim = items.dim;
  for (int64_t d = 0; d < dim; d += kLanes) {
    Floats rows[R], found[R];
    for (int r = 0; r < R; ++r) rows[r] = load(y + r * dim + d), found[r] = Floats{};
    const float *row = items.first + d, *weights = w;
    int64_t place = d;
    for (int64_t t = 0; t < count; ++t, row += stride, place += stride, weights += W) {
      const Floats numbers = load(row);
      Floats sum{};
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Floats weight = weights[r] - Floats{};
        sum += weight * rows[r];
        found[r] += weight * numbers;
      }
      sink.put(place, sum);
    }
    for (int r = 0; r < R; ++r) store(to + r * dim + d, load(to + r * dim + d) + found[r]);
  }
}

// What is known of a group's candidates and what is added up for them, as vectors of kLanes.
struct AcrossSums {
  float* at;
  // peaks, factors and less, as AttentionSlopes has them
  Floats shift() const { return load(at); }
  Floats factor() const { return load(at + kLanes); }
  Floats less() const { return load(at + 2 * kLanes); }
  // sums of dS, of w, and of w of the tiles whose w k are added up
  float* slope() const { return at + 3 * kLanes; }
  float* weight() const { return at + 4 * kLanes; }
  float* sampled() const { return at + 5 * kLanes; }
};

// q and grad of a piece across its candidates and row by row, and room for a tile's products.
template <typename Kind, int R, int W>
struct AcrossSpace {
  const AttentionPiece& piece;
  const float* given;
  float *q, *grad, *s, *d, *words, *sums, *held_dk, *held_dv;
  const float *q_rows, *grad_rows;
  int64_t of_q, of_grad, of_q_rows, of_grad_rows;  // words of a group
  float factor;

  AcrossSpace(const AttentionPiece& of, const float* grads)
      : piece(of),
        given(grads),
        q_rows(piece.q),
        grad_rows(given),
        of_q(piece.dim / Kind::kStep * W),
        of_grad(piece.value_dim / Kind::kStep * W),
        of_q_rows((R + Kind::kStep - 1) / Kind::kStep * piece.dim),
        of_grad_rows((R + Kind::kStep - 1) / Kind::kStep * piece.value_dim) {
    Space space{piece.scratch};
    q = space.take(piece.groups * of_q);
    grad = space.take(piece.groups * of_grad);
    s = space.take(kTile * W);
    d = space.take(kTile * W);
    words = space.take(2 * kTile * W);
    sums = space.take(piece.groups * kAcrossSums * kLanes);
    held_dk = space.take(narrow_space(piece, piece.dim));
    held_dv = space.take(narrow_space(piece, piece.value_dim));
    factor = asked_across<W>(Kind(), piece.q, piece, piece.dim, piece.scale, space.next, q);
    asked_across<W>(Kind(), given, piece, piece.value_dim, 1.0f, space.next, grad);
#if defined(LIVREC_PAIRS)
    if constexpr (Kind::kStep == 2) {
      float* columns = space.take(piece.groups * of_q_rows);
      pair_columns(piece.q, piece.groups, R, piece.dim, factor == 1.0f ? 1.0f : 1.0f / factor,
                   columns);
      q_rows = columns;
      columns = space.take(piece.groups * of_grad_rows);
      pair_columns(given, piece.groups, R, piece.value_dim, 1.0f, columns);
      grad_rows = columns;
    }
#endif
  }

  AcrossSums sums_of(int64_t group) const { return {sums + group * kAcrossSums * kLanes}; }

  LIVREC_INLINE void products(const Items<Kind>& keys, const Items<Kind>& values,
                              int64_t group) const {
    if constexpr (W > 1) {
      products_across<Kind, W>(keys, q + group * of_q, factor, s);
      products_across<Kind, W>(values, grad + group * of_grad, 1.0f, d);
    } else {
      products_of_one(keys, piece.q + group * piece.dim, s);
      products_of_one(values, given + group * piece.value_dim, d);
    }
    end_across<W>(s, keys.count, -kInfinity);
    end_across<W>(d, keys.count, 0.0f);
  }
};

template <typename Kind, int R, int W>
void slopes_across(const AttentionPiece& piece, const float* grad, const float* base, float* peaks,
                   float* sums, float* slopes) {
  const AcrossSpace<Kind, R, W> space(piece, grad);
  for (int64_t group = 0; group < piece.groups; ++group) {
    const Floats less = repeated<W>(base + group * R, R);
    Floats peak = repeated<W>(peaks + group * R, R), total{}, slope{};
    for (int64_t at = 0; at < piece.items; at += kTile) {
      const Items<Kind> keys(piece.k, piece, piece.dim, group, at);
      space.products(keys, Items<Kind>(piece.v, piece, piece.value_dim, group, at), group);
      const Floats most = peak_across<W>(space.s, keys.count, peak);
      if (bits_of_lanes<kLanes>(most > peak) != 0) {
        const Floats factors = exponential<kLanes>(peak - shift_across(most));
        total *= factors, slope *= factors;
        peak = most;
      }
      const Floats shift = shift_across(peak);
      Floats more{}, slopes_of_tile{};
      for (int64_t i = 0; i < keys.count * W; i += kLanes) {
        const Floats p = exponential<kLanes>(load(space.s + i) - shift);
        more += p;
        slopes_of_tile += p * (load(space.d + i) - less);
      }
      total += more, slope += slopes_of_tile;
    }
    total = folded_across<W>(total), slope = folded_across<W>(slope);
    for (int r = 0; r < R; ++r) {
      const int64_t row = group * R + r;
      peaks[row] = peak[r], sums[row] = total[r], slopes[row] = slope[r];
    }
  }
}

template <int R, int W>
void begin_sums(const AttentionSlopes& slopes, int64_t group, const AcrossSums& sums) {
  store(sums.at, shift_across(repeated<W>(slopes.peaks + group * R, R)));
  store(sums.at + kLanes, repeated<W>(slopes.factors + group * R, R));
  store(sums.at + 2 * kLanes, repeated<W>(slopes.less + group * R, R));
  for (int i = 3; i < kAcrossSums; ++i) store(sums.at + i * kLanes, Floats{});
}

LIVREC_INLINE void add_to(float* sum, Floats x) { store(sum, load(sum) + x); }

// Logits of a tile to weights, and D to the gradient of logits; adds both up.
LIVREC_INLINE void slope_across(const AcrossSums& sums, float* s, float* d, int64_t numbers,
                                bool sampled) {
  const Floats shift = sums.shift(), factor = sums.factor(), less = sums.less();
  Floats weight{}, slope{};
  for (int64_t i = 0; i < numbers; i += kLanes) {
    const Floats p = exponential<kLanes>(load(s + i) - shift) * factor;
    const Floats ds = p * (load(d + i) - less);
    store(s + i, p);
    store(d + i, ds);
    weight += p;
    slope += ds;
  }
  add_to(sums.slope(), slope);
  add_to(sums.weight(), weight);
  if (sampled) add_to(sums.sampled(), weight);
}

template <typename Kind, int R, int W>
void backward_across(const AttentionPiece& piece, const AttentionSlopes& slopes) {
  const AcrossSpace<Kind, R, W> space(piece, slopes.grad);
  const int64_t dim = piece.dim, width = piece.value_dim;
  const bool large = slopes.past_caches, centers = slopes.sums != nullptr;
  for (int64_t group = 0; group < piece.groups; ++group)
    begin_sums<R, W>(slopes, group, space.sums_of(group));
  for (int64_t at = 0; at < piece.items; at += kTile) {
    const bool sampled = centers && at / kTile % kSampledTiles == 0;
    for (int64_t group = 0; group < piece.groups; ++group) {
      const int64_t first = group * R;
      const Items<Kind> keys(piece.k, piece, dim, group, at);
      const Items<Kind> values(piece.v, piece, width, group, at);
      space.products(keys, values, group);
      const AcrossSums sums = space.sums_of(group);
      slope_across(sums, space.s, space.d, keys.count * W, sampled);
      const Sink<Kind> dk(slopes.dk, space.held_dk, dim, large, piece, group, at, space.factor);
      const Sink<Kind> dv(slopes.dv, space.held_dv, width, large, piece, group, at, 1.0f);
      const float *q = space.q_rows + group * space.of_q_rows,
                  *grad = space.grad_rows + group * space.of_grad_rows;
      const Weights w = Kind::template weights_of<W>(space.s, keys.count, space.words);
      spread_items<Kind, R, W>(w.of_rows, grad, values, dv);
      if (sampled) gather_items<Kind, R, W>(w.of_items, keys, slopes.keys + first * dim);
      const Weights ds = Kind::template weights_of<W>(space.d, keys.count, space.words);
      float* dq = slopes.dq + first * dim;
      if constexpr (Kind::kStep == 1 && W < kLanes) {
        exchange_items<R, W>(ds.of_items, q, keys, dk, dq);
      } else {
        gather_items<Kind, R, W>(ds.of_items, keys, dq);
        spread_items<Kind, R, W>(ds.of_rows, q, keys, dk);
      }
    }
    release<Kind>(slopes.dk, space.held_dk, dim, large, piece, at);
    release<Kind>(slopes.dv, space.held_dv, width, large, piece, at);
  }
  for (int64_t group = 0; centers && group < piece.groups; ++group) {
    const AcrossSums sums = space.sums_of(group);
    const Floats slope = folded_across<W>(load(sums.slope())),
                 all = folded_across<W>(load(sums.weight())),
                 part = folded_across<W>(load(sums.sampled()));
    for (int r = 0; r < R; ++r) {
      const float factor = part[r] > 0.0f ? all[r] / part[r] : 0.0f;
      float* keys = slopes.keys + (group * R + r) * dim;
      for (int64_t d = 0; d < dim; ++d) keys[d] *= factor;
      slopes.sums[group * R + r] = slope[r];
    }
  }
}
#endif

}  // namespace
}  // namespace LIVREC_ISA
}  // namespace livrec
