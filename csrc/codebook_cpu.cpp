#include "codebook.h"

#include "codebook_bytes.h"
#include "rows.h"

namespace livrec {
namespace LIVREC_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kTileRows = 12;
#else
constexpr int kTileRows = 6;
#endif
constexpr int kTailRows = kTileRows / 3;  // rows of the lower tile that takes what is left
constexpr int kPanel = 2 * kLanes;        // codewords in a panel

// The best codewords of a row so far, one contest per lane.
struct Best {
  Floats score;
  Ints code;
};

struct alignas(64) Scratch {
  Best best[kBlockRows];
  float scores[kBlockRows][kPanel];
};

// Adds up the scores of kRows rows with one panel.
template <int kRows>
LIVREC_INLINE void score_tile(const float* row, int64_t stride, const float* panel,
                              const float* half_norms, int64_t dim, Floats* low, Floats* high) {
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) low[i] = -load(half_norms), high[i] = -load(half_norms + kLanes);
  for (int64_t d = 0; d < dim; ++d) {
    const Floats c0 = load(panel + d * kPanel), c1 = load(panel + d * kPanel + kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const float r = row[i * stride + d];
      low[i] += r * c0;
      high[i] += r * c1;
    }
  }
}

// Lets kRows rows contend in one panel; lane j of half h is codeword `first + h * kLanes + j`.
// Codewords come in ascending order and only a strictly greater score wins: ties keep the lowest
// code.
template <int kRows>
LIVREC_INLINE void contend(const float* row, int64_t stride, const float* panel,
                           const float* half_norms, int64_t dim, int32_t first, Best* best) {
  Floats low[kRows], high[kRows];
  score_tile<kRows>(row, stride, panel, half_norms, dim, low, high);
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

template <int kRows>
LIVREC_INLINE void keep(const float* row, int64_t stride, const float* panel,
                        const float* half_norms, int64_t dim, float (*scores)[kPanel]) {
  Floats low[kRows], high[kRows];
  score_tile<kRows>(row, stride, panel, half_norms, dim, low, high);
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) store(scores[i], low[i]), store(scores[i] + kLanes, high[i]);
}

// The winner among the lanes: greatest score, then lowest code. Without branches, since nobody can
// predict which lane wins: after log2(kLanes) turns every lane holds the winner.
LIVREC_INLINE Best settle(Best best) {
#pragma GCC unroll 4
  for (int step = kLanes / 2; step > 0; step /= 2) {
    const Best other{turn(best.score, step), turn(best.code, step)};
    const Ints wins =
        (other.score > best.score) | ((other.score == best.score) & (other.code < best.code));
    best.score = wins ? other.score : best.score;
    best.code = wins ? other.code : best.code;
  }
  return best;
}

bool is_finite(float score) { return score > -kInfinity && score < kInfinity; }

void pack_floats(Codebook& codebook) {
  const int64_t size = codebook.size, dim = codebook.dim;
  for (int64_t first = 0; first < size; first += kPanel) {
    float* panel = codebook.panels + first * dim;
    const int64_t width = size - first < kPanel ? size - first : kPanel;
    const float* from = codebook.codewords + first * dim;
    for (int64_t d = 0; d < dim; ++d)
      for (int64_t j = 0; j < kPanel; ++j)
        panel[d * kPanel + j] = j < width ? from[j * dim + d] : 0.0f;
    for (int64_t j = 0; j < kPanel; ++j) {
      const float penalty = codebook.penalty && j < width ? codebook.penalty[first + j] : 0.0f;
      codebook.half_norms[first + j] =
          j < width ? (square_of(from + j * dim, dim) + penalty) / 2 : kInfinity;
    }
  }
}

