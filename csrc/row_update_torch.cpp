#include "row_update.h"

#include <optional>
#include <string>

#include "torch_glue.h"

namespace livrec {
namespace {

RowType row_type(const Tensor& table) {
  const auto type = table.scalar_type();
  STD_TORCH_CHECK(
      type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16,
      "table: must be float32, float16 or bfloat16");
  return type == ScalarType::Float  ? RowType::f32
         : type == ScalarType::Half ? RowType::f16
                                    : RowType::bf16;
}

RowRule row_rule(const std::string& rule) {
  STD_TORCH_CHECK(rule == "sgd" || rule == "adagrad" || rule == "rowwise_adagrad",
                  "rule: must be sgd, adagrad or rowwise_adagrad");
  return rule == "sgd"       ? RowRule::sgd
         : rule == "adagrad" ? RowRule::adagrad
                             : RowRule::rowwise_adagrad;
}

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
                const Tensor& sums_given, const std::string& rule, double lr, double eps,
                int64_t seed) {
  const Tensor rows = torch::stable::contiguous(rows_given);
  const Tensor sums = torch::stable::contiguous(sums_given);
  const int64_t count = rows.numel();
  STD_TORCH_CHECK(table.dim() == 2 && rows.dim() == 1 && rows.scalar_type() == ScalarType::Long &&
                      sums.dim() == 2 && sums.size(0) == count && sums.size(1) == table.size(1) &&
                      sums.scalar_type() == ScalarType::Float,
                  "sums: must be float32 [n, d] for rows int64 [n] of a table [H, d]");
  RowUpdate job{};
  job.table = table.mutable_data_ptr();
  job.type = row_type(table);
  job.stride = table.stride(0), job.column_stride = table.stride(1);
  job.rows = rows.const_data_ptr<int64_t>();
  job.sums = sums.const_data_ptr<float>();
  job.dim = table.size(1);
  job.rule = row_rule(rule);
  job.lr = static_cast<float>(lr), job.eps = static_cast<float>(eps);
  job.seed = static_cast<uint64_t>(seed);
  STD_TORCH_CHECK(state.has_value() == (job.rule != RowRule::sgd),
                  "state: Adagrad's, and its alone");
  if (state) {
    const bool wide = job.rule == RowRule::adagrad;
    STD_TORCH_CHECK(state->dim() == (wide ? 2 : 1) && state->size(0) == table.size(0) &&
                        (!wide || state->size(1) == job.dim) &&
                        state->scalar_type() == ScalarType::Float,
                    "state: must be float32 [H, d] for adagrad, [H] for rowwise_adagrad");
    job.state = state->mutable_data_ptr<float>();
    job.state_stride = state->stride(0);
    job.state_column_stride = wide ? state->stride(1) : 1;
  }
  check_rows(job.rows, count, table.size(0));
  torch::stable::parallel_for(0, count, 512, [&](int64_t begin, int64_t end) {
    const Scratch scratch(2 * job.dim * 4);
    LIVREC_CALL(row_update, job, begin, end, static_cast<float*>(scratch.data()));
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(livrec, CPU, m) { m.impl("row_update.native", TORCH_BOX(&row_update)); }

}  // namespace livrec
