// Numbers of 16 bits to float32 and back, for the CPU kernels; see vectors.h for how it is
// included.
#pragma once

#include <cstdint>

#include "vectors.h"

namespace livrec {
namespace LIVREC_ISA {
namespace {

LIVREC_INLINE float float_of(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

LIVREC_INLINE uint32_t bits_of(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits;
}

// Below 0x400 a multiple of 2^-24, from 0x7c00 infinities and NaNs, between them normal.
LIVREC_INLINE float float_of_f16(uint16_t half) {
  const uint32_t size = half & 0x7fffu, sign = (half & 0x8000u) << 16;
  const float small = static_cast<float>(static_cast<int32_t>(size)) * 0x1p-24f;
  const uint32_t large = (size << 13) + ((size < 0x7c00 ? 112u : 224u) << 23);
  return size < 0x400 ? (sign ? -small : small) : float_of(sign | large);
}

LIVREC_INLINE float float_of_bf16(uint16_t half) {
  return float_of(static_cast<uint32_t>(half) << 16);
}

// To the nearest, ties to even; a NaN stays one.
LIVREC_INLINE uint16_t bf16_of(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x40u : rounded);
}

// The same. Below 2^-14 adding 0.5 leaves just the bits that a subnormal half has.
LIVREC_INLINE uint16_t f16_of(float value) {
  const uint32_t bits = bits_of(value), sign = (bits >> 16) & 0x8000u, size = bits & 0x7fffffffu;
  const uint32_t small = bits_of(float_of(size) + 0.5f) - bits_of(0.5f);
  const uint32_t normal = (size - (112u << 23) + 0xfffu + ((size >> 13) & 1u)) >> 13;
  const uint32_t half = size > 0x7f800000u    ? 0x7e00u
                        : size >= 0x477ff000u ? 0x7c00u
                        : size < 0x38800000u  ? small
                                              : normal;
  return static_cast<uint16_t>(sign | half);
}

// The same for whole vectors.
typedef uint16_t Halves __attribute__((vector_size(kLanes * 2)));
typedef uint16_t LooseHalves __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));
typedef uint32_t Bits __attribute__((vector_size(kLanes * 4)));
typedef short HalfLanes __attribute__((vector_size(kLanes * 2)));  // as the builtins have them

template <typename To, typename From>
LIVREC_INLINE To same_bits(From from) {
  To to;
  static_assert(sizeof(to) == sizeof(from), "");
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

LIVREC_INLINE Floats widen_bf16(Halves halves) {
  return same_bits<Floats>(__builtin_convertvector(halves, Bits) << 16);
}

LIVREC_INLINE Floats widen_f16(Halves halves) {
#if defined(__AVX512F__)
  return __builtin_ia32_vcvtph2ps512_mask(same_bits<HalfLanes>(halves), Floats{}, 0xffff, 4);
#elif defined(__F16C__)
  return __builtin_ia32_vcvtph2ps256(same_bits<HalfLanes>(halves));
#else
  Floats wide;
  for (int j = 0; j < kLanes; ++j) wide[j] = float_of_f16(halves[j]);
  return wide;
#endif
}

LIVREC_INLINE Halves narrow_bf16(Floats wide) {
  const Bits bits = same_bits<Bits>(wide);
  const Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16, quiet = (bits >> 16) | 0x40u;
  return __builtin_convertvector((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded, Halves);
}

LIVREC_INLINE Halves narrow_f16(Floats wide) {
#if defined(__AVX512F__)
  return same_bits<Halves>(__builtin_ia32_vcvtps2ph512_mask(wide, 0, HalfLanes{}, 0xffff));
#elif defined(__F16C__)
  return same_bits<Halves>(__builtin_ia32_vcvtps2ph256(wide, 0));
#else
  Halves halves;
  for (int j = 0; j < kLanes; ++j) halves[j] = f16_of(wide[j]);
  return halves;
#endif
}

inline void widen_row(const uint16_t* row, bool is_f16, int64_t count, float* out) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const Halves halves = *reinterpret_cast<const LooseHalves*>(row + i);
    store(out + i, is_f16 ? widen_f16(halves) : widen_bf16(halves));
  }
  for (; i < count; ++i) out[i] = is_f16 ? float_of_f16(row[i]) : float_of_bf16(row[i]);
}

inline void narrow_row(const float* row, bool to_f16, int64_t count, uint16_t* out) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const Floats wide = load(row + i);
    *reinterpret_cast<LooseHalves*>(out + i) = to_f16 ? narrow_f16(wide) : narrow_bf16(wide);
  }
  for (; i < count; ++i) out[i] = to_f16 ? f16_of(row[i]) : bf16_of(row[i]);
}

// Row `at` of x [rows, dim] in float32, with zeros up to `padded`.
template <typename Type>
inline void pad_row(const void* x, Type type, int64_t at, int64_t dim, int64_t padded, float* out) {
  const auto* floats = static_cast<const float*>(x) + at * dim;
  if (type == Type::f32)
    for (int64_t d = 0; d < dim; ++d) out[d] = floats[d];
  else
    widen_row(static_cast<const uint16_t*>(x) + at * dim, type == Type::f16, dim, out);
  for (int64_t d = dim; d < padded; ++d) out[d] = 0.0f;
}

// x [count, padded] to [count, dim] of `type`.
template <typename Type>
inline void narrow_padded(const float* x, Type type, int64_t count, int64_t dim, int64_t padded,
                          void* out) {
  auto* floats = static_cast<float*>(out);
  auto* halves = static_cast<uint16_t*>(out);
  for (int64_t i = 0; i < count; ++i, x += padded, floats += dim, halves += dim) {
    if (type == Type::f32)
      for (int64_t d = 0; d < dim; ++d) floats[d] = x[d];
    else
      narrow_row(x, type == Type::f16, dim, halves);
  }
}

}  // namespace
}  // namespace LIVREC_ISA
}  // namespace livrec
