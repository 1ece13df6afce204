#include "kmeans_step.h"

#include <memory>
#include <mutex>
#include <optional>
#include <tuple>

#include "codebook_torch.h"

namespace livrec {
namespace {

constexpr int64_t kCachedSums = 512 << 10;  // bytes of sums that a thread keeps for itself

Tensor zeros(torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  return torch::stable::fill_(empty_cpu(sizes, ScalarType::Double), 0.0);
}

// Row numbers in the order of their codes, and where each code's begin: a counting sort.
struct Order {
  std::vector<int64_t> rows, starts;

  Order(const int32_t* codes, int64_t count, int64_t size)
      : rows(static_cast<size_t>(count)), starts(static_cast<size_t>(size) + 1, 0) {
    for (int64_t i = 0; i < count; ++i) ++starts[static_cast<size_t>(codes[i]) + 1];
    for (size_t j = 0; j < static_cast<size_t>(size); ++j) starts[j + 1] += starts[j];
    std::vector<int64_t> next(starts.begin(), starts.end() - 1);
    for (int64_t i = 0; i < count; ++i)
      rows[static_cast<size_t>(next[static_cast<size_t>(codes[i])]++)] = i;
  }
};

// Adds each codeword's rows up by itself. Sums of runs of rows are exact, so that a codeword with
// many rows can be cut among threads.
void gather_sums(const KMeansStep& job, int64_t rows, double* sums) {
  const int64_t size = job.codebook.size, dim = job.dim;
  const Order order(job.codes, rows, size);
  std::mutex mutex;
  torch::stable::parallel_for(0, rows, 1024, [&](int64_t begin, int64_t end) {
    std::vector<double> run(static_cast<size_t>(dim));
    std::vector<float> scratch(static_cast<size_t>(dim));
    for (int64_t at = begin; at < end;) {
      const auto code = static_cast<size_t>(job.codes[order.rows[static_cast<size_t>(at)]]);
      const int64_t last = order.starts[code + 1] < end ? order.starts[code + 1] : end;
      const bool shared = order.starts[code] < begin || order.starts[code + 1] > end;
      double* to = shared ? run.data() : sums + static_cast<int64_t>(code) * dim;
      if (shared) run.assign(run.size(), 0.0);
      LIVREC_CALL_VNNI(kmeans_step_gather, job, order.rows.data(), at, last, to, scratch.data());
      if (shared) {
        const std::lock_guard<std::mutex> lock(mutex);
        for (int64_t d = 0; d < dim; ++d) sums[static_cast<int64_t>(code) * dim + d] += run[d];
      }
      at = last;
    }
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> kmeans_step(
    const Tensor& x_given, const Tensor& codebook, const std::optional<Tensor>& weights_given,
    const std::optional<Tensor>& penalty, const Tensor& quanta_given) {
  const Tensor x = rows_of(x_given), quanta = contiguous_of(quanta_given);
  const int64_t rows = x.size(0), dim = x.size(1), size = codebook.size(0);
  STD_TORCH_CHECK(quanta.dim() == 1 && quanta.size(0) == 3, "quanta: must be [3]");
  STD_TORCH_CHECK(!weights_given || (weights_given->dim() == 1 && weights_given->size(0) == rows),
                  "weights: must be [M]");
  STD_TORCH_CHECK(!penalty || (penalty->dim() == 1 && penalty->size(0) == size),
                  "penalty: must be [N]");
  const double* quantum = quanta.const_data_ptr<double>();
  for (int i = 0; i < 3; ++i)
    STD_TORCH_CHECK(quantum[i] > 0 && quantum[i] < 1e308, "quanta: must be positive and finite");
  const PackedCodebook packed(codebook, penalty ? &*penalty : nullptr, dim);
  Tensor weights;
  KMeansStep job{};
  if (weights_given) {
    weights = contiguous_of(*weights_given);
    job.weights = weights.const_data_ptr<float>();
  }
  Tensor codes = empty_cpu({rows}, ScalarType::Int), error = empty_cpu({rows}, ScalarType::Float);
  Tensor sums = zeros({size, dim}), mass = zeros({size}), inertia = zeros({});
  job.x = x.const_data_ptr();
  job.x_type = float_type(x);
  job.x_stride = x.stride(0);
  job.dim = dim;
  job.codebook = packed.codebook;
  job.sum_quantum = quantum[0], job.mass_quantum = quantum[1], job.inertia_quantum = quantum[2];
  job.codes = codes.mutable_data_ptr<int32_t>();
  job.error = error.mutable_data_ptr<float>();
  double* total = sums.mutable_data_ptr<double>();
  double* masses = mass.mutable_data_ptr<double>();
  const bool cached = size * dim * 8 <= kCachedSums;
  std::mutex mutex;
  FirstBad first_bad;
  torch::stable::parallel_for(0, rows, 1024, [&](int64_t begin, int64_t end) {
    const Scratch scratch(LIVREC_CALL_VNNI(kmeans_step_scratch, dim));
    std::vector<double> own(static_cast<size_t>(size * ((cached ? dim : 0) + 1)), 0.0);
    KMeansSums part{cached ? own.data() + size : nullptr, own.data(), 0.0};
    first_bad.note(LIVREC_CALL_VNNI(kmeans_step, job, begin, end, part, scratch.data()));
    const std::lock_guard<std::mutex> lock(mutex);  // sums are exact: their order is of no account
    for (int64_t j = 0; j < size; ++j) masses[j] += part.mass[j];
    for (int64_t k = 0; cached && k < size * dim; ++k) total[k] += part.sums[k];
    *inertia.mutable_data_ptr<double>() += part.inertia;
  });
  for (int64_t i = 0; weights_given && i < rows; ++i)
    STD_TORCH_CHECK(job.weights[i] >= 0 && job.weights[i] < 3.5e38, "weights: must be finite");
  for (int64_t j = 0; penalty && j < size; ++j)
    STD_TORCH_CHECK(packed.codebook.penalty[j] > -3.5e38, "penalty: must be finite or +inf");
  check_rows(first_bad);
  if (!cached) gather_sums(job, rows, total);
  return {codes, error, sums, mass, inertia};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(livrec, CPU, m) { m.impl("kmeans_step.native", TORCH_BOX(&kmeans_step)); }

}  // namespace livrec
