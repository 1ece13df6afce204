// Gradients of items and their sums, for the CPU kernels; see vectors.h for how it is included.
#pragma once

#include "halves.h"
#include "prefix_ngram_gradient.h"

namespace livrec {
namespace LIVREC_ISA {
namespace {

constexpr int kMostLevels = 64;  // a level of one codeword takes no bits, but counts as one

inline int64_t grad_row(const PrefixGradient& job, int64_t item) {
  return job.history ? job.history[item] : item;
}

// One past the last item of a chunk.
inline int64_t end_of(const PrefixGradient& job, int64_t chunk) {
  return least((chunk + 1) * kRunChunk, job.codes.items);
}

// Of the part of a gradient's row that the levels read.
inline int64_t width_of(const PrefixGradient& job) {
  int64_t width = 0;
  for (int64_t l = 0; l < job.codes.level_count; ++l) {
    const int64_t end = job.codes.levels[l].column + job.codes.levels[l].dim;
    width = end > width ? end : width;
  }
  return width;
}

inline int64_t grad_size(const PrefixGradient& job) {
  return job.grad_type == TableType::f32 ? 4 : 2;
}

// The gradient of the item at place `at` of the order, as it lies.
inline const char* grad_at(const PrefixGradient& job, int64_t at) {
  return static_cast<const char*>(job.grad) +
         grad_row(job, job.order[at]) * job.grad_stride * grad_size(job);
}

// An item's gradient in float32: as it lies, or in `space`.
inline const float* grad_of(const PrefixGradient& job, int64_t item, int64_t width, float* space) {
  const int64_t row = grad_row(job, item);
  const auto* floats = static_cast<const float*>(job.grad) + row * job.grad_stride;
  const auto* halves = static_cast<const uint16_t*>(job.grad) + row * job.grad_stride;
  if (job.grad_type == TableType::f32 && !job.offsets) return floats;
  const float count =
      job.offsets ? static_cast<float>(job.offsets[row + 1] - job.offsets[row]) : 1.0f;
  if (job.grad_type == TableType::f32)
    for (int64_t d = 0; d < width; ++d) space[d] = floats[d] / count;
  else if (job.grad_type == TableType::f16)
    for (int64_t d = 0; d < width; ++d) space[d] = float_of_f16(halves[d]) / count;
  else
    for (int64_t d = 0; d < width; ++d) space[d] = float_of_bf16(halves[d]) / count;
  return space;
}

LIVREC_INLINE void add(const float* from, int64_t dim, float* to) {
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) store(to + d, load(to + d) + load(from + d));
  for (; d < dim; ++d) to[d] += from[d];
}

LIVREC_INLINE void copy(const float* from, int64_t dim, float* to) {
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) store(to + d, load(from + d));
  for (; d < dim; ++d) to[d] = from[d];
}

}  // namespace
}  // namespace LIVREC_ISA
}  // namespace livrec
