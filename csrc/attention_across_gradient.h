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
constexpr int kAcrossSums = 6;  // vectors that are kept of a set

// A vector of each item's gradient: of weights [items, ceil(W / kStep)] and of words y
// [ceil(R / kStep), dim], from where it begins.
struct Part {
  const float *w, *y;
};

// Where the gradients of a tile's items go: past the caches if they are large. Where there are
// several sets of candidates, those of the sets before wait in `sums` [kTile, kStep groups' dim].
template <typename Kind>
struct Sink {
  typedef typename Kind::Type Type;
  Type* first;
  int64_t stride, count, dim;
  float factor;
  float* sums;
  bool past_caches, begins, ends;

  Sink(void* x, const AttentionPiece& piece, int64_t width, int64_t at, bool large, float times,
       float* space)
      : first(static_cast<Type*>(x) + at * piece.groups * width),
        stride(piece.groups * width),
        count(least(kTile, piece.items - at)),
        dim(width),
        factor(times),
        sums(space),
        past_caches(large && streamable(first, stride * int64_t{sizeof(Type)})),
        begins(true),
        ends(true) {}
};

// sink_t = sum_r w_tr y_r, of parts side by side; one row is multiplied in float32.
template <typename Kind, int R, int W, int kParts>
__attribute__((noinline)) void spread_items(const Part* parts, int64_t place, float* waiting,
                                            const Sink<Kind>& given) {
  constexpr int kRows = (R + Kind::kStep - 1) / Kind::kStep;
  const Sink<Kind> sink = given;
  const int64_t row = Kind::kStep * sink.dim;
  Floats rows[kParts][kRows];
  const float* weights[kParts];
  for (int j = 0; j < kParts; ++j) {
    weights[j] = parts[j].w;
    for (int r = 0; r < kRows; ++r) rows[j][r] = load(parts[j].y + r * sink.dim);
  }
  typename Kind::Type* to = sink.first + place;
  for (int64_t t = 0; t < sink.count; ++t, to += sink.stride, waiting += row) {
    Floats sums[kParts];
    for (int j = 0; j < kParts; ++j) {
      sums[j] = sink.begins ? Floats{} : load(waiting + j * kLanes);
      if constexpr (R == 1) {
        sums[j] = weights[j][0] * rows[j][0];
      } else {
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r)
          sums[j] = Kind::template add<kLanes>(sums[j], weights[j][r], rows[j][r]);
      }
      weights[j] += (W + Kind::kStep - 1) / Kind::kStep;
      if (!sink.ends) store(waiting + j * kLanes, sums[j]);
      if (sink.factor != 1.0f) sums[j] *= sink.factor;
    }
    if (sink.ends) Kind::template put_line<kParts>(sums, sink.past_caches, to);
  }
}

// What is known of a set of candidates and what is added up for them, as vectors of kLanes.
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
  static constexpr int kBlock = Kind::kStep;  // groups that fill lines of memory together
  float *q, *grad, *s, *d, *sums;
  Weights w[kBlock], ds[kBlock];
  const float *q_rows, *grad_rows;
  int64_t each, sets;                              // sets of a group, and of all
  int64_t of_q, of_grad, of_q_rows, of_grad_rows;  // words of a set
  float *sums_k, *sums_v;
  float factor;

  AcrossSpace(const AttentionPiece& of, const float* grads)
      : piece(of),
        given(grads),
        q_rows(piece.q),
        grad_rows(given),
        each(sets_of(piece)),
        sets(piece.groups * each),
        of_q(piece.dim / Kind::kStep * W),
        of_grad(piece.value_dim / Kind::kStep * W),
        of_q_rows((R + Kind::kStep - 1) / Kind::kStep * piece.dim),
        of_grad_rows((R + Kind::kStep - 1) / Kind::kStep * piece.value_dim) {
    Space space{piece.scratch};
    q = space.take(sets * of_q);
    grad = space.take(sets * of_grad);
    s = space.take(kTile * W);
    d = space.take(kTile * W);
    for (int i = 0; i < kBlock; ++i) {
      w[i] = Kind::weights_in(space.take(2 * kTile * W), W);
      ds[i] = Kind::weights_in(space.take(2 * kTile * W), W);
    }
    sums = space.take(sets * kAcrossSums * kLanes);
    sums_k = space.take(each > 1 ? kTile * kBlock * piece.dim : 0);
    sums_v = space.take(each > 1 ? kTile * kBlock * piece.value_dim : 0);
    factor = asked_across<R, W>(Kind(), piece.q, sets, piece.dim, piece.scale, space.next, q);
    asked_across<R, W>(Kind(), given, sets, piece.value_dim, 1.0f, space.next, grad);
#if defined(LIVREC_PAIRS)
    if constexpr (Kind::kStep == 2 && R > 1) {
      float* columns = space.take(sets * of_q_rows);
      pair_columns(piece.q, sets, R, piece.dim, factor == 1.0f ? 1.0f : 1.0f / factor, columns);
      q_rows = columns;
      columns = space.take(sets * of_grad_rows);
      pair_columns(given, sets, R, piece.value_dim, 1.0f, columns);
      grad_rows = columns;
    }
#endif
  }

  AcrossSums sums_of(int64_t set) const { return {sums + set * kAcrossSums * kLanes}; }

  LIVREC_INLINE void products(const Items<Kind>& keys, const Items<Kind>& values,
                              int64_t set) const {
    if constexpr (W > 1) {
      products_across<Kind, W>(keys, q + set * of_q, factor, s);
      products_across<Kind, W>(values, grad + set * of_grad, 1.0f, d);
    } else {
      products_of_one(keys, q + set * of_q, factor, s);
      products_of_one(values, grad + set * of_grad, 1.0f, d);
    }
    end_across<Kind, W>(s, keys.count, -kInfinity);
    end_across<Kind, W>(d, keys.count, 0.0f);
  }
};