int64_t nearest_in_floats(const Codebook& codebook, const Rows& rows, int32_t* codes, Best* best) {
  for (int64_t i = 0; i < rows.count; ++i) best[i] = Best{Floats{} - kInfinity, Ints{}};
  for (int64_t j = 0; j < codebook.size; j += kPanel) {
    const float* panel = codebook.panels + j * codebook.dim;
    const float* norms = codebook.half_norms + j;
    const int32_t first = static_cast<int32_t>(j);
    const float* row = rows.first;
    int64_t i = 0;
    for (; i + kTileRows <= rows.count; i += kTileRows, row += kTileRows * rows.stride)
      contend<kTileRows>(row, rows.stride, panel, norms, codebook.dim, first, best + i);
    for (; i + kTailRows <= rows.count; i += kTailRows, row += kTailRows * rows.stride)
      contend<kTailRows>(row, rows.stride, panel, norms, codebook.dim, first, best + i);
    for (; i < rows.count; ++i, row += rows.stride)
      contend<1>(row, rows.stride, panel, norms, codebook.dim, first, best + i);
  }
  int64_t first_bad = -1;
  for (int64_t i = rows.count - 1; i >= 0; --i) {
    const Best winner = settle(best[i]);
    codes[i] = is_finite(winner.score[0]) ? winner.code[0] : 0;
    if (!is_finite(winner.score[0])) first_bad = i;
  }
  return first_bad;
}

}  // namespace

int64_t codebook_bytes(int64_t size, int64_t dim) {
  const int64_t padded = (size + kPanel - 1) / kPanel * kPanel;
  return (padded * (dim + 1) * 4 + 63) / 64 * 64 + bytes_memory(size, dim);
}

void codebook_pack(Codebook& codebook, void* memory) {
  const int64_t padded = (codebook.size + kPanel - 1) / kPanel * kPanel;
  codebook.panels = static_cast<float*>(memory);
  codebook.half_norms = codebook.panels + padded * codebook.dim;
  pack_floats(codebook);
  const int64_t used = (padded * (codebook.dim + 1) * 4 + 63) / 64 * 64;
  pack_bytes(codebook, static_cast<char*>(memory) + used);
}

int64_t codebook_scratch(int64_t dim) {
  return static_cast<int64_t>(sizeof(Scratch)) + bytes_scratch(dim);
}

int64_t codebook_nearest(const Codebook& codebook, const Rows& rows, int32_t* codes,
                         void* scratch) {
  Best* best = static_cast<Scratch*>(scratch)->best;
  if (!codebook.in_bytes) return nearest_in_floats(codebook, rows, codes, best);
  int32_t left[kBlockRows];
  const Rows hard =
      nearest_in_bytes(codebook, rows, codes, left, static_cast<Scratch*>(scratch) + 1);
  if (hard.count == 0) return -1;
  int32_t found[kBlockRows];
  const int64_t bad = nearest_in_floats(codebook, hard, found, best);
  for (int64_t i = 0; i < hard.count; ++i) codes[left[i]] = found[i];
  return bad < 0 ? -1 : left[bad];
}

int64_t codebook_two_nearest(const Codebook& codebook, const Rows& rows, int32_t* codes,
                             int32_t* second, float* gaps, void* scratch) {
  const int64_t first_bad = codebook_nearest(codebook, rows, codes, scratch);
  float (*scores)[kPanel] = static_cast<Scratch*>(scratch)->scores;
  float own[kBlockRows], next[kBlockRows];
  for (int64_t i = 0; i < rows.count; ++i) own[i] = next[i] = -kInfinity, second[i] = 0;
  for (int64_t j = 0; j < codebook.size; j += kPanel) {
    const float* panel = codebook.panels + j * codebook.dim;
    const float* norms = codebook.half_norms + j;
    int64_t i = 0;
    for (; i + kTailRows <= rows.count; i += kTailRows)
      keep<kTailRows>(rows.first + i * rows.stride, rows.stride, panel, norms, codebook.dim,
                      scores + i);
    for (; i < rows.count; ++i)
      keep<1>(rows.first + i * rows.stride, rows.stride, panel, norms, codebook.dim, scores + i);
    const int64_t width = codebook.size - j < kPanel ? codebook.size - j : kPanel;
    for (i = 0; i < rows.count; ++i)
      for (int64_t k = 0; k < width; ++k) {
        const float score = scores[i][k];
        if (codes[i] == j + k)
          own[i] = score;
        else if (score > next[i])
          next[i] = score, second[i] = static_cast<int32_t>(j + k);
      }
  }
  // Where rounding alone decides, the second may score a trifle more than the first.
  for (int64_t i = 0; i < rows.count; ++i) {
    const float gap = 2 * (own[i] - next[i]);
    gaps[i] = !(next[i] > -kInfinity) ? kInfinity : gap > 0 ? gap : 0.0f;
  }
  return first_bad;
}

}  // namespace LIVREC_ISA
}  // namespace livrec
