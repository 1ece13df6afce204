// One step of Lloyd's k-means: the nearest codeword of every row, and the sums of each codeword's
// rows.
//
//   c_i = argmin_j ||x_i - C[j]||^2 + p_j;   S_j = sum of w_i x_i,  W_j = sum of w_i  over c_i = j
//
// Terms are rounded to whole quanta before they are added in float64: every partial sum is exact,
// so that neither the order of the rows nor their division among threads changes a bit.
//
// Where the sums fit into the cache of a core, each thread adds a row while it still has it, to
// sums of its own. Where they do not, rows are ordered by codeword first, and every codeword's rows
// are then added by one thread: x is read twice, and no thread needs N x D sums.
#pragma once

#include <cstdint>

#include "codebook.h"
#include "isa.h"

namespace livrec {

struct KMeansStep {
  const void* x;  // [rows, dim], unit stride along dim
  Float x_type;
  int64_t x_stride;  // elements from row to row
  int64_t dim;
  Codebook codebook;     // with its penalty
  const float* weights;  // [rows], or null: all 1
  double sum_quantum, mass_quantum, inertia_quantum;
  int32_t* codes;  // [rows]
  float* error;    // [rows]: ||x_i - C[c_i]||^2
};

// What some rows add up to.
struct KMeansSums {
  double* sums;  // [size, dim], or null: not wanted
  double* mass;  // [size]
  double inertia;
};

// Bytes of scratch that one call of kmeans_step needs.
LIVREC_DECLARE_VNNI(int64_t, kmeans_step_scratch, (int64_t dim))
// Assigns rows [begin, end) and adds them to `sums`. Returns the first row that has no nearest
// codeword (its code is 0, and it is added), or -1.
LIVREC_DECLARE_VNNI(int64_t, kmeans_step,
                    (const KMeansStep& job, int64_t begin, int64_t end, KMeansSums& sums,
                     void* scratch))
// Adds up the rows order[begin .. end - 1] into `sum` [dim]; `scratch` holds dim floats.
LIVREC_DECLARE_VNNI(void, kmeans_step_gather,
                    (const KMeansStep& job, const int64_t* order, int64_t begin, int64_t end,
                     double* sum, float* scratch))

}  // namespace livrec
