#include "row_update.h"

#include "row_update_torch.h"

namespace livrec {
namespace {

void check_rows(const int64_t* rows, int64_t count, int64_t height) {
  FirstBad first_bad;
  torch::stable::parallel_for(0, count, 16384, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      if (rows[i] < 0 || rows[i] >= height || (i > 0 && rows[i] <= rows[i - 1]))
        return first_bad.note(i);
  });
  STD_TORCH_CHECK(!first_bad.any(), "rows: number ", first_bad.first(),
                  " is outside the table or not above the one before it");
}

void row_update(const Tensor& table, const std::optional<Tensor>& state, const Tensor& rows_given,
                const Tensor& sums_given, const Text& rule, double lr, double eps, int64_t seed) {
  const Tensor rows = contiguous_of(rows_given);
  const Tensor sums = contiguous_of(sums_given);
  const int64_t count = rows.numel();
  STD_TORCH_CHECK(table.dim() == 2 && rows.dim() == 1 && rows.scalar_type() == ScalarType::Long &&
                      sums.dim() == 2 && sums.size(0) == count && sums.size(1) == table.size(1) &&
                      sums.scalar_type() == ScalarType::Float,
                  "sums: must be float32 [n, d] for rows int64 [n] of a table [H, d]");
  RowUpdate job = row_job(table, state, rule, lr, eps, seed);
  job.rows = rows.const_data_ptr<int64_t>();
  job.sums = sums.const_data_ptr<float>();
  check_rows(job.rows, count, table.size(0));
  torch::stable::parallel_for(0, count, 512, [&](int64_t begin, int64_t end) {
    const Scratch scratch(2 * job.dim * 4);
    LIVREC_CALL(row_update, job, begin, end, static_cast<float*>(scratch.data()));
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(livrec, CPU, m) { m.impl("row_update.native", TORCH_BOX(&row_update)); }

}  // namespace livrec
