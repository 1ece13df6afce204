// Products of matrices of bfloat16 in tiles of 16 by 16 words, by AMX or as AMX does them; see
// vectors.h for how it is included. A word holds two numbers that are neighbours along the depth.
#pragma once

#include "halves.h"

namespace livrec {
namespace LIVREC_ISA {
namespace {

constexpr int64_t kTileSide = 16;  // rows of a tile, and words of a row

#if defined(__AMX_BF16__)
// Eight tiles of this thread, set up as long as this lives, if they are used.
class MatrixTiles {
 public:
  explicit MatrixTiles(bool used) : used_(used) {
    if (!used) return;
    Setup setup{};
    setup.palette = 1;
    for (int t = 0; t < 8; ++t) setup.row_bytes[t] = 64, setup.rows[t] = kTileSide;
    asm volatile("ldtilecfg %0" ::"m"(setup));
  }
  ~MatrixTiles() {
    if (used_) asm volatile("tilerelease");
  }
  MatrixTiles(const MatrixTiles&) = delete;

  template <int kAt>
  LIVREC_INLINE void load(const float* from, int64_t row) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(4 * row), "i"(kAt) : "memory");
  }
  template <int kAt>
  LIVREC_INLINE void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(kAt));
  }
  template <int kTo, int kLeft, int kRight>
  LIVREC_INLINE void multiply() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kTo), "i"(kLeft), "i"(kRight));
  }
  template <int kAt>
  LIVREC_INLINE void store(float* to, int64_t row) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(4 * row), "i"(kAt) : "memory");
  }

 private:
  struct Setup {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  };
  bool used_;
};
#else
// The same, number for number: for tests where there is no AMX.
class MatrixTiles {
 public:
  explicit MatrixTiles(bool) {}

  template <int kAt>
  void load(const float* from, int64_t row) {
    for (int64_t i = 0; i < kTileSide; ++i)
      __builtin_memcpy(words_[kAt][i], from + i * row, sizeof(words_[kAt][i]));
  }
  template <int kAt>
  void zero() {
    __builtin_memset(words_[kAt], 0, sizeof(words_[kAt]));
  }
  // Sums of the first and of the second numbers of words, and then both onto what is there.
  template <int kTo, int kLeft, int kRight>
  void multiply() {
    for (int64_t i = 0; i < kTileSide; ++i) {
      float firsts[kTileSide] = {}, seconds[kTileSide] = {};
      for (int64_t k = 0; k < kTileSide; ++k)
        for (int64_t j = 0; j < kTileSide; ++j) {
          const uint32_t a = words_[kLeft][i][k], b = words_[kRight][k][j];
          firsts[j] = normal(__builtin_fmaf(first(a), first(b), firsts[j]));
          seconds[j] = normal(__builtin_fmaf(second(a), second(b), seconds[j]));
        }
      for (int64_t j = 0; j < kTileSide; ++j) {
        uint32_t& to = words_[kTo][i][j];
        to = bits_of(normal(normal(float_of(to)) + normal(firsts[j] + seconds[j])));
      }
    }
  }
  template <int kAt>
  void store(float* to, int64_t row) {
    for (int64_t i = 0; i < kTileSide; ++i)
      __builtin_memcpy(to + i * row, words_[kAt][i], sizeof(words_[kAt][i]));
  }

 private:
  // Denormals are zeros, before and after.
  static float normal(float x) {
    return bits_of(x) & 0x7f800000u ? x : float_of(bits_of(x) & 0x80000000u);
  }
  static float first(uint32_t word) { return normal(float_of(word << 16)); }
  static float second(uint32_t word) { return normal(float_of(word & 0xffff0000u)); }

  uint32_t words_[8][kTileSide][kTileSide];
};
#endif

