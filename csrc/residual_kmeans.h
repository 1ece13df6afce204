// Residual k-means encode.
//
//   r_0 = x;   c_l = argmin_j ||r_{l-1} - C_l[j]||^2 (lowest j on ties);   r_l = r_{l-1} - C_l[c_l]
//
// One pass: a block of rows goes through all levels while it lies in cache; x is read once, and
// only what is asked for is written. codebook.h tells how the nearest codeword is found.
#pragma once

#include <cstdint>

#include "codebook.h"
#include "isa.h"

namespace livrec {

struct ResidualKMeansEncode {
  const void* x;  // [rows, dim], unit stride along dim
  Float x_type;
  int64_t x_stride;  // elements from row to row
  int64_t dim;
  const Codebook* levels;
  int64_t level_count;
  int64_t code_size;  // bytes of a code: 1, 2 or 4
  void* codes;        // [rows, level_count], contiguous
  // Null where not asked for; contiguous.
  float* residual_norms;  // [rows, level_count]
  float* reconstruction;  // [rows, dim]
  void* second;           // [rows, level_count], of code_size; goes with gap
  float* gap;             // [rows, level_count]
};

// Bytes of scratch that one call of residual_kmeans_encode needs.
LIVREC_DECLARE_VNNI(int64_t, residual_kmeans_scratch, (int64_t dim))
// Encodes rows [begin, end); `scratch` is aligned to 64 bytes. Returns the first row that has no
// nearest codeword (a NaN, an infinity, or products past float32's range; its codes are in range
// and mean nothing), or -1.
LIVREC_DECLARE_VNNI(int64_t, residual_kmeans_encode,
                    (const ResidualKMeansEncode& job, int64_t begin, int64_t end, void* scratch))

}  // namespace livrec
