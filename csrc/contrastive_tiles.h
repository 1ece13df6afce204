// Tiles of logits and what is masked of them, for the CPU kernels of the contrastive loss; see
// vectors.h for how it is included.
#pragma once

#include "contrastive.h"
#include "halves.h"
#include "pairs.h"
#include "products.h"
#if defined(__AMX_BF16__) || defined(LIVREC_EMULATED_TILES)
#define LIVREC_TILED 1
#include "matrix_tiles.h"
#endif

namespace livrec {
namespace LIVREC_ISA {
namespace {

// Numbers in whole vectors, or in whole rows of tiles: at most as many as contrastive_space has.
#if defined(LIVREC_TILED)
constexpr int64_t kLine = kTileSide;
#else
constexpr int64_t kLine = kLanes;
#endif
LIVREC_INLINE int64_t padded_to_line(int64_t count) { return (count + kLine - 1) / kLine * kLine; }

// Products of matrices of bfloat16, whose numbers are words of two along the depth; set up if used.
#if defined(LIVREC_TILED)
class PairProducts {
 public:
  explicit PairProducts(bool used) : tiles_(used) {}
  void multiply(Left a, int64_t rows, const float* b, int64_t b_row, int64_t depth, float* c,
                int64_t c_row, int64_t columns, bool add) {
    multiply_tiles(tiles_, a.data, a.row, rows, b, b_row, depth, c, c_row, columns, add);
  }

