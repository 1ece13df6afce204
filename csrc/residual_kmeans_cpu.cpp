#include "residual_kmeans.h"

#if !defined(LIVREC_ISA)
#error "compile once per instruction-set level, with -DLIVREC_ISA=<level>"
#endif

namespace livrec {
namespace LIVREC_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16, kTileRows = 12;
#elif defined(__AVX2__)
constexpr int kLanes = 8, kTileRows = 6;
#else
constexpr int kLanes = 4, kTileRows = 6;
#endif
constexpr int kWidth = 2 * kLanes;         // codewords in a panel
constexpr int kTailRows = kTileRows / 3;   // rows of the lower tile that takes what is left
constexpr int kBlockRows = 4 * kTileRows;  // rows that go through all levels together

typedef float Floats __attribute__((vector_size(kLanes * 4)));
typedef int32_t Ints __attribute__((vector_size(kLanes * 4)));

// A vector wherever it lies in memory.
typedef float LooseFloats __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));

inline Floats load(const float* from) { return *reinterpret_cast<const LooseFloats*>(from); }

inline __attribute__((always_inline)) Ints lane_numbers() {
  static const int32_t numbers[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  Ints lanes;
  __builtin_memcpy(&lanes, numbers, sizeof(lanes));
  return lanes;
}

// Lane j of the result is lane j + step of `from`, around the end.
template <typename Vector>
inline __attribute__((always_inline)) Vector turn(Vector from, int step) {
#if defined(__clang__)
  Vector to;
  for (int j = 0; j < kLanes; ++j) to[j] = from[(j + step) % kLanes];
  return to;
#else
  return __builtin_shuffle(from, (lane_numbers() + step) & (kLanes - 1));
#endif
}

constexpr float kInfinity = __builtin_inff();

// The best codewords of a row so far, one contest per lane.
struct Best {
  Floats score;
  Ints code;
};

struct alignas(64) Scratch {
  Best best[kBlockRows];
  float residual[1];  // [kBlockRows, dim]
};

float float_of(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

float to_float(const void* row, Float type, int64_t d) {
  if (type == Float::f32) return static_cast<const float*>(row)[d];
  const uint32_t half = static_cast<const uint16_t*>(row)[d];
  if (type == Float::bf16) return float_of(half << 16);
  // float16: below 0x400 a multiple of 2^-24, from 0x7c00 infinities and NaNs, between them normal.
  const uint32_t size = half & 0x7fff, sign = (half & 0x8000) << 16;
  const float small = static_cast<float>(static_cast<int32_t>(size)) * 0x1p-24f;
  const uint32_t large = (size << 13) + ((size < 0x7c00 ? 112u : 224u) << 23);
  return size < 0x400 ? (sign ? -small : small) : float_of(sign | large);
}

void load_rows(const ResidualKMeansEncode& job, int64_t begin, int64_t rows, float* residual) {
  const int64_t element = job.x_type == Float::f32 ? 4 : 2;
  for (int64_t i = 0; i < rows; ++i) {
    const char* row = static_cast<const char*>(job.x) + (begin + i) * job.x_stride * element;
    float* out = residual + i * job.dim;
    if (job.x_type == Float::f32)
      for (int64_t d = 0; d < job.dim; ++d) out[d] = to_float(row, Float::f32, d);
    else if (job.x_type == Float::f16)
      for (int64_t d = 0; d < job.dim; ++d) out[d] = to_float(row, Float::f16, d);
    else
      for (int64_t d = 0; d < job.dim; ++d) out[d] = to_float(row, Float::bf16, d);
  }
}

// Rows [0, kRows) of a tile against one panel; lane j of half h is codeword `first + h * kLanes +
// j`. Codewords come in ascending order and only a strictly greater score wins: ties keep the
// lowest code.
template <int kRows>
inline __attribute__((always_inline)) void score_tile(const float* residual, const float* panel,
                                                      const float* half_norms, int64_t dim,
                                                      int32_t first, Best* best) {
  Floats low[kRows], high[kRows];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) low[i] = -load(half_norms), high[i] = -load(half_norms + kLanes);
  for (int64_t d = 0; d < dim; ++d) {
    const Floats c0 = load(panel + d * kWidth), c1 = load(panel + d * kWidth + kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const float r = residual[i * dim + d];
      low[i] += r * c0;
      high[i] += r * c1;
    }
  }
  const Ints code = lane_numbers() + first;
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    const Ints wins = low[i] > best[i].score;
    const Floats score = wins ? low[i] : best[i].score;
    const Ints winner = wins ? code : best[i].code;
    const Ints wins_again = high[i] > score;
    best[i].score = wins_again ? high[i] : score;
    best[i].code = wins_again ? code + kLanes : winner;
  }
}

