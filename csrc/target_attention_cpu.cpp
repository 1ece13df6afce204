#include "target_attention.h"

#include "attention_across.h"
#include "attention_tiles.h"

namespace livrec {
namespace LIVREC_ISA {
namespace {

// Softmax terms of one row of logits, and what it knows of earlier tiles made to fit them; returns
// what is to be added to its sum, lane by lane.
template <typename Tiles>
LIVREC_INLINE Floats weigh(const AttentionPiece& piece, float* s, float* out, float* peak,
                           float* sum) {
  const float most = greatest_in(s, *peak), shift = shift_of(most);
  if (most != *peak) {
    const float factor = exp_of(*peak - shift);
    *sum *= factor;
    for (int64_t d = 0; d < piece.value_padded; d += kLanes) store(out + d, load(out + d) * factor);
    *peak = most;
  }
  Floats total{};
  for (int64_t t = 0; t < kTile; t += kLanes) {
    const Floats p = exponential<kLanes>(load(s + t) - shift);
    Tiles::put(s, t, p);
    total += p;
  }
  return total;
}

// Adds the lanes of each total to its sum.
LIVREC_INLINE void add_totals(const Floats* totals, int64_t count, float* sums) {
  constexpr int kMany = kLanes < 8 ? kLanes : 8;
  int64_t i = 0;
  for (; i + kMany <= count; i += kMany) {
    const Floats found = sums_of<kMany>(totals + i);
    for (int j = 0; j < kMany; ++j) sums[i + j] += found[j];
  }
  for (; i < count; ++i) sums[i] += sum_of(totals[i]);
}

struct ForwardSpace {
  float *keys, *values, *turned, *bias, *s, *q;
  explicit ForwardSpace(const AttentionPiece& piece) {
    Space space{piece.scratch};
    keys = space.take(kTile * piece.padded);
    values = space.take(kTile * piece.value_padded);
    turned = space.take(kTile * piece.padded);
    bias = space.take(kTile * piece.bias_heads);
    s = space.take(kTile * kRowTile);
    q = space.next;  // of pieces in bfloat16
  }
};

// Keys and values of a tile in float32.
struct FloatTiles {
  const AttentionPiece& piece;
  const ForwardSpace space;
  Panel values;

  explicit FloatTiles(const AttentionPiece& given) : piece(given), space(given), values{} {}
  void open(int64_t group, int64_t at, int64_t count, Ahead& ahead) {
    values = panel_of(values_of(piece, group, at, count), space.values);
    turn(keys_of(piece, group, at, count), space.keys, space.turned, ahead);
  }
  void logits(int64_t first, int64_t rows) const {
    logits_of(piece, first, rows, space.turned, space.bias, space.s);
  }
  static LIVREC_INLINE void put(float* weights, int64_t t, Floats p) { store(weights + t, p); }
  void add(int64_t rows, int64_t count, float* out) const {
    multiply({space.s, kTile, 1}, rows, values.rows, values.stride, count, out, piece.value_padded,
             piece.value_padded, true);
  }
};

#if defined(LIVREC_PAIRS)
// In bfloat16, by words of two numbers.
struct PairTiles {
  const AttentionPiece& piece;
  const ForwardSpace space;
  const float factor;

