// How the kernels over blocks of columns (code_attention.h) are chosen by the block's shape; see
// vectors.h for how it is included.
#pragma once

#include "code_attention.h"
#include "tiles.h"

namespace livrec {
namespace LIVREC_ISA {
namespace {

// Calls visit.run<lanes, vectors>() for the block's shape.
template <typename Visit>
LIVREC_INLINE void shaped(const CodeShape& shape, const Visit& visit) {
  if (shape.lanes == 4 && shape.vectors == 1) return visit.template run<4, 1>();
#if defined(__AVX2__)
  if (shape.lanes == 8 && shape.vectors == 1) return visit.template run<8, 1>();
#endif
#if defined(__AVX512F__)
  if (shape.vectors == 1) return visit.template run<16, 1>();
#endif
  if (shape.vectors == 2) return visit.template run<kLanes, 2>();
  return visit.template run<kLanes, 4>();
}

// The head of a column; columns past the last count as the last.
LIVREC_INLINE int64_t head_of(const CodeBlock& block, int64_t column) {
  const int64_t last = block.heads * block.candidates - 1;
  return least(block.first + column, last) / block.candidates;
}

// An item's bias for each column of the block.
template <int W>
LIVREC_INLINE void spread(const CodeBlock& block, const int32_t* heads, int64_t item, float* to) {
  const float* from = block.factors + item * block.bias_heads;
  for (int w = 0; w < W; ++w) to[w] = from[heads[w]];
}

template <int W>
LIVREC_INLINE void bias_heads_of(const CodeBlock& block, int32_t* heads) {
  for (int w = 0; w < W; ++w)
    heads[w] = block.bias_heads > 1 ? static_cast<int32_t>(head_of(block, w)) : 0;
}

// Where the rows of an item begin in tables, and in sums of their shape. They are found before any
// sum is written, after which all that lies in memory would be read again. kFields: 0 where the
// number is known at run time only.
template <int kFields, int kSize>
struct Places {
  Places(const uint32_t* slots, int64_t items, int64_t item) {
    for (int f = 0; f < kFields; ++f) own[f] = slots[f * items + item];
  }
  int64_t operator[](int64_t field) const { return static_cast<int64_t>(own[field]) * kSize; }
  uint32_t own[kFields];  // multiplied when used: together, the compiler would do it in vectors
};

template <int kSize>
struct Places<0, kSize> {
  Places(const uint32_t* slots, int64_t count, int64_t item) : own(slots + item), items(count) {}
  int64_t operator[](int64_t field) const {
    return static_cast<int64_t>(own[field * items]) * kSize;
  }
  const uint32_t* own;
  int64_t items;
};

// The terms of an item: products of its rows' exponentials, or, where exact, the exponential of
// their sum less the peak.
template <int N, int V, int kFields, bool kExact, int kParts>
struct Terms {
  typedef typename Lanes<N>::V Vector;
  static constexpr int kWidth = N * V;
  typedef Places<kFields, kParts * kWidth> Rows;

  explicit Terms(const CodeBlock& given)
      : block(given),
        tables(given.tables),
        slots(given.rows->slots),
        fields(kFields ? kFields : given.rows->fields),
        items(given.rows->items) {
    bias_heads_of<kWidth>(block, heads);
  }

  LIVREC_INLINE Rows rows_of(int64_t item) const { return Rows(slots, items, item); }

  // Logits where exact (without the peak), else terms.
  LIVREC_INLINE void combine(int64_t item, const Rows& rows, Vector* p) const {
    for (int v = 0; v < V; ++v) p[v] = read<N>(tables + rows[0] + v * N);
    for (int64_t f = 1; f < fields; ++f) {
      const float* row = tables + rows[f];
      for (int v = 0; v < V; ++v)
        p[v] = kExact ? p[v] + read<N>(row + v * N) : p[v] * read<N>(row + v * N);
    }
    if (!block.bias_heads) return;
    float bias[kWidth];
    spread<kWidth>(block, heads, item, bias);
    for (int v = 0; v < V; ++v)
      p[v] = kExact ? p[v] + read<N>(bias + v * N) : p[v] * read<N>(bias + v * N);
  }

  LIVREC_INLINE void weigh(int64_t item, const Rows& rows, Vector* p) const {
    combine(item, rows, p);
    if (!kExact) return;
    for (int v = 0; v < V; ++v) p[v] = exponential<N>(p[v] - read<N>(block.peaks + v * N));
  }

  // D: the gradient of the terms.
  LIVREC_INLINE void slope(const Rows& rows, Vector* g) const {
    for (int v = 0; v < V; ++v) g[v] = read<N>(tables + rows[0] + kWidth + v * N);
    for (int64_t f = 1; f < fields; ++f) {
      const float* row = tables + rows[f] + kWidth;
      for (int v = 0; v < V; ++v) g[v] += read<N>(row + v * N);
    }
  }

  const CodeBlock& block;
  const float* tables;
  const uint32_t* slots;
  const int64_t fields, items;
  int32_t heads[kWidth];
};

}  // namespace
}  // namespace LIVREC_ISA
}  // namespace livrec
