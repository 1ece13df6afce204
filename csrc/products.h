// Products of small matrices that lie in caches, for the CPU kernels; see vectors.h for how it is
// included.
#pragma once

#include "tiles.h"

namespace livrec {
namespace LIVREC_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kWide = 4;  // vectors of an output row at a time, as registers allow
#else
constexpr int kWide = 2;
#endif

// A matrix read number by number: element (m, k) is data[m * row + k * step].
struct Left {
  const float* data;
  int64_t row, step;
  LIVREC_INLINE Left from(int64_t m) const { return {data + m * row, row, step}; }
};

// A term of a product of matrices of floats: a number of the left, a vector of the right.
struct OfFloats {
  static LIVREC_INLINE Floats add(Floats sum, float a, Floats b) { return sum + a * b; }
};

// c [M, V vectors] (+)= a [M, depth] b [depth, V vectors], in M V kChains registers.
template <int M, int V, int kChains = 1, bool kPast = false, typename Term = OfFloats>
LIVREC_INLINE void product_block(Left a, const float* b, int64_t b_row, int64_t depth, float* c,
                                 int64_t c_row, bool add) {
  Floats sums[kChains][M][V];
  for (int s = 0; s < kChains; ++s)
    for (int m = 0; m < M; ++m)
      for (int v = 0; v < V; ++v) sums[s][m][v] = Floats{};
  int64_t k = 0;
  for (; k + kChains <= depth; k += kChains) {
#pragma GCC unroll 4
    for (int s = 0; s < kChains; ++s) {
      Floats row[V];
      for (int v = 0; v < V; ++v) row[v] = load(b + (k + s) * b_row + v * kLanes);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        const float factor = a.data[m * a.row + (k + s) * a.step];
        for (int v = 0; v < V; ++v) sums[s][m][v] = Term::add(sums[s][m][v], factor, row[v]);
      }
    }
  }
  for (; k < depth; ++k)
    for (int m = 0; m < M; ++m)
      for (int v = 0; v < V; ++v)
        sums[0][m][v] = Term::add(sums[0][m][v], a.data[m * a.row + k * a.step],
                                  load(b + k * b_row + v * kLanes));
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < V; ++v) {
      Floats sum = sums[0][m][v];
      for (int s = 1; s < kChains; ++s) sum += sums[s][m][v];
      float* to = c + m * c_row + v * kLanes;
      if (kPast)
        stream(to, sum);
      else
        store(to, add ? load(to) + sum : sum);
    }
}

template <int V, bool kShortChains, bool kPast, typename Term>
inline void product_columns(Left a, int64_t rows, const float* b, int64_t b_row, int64_t depth,
                            float* c, int64_t c_row, bool add) {
  constexpr int kMost = V == 1 ? 8 : kWide == 4 ? 6 : 4;
  constexpr int kChains = V == 1 ? 4 : 2;
  constexpr int kTall = kShortChains ? kMost / 2 : kMost;
  int64_t m = 0;
  for (; m + kTall <= rows; m += kTall)
    product_block<kTall, V, kShortChains ? kChains : 1, kPast, Term>(a.from(m), b, b_row, depth,
                                                                     c + m * c_row, c_row, add);
  for (; m + 2 <= rows; m += 2)
    product_block<2, V, V == 1 || kShortChains ? kChains : 1, kPast, Term>(
        a.from(m), b, b_row, depth, c + m * c_row, c_row, add);
  for (; m < rows; ++m)
    product_block<1, V, kChains, kPast, Term>(a.from(m), b, b_row, depth, c + m * c_row, c_row,
                                              add);
}

// c [rows, columns] (+)= a [rows, depth] b [depth, columns]; columns is a multiple of kLanes. With
// short chains a number is the sum of two or more, each over a part of the depth: they round less,
// and b had better lie in the nearest cache. Past caches, c is written for good, whatever it was:
// its rows must be streamable, and end_stream() must follow.
template <bool kShortChains = false, bool kPast = false, typename Term = OfFloats>
inline void multiply(Left a, int64_t rows, const float* b, int64_t b_row, int64_t depth, float* c,
                     int64_t c_row, int64_t columns, bool add) {
  int64_t n = 0;
  for (; n + kWide * kLanes <= columns; n += kWide * kLanes)
    product_columns<kWide, kShortChains, kPast, Term>(a, rows, b + n, b_row, depth, c + n, c_row,
                                                      add);
  for (; n < columns; n += kLanes)
    product_columns<1, kShortChains, kPast, Term>(a, rows, b + n, b_row, depth, c + n, c_row, add);
}