void score_rows(const float* residual, int64_t rows, const float* panel, const float* half_norms,
                int64_t dim, int32_t first, Best* best) {
  int64_t i = 0;
  for (; i + kTileRows <= rows; i += kTileRows)
    score_tile<kTileRows>(residual + i * dim, panel, half_norms, dim, first, best + i);
  for (; i < rows; i += kTailRows)
    score_tile<kTailRows>(residual + i * dim, panel, half_norms, dim, first, best + i);
}

// The winner among the lanes: greatest score, then lowest code. Without branches, since nobody can
// predict which lane wins: after log2(kLanes) turns every lane holds the winner.
int32_t settle(Best best, bool* finite) {
#pragma GCC unroll 4
  for (int step = kLanes / 2; step > 0; step /= 2) {
    const Best other{turn(best.score, step), turn(best.code, step)};
    const Ints wins =
        (other.score > best.score) | ((other.score == best.score) & (other.code < best.code));
    best.score = wins ? other.score : best.score;
    best.code = wins ? other.code : best.code;
  }
  *finite = best.score[0] > -kInfinity && best.score[0] < kInfinity;
  return *finite ? best.code[0] : 0;
}

void store_code(const ResidualKMeansEncode& job, int64_t row, int64_t level, int32_t code) {
  const int64_t at = row * job.level_count + level;
  if (job.code_size == 1)
    static_cast<uint8_t*>(job.codes)[at] = static_cast<uint8_t>(code);
  else if (job.code_size == 2)
    static_cast<int16_t*>(job.codes)[at] = static_cast<int16_t>(code);
  else
    static_cast<int32_t*>(job.codes)[at] = code;
}

}  // namespace

int64_t residual_kmeans_panel_width() { return kWidth; }

int64_t residual_kmeans_scratch(int64_t dim) {
  return static_cast<int64_t>(sizeof(Scratch)) + kBlockRows * dim * 4;
}

void residual_kmeans_pack(const ResidualKMeansLevel& level, int64_t dim) {
  const int64_t panels = (level.size + kWidth - 1) / kWidth;
  for (int64_t j = 0; j < panels * kWidth; ++j) {
    float* column = level.panels + j / kWidth * kWidth * dim + j % kWidth;
    const float* codeword = level.codebook + j * dim;
    float norm = 0;
    for (int64_t d = 0; d < dim; ++d) {
      const float value = j < level.size ? codeword[d] : 0.0f;
      column[d * kWidth] = value;
      norm += value * value;
    }
    level.half_norms[j] = j < level.size ? norm / 2 : kInfinity;
  }
}

int64_t residual_kmeans_encode(const ResidualKMeansEncode& job, int64_t begin, int64_t end,
                               void* scratch) {
  Best* best = static_cast<Scratch*>(scratch)->best;
  float* residual = static_cast<Scratch*>(scratch)->residual;
  int64_t first_bad = -1;
  for (int64_t row = begin; row < end; row += kBlockRows) {
    const int64_t rows = end - row < kBlockRows ? end - row : kBlockRows;
    load_rows(job, row, rows, residual);
    const int64_t padded = (rows + kTailRows - 1) / kTailRows * kTailRows;
    for (int64_t i = rows * job.dim; i < padded * job.dim; ++i) residual[i] = 0.0f;
    for (int64_t l = 0; l < job.level_count; ++l) {
      const ResidualKMeansLevel& level = job.levels[l];
      for (int64_t i = 0; i < padded; ++i) best[i] = Best{Floats{} - kInfinity, Ints{}};
      for (int64_t j = 0; j < level.size; j += kWidth)
        score_rows(residual, rows, level.panels + j * job.dim, level.half_norms + j, job.dim,
                   static_cast<int32_t>(j), best);
      for (int64_t i = 0; i < rows; ++i) {
        bool finite;
        const int32_t code = settle(best[i], &finite);
        if (!finite && (first_bad < 0 || row + i < first_bad)) first_bad = row + i;
        store_code(job, row + i, l, code);
        const float* codeword = level.codebook + code * job.dim;
        for (int64_t d = 0; d < job.dim; ++d) residual[i * job.dim + d] -= codeword[d];
      }
    }
  }
  return first_bad;
}

}  // namespace LIVREC_ISA
}  // namespace livrec
