#include "residual_kmeans.h"

#include "rows.h"

namespace livrec {
namespace LIVREC_ISA {
namespace {

void store_code(void* codes, int64_t code_size, int64_t at, int32_t code) {
  if (code_size == 1)
    static_cast<uint8_t*>(codes)[at] = static_cast<uint8_t>(code);
  else if (code_size == 2)
    static_cast<int16_t*>(codes)[at] = static_cast<int16_t>(code);
  else
    static_cast<int32_t*>(codes)[at] = code;
}

// to = from - codeword
void subtract(const float* from, const float* codeword, int64_t dim, float* to) {
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) store(to + d, load(from + d) - load(codeword + d));
  for (; d < dim; ++d) to[d] = from[d] - codeword[d];
}

void add(const float* codeword, int64_t dim, bool first, float* to) {
  for (int64_t d = 0; d < dim; ++d) to[d] = first ? codeword[d] : to[d] + codeword[d];
}

}  // namespace

int64_t residual_kmeans_scratch(int64_t dim) {
  return codebook_scratch(dim) + kBlockRows * dim * 4;
}

int64_t residual_kmeans_encode(const ResidualKMeansEncode& job, int64_t begin, int64_t end,
                               void* scratch) {
  const int64_t dim = job.dim, depth = job.level_count;
  float* residual = reinterpret_cast<float*>(static_cast<char*>(scratch) + codebook_scratch(dim));
  int32_t codes[kBlockRows], second[kBlockRows];
  float gaps[kBlockRows];
  int64_t first_bad = -1;
  for (int64_t row = begin; row < end; row += kBlockRows) {
    const int64_t count = end - row < kBlockRows ? end - row : kBlockRows;
    Rows rows = floats_of(job.x, job.x_type, job.x_stride, dim, row, count, residual);
    for (int64_t l = 0; l < depth; ++l) {
      const Codebook& level = job.levels[l];
      const int64_t bad = job.second
                              ? codebook_two_nearest(level, rows, codes, second, gaps, scratch)
                              : codebook_nearest(level, rows, codes, scratch);
      if (bad >= 0 && (first_bad < 0 || row + bad < first_bad)) first_bad = row + bad;
      const bool needed = l + 1 < depth || job.residual_norms != nullptr;
      for (int64_t i = 0; i < count; ++i) {
        const int64_t at = (row + i) * depth + l;
        const float* codeword = level.codewords + codes[i] * dim;
        store_code(job.codes, job.code_size, at, codes[i]);
        if (needed) subtract(rows.first + i * rows.stride, codeword, dim, residual + i * dim);
        if (job.residual_norms)
          job.residual_norms[at] = __builtin_sqrtf(square_of(residual + i * dim, dim));
        if (job.reconstruction) add(codeword, dim, l == 0, job.reconstruction + (row + i) * dim);
        if (job.second) store_code(job.second, job.code_size, at, second[i]), job.gap[at] = gaps[i];
      }
      rows = Rows{residual, dim, count};
    }
  }
  return first_bad;
}

}  // namespace LIVREC_ISA
}  // namespace livrec
