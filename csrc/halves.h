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

}  // namespace
}  // namespace LIVREC_ISA
}  // namespace livrec
