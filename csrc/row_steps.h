// Steps of optimisers on a row, for the CPU kernels; see vectors.h for how it is included.
#pragma once

#include "hashes.h"
#include "row_update.h"
#include "rows.h"

namespace livrec {
namespace LIVREC_ISA {
namespace {

// A row of float32 as it lies, or gathered into `space`.
inline float* gathered(float* row, int64_t stride, int64_t dim, float* space) {
  if (stride == 1) return row;
  for (int64_t d = 0; d < dim; ++d) space[d] = row[d * stride];
  return space;
}

inline void scatter(const float* from, int64_t stride, int64_t dim, float* row) {
  for (int64_t d = 0; from != row && d < dim; ++d) row[d * stride] = from[d];
}

inline float* widened(const uint16_t* row, RowType type, int64_t stride, int64_t dim,
                      float* space) {
  for (int64_t d = 0; d < dim; ++d)
    space[d] =
        type == RowType::f16 ? float_of_f16(row[d * stride]) : float_of_bf16(row[d * stride]);
  return space;
}

// Up or down, the nearer the likelier: a float's bits grow with its magnitude, so that noise below
// the last kept bit carries into it as often as is due. noise < 2^16 for bf16, < 2^13 for f16.
inline uint16_t bf16_at_random(float value, uint32_t noise) {
  const bool finite = (bits_of(value) & 0x7f800000u) != 0x7f800000u;
  return finite ? static_cast<uint16_t>((bits_of(value) + noise) >> 16) : bf16_of(value);
}

inline uint16_t f16_at_random(float value, uint32_t noise) {
  const bool finite = (bits_of(value) & 0x7f800000u) != 0x7f800000u;
  float rounded = float_of(((bits_of(value) + noise) >> 13) << 13);
  if (__builtin_fabsf(value) < 0x1p-14f) {  // there its numbers are 2^-24 apart
    const float units = value * 0x1p24f, low = __builtin_floorf(units);
    const bool up = static_cast<float>(noise) < (units - low) * 8192.0f;
    rounded = (low + (up ? 1.0f : 0.0f)) * 0x1p-24f;
  }
  return f16_of(finite ? rounded : value);
}

inline void narrow_at_random(const float* from, const RowUpdate& job, int64_t row, uint16_t* to) {
  const uint64_t seed = mixed(job.seed);
  const bool brain = job.type == RowType::bf16;
  for (int64_t d = 0; d < job.dim; ++d) {
    const uint64_t drawn = mixed(seed ^ static_cast<uint64_t>(row * job.dim + d));
    const auto noise = static_cast<uint32_t>(drawn & (brain ? 0xffffu : 0x1fffu));
    to[d * job.column_stride] =
        brain ? bf16_at_random(from[d], noise) : f16_at_random(from[d], noise);
  }
}

// to: the row in float32, unit stride. dim: job's, which the compiler may know.
LIVREC_INLINE void move(const RowUpdate& job, int64_t dim, int64_t row, const float* grad,
                        float* to, float* space) {
  float* state = job.state ? job.state + row * job.state_stride : nullptr;
  if (job.rule == RowRule::adagrad) {
    float* squares = gathered(state, job.state_column_stride, dim, space);
    for (int64_t d = 0; d < dim; ++d) {
      squares[d] += grad[d] * grad[d];
      to[d] -= job.lr * grad[d] / (__builtin_sqrtf(squares[d]) + job.eps);
    }
    return scatter(squares, job.state_column_stride, dim, state);
  }
  float rate = job.lr;
  if (job.rule == RowRule::rowwise_adagrad) {
    *state += square_of(grad, dim) / static_cast<float>(dim);
    rate /= __builtin_sqrtf(*state) + job.eps;
  }
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) store(to + d, load(to + d) - rate * load(grad + d));
  for (; d < dim; ++d) to[d] -= rate * grad[d];
}

// Of rows that are not float32 of unit stride.
__attribute__((noinline)) void step_elsewhere(const RowUpdate& job, int64_t row, const float* grad,
                                              float* scratch) {
  const int64_t dim = job.dim;
  if (job.type == RowType::f32) {
    float* own = static_cast<float*>(job.table) + row * job.stride;
    float* moved = gathered(own, job.column_stride, dim, scratch);
    move(job, dim, row, grad, moved, scratch + dim);
    return scatter(moved, job.column_stride, dim, own);
  }
  uint16_t* own = static_cast<uint16_t*>(job.table) + row * job.stride;
  float* moved = widened(own, job.type, job.column_stride, dim, scratch);
  move(job, dim, row, grad, moved, scratch + dim);
  narrow_at_random(moved, job, row, own);
}

LIVREC_INLINE void ask(const RowUpdate& job, int64_t row) {
  if (job.rule == RowRule::store) return;  // it is not read
  const int64_t size = job.type == RowType::f32 ? 4 : 2;
  fetch(static_cast<char*>(job.table) + row * job.stride * size, job.dim * size);
  if (job.state)
    fetch(job.state + row * job.state_stride, job.rule == RowRule::adagrad ? job.dim * 4 : 4);
}

// Moves a row, given its gradient. dim: job's, which the compiler may know. scratch [2 dim].
LIVREC_INLINE void step_row(const RowUpdate& job, int64_t dim, int64_t row, const float* grad,
                            float* scratch) {
  if (job.rule == RowRule::store) {
    float* to = static_cast<float*>(job.table) + row * job.stride;
    if (job.past_caches && streamable(to, dim * 4))
      stream(reinterpret_cast<const char*>(grad), dim * 4, reinterpret_cast<char*>(to));
    else
      __builtin_memcpy(to, grad, static_cast<size_t>(dim) * 4);
  } else if (job.type == RowType::f32 && job.column_stride == 1) {
    move(job, dim, row, grad, static_cast<float*>(job.table) + row * job.stride, scratch);
  } else {
    step_elsewhere(job, row, grad, scratch);
  }
}

}  // namespace
}  // namespace LIVREC_ISA
}  // namespace livrec
