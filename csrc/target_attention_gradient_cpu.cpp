#include "attention_across_gradient.h"
#include "attention_tiles.h"

namespace livrec {
namespace LIVREC_ISA {
namespace {

struct GradientSpace {
  float *keys, *values, *turned_keys, *turned_values, *dk, *dv, *bias, *dbias, *s, *d, *words,
      *narrow_dk, *narrow_dv, *two_rows;
  explicit GradientSpace(const AttentionPiece& piece) {
    Space space{piece.scratch};
    keys = space.take(kTile * piece.padded);
    values = space.take(kTile * piece.value_padded);
    turned_keys = space.take(kTile * piece.padded);
    turned_values = space.take(kTile * piece.value_padded);
    dk = space.take(kTile * piece.padded);
    dv = space.take(kTile * piece.value_padded);
    bias = space.take(kTile * piece.bias_heads);
    dbias = space.take(kTile * piece.bias_heads);
    s = space.take(kTile * kRowTile);
    d = space.take(kTile * kRowTile);
    narrow_dk = space.take(narrow_space(piece, piece.dim));
    narrow_dv = space.take(narrow_space(piece, piece.value_dim));
    two_rows = space.next, words = two_rows + kTile * kRowTile;  // of pieces in bfloat16
  }
};

// q and grad, in words of two numbers if keys and values are read so, and of two rows.
struct Asked {
  const float *q, *grad;
  bool in_words;
  float factor;  // of products of words of q
  const float *q_rows, *grad_rows;

  Asked(const AttentionPiece& piece, const float* given, float* words)
      : q(piece.q), grad(given), in_words(false), factor(1.0f), q_rows{}, grad_rows{} {
#if defined(LIVREC_PAIRS)
    if (!in_pairs(piece)) return;
    const int64_t rows = piece.groups * piece.rows, half = (piece.rows + 1) / 2;
    const int64_t dim = piece.padded, width = piece.value_padded;
    float *grads = words + rows * dim / 2, *columns = grads + rows * width / 2;
    factor = pair_rows(piece.q, rows, dim, piece.scale, words);
    pair_rows(given, rows, width, 1.0f, grads);
    q = words, grad = grads, in_words = true;
    pair_columns(piece.q, piece.groups, piece.rows, dim, factor == 1.0f ? 1.0f : 1.0f / factor,
                 columns);
    q_rows = columns, columns += piece.groups * half * dim;
    pair_columns(given, piece.groups, piece.rows, width, 1.0f, columns);
    grad_rows = columns;
#else
    (void)words;
#endif
  }
};

// A tile of a group, and the products s = q k + bias and D = grad v of some of its rows.
struct Tile {
  const AttentionPiece& piece;
  const GradientSpace& space;
  const Asked& asked;
  int64_t at, count;
  Stretch keys;
  Ahead ahead;

  void open(int64_t group) {
    ahead = ahead_of(piece, group, at);
    keys = keys_of(piece, group, at, count);
    turn_over(keys, space.keys, space.turned_keys);
    if (!piece.shared)
      turn_over(values_of(piece, group, at, count), space.values, space.turned_values);
  }

  void products(int64_t first, int64_t rows) const {
    const float* values = piece.shared ? space.turned_keys : space.turned_values;
    const int64_t width = piece.value_padded;
#if defined(LIVREC_PAIRS)
    if (asked.in_words) {
      pair_logits(piece, asked.q, asked.factor, first, rows, space.turned_keys, space.bias,
                  space.s);
      return multiply_pairs<true>({asked.grad + first * width / 2, width / 2, 1}, rows, values,
                                  kTile, width / 2, space.d, kTile, kTile, false);
    }
#endif
    logits_of(piece, first, rows, space.turned_keys, space.bias, space.s);
    multiply<true>({asked.grad + first * width, width, 1}, rows, values, kTile, piece.value_dim,
                   space.d, kTile, kTile, false);
  }

