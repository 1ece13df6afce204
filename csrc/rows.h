// Blocks of rows in float32, for the CPU kernels; see vectors.h for how it is included.
#pragma once

#include "codebook.h"
#include "halves.h"

namespace livrec {
namespace LIVREC_ISA {
namespace {

// Rows [begin, begin + count) of x: as they lie, or widened into `space` [count, dim].
inline Rows floats_of(const void* x, Float type, int64_t stride, int64_t dim, int64_t begin,
                      int64_t count, float* space) {
  if (type == Float::f32) return Rows{static_cast<const float*>(x) + begin * stride, stride, count};
  const uint16_t* halves = static_cast<const uint16_t*>(x) + begin * stride;
  for (int64_t i = 0; i < count; ++i)
    widen_row(halves + i * stride, type == Float::f16, dim, space + i * dim);
  return Rows{space, dim, count};
}

// ||row||^2, lane by lane and then the rest, whatever the row's address.
inline float square_of(const float* row, int64_t dim) {
  Floats lanes{};
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) lanes += load(row + d) * load(row + d);
  float sum = sum_of(lanes);
  for (; d < dim; ++d) sum += row[d] * row[d];
  return sum;
}

}  // namespace
}  // namespace LIVREC_ISA
}  // namespace livrec
