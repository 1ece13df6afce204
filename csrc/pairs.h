// Numbers of bfloat16 in words of two, whose products with another two the processor adds up at
// once, where it can; see vectors.h for how it is included.
#pragma once

#include "halves.h"
#include "products.h"

#if defined(__AVX512BF16__)
#define LIVREC_PAIRS 1
#include <immintrin.h>

namespace livrec {
namespace LIVREC_ISA {
namespace {

// A term of a product of matrices whose numbers are words of two along the depth.
struct OfPairs {
  static LIVREC_INLINE Floats add(Floats sum, float a, Floats b) {
    const Ints pairs = Ints{} + same_bits<int32_t>(a);  // as a float it may be no number
    return _mm512_dpbf16_ps(sum, same_bits<__m512bh>(pairs), same_bits<__m512bh>(b));
  }
};

// By itself: among the rest of a pass its loops would have too few registers.
template <bool kShortChains>
__attribute__((noinline)) void multiply_pairs(Left a, int64_t rows, const float* b, int64_t b_row,
                                              int64_t depth, float* c, int64_t c_row,
                                              int64_t columns, bool add) {
  multiply<kShortChains, false, OfPairs>(a, rows, b, b_row, depth, c, c_row, columns, add);
}

}  // namespace
}  // namespace LIVREC_ISA
}  // namespace livrec
#endif