template <typename Kind, int R, int W>
void slopes_across(const AttentionPiece& piece, const float* grad, const float* base, float* peaks,
                   float* sums, float* slopes) {
  const AcrossSpace<Kind, R, W> space(piece, grad);
  for (int64_t set = 0; set < space.sets; ++set) {
    const Floats less = repeated<W>(base + set * R, R);
    Floats peak = repeated<W>(peaks + set * R, R), total{}, slope{};
    for (int64_t at = 0; at < piece.items; at += kTile) {
      const Items<Kind> keys(piece.k, piece, piece.dim, set / space.each, at);
      space.products(keys, Items<Kind>(piece.v, piece, piece.value_dim, set / space.each, at), set);
      const Floats most = peak_across<W>(space.s, keys.count, peak);
      if (bits_of_lanes<kLanes>(most > peak) != 0) {
        const Floats factors = exponential<kLanes>(peak - shift_across(most));
        total *= factors, slope *= factors;
        peak = most;
      }
      const Floats shift = shift_across(peak);
      Floats more{}, slopes_of_tile{};
      for (int64_t i = 0; i < keys.count * W; i += kLanes) {
        const Floats p = Kind::weight_of(load(space.s + i), shift);
        more += p;
        slopes_of_tile += p * (load(space.d + i) - less);
      }
      total += more, slope += slopes_of_tile;
    }
    total = folded_across<W>(total), slope = folded_across<W>(slope);
    for (int r = 0; r < R; ++r) {
      const int64_t row = set * R + r;
      peaks[row] = peak[r], sums[row] = total[r], slopes[row] = slope[r];
    }
  }
}

template <int R, int W>
void begin_sums(const AttentionSlopes& slopes, int64_t set, const AcrossSums& sums) {
  store(sums.at, shift_across(repeated<W>(slopes.peaks + set * R, R)));
  store(sums.at + kLanes, repeated<W>(slopes.factors + set * R, R));
  store(sums.at + 2 * kLanes, repeated<W>(slopes.less + set * R, R));
  for (int i = 3; i < kAcrossSums; ++i) store(sums.at + i * kLanes, Floats{});
}

LIVREC_INLINE void add_to(float* sum, Floats x) { store(sum, load(sum) + x); }

// Logits of a tile to weights, and D to the gradient of logits; adds both up.
template <typename Kind, int W>
LIVREC_INLINE void slope_across(const AcrossSums& sums, const float* s, const float* d,
                                int64_t numbers, bool sampled, const Weights& to_w,
                                const Weights& to_ds) {
  const Floats shift = sums.shift(), factor = sums.factor(), less = sums.less();
  Floats weight{}, slope{};
  for (int64_t i = 0; i < numbers; i += Kind::kStep * kLanes) {
    Floats p[Kind::kStep], ds[Kind::kStep];
    for (int j = 0; j < Kind::kStep; ++j) {
      p[j] = Kind::weight_of(load(s + i + j * kLanes), shift) * factor;
      ds[j] = p[j] * (load(d + i + j * kLanes) - less);
      weight += p[j];
      slope += ds[j];
    }
    Kind::template put<W>(p, i, to_w);
    Kind::template put<W>(ds, i, to_ds);
  }
  add_to(sums.slope(), slope);
  add_to(sums.weight(), weight);
  if (sampled) add_to(sums.sampled(), weight);
}

