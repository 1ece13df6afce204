// One step of an optimiser on some rows of a table, given the sums of their gradients.
//
//   sgd               w -= lr g
//   adagrad           s += g^2,        w -= lr g / (sqrt(s) + eps), per element
//   rowwise_adagrad   s += mean(g^2),  w -= lr g / (sqrt(s) + eps), s a number per row
//   store             w = g: where sums themselves are wanted, in float32 rows of unit stride
//
// Rows of 16-bit tables are rounded up or down at random: the noise added below the last kept bit
// is a hash of the seed, the row and the column, so that every device draws the same.
#pragma once

#include <cstdint>

#include "isa.h"

namespace livrec {

enum class RowRule : int { sgd, adagrad, rowwise_adagrad, store };
enum class RowType : int { f32, f16, bf16 };

struct RowUpdate {
  void* table;
  RowType type;
  int64_t stride, column_stride;  // of the table, in elements
  float* state;                   // null for sgd
  int64_t state_stride, state_column_stride;
  const int64_t* rows;  // distinct, inside the table
  const float* sums;    // [rows, dim]
  int64_t dim;
  RowRule rule;
  bool past_caches;  // whether what is stored is too much for them
  float lr, eps;
  uint64_t seed;
};

// Updates rows[begin] ... rows[end - 1]. scratch [2 dim].
LIVREC_DECLARE(void, row_update, (const RowUpdate& job, int64_t begin, int64_t end, float* scratch))

}  // namespace livrec
