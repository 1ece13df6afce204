#include "row_update.h"

#include "row_steps.h"

namespace livrec {
namespace LIVREC_ISA {
namespace {

constexpr int64_t kAhead = 32;  // rows that are asked for before they are read

}  // namespace

void row_update(const RowUpdate& job, int64_t begin, int64_t end, float* scratch) {
  by_vectors(job.dim, [&](auto vectors) {
    const int64_t dim = vectors.value > 0 ? vectors.value * kLanes : job.dim;
    for (int64_t i = begin; i < end; ++i) {
      if (i + kAhead < end) ask(job, job.rows[i + kAhead]);
      step_row(job, dim, job.rows[i], job.sums + i * dim, scratch);
    }
  });
  end_stream();  // of rules that store
}

}  // namespace LIVREC_ISA
}  // namespace livrec