// Lanes of two vectors, picked by place: those of the second come after those of the first.
#if defined(__clang__)
LIVREC_INLINE Floats pick(Floats a, Floats b, Ints places) {
  Floats to;
  for (int j = 0; j < kLanes; ++j)
    to[j] = places[j] < kLanes ? a[places[j]] : b[places[j] - kLanes];
  return to;
}
#else
LIVREC_INLINE Floats pick(Floats a, Floats b, Ints places) {
  return __builtin_shuffle(a, b, places);
}
#endif

// Places of every vector width for which the processor has an instruction of one step: numbers or
// pairs of them, alternately from both vectors, of the lower or upper half of every four; fours.
#if defined(__AVX512F__)
constexpr Ints kLowerNumbers = {0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29};
constexpr Ints kUpperNumbers = {2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31};
constexpr Ints kLowerPairs = {0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29};
constexpr Ints kUpperPairs = {2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31};
constexpr Ints kLowerFours = {0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27};
constexpr Ints kUpperFours = {4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31};
#elif defined(__AVX2__)
constexpr Ints kLowerNumbers = {0, 8, 1, 9, 4, 12, 5, 13};
constexpr Ints kUpperNumbers = {2, 10, 3, 11, 6, 14, 7, 15};
constexpr Ints kLowerPairs = {0, 1, 8, 9, 4, 5, 12, 13};
constexpr Ints kUpperPairs = {2, 3, 10, 11, 6, 7, 14, 15};
constexpr Ints kLowerFours = {0, 1, 2, 3, 8, 9, 10, 11};
constexpr Ints kUpperFours = {4, 5, 6, 7, 12, 13, 14, 15};
#else
constexpr Ints kLowerNumbers = {0, 4, 1, 5};
constexpr Ints kUpperNumbers = {2, 6, 3, 7};
constexpr Ints kLowerPairs = {0, 1, 4, 5};
constexpr Ints kUpperPairs = {2, 3, 6, 7};
#endif

// Turns kLanes vectors into their transpose, in place.
LIVREC_INLINE void transpose_lanes(Floats* rows) {
  Floats mixed[kLanes];
#pragma GCC unroll 8
  for (int i = 0; i < kLanes; i += 2) {
    mixed[i] = pick(rows[i], rows[i + 1], kLowerNumbers);
    mixed[i + 1] = pick(rows[i], rows[i + 1], kUpperNumbers);
  }
#pragma GCC unroll 8
  for (int i = 0; i < kLanes; i += 4)  // rows[i + j]: columns j, 4 + j ... of rows i .. i + 3
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      rows[i + 2 * j] = pick(mixed[i + j], mixed[i + 2 + j], kLowerPairs);
      rows[i + 2 * j + 1] = pick(mixed[i + j], mixed[i + 2 + j], kUpperPairs);
    }
#if defined(__AVX2__)
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
#if defined(__AVX512F__)
    const Floats even = pick(rows[j], rows[4 + j], kLowerFours),
                 odd = pick(rows[j], rows[4 + j], kUpperFours),
                 more_even = pick(rows[8 + j], rows[12 + j], kLowerFours),
                 more_odd = pick(rows[8 + j], rows[12 + j], kUpperFours);
    rows[j] = pick(even, more_even, kLowerFours);
    rows[4 + j] = pick(odd, more_odd, kLowerFours);
    rows[8 + j] = pick(even, more_even, kUpperFours);
    rows[12 + j] = pick(odd, more_odd, kUpperFours);
#else
    const Floats first = rows[j], second = rows[4 + j];
    rows[j] = pick(first, second, kLowerFours);
    rows[4 + j] = pick(first, second, kUpperFours);
#endif
  }
#endif
}

// Nothing else to do meanwhile.
struct Nothing {
  LIVREC_INLINE void operator()() const {}
};

// out [dim, width] = the transpose of rows [count, dim], where load_at(i, d) gives kLanes numbers
// of row i from d on; columns past count are zeros. Both width and dim are multiples of kLanes.
// What else there is to do meanwhile, between() does after every block of kLanes by kLanes.
template <typename LoadAt, typename Between = Nothing>
LIVREC_INLINE void transpose(const LoadAt& load_at, int64_t count, int64_t dim, float* out,
                             int64_t width, const Between& between = {}) {
  for (int64_t i = 0; i < width; i += kLanes)
    for (int64_t d = 0; d < dim; d += kLanes) {
      Floats block[kLanes];
      if (i + kLanes <= count)
        for (int j = 0; j < kLanes; ++j) block[j] = load_at(i + j, d);
      else
        for (int j = 0; j < kLanes; ++j) block[j] = i + j < count ? load_at(i + j, d) : Floats{};
      transpose_lanes(block);
      for (int j = 0; j < kLanes; ++j) store(out + (d + j) * width + i, block[j]);
      between();
    }
}

}  // namespace
}  // namespace LIVREC_ISA
}  // namespace livrec