 private:
  MatrixTiles tiles_;
};
#else
struct PairProducts {
  explicit PairProducts(bool) {}
#if defined(LIVREC_PAIRS)
  static void multiply(Left a, int64_t rows, const float* b, int64_t b_row, int64_t depth, float* c,
                       int64_t c_row, int64_t columns, bool add) {
    multiply_pairs<false>(a, rows, b, b_row, depth, c, c_row, columns, add);
  }
#else  // never used: nothing is packed
  static void multiply(Left, int64_t, const float*, int64_t, int64_t, float*, int64_t, int64_t,
                       bool) {}
#endif
};
#endif

LIVREC_INLINE Ints load_ids(const int32_t* from) {
  typedef int32_t LooseInts __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
  return *reinterpret_cast<const LooseInts*>(from);
}

// kPanel units from `first` on, number after number: [padded dim, kPanel]; zeros past the last.
inline void turn_panel(const ContrastiveSide& side, int64_t dim, int64_t stride, int64_t first,
                       float* out) {
  const float* rows = side.units + first * stride;
  transpose([=](int64_t i, int64_t d) { return load(rows + i * stride + d); },
            least(kPanel, side.count - first), padded_to_line(dim), out, kPanel);
}

constexpr int64_t kChain = 32;  // numbers added one by one; longer sums are sums of such

// Products of rows with the columns of some panels: s [rows, kTileStride]. Their number is rounded
// up to an even one (there are more rows), as then all are added up in one order: <a, b> has the
// bits of <b, a>, wherever they lie.
inline void tile_products(const float* rows, int64_t count, int64_t stride, const float* panels,
                          int64_t columns, int64_t dim, float* s) {
  const int64_t padded = padded_to_line(dim), even = count + count % 2;
  for (int64_t at = 0; at < columns; at += kPanel)
    for (int64_t d = 0; d < dim; d += kChain)
      multiply({rows + d, stride, 1}, even, panels + at * padded + d * kPanel, kPanel,
               least(kChain, dim - d), s + at, kTileStride, kPanel, d > 0);
}

// Likewise of vectors in words of two numbers; <a, b> may not have the bits of <b, a>.
inline void tile_pair_products(PairProducts& pairs, const float* rows, int64_t count,
                               int64_t stride, const float* panels, int64_t columns, int64_t words,
                               float* s) {
  for (int64_t at = 0; at < columns; at += kPanel)
    pairs.multiply({rows, stride, 1}, count, panels + at * padded_to_line(words), kPanel, words,
                   s + at, kTileStride, kPanel, false);
}

LIVREC_INLINE int64_t words_of(int64_t dim) { return (dim + 1) / 2; }

// One bit for each product above the threshold, of the first `count` of a panel.
LIVREC_INLINE uint64_t bits_above(const float* s, float threshold, int64_t count) {
  uint64_t bits = 0;
  for (int64_t v = 0; v < kPanel; v += kLanes)
    bits |= static_cast<uint64_t>(bits_of_lanes<kLanes>(load(s + v) > threshold)) << v;
  return bits & (~uint64_t{0} >> (kPanel - least(kPanel, count)));
}

constexpr int64_t kTileWords = kTileColumns / kPanel;
typedef uint64_t RowBits[kTileWords];  // a bit for each column of a tile

// One bit for each of a panel's ids that is the row's own.
LIVREC_INLINE uint64_t bits_equal(const int32_t* ids, int32_t own) {
  uint64_t bits = 0;
  for (int64_t v = 0; v < kPanel; v += kLanes)
    bits |= static_cast<uint64_t>(bits_of_lanes<kLanes>(load_ids(ids + v) == Ints{} + own)) << v;
  return bits;
}

// Takes masked pairs out of a row of products, and its own: -inf, which no shift brings back.
// Positives of its group stay. width: of the tile, whole panels; masked: by the row's query.
template <bool kGroups>
inline void mask_row(const Contrastive& call, int64_t row, int64_t column, int64_t width,
                     const RowBits& masked, float* s) {
  const Floats gone = Floats{} - kInfinity;
  if (call.valid != nullptr && !call.valid[row]) {
    for (int64_t v = 0; v < width; v += kLanes) store(s + v, gone);
    return;
  }
  const int32_t group = kGroups ? call.row_groups[row] : 0;
  for (int64_t p = 0; p * kPanel < width; ++p) {
    const int64_t at = column + p * kPanel;
    uint64_t bits = masked[p];
    if (call.key_ids != nullptr) bits |= bits_equal(call.key_ids + at, call.row_key_ids[row]);
    if (kGroups && bits != 0) bits &= ~bits_equal(call.groups + at, group);
    for (; bits != 0; bits &= bits - 1) s[p * kPanel + __builtin_ctzll(bits)] = -kInfinity;
  }
  if (row >= column && row < column + width) s[row - column] = -kInfinity;
}

// a b + c, rounded once where there is an instruction for it; left to itself, the compiler rounds
// a product that it finds in two sums.
LIVREC_INLINE Floats fused(Floats a, Floats b, Floats c) {
#if defined(__clang__)
  return __builtin_elementwise_fma(a, b, c);
#elif defined(__AVX512F__)
  return __builtin_ia32_vfmaddps512_mask(a, b, c, 0xffff, 4);
#elif defined(__FMA__)
  return __builtin_ia32_vfmaddps256(a, b, c);
#else
  return a * b + c;
#endif
}

// Products to logits less a shift. What is large cancels before anything is rounded.
LIVREC_INLINE Floats logits_of(const Contrastive& call, Floats products, Floats bias,
                               Floats shift) {
  return fused(products, Floats{} + call.per_temperature, -shift) +
         fused(products, Floats{} + call.rest, bias);
}

// Takes scratch memory apart: a tile of products, another for what is needed beside it, and the
// panels of its columns, of the vectors compared and of each term's keys.
struct TileSpace {
  float *s, *other, *similar_panels, *panels;
  int64_t panels_size;
  TileSpace(float* scratch, int64_t dim, int64_t similar_dim)
      : s(scratch),
        other(s + kTileRows * kTileStride),
        similar_panels(other + kTileRows * kTileStride),
        panels(similar_panels + kTileColumns * padded_to_line(similar_dim)),
        panels_size(kTileColumns * padded_to_line(dim)) {}
};

inline void turn_panels(const ContrastiveSide& side, int64_t dim, int64_t stride, int64_t column,
                        int64_t width, float* out) {
  for (int64_t p = 0; p < width; p += kPanel)
    if (column + p < side.count)
      turn_panel(side, dim, stride, column + p, out + p * padded_to_line(dim));
}

LIVREC_INLINE bool queries_mask(const Contrastive& call) {
  return call.finds_similar || call.pairs != nullptr || call.query_ids != nullptr;
}

// What the queries mask of a tile, in any term: by their ids, and false negatives.
inline void mask_by_queries(const Contrastive& call, const TileSpace& space, int64_t column,
                            int64_t width, int64_t row, int64_t rows, RowBits* masked) {
  const int64_t similar =
      call.finds_similar ? least(width, call.similar.count - column) : 0;  // or less than 0
  if (similar > 0)
    tile_products(call.similar.units + row * call.similar_stride, rows, call.similar_stride,
                  space.similar_panels, similar, call.similar_dim, space.other);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t p = 0; p < kTileWords; ++p) {
      const int64_t first = p * kPanel, word = column / kPanel + p;
      uint64_t bits = 0;
      if (first < similar)
        bits = bits_above(space.other + i * kTileStride + first, call.threshold, similar - first);
      else if (call.pairs != nullptr && word < call.words)
        bits = call.pairs[(row + i) * call.words + word];
      if (call.query_ids != nullptr && first < width)
        bits |= bits_equal(call.query_ids + column + first, call.row_query_ids[row + i]);
      masked[i][p] = bits;
    }
}

// Takes what is masked out of a tile of products; masked: by the queries, or null.
inline void mask_tile(const Contrastive& call, int64_t column, int64_t width, int64_t row,
                      int64_t rows, const RowBits* masked, float* s) {
  if (masked == nullptr && call.key_ids == nullptr && call.valid == nullptr) {  // own pairs alone
    for (int64_t at = row > column ? row : column; at < least(row + rows, column + width); ++at)
      s[(at - row) * kTileStride + at - column] = -kInfinity;
    return;
  }
  const RowBits none = {};
  const auto mask = call.groups != nullptr ? mask_row<true> : mask_row<false>;
  for (int64_t i = 0; i < rows; ++i)
    mask(call, row + i, column, width, masked != nullptr ? masked[i] : none, s + i * kTileStride);
}

// A tile of masked products.
inline void fill_tile(const Contrastive& call, PairProducts& pairs, const float* panels,
                      int64_t column, int64_t width, int64_t row, int64_t rows,
                      const RowBits* masked, float* s) {
  if (call.queries.words != nullptr)
    tile_pair_products(pairs, call.queries.words + row * call.words_stride, rows, call.words_stride,
                       panels, width, words_of(call.dim), s);
  else
    tile_products(call.queries.units + row * call.stride, rows, call.stride, panels, width,
                  call.dim, s);
  mask_tile(call, column, width, row, rows, masked, s);
}

// A tile of masked products goes to where they are kept, or comes from there; padded with zeros.
LIVREC_INLINE void keep_tile(const Contrastive& call, int64_t column, int64_t width, int64_t row,
                             int64_t rows, const float* s) {
  const int64_t columns = least(width, call.keys.count - column);
  for (int64_t i = 0; i < rows; ++i) {
    const float* from = s + i * kTileStride;
    float* to = call.keeps + (row + i) * call.keys.count + column;
    if (streamable(to, columns * 4))
      stream(reinterpret_cast<const char*>(from), columns * 4, reinterpret_cast<char*>(to));
    else
      __builtin_memcpy(to, from, static_cast<std::size_t>(columns) * 4);
  }
}

LIVREC_INLINE void take_tile(const Contrastive& call, int64_t column, int64_t width, int64_t row,
                             int64_t rows, float* s) {
  const int64_t columns = least(width, call.keys.count - column);
  for (int64_t i = 0; i < rows; ++i) {
    const float* from = call.kept + (row + i) * call.keys.count + column;
    float* to = s + i * kTileStride;
    int64_t j = 0;
    for (; j + kLanes <= columns; j += kLanes) store(to + j, load(from + j));
    for (; j < width; ++j) to[j] = j < columns ? from[j] : 0.0f;
  }
}

// Asks for the tile that comes after one of a part, of the rows below or of the next columns.
LIVREC_INLINE void ask_for_tile(const Contrastive& call, const ContrastivePart& part,
                                int64_t column, int64_t row) {
  const bool below = row + kTileRows < part.row + part.rows;
  const int64_t first = below ? row + kTileRows : part.row,
                rows = least(kTileRows, least(part.row + part.rows, call.kept_rows) - first),
                at = below ? column : column + kTileColumns,
                columns = least(kTileColumns, call.keys.count - at);
  for (int64_t i = 0; i < rows && columns > 0; ++i)
    fetch(call.kept + (first + i) * call.keys.count + at, columns * 4);
}

// Visits a part tile by tile, and in each tile term by term: visit(term, column, width, row, rows),
// the term's products in space.s, -inf where a pair is masked.
template <typename Visit>
LIVREC_INLINE void each_tile(const ContrastiveTerms& terms, const ContrastivePart& part,
                             const TileSpace& space, PairProducts& pairs, const Visit& visit) {
  const Contrastive& shared = terms.calls[0];
  RowBits bits[kTileRows];
  const int64_t kept_rows = shared.kept != nullptr ? shared.kept_rows : 0;
  const bool all_kept = part.row + part.rows <= kept_rows, asks = queries_mask(shared);
  for (int64_t at = 0; at < part.columns; at += kTileColumns) {
    const int64_t column = part.column + at,
                  width = least(kTileColumns, (part.columns - at + kPanel - 1) / kPanel * kPanel);
    for (int64_t t = 0; t < terms.count && !all_kept; ++t) {
      const Contrastive& call = terms.calls[t];
      float* panels = space.panels + t * space.panels_size;
      if (call.keys.words != nullptr)
        turn_panels({call.keys.words, call.keys.count, nullptr, nullptr}, words_of(call.dim),
                    call.words_stride, column, width, panels);
      else
        turn_panels(call.keys, call.dim, call.stride, column, width, panels);
    }
    if (!all_kept && shared.finds_similar)
      turn_panels(shared.similar, shared.similar_dim, shared.similar_stride, column, width,
                  space.similar_panels);
    for (int64_t r = 0; r < part.rows; r += kTileRows) {
      const int64_t row = part.row + r, rows = least(kTileRows, part.rows - r);
      const bool kept = row + rows <= kept_rows;
      const RowBits* masked = asks && !kept ? bits : nullptr;
      if (masked != nullptr) mask_by_queries(shared, space, column, width, row, rows, bits);
      for (int64_t t = 0; t < terms.count; ++t) {
        const Contrastive& call = terms.calls[t];
        if (kept) {
          take_tile(call, column, width, row, rows, space.s);
          ask_for_tile(call, part, column, row);
        } else {
          fill_tile(call, pairs, space.panels + t * space.panels_size, column, width, row, rows,
                    masked, space.s);
        }
        if (call.keeps != nullptr && row + rows <= call.kept_rows)
          keep_tile(call, column, width, row, rows, space.s);
        visit(t, column, width, row, rows);
      }
    }
  }
}

}  // namespace
}  // namespace LIVREC_ISA
}  // namespace livrec
