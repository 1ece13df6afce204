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
constexpr int kLanes = 4, kTileRows = 4;
#endif
constexpr int kWidth = 2 * kLanes;           // codewords in a panel
constexpr int kBlockRows = 4 * kTileRows;    // rows that go through all levels together

typedef float Floats __attribute__((vector_size(kLanes * 4)));
typedef int32_t Ints __attribute__((vector_size(kLanes * 4)));

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

float to_float(const void* row, Float type, int64_t d) {
  if (type == Float::f32) return static_cast<const float*>(row)[d];
  if (type == Float::f16) return static_cast<float>(static_cast<const _Float16*>(row)[d]);
  const uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(row)[d]) << 16;
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
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

// Rows [0, kRows) of a tile against one panel; lane j of half h is codeword `first + h * kLanes + j`.
// Codewords come in ascending order and only a strictly greater score wins: ties keep the lowest code.
template <int kRows>
inline __attribute__((always_inline)) void score_tile(const float* residual, const float* panel,
                                                      const float* half_norms, int64_t dim,
                                                      int32_t first, Best* best) {
  Floats norms[2], sums[kRows][2];
  __builtin_memcpy(norms, half_norms, sizeof(norms));
  for (int i = 0; i < kRows; ++i) sums[i][0] = -norms[0], sums[i][1] = -norms[1];
  for (int64_t d = 0; d < dim; ++d) {
    Floats codewords[2];
    __builtin_memcpy(codewords, panel + d * kWidth, sizeof(codewords));
    for (int i = 0; i < kRows; ++i) {
      const float r = residual[i * dim + d];
      sums[i][0] += r * codewords[0];
      sums[i][1] += r * codewords[1];
    }
  }
  for (int half = 0; half < 2; ++half) {
    Ints code;
    for (int j = 0; j < kLanes; ++j) code[j] = first + half * kLanes + j;
    for (int i = 0; i < kRows; ++i) {
      const Ints wins = sums[i][half] > best[i].score;
      best[i].score = wins ? sums[i][half] : best[i].score;
      best[i].code = wins ? code : best[i].code;
    }
  }
}

void score_rows(const float* residual, int64_t rows, const float* panel, const float* half_norms,
                int64_t dim, int32_t first, Best* best) {
  int64_t i = 0;
  for (; i + kTileRows <= rows; i += kTileRows)
    score_tile<kTileRows>(residual + i * dim, panel, half_norms, dim, first, best + i);
  for (; i < rows; ++i)
    score_tile<1>(residual + i * dim, panel, half_norms, dim, first, best + i);
}

// The winner among the lanes: greatest score, then lowest code.
int32_t settle(const Best& best, bool* finite) {
  float score = best.score[0];
  int32_t code = best.code[0];
  for (int j = 1; j < kLanes; ++j)
    if (best.score[j] > score || (best.score[j] == score && best.code[j] < code))
      score = best.score[j], code = best.code[j];
  *finite = score > -kInfinity && score < kInfinity;
  return *finite ? code : 0;
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
    for (int64_t l = 0; l < job.level_count; ++l) {
      const ResidualKMeansLevel& level = job.levels[l];
      for (int64_t i = 0; i < rows; ++i) best[i] = Best{Floats{} - kInfinity, Ints{}};
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