// What a set of candidates of each of `many` groups adds to the gradients of their items: by lines
// of as many parts as fill one. y are the rows of all sets.
template <typename Kind, int R, int W>
inline void spread_set(const Weights* weights, const float* y, int64_t of_y, int64_t each,
                       int64_t set, int64_t many, const Sink<Kind>& sink) {
  Part parts[Kind::kStep];
  int found = 0;
  int64_t place = 0;
  for (int64_t i = 0; i < many; ++i)
    for (int64_t d = 0; d < sink.dim; d += kLanes) {
      parts[found++] = {weights[i].of_rows, y + (set + i * each) * of_y + d};
      if (found < Kind::kStep) continue;
      spread_items<Kind, R, W, Kind::kStep>(parts, set / each * sink.dim + place, sink.sums + place,
                                            sink);
      place += found * kLanes;
      found = 0;
    }
  if (found > 0)
    spread_items<Kind, R, W, 1>(parts, set / each * sink.dim + place, sink.sums + place, sink);
}

// dq's part of the set, and sums of w k where they are asked for.
template <typename Kind, int R, int W>
inline void gather_set(const AttentionSlopes& slopes, const Items<Kind>& keys, const Weights& w,
                       const Weights& ds, int64_t set, bool sampled) {
  const int64_t place = set * R * keys.dim;
  if (sampled) gather_items<Kind, R, W>(w.of_items, keys, slopes.keys + place);
  gather_items<Kind, R, W>(ds.of_items, keys, slopes.dq + place);
}

// Makes sums of w k of the tiles looked at those of all, and puts down the sums of dS.
template <int R, int W>
inline void end_sums(const AttentionSlopes& slopes, int64_t set, int64_t dim,
                     const AcrossSums& sums) {
  const Floats slope = folded_across<W>(load(sums.slope())),
               all = folded_across<W>(load(sums.weight())),
               part = folded_across<W>(load(sums.sampled()));
  for (int r = 0; r < R; ++r) {
    const float factor = part[r] > 0.0f ? all[r] / part[r] : 0.0f;
    float* keys = slopes.keys + (set * R + r) * dim;
    for (int64_t d = 0; d < dim; ++d) keys[d] *= factor;
    slopes.sums[set * R + r] = slope[r];
  }
}

template <typename Kind, int R, int W>
void backward_across(const AttentionPiece& piece, const AttentionSlopes& slopes) {
  const AcrossSpace<Kind, R, W> space(piece, slopes.grad);
  constexpr int64_t kBlock = AcrossSpace<Kind, R, W>::kBlock;
  const int64_t dim = piece.dim, width = piece.value_dim, each = space.each;
  const bool large = slopes.past_caches, centers = slopes.sums != nullptr;
  for (int64_t set = 0; set < space.sets; ++set) begin_sums<R, W>(slopes, set, space.sums_of(set));
  for (int64_t at = 0; at < piece.items; at += kTile) {
    const bool sampled = centers && at / kTile % kSampledTiles == 0;
    Sink<Kind> dk(slopes.dk, piece, dim, at, large, R == 1 ? 1.0f : space.factor, space.sums_k);
    Sink<Kind> dv(slopes.dv, piece, width, at, large, 1.0f, space.sums_v);
    for (int64_t group = 0; group < piece.groups; group += kBlock) {
      const int64_t many = least(kBlock, piece.groups - group);
      for (int64_t own = 0; own < each; ++own) {
        const int64_t first = group * each + own;
        for (int64_t i = 0; i < many; ++i) {
          const int64_t set = first + i * each;
          const Items<Kind> keys(piece.k, piece, dim, group + i, at);
          const Items<Kind> values(piece.v, piece, width, group + i, at);
          space.products(keys, values, set);
          slope_across<Kind, W>(space.sums_of(set), space.s, space.d, keys.count * W, sampled,
                                space.w[i], space.ds[i]);
          gather_set<Kind, R, W>(slopes, keys, space.w[i], space.ds[i], set, sampled);
        }
        dk.begins = dv.begins = own == 0;
        dk.ends = dv.ends = own + 1 == each;
        spread_set<Kind, R, W>(space.w, space.grad_rows, space.of_grad_rows, each, first, many, dv);
        spread_set<Kind, R, W>(space.ds, space.q_rows, space.of_q_rows, each, first, many, dk);
      }
    }
  }
  for (int64_t set = 0; centers && set < space.sets; ++set)
    end_sums<R, W>(slopes, set, dim, space.sums_of(set));
}
#endif

}  // namespace
}  // namespace LIVREC_ISA
}  // namespace livrec
