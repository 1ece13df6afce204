// Hashes of 64-bit numbers, for the CPU kernels; see vectors.h for how it is included.
#pragma once

#include "vectors.h"

namespace livrec {
namespace LIVREC_ISA {
namespace {

LIVREC_INLINE uint64_t rotated(uint64_t value, int bits) {
  return (value << bits) | (value >> (64 - bits));
}

// MurmurHash3's last steps: every bit of the result depends on every bit of the value.
LIVREC_INLINE uint64_t mixed(uint64_t value) {
  value = (value ^ (value >> 33)) * 0xff51afd7ed558ccdull;
  value = (value ^ (value >> 33)) * 0xc4ceb9fe1a85ec53ull;
  return value ^ (value >> 33);
}

// The two halves of MurmurHash3 (x64, 128 bits) of the 16 bytes (key, 0), seed 0, combined by xor.
LIVREC_INLINE uint64_t murmur3(uint64_t key) {
  uint64_t low = rotated(key * 0x87c37b91114253d5ull, 31) * 0x4cf5ad432745937full;
  low = rotated(low, 27) * 5 + 0x52dce729;
  uint64_t high = rotated(0, 31) + low;
  high = high * 5 + 0x38495ab5;
  low ^= 16, high ^= 16;
  low += high, high += low;
  low = mixed(low), high = mixed(high);
  low += high, high += low;
  return low ^ high;
}

}  // namespace
}  // namespace LIVREC_ISA
}  // namespace livrec
