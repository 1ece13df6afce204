// Residual k-means encode.
//
//   r_0 = x;   c_l = argmin_j ||r_{l-1} - C_l[j]||^2 (lowest j on ties);   r_l = r_{l-1} - C_l[c_l]
//
// ||r - c||^2 is least where  r.c - ||c||^2 / 2  is greatest, so the kernel seeks the maximum of
// that: one multiply-add per element, and ||r||^2 is never formed. One pass: a block of rows is
// turned into float32 once and goes through all levels while it lies in cache; x is read once, only
// codes are written. Sums run over d = 0, 1, ..., D-1 in that order for every row, whatever the
// block or the thread: codes do not depend on either.
//
// Codebooks are repacked once per call into panels of `panel_width()` codewords,
// [panel][d][codeword], so that the inner loop reads them in order. The last panel is filled up
// with codewords that cannot win (score -inf).
#pragma once

#include <cstdint>

#include "isa.h"

namespace livrec {

enum class Float : int { f32, f16, bf16 };

struct ResidualKMeansLevel {
  const float* codebook;  // [size, dim], contiguous
  int64_t size;
  float* panels;      // [ceil(size / width), dim, width]
  float* half_norms;  // [ceil(size / width) * width]; +inf past size
};

struct ResidualKMeansEncode {
  const void* x;  // [rows, dim], unit stride along dim
  Float x_type;
  int64_t x_stride;  // elements from row to row
  int64_t dim;
  const ResidualKMeansLevel* levels;
  int64_t level_count;
  void* codes;        // [rows, level_count], contiguous
  int64_t code_size;  // bytes of a code: 1, 2 or 4
};

// Codewords in a panel.
LIVREC_DECLARE(int64_t, residual_kmeans_panel_width, ())
// Fills level.panels and level.half_norms from level.codebook.
LIVREC_DECLARE(void, residual_kmeans_pack, (const ResidualKMeansLevel& level, int64_t dim))
// Bytes of scratch that one call of residual_kmeans_encode needs.
LIVREC_DECLARE(int64_t, residual_kmeans_scratch, (int64_t dim))
// Encodes rows [begin, end); `scratch` is aligned to 64 bytes. Returns the first row that has no
// nearest codeword (a NaN, an infinity, or products past float32's range; its codes are in range
// and mean nothing), or -1.
LIVREC_DECLARE(int64_t, residual_kmeans_encode,
               (const ResidualKMeansEncode& job, int64_t begin, int64_t end, void* scratch))

}  // namespace livrec
