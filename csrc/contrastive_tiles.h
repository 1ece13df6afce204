// Tiles of logits and what is masked of them, for the CPU kernels of the contrastive loss; see
// vectors.h for how it is included.
#pragma once

#include "contrastive.h"
#include "halves.h"
#include "products.h"
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace livrec {
namespace LIVREC_ISA {
namespace {

#if defined(__AVX512BF16__)
// A term of a product of matrices of bfloat16, whose numbers are words of two along the depth.
struct OfPairs {
  static LIVREC_INLINE Floats add(Floats sum, float a, Floats b) {
    return _mm512_dpbf16_ps(sum, same_bits<__m512bh>(Floats{} + a), same_bits<__m512bh>(b));
  }
};
#else
using OfPairs = OfFloats;  // never used: nothing is packed
#endif

LIVREC_INLINE int64_t padded_to_lanes(int64_t dim) { return (dim + kLanes - 1) / kLanes * kLanes; }

LIVREC_INLINE Ints load_ids(const int32_t* from) {
  typedef int32_t LooseInts __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
  return *reinterpret_cast<const LooseInts*>(from);
}

// kPanel units from `first` on, number after number: [padded dim, kPanel]; zeros past the last.
inline void turn_panel(const ContrastiveSide& side, int64_t dim, int64_t stride, int64_t first,
                       float* out) {
  const float* rows = side.units + first * stride;
  transpose([=](int64_t i, int64_t d) { return load(rows + i * stride + d); },
            least(kPanel, side.count - first), padded_to_lanes(dim), out, kPanel);
}

constexpr int64_t kChain = 32;  // numbers added one by one; longer sums are sums of such

// Products of rows with the columns of some panels: s [rows, kTileStride]. Their number is rounded
// up to an even one (there are more rows), as then all are added up in one order: <a, b> has the
// bits of <b, a>, wherever they lie.
inline void tile_products(const float* rows, int64_t count, int64_t stride, const float* panels,
                          int64_t columns, int64_t dim, float* s) {
  const int64_t padded = padded_to_lanes(dim), even = count + count % 2;
  for (int64_t at = 0; at < columns; at += kPanel)
    for (int64_t d = 0; d < dim; d += kChain)
      multiply({rows + d, stride, 1}, even, panels + at * padded + d * kPanel, kPanel,
               least(kChain, dim - d), s + at, kTileStride, kPanel, d > 0);
}

// Likewise of vectors in words of two numbers; <a, b> may not have the bits of <b, a>.
inline void tile_pair_products(const float* rows, int64_t count, int64_t stride,
                               const float* panels, int64_t columns, int64_t words, float* s) {
  for (int64_t at = 0; at < columns; at += kPanel)
    multiply<false, false, OfPairs>({rows, stride, 1}, count, panels + at * padded_to_lanes(words),
                                    kPanel, words, s + at, kTileStride, kPanel, false);
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

// Takes masked pairs out of a row of products, and its own: -inf, which no shift brings back.
// Positives of its group stay. width: of the tile, whole panels; words: bits of its false
// negatives, or null.
template <bool kGroups>
inline void mask_row(const Contrastive& call, int64_t row, int64_t column, int64_t width,
                     const uint64_t* words, float* s) {
  const Floats gone = Floats{} - kInfinity;
  if (call.valid != nullptr && !call.valid[row]) {
    for (int64_t v = 0; v < width; v += kLanes) store(s + v, gone);
    return;
  }
  const int32_t group = kGroups ? call.row_groups[row] : 0;
  const auto drop = [&](const int32_t* rows, const int32_t* columns) {
    const Ints own = Ints{} + rows[row];
    for (int64_t v = 0; v < width; v += kLanes) {
      Ints same = load_ids(columns + column + v) == own;
      if (kGroups) same &= load_ids(call.groups + column + v) != group;
      store(s + v, same ? gone : load(s + v));
    }
  };
  if (call.query_ids != nullptr) drop(call.row_query_ids, call.query_ids);
  if (call.key_ids != nullptr) drop(call.row_key_ids, call.key_ids);
  if (words != nullptr)
    for (int64_t p = 0; p * kPanel < width && column + p * kPanel < call.similar.count; ++p)
      for (uint64_t bits = words[p]; bits != 0; bits &= bits - 1) {
        const int64_t at = p * kPanel + __builtin_ctzll(bits);
        if (!kGroups || call.groups[column + at] != group) s[at] = -kInfinity;
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

// Takes scratch memory apart: a tile of products, and the panels of its columns.
struct TileSpace {
  float *s, *panels, *similar, *similar_panels;
  TileSpace(float* scratch, int64_t dim)
      : s(scratch),
        panels(s + kTileRows * kTileStride),
        similar(panels + kTileColumns * padded_to_lanes(dim)),
        similar_panels(similar + kTileRows * kTileStride) {}
};

inline void turn_panels(const ContrastiveSide& side, int64_t dim, int64_t stride, int64_t column,
                        int64_t width, float* out) {
  for (int64_t p = 0; p < width; p += kPanel)
    if (column + p < side.count)
      turn_panel(side, dim, stride, column + p, out + p * padded_to_lanes(dim));
}

// A tile of masked products.
inline void fill_tile(const Contrastive& call, const TileSpace& space, int64_t column,
                      int64_t width, int64_t row, int64_t rows) {
  const int64_t stride = call.stride,
                similar = call.finds_similar ? least(width, call.similar.count - column) : 0;
  if (call.queries.words != nullptr)
    tile_pair_products(call.queries.words + row * call.words_stride, rows, call.words_stride,
                       space.panels, width, words_of(call.dim), space.s);
  else
    tile_products(call.queries.units + row * stride, rows, stride, space.panels, width, call.dim,
                  space.s);
  if (similar > 0)
    tile_products(call.similar.units + row * call.similar_stride, rows, call.similar_stride,
                  space.similar_panels, similar, call.similar_dim, space.similar);
  for (int64_t i = 0; i < rows; ++i) {
    uint64_t found[kTileWords];
    const uint64_t* words = nullptr;
    if (call.pairs != nullptr) words = call.pairs + (row + i) * call.words + column / kPanel;
    if (similar > 0) {
      for (int64_t p = 0; p * kPanel < similar; ++p)
        found[p] = bits_above(space.similar + i * kTileStride + p * kPanel, call.threshold,
                              similar - p * kPanel);
      words = found;
    }
    float* s = space.s + i * kTileStride;
    if (call.groups != nullptr)
      mask_row<true>(call, row + i, column, width, words, s);
    else
      mask_row<false>(call, row + i, column, width, words, s);
  }
}

// Visits a part tile by tile: visit(column, width, row, rows), its products in space.s, -inf where
// a pair is masked.
template <typename Visit>
LIVREC_INLINE void each_tile(const Contrastive& call, const ContrastivePart& part,
                             const TileSpace& space, const Visit& visit) {
  for (int64_t at = 0; at < part.columns; at += kTileColumns) {
    const int64_t column = part.column + at,
                  width = least(kTileColumns, (part.columns - at + kPanel - 1) / kPanel * kPanel);
    if (call.keys.words != nullptr)
      turn_panels({call.keys.words, call.keys.count, nullptr, nullptr}, words_of(call.dim),
                  call.words_stride, column, width, space.panels);
    else
      turn_panels(call.keys, call.dim, call.stride, column, width, space.panels);
    if (call.finds_similar)
      turn_panels(call.similar, call.similar_dim, call.similar_stride, column, width,
                  space.similar_panels);
    for (int64_t r = 0; r < part.rows; r += kTileRows) {
      const int64_t row = part.row + r, rows = least(kTileRows, part.rows - r);
      fill_tile(call, space, column, width, row, rows);
      visit(column, width, row, rows);
    }
  }
}

}  // namespace
}  // namespace LIVREC_ISA
}  // namespace livrec
