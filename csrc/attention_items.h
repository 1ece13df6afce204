// How the numbers of items are multiplied in attention across candidates, by their type: see
// attention_across.h.
#pragma once

#include <type_traits>

#include "attention_pairs.h"

namespace livrec {
namespace LIVREC_ISA {
namespace {

#if defined(__AVX512F__)
#define LIVREC_ACROSS 1

template <int N>
using Number = std::integral_constant<int, N>;

typedef float LooseWord __attribute__((aligned(2), may_alias));

// What the weights of a tile are multiplied as.
struct Weights {
  float *of_items, *of_rows;  // [count / kStep, W] and [count, ceil(W / kStep)]
};

LIVREC_INLINE void put_down_line(float* to, Floats x, bool past_caches) {
  if (past_caches)
    stream(to, x);
  else
    store(to, x);
}

// Keys and values in float32. A number of one item or row is multiplied at a time.
struct FloatItems {
  typedef float Type;
  static constexpr int kStep = 1;

  template <int W>
  static LIVREC_INLINE typename Lanes<W>::V add(typename Lanes<W>::V sum, float a,
                                                typename Lanes<W>::V b) {
    return sum + a * b;
  }
  static LIVREC_INLINE Floats load_items(const float* row, int64_t, bool) { return load(row); }
  // Vectors of numbers, one after the other.
  template <int kParts>
  static LIVREC_INLINE void put_line(const Floats* x, bool past_caches, float* to) {
    put_down_line(to, x[0], past_caches);
  }

  // Products of the next kLanes items, of which `count` are there, with words y.
  template <typename Count>
  static LIVREC_INLINE Floats dots(const float* row, int64_t stride, Count count, int64_t dim,
                                   const float* y) {
    Floats found[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i, row += stride) {
      found[i] = Floats{};
      for (int64_t d = 0; i < count && d < dim; d += kLanes)
        found[i] += load(row + d) * load(y + d);
    }
    return merged<kLanes>(found);
  }
  static LIVREC_INLINE Floats weight_of(Floats s, Floats shift) {
    return exponential<kLanes>(s - shift);
  }
  static LIVREC_INLINE Weights weights_in(float* words, int) { return {words, words}; }
  template <int W>
  static LIVREC_INLINE void put(const Floats* w, int64_t i, const Weights& to) {
    store(to.of_items + i, w[0]);
  }
};

#if defined(LIVREC_PAIRS)
constexpr float kLog2E = 1.44269504088896341f;

// 2^x for x up to 127 to four parts in a million, far less than rounding to bfloat16 changes; 0
// below 2^-125, and NaN stays one.
LIVREC_INLINE Floats power_of_two(Floats x) {
  const Floats magic = Floats{} - 12582912.0f;  // taking it away rounds to an integer
  const Floats shifted = x - magic, r = x - (shifted + magic);
  Floats y = r * 9.570104070007801e-3f + 5.591786652803421e-2f;
  y = y * r + 0.240247443318367f;
  y = y * r + 0.6931217908859253f;
  y = y * r + 0.9999992847442627f;
  const Ints scaled = same_bits<Ints>(y) + (same_bits<Ints>(shifted) << 23);
  return same_bits<Floats>(x < -125.0f ? Ints{} : scaled);
}

// In bfloat16, of which words of two are multiplied: numbers of an item, items, or rows. Weights
// are rounded to it, which changes no more than rounding the result does.
struct PairItems {
  typedef uint16_t Type;
  static constexpr int kStep = 2;

  template <int W>
  static LIVREC_INLINE typename Lanes<W>::V add(typename Lanes<W>::V sum, float a,
                                                typename Lanes<W>::V b) {
    typedef typename Lanes<W>::I I;
    const I words = I{} + same_bits<int32_t>(a);  // as a float it may be no number
    if constexpr (W == 4)
      return _mm_dpbf16_ps(sum, same_bits<__m128bh>(words), same_bits<__m128bh>(b));
    else if constexpr (W == 8)
      return _mm256_dpbf16_ps(sum, same_bits<__m256bh>(words), same_bits<__m256bh>(b));
    else
      return _mm512_dpbf16_ps(sum, same_bits<__m512bh>(words), same_bits<__m512bh>(b));
  }
  // Words of two items, or of one and zeros.
  static LIVREC_INLINE Floats load_items(const uint16_t* row, int64_t stride, bool two) {
    const Halves second = two ? load_halves(row + stride) : Halves{};
    return same_bits<Floats>(interleaved(same_bits<TwoHalves>(both(load_halves(row), second))));
  }
  template <int kParts>
  static LIVREC_INLINE void put_line(const Floats* x, bool past_caches, uint16_t* to) {
    if constexpr (kParts == 1) {
      store_pairs(reinterpret_cast<float*>(to), x[0]);
    } else {
      const auto line =
          same_bits<Floats>(_mm512_cvtne2ps_pbh(same_bits<__m512>(x[1]), same_bits<__m512>(x[0])));
      put_down_line(reinterpret_cast<float*>(to), line, past_caches);
    }
  }

  // Half a vector of each of two items at a time.
  template <typename Count>
  static LIVREC_INLINE Floats dots(const uint16_t* row, int64_t stride, Count count, int64_t dim,
                                   const float* y) {
    Floats found[kLanes / 2];
#pragma GCC unroll 8
    for (int i = 0; i < kLanes; i += 2, row += 2 * stride) {
      found[i / 2] = Floats{};
      const float* words = y;
      for (int64_t d = 0; i < count && d < dim; d += kLanes, words += kLanes / 2) {
        const Halves first = load_halves(row + d),
                     second = i + 1 < count ? load_halves(row + stride + d) : Halves{};
        const Halves asked = *reinterpret_cast<const LooseHalves*>(words);
        found[i / 2] = same_bits<Floats>(_mm512_dpbf16_ps(same_bits<__m512>(found[i / 2]),
                                                          same_bits<__m512bh>(both(first, second)),
                                                          same_bits<__m512bh>(both(asked, asked))));
      }
    }
    return merged<kLanes / 2, kLanes / 2>(found);
  }
  static LIVREC_INLINE Floats weight_of(Floats s, Floats shift) {
    return power_of_two(s * kLog2E - shift * kLog2E);
  }
  // Words of both kinds, of kTile times `width` numbers.
  static LIVREC_INLINE Weights weights_in(float* words, int width) {
    return {words, words + kTile * width};
  }
  // Weights i and on of [count, W], two vectors of them.
  template <int W>
  static LIVREC_INLINE void put(const Floats* w, int64_t i, const Weights& to) {
    TwoHalves places;  // numbers of two items alternately, items being W apart
    for (int j = 0; j < 2 * kLanes; ++j)
      places[j] = static_cast<uint16_t>(j / (2 * W) * 2 * W + j % (2 * W) / 2 + j % 2 * W);
    const auto halves =
        same_bits<TwoHalves>(_mm512_cvtne2ps_pbh(same_bits<__m512>(w[1]), same_bits<__m512>(w[0])));
    if constexpr (W > 1)
      store(to.of_rows + i / 2, same_bits<Floats>(halves));
    else  // one row has nothing to make words with
      store(to.of_rows + i, w[0]), store(to.of_rows + i + kLanes, w[1]);
    store(to.of_items + i / 2, same_bits<Floats>(picked(halves, places)));
  }
};
#endif

#endif

}  // namespace
}  // namespace LIVREC_ISA
}  // namespace livrec
