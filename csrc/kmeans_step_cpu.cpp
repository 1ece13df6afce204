#include "kmeans_step.h"

#include "rows.h"

namespace livrec {
namespace LIVREC_ISA {
namespace {

// The nearest multiple of `quantum`, where coarse = 1.5 * 2^52 * quantum: beside that a float64 has
// no room for anything finer.
double whole(double value, double coarse) { return (value + coarse) - coarse; }

void add_row(const float* row, int64_t dim, double weight, double coarse, double* sum) {
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) {
    const Doubles term = __builtin_convertvector(load(row + d), Doubles) * weight;
    LooseDoubles& to = *reinterpret_cast<LooseDoubles*>(sum + d);
    to += (term + coarse) - coarse;
  }
  for (; d < dim; ++d) sum[d] += whole(weight * static_cast<double>(row[d]), coarse);
}

float distance(const float* row, const float* codeword, int64_t dim) {
  Floats lanes{};
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) {
    const Floats apart = load(row + d) - load(codeword + d);
    lanes += apart * apart;
  }
  float sum = sum_of(lanes);
  for (; d < dim; ++d) sum += (row[d] - codeword[d]) * (row[d] - codeword[d]);
  return sum;
}

}  // namespace

int64_t kmeans_step_scratch(int64_t dim) { return codebook_scratch(dim) + kBlockRows * dim * 4; }

int64_t kmeans_step(const KMeansStep& job, int64_t begin, int64_t end, KMeansSums& sums,
                    void* scratch) {
  const int64_t dim = job.dim;
  float* space = reinterpret_cast<float*>(static_cast<char*>(scratch) + codebook_scratch(dim));
  const double coarse = 0x1.8p52 * job.sum_quantum;
  int64_t first_bad = -1;
  for (int64_t row = begin; row < end; row += kBlockRows) {
    const int64_t count = end - row < kBlockRows ? end - row : kBlockRows;
    const Rows rows = floats_of(job.x, job.x_type, job.x_stride, dim, row, count, space);
    const int64_t bad = codebook_nearest(job.codebook, rows, job.codes + row, scratch);
    if (bad >= 0 && first_bad < 0) first_bad = row + bad;
    for (int64_t i = 0; i < count; ++i) {
      const float* from = rows.first + i * rows.stride;
      const int64_t code = job.codes[row + i];
      const double given = job.weights ? job.weights[row + i] : 1.0;
      const double weight = whole(given, 0x1.8p52 * job.mass_quantum);
      const float error = distance(from, job.codebook.codewords + code * dim, dim);
      job.error[row + i] = error;
      sums.inertia += whole(weight * static_cast<double>(error), 0x1.8p52 * job.inertia_quantum);
      sums.mass[code] += weight;
      if (sums.sums) add_row(from, dim, given, coarse, sums.sums + code * dim);
    }
  }
  return first_bad;
}

void kmeans_step_gather(const KMeansStep& job, const int64_t* order, int64_t begin, int64_t end,
                        double* sum, float* scratch) {
  for (int64_t i = begin; i < end; ++i) {
    const Rows row = floats_of(job.x, job.x_type, job.x_stride, job.dim, order[i], 1, scratch);
    const double weight = job.weights ? job.weights[order[i]] : 1.0;
    add_row(row.first, job.dim, weight, 0x1.8p52 * job.sum_quantum, sum);
  }
}

}  // namespace LIVREC_ISA
}  // namespace livrec