// c (+)= a b for one or two tiles of rows and of columns. depth: in words, whole tiles.
template <int kRows, int kColumns>
LIVREC_INLINE void tile_block(MatrixTiles& tiles, const float* a, int64_t a_row, const float* b,
                              int64_t b_row, int64_t depth, float* c, int64_t c_row, bool add) {
  constexpr bool kWide = kColumns == 2, kTall = kRows == 2;
  float* below = c + kTileSide * c_row;
  if (add) {
    tiles.template load<0>(c, c_row);
    if constexpr (kWide) tiles.template load<1>(c + kTileSide, c_row);
    if constexpr (kTall) tiles.template load<2>(below, c_row);
    if constexpr (kWide && kTall) tiles.template load<3>(below + kTileSide, c_row);
  } else {
    tiles.template zero<0>(), tiles.template zero<1>();
    tiles.template zero<2>(), tiles.template zero<3>();
  }
  for (int64_t k = 0; k < depth; k += kTileSide) {
    tiles.template load<4>(a + k, a_row);
    tiles.template load<6>(b + k * b_row, b_row);
    tiles.template multiply<0, 4, 6>();
    if constexpr (kWide) tiles.template load<7>(b + k * b_row + kTileSide, b_row);
    if constexpr (kWide) tiles.template multiply<1, 4, 7>();
    if constexpr (kTall) tiles.template load<5>(a + kTileSide * a_row + k, a_row);
    if constexpr (kTall) tiles.template multiply<2, 5, 6>();
    if constexpr (kWide && kTall) tiles.template multiply<3, 5, 7>();
  }
  tiles.template store<0>(c, c_row);
  if constexpr (kWide) tiles.template store<1>(c + kTileSide, c_row);
  if constexpr (kTall) tiles.template store<2>(below, c_row);
  if constexpr (kWide && kTall) tiles.template store<3>(below + kTileSide, c_row);
}

// Likewise for any number of rows, of which a has whole tiles to read.
template <int kColumns>
inline void tile_columns(MatrixTiles& tiles, const float* a, int64_t a_row, int64_t rows,
                         const float* b, int64_t b_row, int64_t depth, float* c, int64_t c_row,
                         bool add) {
  int64_t m = 0;
  for (; m + 2 * kTileSide <= rows; m += 2 * kTileSide)
    tile_block<2, kColumns>(tiles, a + m * a_row, a_row, b, b_row, depth, c + m * c_row, c_row,
                            add);
  for (; m < rows; m += kTileSide) {
    float whole[kTileSide][kColumns * kTileSide] = {};
    const int64_t left = least(kTileSide, rows - m), bytes = sizeof(whole[0]);
    for (int64_t i = 0; add && i < left; ++i)
      __builtin_memcpy(whole[i], c + (m + i) * c_row, bytes);
    tile_block<1, kColumns>(tiles, a + m * a_row, a_row, b, b_row, depth, whole[0],
                            kColumns * kTileSide, true);
    for (int64_t i = 0; i < left; ++i) __builtin_memcpy(c + (m + i) * c_row, whole[i], bytes);
  }
}

// c [rows, columns] (+)= a [rows, depth] b [depth, columns], a and b in words; columns are whole
// tiles. Both have whole tiles to read, and past the depth a is 0 and b no infinity.
inline void multiply_tiles(MatrixTiles& tiles, const float* a, int64_t a_row, int64_t rows,
                           const float* b, int64_t b_row, int64_t depth, float* c, int64_t c_row,
                           int64_t columns, bool add) {
  const int64_t whole = (depth + kTileSide - 1) / kTileSide * kTileSide;
  int64_t n = 0;
  for (; n + 2 * kTileSide <= columns; n += 2 * kTileSide)
    tile_columns<2>(tiles, a, a_row, rows, b + n, b_row, whole, c + n, c_row, add);
  for (; n < columns; n += kTileSide)
    tile_columns<1>(tiles, a, a_row, rows, b + n, b_row, whole, c + n, c_row, add);
}

}  // namespace
}  // namespace LIVREC_ISA
}  // namespace livrec