 private:
  void turn_over(const Stretch& x, float* wide, float* turned) {
#if defined(LIVREC_PAIRS)
    if (asked.in_words) return turn_pairs(x, turned, ahead);
#endif
    turn(x, wide, turned, ahead);
  }
};

// Visits every tile, group and block of rows.
template <typename Visit, typename Close, typename Finish>
LIVREC_INLINE void each_block(const AttentionPiece& piece, const GradientSpace& space,
                              const float* grad, const Visit& visit, const Close& close,
                              const Finish& finish) {
  const Asked asked(piece, grad, space.words);
  for (int64_t at = 0; at < piece.items; at += kTile) {
    Tile tile{piece, space, asked, at, least(kTile, piece.items - at), {}, {}};
    turn_bias(piece, at, tile.count, space.bias);
    for (int64_t group = 0; group < piece.groups; ++group) {
      tile.open(group);
      for (int64_t r = 0; r < piece.rows; r += kRowTile) {
        const int64_t rows = least(kRowTile, piece.rows - r), first = group * piece.rows + r;
        tile.products(first, rows);
        visit(tile, first, rows, r == 0);
      }
      tile.ahead.ask_rest();
      close(tile, group);
    }
    finish(tile);
  }
}

// One row of a tile, added to the greatest logit, Z and the sum of slopes of those before.
void add_slopes(const float* s, const float* d, float base, float* peak, float* sum, float* slope) {
  const float most = greatest_in(s, *peak), shift = shift_of(most);
  if (most != *peak) {
    const float factor = exp_of(*peak - shift);
    *sum *= factor, *slope *= factor;
    *peak = most;
  }
  Floats total{}, slopes{};
  for (int64_t t = 0; t < kTile; t += kLanes) {
    const Floats p = exponential<kLanes>(load(s + t) - shift);
    total += p;
    slopes += p * (load(d + t) - base);
  }
  *sum += sum_of(total);
  *slope += sum_of(slopes);
}

// s to weights, d to the gradient of s.
LIVREC_INLINE void slope_row(const AttentionPiece& piece, const AttentionSlopes& slopes,
                             int64_t row, const float* bias, float* s, float* d) {
  if (piece.activation != Activation::softmax)
    return weigh_row(piece, bias + bias_row(piece, row), s, d);
  const float shift = shift_of(slopes.peaks[row]), factor = slopes.factors[row];
  const float less = slopes.less[row];
  for (int64_t t = 0; t < kTile; t += kLanes) {
    const Floats p = exponential<kLanes>(load(s + t) - shift) * factor;
    store(s + t, p);
    store(d + t, p * (load(d + t) - less));
  }
}

float sum_in(float* d, int64_t count) {
  Floats total{};
  for (int64_t t = count; t < kTile; ++t) d[t] = 0.0f;
  for (int64_t t = 0; t < kTile; t += kLanes) total += load(d + t);
  return sum_of(total);
}

// x [count, padded] to rows of a group of `to` [items, groups, dim].
void narrow_rows(const float* x, TableType type, int64_t groups, int64_t group, int64_t at,
                 int64_t count, int64_t dim, int64_t padded, bool past_caches, void* to) {
  for (int64_t i = 0; i < count; ++i, x += padded) {
    const int64_t first = ((at + i) * groups + group) * dim;
    if (type == TableType::f32) {
      float* out = static_cast<float*>(to) + first;
      if (past_caches && streamable(out, dim * 4)) {
        stream(reinterpret_cast<const char*>(x), dim * 4, reinterpret_cast<char*>(out));
        continue;
      }
      for (int64_t d = 0; d < dim; ++d) out[d] = x[d];
    } else {
      uint16_t* out = static_cast<uint16_t*>(to) + first;
      narrow_row(x, type == TableType::f16, dim, out);
    }
  }
}

// dk or dv, tile by tile: rows are made in place where they are complete at once and in the form in
// which they are wanted, else in `space` [kTile, padded].
struct Rows {
  const AttentionPiece& piece;
  void* to;  // [items, groups, dim], or null
  int64_t dim, padded;
  float *space, *narrow;
  bool past_caches;

  bool at_once() const {
    return piece.type == TableType::f32 && dim == padded && piece.rows <= kRowTile && !piece.shared;
  }

  // (+)= a [items of the tile, depth] b [depth, padded], for a group.
  void add(const Tile& tile, int64_t group, Left a, const float* b, int64_t depth,
           bool more) const {
    if (to == nullptr) return;
    const bool direct = at_once();
    float* first =
        direct ? static_cast<float*>(to) + (tile.at * piece.groups + group) * dim : space;
    const int64_t stride = direct ? piece.groups * dim : padded;
    if (direct && past_caches && streamable(first, dim * 4))
      multiply<false, true>(a, tile.count, b, padded, depth, first, stride, padded, false);
    else
      multiply(a, tile.count, b, padded, depth, first, stride, padded, more);
  }