  explicit PairTiles(const AttentionPiece& given)
      : piece(given),
        space(given),
        factor(pair_rows(piece.q, piece.groups * piece.rows, piece.padded, piece.scale, space.q)) {}
  void open(int64_t group, int64_t at, int64_t count, Ahead& ahead) const {
    pair_items(values_of(piece, group, at, count), space.values);
    turn_pairs(keys_of(piece, group, at, count), space.turned, ahead);
  }
  void logits(int64_t first, int64_t rows) const {
    pair_logits(piece, space.q, factor, first, rows, space.turned, space.bias, space.s);
  }
  static LIVREC_INLINE void put(float* weights, int64_t t, Floats p) {
    store_pairs(weights + t / 2, p);
  }
  void add(int64_t rows, int64_t count, float* out) const {
    multiply_pairs<false>({space.s, kTile, 1}, rows, space.values, piece.value_padded,
                          (count + 1) / 2, out, piece.value_padded, piece.value_padded, true);
  }
};
#endif

#if defined(LIVREC_ACROSS)
// By how much a logit may lie above what exponentials are taken less.
constexpr float kRoom = 8.0f;

// Makes what is known of earlier tiles fit the greatest logits of this one; returns those.
template <int R, int W>
LIVREC_INLINE Floats raise_across(const float* s, int64_t count, int64_t dim, float* out,
                                  float* peaks, float* totals) {
  const Floats known = load(peaks), most = peak_across<W>(s, count, known);
  const Floats factors = exponential<kLanes>(known - shift_across(most));
  for (int r = 0; r < R; ++r)
    for (int64_t d = 0; d < dim; d += kLanes)
      store(out + r * dim + d, load(out + r * dim + d) * factors[r]);
  store(totals, load(totals) * factors);
  store(peaks, most);
  return most;
}

// Logits of a tile to exp(s - peak), added up to `totals`. A peak is the greatest logit of the
// first tile, and raised only where a later one exceeds it by much: nothing waits for maxima.
template <typename Kind, int R, int W>
LIVREC_INLINE void weigh_across(float* s, int64_t count, int64_t dim, float* out, float* peaks,
                                float* totals, const Weights& weights) {
  end_across<Kind, W>(s, count, -kInfinity);
  Floats peak = load(peaks), total;
  for (bool raise = bits_of_lanes<kLanes>(peak == -kInfinity) != 0;; raise = true) {
    if (raise) peak = raise_across<R, W>(s, count, dim, out, peaks, totals);
    const Floats shift = shift_across(peak);
    Floats top = peak;
    total = Floats{};
    for (int64_t i = 0; i < count * W; i += Kind::kStep * kLanes) {
      Floats p[Kind::kStep];
      for (int j = 0; j < Kind::kStep; ++j) {
        const Floats logits = load(s + i + j * kLanes);
        top = greater<kLanes>(logits, top);
        p[j] = Kind::weight_of(logits, shift);
        total += p[j];
      }
      Kind::template put<W>(p, i, weights);
    }
    if (raise || bits_of_lanes<kLanes>(top > peak + kRoom) == 0) break;
  }
  store(totals, load(totals) + total);
}

template <typename Kind, int R, int W>
void forward_across(const AttentionPiece& piece, float* out, float* peaks, float* sums) {
  const int64_t each = sets_of(piece), sets = piece.groups * each;
  const int64_t dim = piece.dim, width = piece.value_dim;
  Space space{piece.scratch};
  float *q = space.take(sets * dim * W), *s = space.take(kTile * W);
  const Weights weights = Kind::weights_in(space.take(2 * kTile * W), W);
  float *most = space.take(sets * kLanes), *totals = space.take(sets * kLanes);
  const float factor = asked_across<R, W>(Kind(), piece.q, sets, dim, piece.scale, space.next, q);
  for (int64_t set = 0; set < sets; ++set) {
    store(most + set * kLanes, repeated<W>(peaks + set * R, R));
    store(totals + set * kLanes, Floats{});
  }
  for (int64_t at = 0; at < piece.items; at += kTile)
    for (int64_t set = 0; set < sets; ++set) {
      const Items<Kind> keys(piece.k, piece, dim, set / each, at);
      const Items<Kind> values(piece.v, piece, width, set / each, at);
      const float* asked = q + set * (dim / Kind::kStep) * W;
      float* sum = out + set * R * width;
      if constexpr (W > 1)
        products_across<Kind, W>(keys, asked, factor, s);
      else
        products_of_one(keys, asked, factor, s);
      weigh_across<Kind, R, W>(s, keys.count, width, sum, most + set * kLanes,
                               totals + set * kLanes, weights);
      gather_items<Kind, R, W>(weights.of_items, values, sum);
    }
  for (int64_t set = 0; set < sets; ++set) {
    const Floats total = folded_across<W>(load(totals + set * kLanes));
    for (int r = 0; r < R; ++r) {
      peaks[set * R + r] = most[set * kLanes + r];
      sums[set * R + r] = total[r];
    }
  }
}
#endif

template <typename Tiles>
void forward(const AttentionPiece& piece, float* out, float* peaks, float* sums) {
  Tiles tiles(piece);
  const bool softmax = piece.activation == Activation::softmax;
  for (int64_t at = 0; at < piece.items; at += kTile) {
    const int64_t count = least(kTile, piece.items - at);
    turn_bias(piece, at, count, tiles.space.bias);
    for (int64_t group = 0; group < piece.groups; ++group) {
      Ahead ahead = ahead_of(piece, group, at);
      tiles.open(group, at, count, ahead);
      for (int64_t r = 0; r < piece.rows; r += kRowTile) {
        const int64_t rows = least(kRowTile, piece.rows - r), first = group * piece.rows + r;
        tiles.logits(first, rows);
        Floats totals[kRowTile];
        for (int64_t i = 0; i < rows; ++i) {
          float* s = tiles.space.s + i * kTile;
          ahead.ask(kLinesPerRow);
          if (!softmax) {
            weigh_row(piece, tiles.space.bias + bias_row(piece, first + i), s, nullptr);
            continue;
          }
          end_row(s, count);
          totals[i] = weigh<Tiles>(piece, s, out + (first + i) * piece.value_padded,
                                   peaks + first + i, sums + first + i);
        }
        if (softmax) add_totals(totals, rows, sums + first);
        tiles.add(rows, count, out + first * piece.value_padded);
      }
      ahead.ask_rest();
    }
  }
}

}  // namespace

int64_t target_attention_pad() { return kLanes; }

int64_t target_attention_space(const AttentionPiece& piece, bool gradient) {
  const int64_t widths = piece.padded + piece.value_padded;
  const int64_t narrow =
      gradient ? narrow_space(piece, piece.dim) + narrow_space(piece, piece.value_dim) : 0;
  const int64_t words = piece.type == TableType::bf16
                            ? kTile * kRowTile + piece.groups * (2 * piece.rows + 1) * widths / 2
                            : 0;
  int64_t across = 0;
#if defined(LIVREC_ACROSS)
  if (goes_across(piece))  // q and grad twice; a tile's products and weights; rows of two groups
    across = piece.groups * sets_of(piece) * (2 * widths + 16) * kLanes + 10 * kTile * kLanes +
             (gradient ? 2 * kTile * widths : 0);
#endif
  return kTile * (3 * widths + 2 * piece.bias_heads + (gradient ? 2 : 1) * kRowTile) + words +
         narrow + across + 16 * 16;
}

void target_attention_widen(const void* x, TableType type, int64_t candidates, int64_t heads,
                            int64_t dim, int64_t padded, float factor, float* out) {
  for (int64_t h = 0; h < heads; ++h)
    for (int64_t c = 0; c < candidates; ++c, out += padded) {
      pad_row(x, type, c * heads + h, dim, padded, out);
      for (int64_t d = 0; d < dim; ++d) out[d] *= factor;
    }
}

void target_attention_narrow(const float* x, const float* factors, float factor, TableType type,
                             int64_t candidates, int64_t heads, int64_t dim, int64_t padded,
                             void* out) {
  for (int64_t h = 0; h < heads; ++h)
    for (int64_t c = 0; c < candidates; ++c, x += padded) {
      const int64_t first = (c * heads + h) * dim;
      const float times = factors == nullptr ? factor : *factors++;
      auto* floats = static_cast<float*>(out) + first;
      auto* halves = static_cast<uint16_t*>(out) + first;
      if (type == TableType::f32)
        for (int64_t d = 0; d < dim; ++d) floats[d] = times * x[d];
      else if (type == TableType::f16)
        for (int64_t d = 0; d < dim; ++d) halves[d] = f16_of(times * x[d]);
      else
        for (int64_t d = 0; d < dim; ++d) halves[d] = bf16_of(times * x[d]);
    }
}

void target_attention_forward(const AttentionPiece& piece, float* out, float* peaks, float* sums) {
  const int64_t all = piece.groups * piece.rows;
  for (int64_t r = 0; r < all * piece.value_padded; ++r) out[r] = 0.0f;
  for (int64_t r = 0; r < all; ++r) peaks[r] = -kInfinity, sums[r] = 0.0f;
#if defined(LIVREC_ACROSS)
  const bool done = across(piece, [&](auto kind, auto rows, auto width) {
    forward_across<decltype(kind), decltype(rows)::value, decltype(width)::value>(piece, out, peaks,
                                                                                  sums);
  });
  if (done) return;
#endif
#if defined(LIVREC_PAIRS)
  if (in_pairs(piece) && piece.activation == Activation::softmax)
    return forward<PairTiles>(piece, out, peaks, sums);
#endif
  forward<FloatTiles>(piece, out, peaks, sums);
}

}  // namespace LIVREC_ISA
}  // namespace livrec
