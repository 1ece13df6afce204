// Tiles of histories in bfloat16 and their products, in words of two numbers, for the CPU kernels
// of target attention; see vectors.h for how it is included.
//
// Logits and D are sums of exact products, as in float32. Weights, and dS, are rounded to bfloat16
// before they are multiplied with what is given in it, which changes an output or gradient by no
// more than its own rounding does; Z is the sum of the weights before.
#pragma once

#include "attention_tiles.h"
#include "pairs.h"

namespace livrec {
namespace LIVREC_ISA {
namespace {

#if defined(LIVREC_PAIRS)

typedef uint16_t TwoHalves __attribute__((vector_size(kLanes * 4)));

// Whether logits and D can be computed by words.
LIVREC_INLINE bool in_pairs(const AttentionPiece& piece) {
  return piece.type == TableType::bf16 && piece.dim == piece.padded &&
         piece.value_dim == piece.value_padded &&
         (piece.scale == 0.0f || (piece.scale < 0x1p60f && piece.scale > 0x1p-60f));
}

// One after the other.
LIVREC_INLINE Floats both(Halves first, Halves second) {
#if defined(__clang__) || __GNUC__ >= 12
  return same_bits<Floats>(__builtin_shufflevector(first, second, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10,
                                                   11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22,
                                                   23, 24, 25, 26, 27, 28, 29, 30, 31));
#else
  struct {
    Halves first, second;
  } two{first, second};
  return same_bits<Floats>(two);
#endif
}

LIVREC_INLINE Halves halves_at(const Stretch& x, int64_t i, int64_t d) {
  return i < x.count ? load_halves(x.halves(i) + d) : Halves{};
}

// Rows of eight words, of items j and 8 + j each, to words j of sixteen items.
LIVREC_INLINE void transpose_words(Floats* rows) {
  constexpr Ints kFirst = {0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27};
  Floats mixed[8], four[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    mixed[i] = pick(rows[i], rows[i + 1], kLowerNumbers);
    mixed[i + 1] = pick(rows[i], rows[i + 1], kUpperNumbers);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      four[i + 2 * j] = pick(mixed[i + j], mixed[i + 2 + j], kLowerPairs);
      four[i + 2 * j + 1] = pick(mixed[i + j], mixed[i + 2 + j], kUpperPairs);
    }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    rows[j] = pick(four[j], four[4 + j], kFirst);
    rows[4 + j] = pick(four[j], four[4 + j], kFirst + 4);
  }
}

// Item after item to word after word: [dim / 2, kTile].
inline void turn_pairs(const Stretch& x, float* out, Ahead& ahead) {
  for (int64_t i = 0; i < kTile; i += kLanes)
    for (int64_t d = 0; d < x.dim; d += kLanes) {
      Floats rows[8];
      if (i + kLanes <= x.count)
        for (int j = 0; j < 8; ++j)
          rows[j] = both(load_halves(x.halves(i + j) + d), load_halves(x.halves(i + 8 + j) + d));
      else
        for (int j = 0; j < 8; ++j)
          rows[j] = both(halves_at(x, i + j, d), halves_at(x, i + 8 + j, d));
      transpose_words(rows);
      for (int j = 0; j < 8; ++j) store(out + (d / 2 + j) * kTile + i, rows[j]);
      ahead.ask(kLinesPerTurn);
    }
}

LIVREC_INLINE TwoHalves picked(TwoHalves x, TwoHalves places) {
#if defined(__clang__)
  TwoHalves to;
  for (int j = 0; j < 2 * kLanes; ++j) to[j] = x[places[j]];
  return to;
#else
  return __builtin_shuffle(x, places);
#endif
}

// Numbers of the first half and of the second, alternately.
LIVREC_INLINE TwoHalves interleaved(TwoHalves x) {
  TwoHalves places;
  for (int j = 0; j < 2 * kLanes; ++j) places[j] = static_cast<uint16_t>(j / 2 + j % 2 * kLanes);
  return picked(x, places);
}

// Words of one number of two items: [half of the items, dim].
inline void pair_items(const Stretch& x, float* out) {
  for (int64_t i = 0; i < x.count; i += 2, out += x.dim)
    for (int64_t d = 0; d < x.dim; d += kLanes) {
      const auto two =
          same_bits<TwoHalves>(both(load_halves(x.halves(i) + d), halves_at(x, i + 1, d)));
      store(out + d, same_bits<Floats>(interleaved(two)));
    }
}

// Rows as words: of q without its scale, unless that leaves q in bfloat16. Returns what the
// products of the words are still to be multiplied with.
inline float pair_rows(const float* x, int64_t rows, int64_t padded, float scale, float* out) {
  const bool exact = (bits_of(scale) & 0x7fffffu) == 0;  // a power of two, or zero
  const float factor = exact ? 1.0f : 1.0f / scale;
  for (int64_t i = 0; i < rows * padded; i += kLanes)
    *reinterpret_cast<LooseHalves*>(reinterpret_cast<uint16_t*>(out) + i) =
        narrow_bf16(load(x + i) * factor);
  return exact ? 1.0f : scale;
}

LIVREC_INLINE void store_pairs(float* to, Floats first) {
  *reinterpret_cast<LooseHalves*>(to) =
      same_bits<Halves>(_mm512_cvtneps_pbh(same_bits<__m512>(first)));
}

// x [groups x rows, padded] times factor as words of two rows: [groups, half of the rows, padded].
inline void pair_columns(const float* x, int64_t groups, int64_t rows, int64_t padded, float factor,
                         float* out) {
  for (int64_t g = 0; g < groups; ++g, x += rows * padded)
    for (int64_t r = 0; r < rows; r += 2, out += padded)
      for (int64_t d = 0; d < padded; d += kLanes) {
        const float* from = x + r * padded + d;
        const Halves first = narrow_bf16(load(from) * factor);
        const Halves second = r + 1 < rows ? narrow_bf16(load(from + padded) * factor) : Halves{};
        store(out + d, same_bits<Floats>(interleaved(same_bits<TwoHalves>(both(first, second)))));
      }
}

// x [rows, kTile] to words of two items, in the first half of each row, and of two rows:
// [half of the rows, kTile]. Items past `count` are zeros.
inline void pair_slopes(float* x, int64_t rows, int64_t count, float* two_rows) {
  for (int64_t r = 0; r < rows; r += 2, two_rows += kTile) {
    float *first = x + r * kTile, *second = r + 1 < rows ? first + kTile : nullptr;
    for (int64_t t = count; t < kTile; ++t) {
      first[t] = 0.0f;
      if (second != nullptr) second[t] = 0.0f;
    }
    for (int64_t t = 0; t < kTile; t += kLanes) {
      const Floats more = second != nullptr ? load(second + t) : Floats{};
      const auto both_rows = same_bits<TwoHalves>(
          _mm512_cvtne2ps_pbh(same_bits<__m512>(more), same_bits<__m512>(load(first + t))));
      Halves apart[2];
      __builtin_memcpy(apart, &both_rows, sizeof(apart));
      *reinterpret_cast<LooseHalves*>(first + t / 2) = apart[0];
      if (second != nullptr) *reinterpret_cast<LooseHalves*>(second + t / 2) = apart[1];
      store(two_rows + t, same_bits<Floats>(interleaved(both_rows)));
    }
  }
}

// Logits of rows [first, first + rows) of q in words, times factor: s [rows, kTile].
inline void pair_logits(const AttentionPiece& piece, const float* q, float factor, int64_t first,
                        int64_t rows, const float* turned, const float* bias, float* s) {
  const int64_t words = piece.padded / 2;
  multiply_pairs<true>({q + first * words, words, 1}, rows, turned, kTile, words, s, kTile, kTile,
                       false);
  if (factor != 1.0f)
    for (int64_t t = 0; t < rows * kTile; t += kLanes) store(s + t, load(s + t) * factor);
  add_bias(piece, first, rows, bias, s);
}

#endif

}  // namespace
}  // namespace LIVREC_ISA
}  // namespace livrec