  // Whether rows in 16 bits, of which one group's may be less than a line of memory, wait in
  // `narrow` for those of the other groups.
  bool held() const { return past_caches && narrow_space(piece, dim) > 0; }

#if defined(LIVREC_PAIRS)
  // (+)= a b as words of two rows of the depth.
  void add_pairs(const Tile& tile, const float* a, const float* b, int64_t depth, bool more) const {
    if (to != nullptr)
      multiply_pairs<false>({a, 1, kTile}, tile.count, b, padded, (depth + 1) / 2, space, padded,
                            padded, more);
  }
#endif

  void scale(float factor) const {
    for (int64_t i = 0; i < kTile * padded && factor != 1.0f; i += kLanes)
      store(space + i, load(space + i) * factor);
  }

  void close(const Tile& tile, int64_t group) const {
    if (to == nullptr || at_once()) return;
    narrow_rows(space, piece.type, piece.groups, group, held() ? 0 : tile.at, tile.count, dim,
                padded, past_caches, held() ? narrow : to);
  }

  void finish(const Tile& tile) const {
    if (to == nullptr || !held()) return;
    const int64_t row = piece.groups * dim * 2, bytes = tile.count * row;
    put_down(narrow, bytes, static_cast<char*>(to) + tile.at * row);
  }
};

// Whether gradients, too, are products of words: what is shared has no factor of its own.
LIVREC_INLINE bool in_words(const Tile& tile) {
  return tile.asked.in_words && (tile.asked.factor == 1.0f || !tile.piece.shared);
}

#if defined(LIVREC_PAIRS)
// What a block of rows, whose weights are in s and dS in d, adds to all gradients.
void multiply_words(const Tile& tile, const AttentionSlopes& slopes, const Rows& dk, const Rows& dv,
                    int64_t group, int64_t first, int64_t rows, bool fresh) {
  const AttentionPiece& piece = tile.piece;
  const GradientSpace& space = tile.space;
  const int64_t dim = piece.padded, words = (tile.count + 1) / 2;
  float *s_rows = space.two_rows, *d_rows = space.two_rows + kTile * kRowTile / 2;
  pair_slopes(space.s, rows, tile.count, s_rows);
  pair_slopes(space.d, rows, tile.count, d_rows);
  if (fresh) pair_items(tile.keys, space.keys);
  if (slopes.sums != nullptr)
    multiply_pairs<false>({space.s, kTile, 1}, rows, space.keys, dim, words,
                          slopes.keys + first * dim, dim, dim, true);
  multiply_pairs<false>({space.d, kTile, 1}, rows, space.keys, dim, words, slopes.dq + first * dim,
                        dim, dim, true);
  const int64_t pair = group * ((piece.rows + 1) / 2) + (first - group * piece.rows) / 2;
  dk.add_pairs(tile, d_rows, tile.asked.q_rows + pair * dim, rows, !fresh);
  dv.add_pairs(tile, s_rows, tile.asked.grad_rows + pair * piece.value_padded, rows,
               !fresh || piece.shared);
}
#endif

}  // namespace

void target_attention_slopes(const AttentionPiece& piece, const float* grad, const float* base,
                             float* peaks, float* sums, float* slopes) {
  const GradientSpace space(piece);
  for (int64_t r = 0; r < piece.groups * piece.rows; ++r)
    peaks[r] = -kInfinity, sums[r] = slopes[r] = 0.0f;
#if defined(LIVREC_ACROSS)
  const bool done = across(piece, [&](auto kind, auto rows, auto width) {
    slopes_across<decltype(kind), decltype(rows)::value, decltype(width)::value>(
        piece, grad, base, peaks, sums, slopes);
  });
  if (done) return;
#endif
  each_block(
      piece, space, grad,
      [&](Tile& tile, int64_t first, int64_t rows, bool) {
        for (int64_t i = 0; i < rows; ++i) {
          tile.ahead.ask(kLinesPerRow);
          end_row(space.s + i * kTile, tile.count);
          add_slopes(space.s + i * kTile, space.d + i * kTile, base[first + i], peaks + first + i,
                     sums + first + i, slopes + first + i);
        }
      },
      [](const Tile&, int64_t) {}, [](const Tile&) {});
}

void target_attention_backward(const AttentionPiece& piece, const AttentionSlopes& slopes) {
  const GradientSpace space(piece);
  const int64_t tile_bias = piece.bias_heads * kTile;
  for (int64_t i = 0; i < piece.groups * piece.rows * piece.padded; ++i) slopes.dq[i] = 0.0f;
  for (int64_t i = 0; i < tile_bias; ++i) space.dbias[i] = 0.0f;
  if (slopes.sums != nullptr) {
    for (int64_t r = 0; r < piece.groups * piece.rows; ++r) slopes.sums[r] = 0.0f;
    for (int64_t i = 0; i < piece.groups * piece.rows * piece.padded; ++i) slopes.keys[i] = 0.0f;
  }
#if defined(LIVREC_ACROSS)
  const bool both = slopes.dk != nullptr && slopes.dv != nullptr;
  const bool done =
      both && across(piece, [&](auto kind, auto rows, auto width) {
        backward_across<decltype(kind), decltype(rows)::value, decltype(width)::value>(piece,
                                                                                       slopes);
      });
  if (done && slopes.past_caches) end_stream();
  if (done) return;
#endif
  const bool shared = piece.shared;
  Panel keys{};
  const Rows dk{piece,    slopes.dk,       piece.dim,         piece.padded,
                space.dk, space.narrow_dk, slopes.past_caches};
  const Rows dv{piece,
                slopes.dv,
                piece.value_dim,
                piece.value_padded,
                shared ? space.dk : space.dv,
                space.narrow_dv,
                slopes.past_caches};
  each_block(
      piece, space, slopes.grad,
      [&](Tile& tile, int64_t first, int64_t rows, bool fresh) {
        for (int64_t i = 0; i < rows; ++i) {
          float *s = space.s + i * kTile, *d = space.d + i * kTile;
          tile.ahead.ask(kLinesPerRow);
          slope_row(piece, slopes, first + i, space.bias, s, d);
          if (slopes.sums != nullptr) slopes.sums[first + i] += sum_in(d, tile.count);
          if (slopes.dbias == nullptr) continue;
          float* sums = space.dbias + bias_row(piece, first + i);
          for (int64_t t = 0; t < kTile; t += kLanes) store(sums + t, load(sums + t) + load(d + t));
        }
        const int64_t group = first / piece.rows;
#if defined(LIVREC_PAIRS)
        if (in_words(tile)) return multiply_words(tile, slopes, dk, dv, group, first, rows, fresh);
#endif
        if (fresh) keys = panel_of(tile.keys, space.keys);
        if (slopes.sums != nullptr)
          multiply({space.s, kTile, 1}, rows, keys.rows, keys.stride, tile.count,
                   slopes.keys + first * piece.padded, piece.padded, piece.padded, true);
        multiply({space.d, kTile, 1}, rows, keys.rows, keys.stride, tile.count,
                 slopes.dq + first * piece.padded, piece.padded, piece.padded, true);
        dk.add(tile, group, {space.d, 1, kTile}, piece.q + first * piece.padded, rows, !fresh);
        dv.add(tile, group, {space.s, 1, kTile}, slopes.grad + first * piece.value_padded, rows,
               !fresh || shared);
      },
      [&](const Tile& tile, int64_t group) {
        if (in_words(tile)) dk.scale(tile.asked.factor);
        dk.close(tile, group);
        if (!shared) dv.close(tile, group);
      },
      [&](const Tile& tile) {
        dk.finish(tile);
        if (!shared) dv.finish(tile);
        if (slopes.dbias == nullptr) return;
        for (int64_t h = 0; h < piece.bias_heads; ++h)
          for (int64_t t = 0; t < tile.count; ++t) {
            float& sum = space.dbias[h * kTile + t];
            slopes.dbias[(tile.at + t) * piece.bias_heads + h] = sum;
          }
        for (int64_t i = 0; i < tile_bias; ++i) space.dbias[i] = 0.0f;
      });
  if (slopes.past_caches) end_stream();
}

}  // namespace LIVREC_ISA
}  // namespace livrec
