// Vectors of a chosen number of lanes, for kernels whose rows may be shorter than the widest
// vectors of an instruction-set level; see vectors.h for how it is included.
#pragma once

#include "vectors.h"

namespace livrec {
namespace LIVREC_ISA {
namespace {

template <int N>
struct Lanes;
#define LIVREC_LANES(N)                                                             \
  template <>                                                                       \
  struct Lanes<N> {                                                                 \
    typedef float V __attribute__((vector_size(N * 4)));                            \
    typedef int32_t I __attribute__((vector_size(N * 4)));                          \
    typedef float Loose __attribute__((vector_size(N * 4), aligned(4), may_alias)); \
  };
LIVREC_LANES(4)
LIVREC_LANES(8)
LIVREC_LANES(16)
#undef LIVREC_LANES

template <int N>
LIVREC_INLINE typename Lanes<N>::V read(const float* from) {
  return *reinterpret_cast<const typename Lanes<N>::Loose*>(from);
}

template <int N>
LIVREC_INLINE void write(float* to, typename Lanes<N>::V value) {
  *reinterpret_cast<typename Lanes<N>::Loose*>(to) = value;
}

// x 2^n for whole n from -151 to 127, in two steps where there is no instruction for it, as 2^n
// itself may be too small.
template <int N>
LIVREC_INLINE typename Lanes<N>::V raise(typename Lanes<N>::V x, typename Lanes<N>::V n) {
  typedef typename Lanes<N>::I I;
  const I power = __builtin_convertvector(n, I), half = power >> 1;
  const I first = (half + 127) << 23, second = (power - half + 127) << 23;
  typename Lanes<N>::V scales[2];
  __builtin_memcpy(&scales[0], &first, sizeof(first));
  __builtin_memcpy(&scales[1], &second, sizeof(second));
  return x * scales[0] * scales[1];
}

#if defined(__AVX512F__)
template <>
LIVREC_INLINE Lanes<16>::V raise<16>(Lanes<16>::V x, Lanes<16>::V n) {
  return __builtin_ia32_scalefps512_mask(x, n, x, 0xffff, 4);
}
#endif

// exp(x) for x up to 88, to about one unit in the last place; subnormal below 2^-126, 0 below
// 2^-150. 2^n times a polynomial of what is left, |r| <= ln(2) / 2 (Cephes' coefficients).
template <int N>
LIVREC_INLINE typename Lanes<N>::V exponential(typename Lanes<N>::V x) {
  typedef typename Lanes<N>::V V;
  const V least = V{} - 104.5f, magic = V{} + 12582912.0f;  // adding it rounds to an integer
  x = least > x ? least : x;                                // NaN stays one
  const V n = (x * 1.44269504088896341f + magic) - magic;
  V r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  V y = r * 1.9875691500e-4f + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * (r * r) + r + 1.0f;
  return raise<N>(y, n);
}

LIVREC_INLINE float exp_of(float x) { return exponential<kLanes>(Floats{} + x)[0]; }

// What exponentials are taken less: where nothing counts, the greatest logit is -inf.
LIVREC_INLINE float shift_of(float peak) { return peak == -kInfinity ? 0.0f : peak; }

// A bit for each lane that is true.
template <int N>
LIVREC_INLINE uint32_t bits_of_lanes(typename Lanes<N>::I lanes) {
#if defined(__SSE2__)
  if constexpr (N == 4)
    return static_cast<uint32_t>(
        __builtin_ia32_movmskps(reinterpret_cast<typename Lanes<N>::V>(lanes)));
#endif
#if defined(__AVX2__)
  if constexpr (N == 8)
    return static_cast<uint32_t>(
        __builtin_ia32_movmskps256(reinterpret_cast<typename Lanes<N>::V>(lanes)));
#endif
#if defined(__AVX512DQ__)
  if constexpr (N == 16) return __builtin_ia32_cvtd2mask512(lanes);
#endif
  uint32_t bits = 0;
  for (int j = 0; j < N; ++j) bits |= lanes[j] ? 1u << j : 0u;
  return bits;
}

template <int N>
LIVREC_INLINE typename Lanes<N>::V greater(typename Lanes<N>::V a, typename Lanes<N>::V b) {
  return a > b ? a : b;
}

}  // namespace
}  // namespace LIVREC_ISA
}  // namespace livrec
