// Vectors as wide as the instruction-set level has them, for the CPU kernels. Everything here has
// internal linkage: the same text becomes other code at every level.
#pragma once

#include <cstddef>
#include <cstdint>

#if !defined(LIVREC_ISA)
#error "for CPU kernels, compiled once per instruction-set level with -DLIVREC_ISA=<level>"
#endif

#define LIVREC_INLINE inline __attribute__((always_inline))

namespace livrec {
namespace LIVREC_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
constexpr float kInfinity = __builtin_inff();

typedef float Floats __attribute__((vector_size(kLanes * 4)));
typedef int32_t Ints __attribute__((vector_size(kLanes * 4)));
typedef double Doubles __attribute__((vector_size(kLanes * 8)));  // as many lanes as Floats

// Vectors wherever they lie in memory.
typedef float LooseFloats __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef double LooseDoubles __attribute__((vector_size(kLanes * 8), aligned(8), may_alias));

LIVREC_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

LIVREC_INLINE Floats load(const float* from) { return *reinterpret_cast<const LooseFloats*>(from); }
LIVREC_INLINE void store(float* to, Floats value) { *reinterpret_cast<LooseFloats*>(to) = value; }

template <int N>
struct Known {
  static constexpr int value = N;
};

// Calls go with the number of whole vectors in a row of `size` numbers where the compiler shall
// know it, else with 0.
template <typename Go>
LIVREC_INLINE void by_vectors(int64_t size, const Go& go) {
  switch (size % kLanes == 0 ? size / kLanes : 0) {
    case 1:
      return go(Known<1>());
    case 2:
      return go(Known<2>());
    case 4:
      return go(Known<4>());
    case 8:
      return go(Known<8>());
    default:
      return go(Known<0>());
  }
}

// Asks memory for what will be read, as far as the second cache: the first keeps track of few lines
// on their way, and the processor waits where it can take no more. Always inline, as must be what
// only calls it: GCC takes a function that does nothing else for one without effect, and drops its
// calls.
LIVREC_INLINE void fetch(const void* from, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64)
    __builtin_prefetch(static_cast<const char*>(from) + at, 0, 2);
}

// Copies that go past the caches, in whole vectors; end_stream() makes them visible to others.
#if defined(__x86_64__)
typedef long long Line __attribute__((vector_size(kLanes * 4)));
typedef long long LooseLine __attribute__((vector_size(kLanes * 4), aligned(1), may_alias));

LIVREC_INLINE bool streamable(const void* to, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(to) % sizeof(Line) == 0 && bytes % sizeof(Line) == 0;
}

LIVREC_INLINE void stream(const char* from, int64_t bytes, char* to) {
  for (int64_t at = 0; at < bytes; at += static_cast<int64_t>(sizeof(Line))) {
    const Line line = *reinterpret_cast<const LooseLine*>(from + at);
#if defined(__AVX512F__)
    __builtin_ia32_movntdq512(reinterpret_cast<Line*>(to + at), line);
#elif defined(__AVX2__)
    __builtin_ia32_movntdq256(reinterpret_cast<Line*>(to + at), line);
#else
    __builtin_ia32_movntdq(reinterpret_cast<Line*>(to + at), line);
#endif
  }
}

LIVREC_INLINE void stream(float* to, Floats value) {
  stream(reinterpret_cast<const char*>(&value), sizeof(value), reinterpret_cast<char*>(to));
}

LIVREC_INLINE void end_stream() { __builtin_ia32_sfence(); }
#else
LIVREC_INLINE bool streamable(const void*, int64_t) { return false; }
LIVREC_INLINE void stream(const char*, int64_t, char*) {}
LIVREC_INLINE void stream(float*, Floats) {}
LIVREC_INLINE void end_stream() {}
#endif

// In so many words, so that the compiler can compute with them.
LIVREC_INLINE Ints lane_numbers() {
#if defined(__AVX512F__)
  return Ints{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#elif defined(__AVX2__)
  return Ints{0, 1, 2, 3, 4, 5, 6, 7};
#else
  return Ints{0, 1, 2, 3};
#endif
}

// Lane j of the result is lane j + step of `from`, around the end.
template <typename Vector>
LIVREC_INLINE Vector turn(Vector from, int step) {
#if defined(__clang__)
  Vector to;
  for (int j = 0; j < kLanes; ++j) to[j] = from[(j + step) % kLanes];
  return to;
#else
  return __builtin_shuffle(from, (lane_numbers() + step) & (kLanes - 1));
#endif
}

LIVREC_INLINE float sum_of(Floats lanes) {
#pragma GCC unroll 4
  for (int step = kLanes / 2; step > 0; step /= 2) lanes += turn(lanes, step);
  return lanes[0];
}

// Adds up lanes by halves of groups of kGroup: first the groups of a, then those of b.
template <int kGroup>
LIVREC_INLINE Floats merge(Floats a, Floats b) {
  constexpr int kHalf = kGroup / 2;
#if defined(__clang__)
  Floats low, high;
  for (int j = 0; j < kLanes; ++j) {
    const int at = j / kHalf * kGroup + j % kHalf;
    low[j] = at < kLanes ? a[at] : b[at - kLanes];
    high[j] = at < kLanes ? a[at + kHalf] : b[at + kHalf - kLanes];
  }
  return low + high;
#else
  const Ints lanes = lane_numbers(), inside = lanes & (kHalf - 1);
  const Ints at = (lanes - inside) * 2 + inside;
  return __builtin_shuffle(a, b, at) + __builtin_shuffle(a, b, at + kHalf);
#endif
}

// The groups of kGroup lanes of kCount vectors added up, to groups of kGroup / kCount lanes.
template <int kCount, int kGroup = kLanes>
LIVREC_INLINE Floats merged(const Floats* x) {
  if constexpr (kCount == 1)
    return *x;
  else
    return merge<2 * kGroup / kCount>(merged<kCount / 2, kGroup>(x),
                                      merged<kCount / 2, kGroup>(x + kCount / 2));
}

template <int kGroup>
LIVREC_INLINE Floats folded(Floats x) {
  if constexpr (kGroup == 1)
    return x;
  else
    return folded<kGroup / 2>(merge<kGroup>(x, x));
}

// The sums of kCount vectors' lanes, at most kLanes of them, in the first lanes.
template <int kCount>
LIVREC_INLINE Floats sums_of(const Floats* x) {
  return folded<kLanes / kCount>(merged<kCount>(x));
}

LIVREC_INLINE float greatest_of(Floats lanes) {
#pragma GCC unroll 4
  for (int step = kLanes / 2; step > 0; step /= 2) {
    const Floats other = turn(lanes, step);
    lanes = other > lanes ? other : lanes;
  }
  return lanes[0];
}

}  // namespace
}  // namespace LIVREC_ISA
}  // namespace livrec
