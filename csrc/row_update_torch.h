// What the torch operators that update rows of tables share.
#pragma once

#include <optional>
#include <string>

#include "row_update.h"
#include "torch_glue.h"

namespace livrec {

inline RowType row_type(const Tensor& table) {
  const auto type = table.scalar_type();
  STD_TORCH_CHECK(
      type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16,
      "table: must be float32, float16 or bfloat16");
  return type == ScalarType::Float  ? RowType::f32
         : type == ScalarType::Half ? RowType::f16
                                    : RowType::bf16;
}

inline RowRule row_rule(const Text& rule) {
  STD_TORCH_CHECK(rule == "sgd" || rule == "adagrad" || rule == "rowwise_adagrad",
                  "rule: must be sgd, adagrad or rowwise_adagrad");
  return rule == "sgd"       ? RowRule::sgd
         : rule == "adagrad" ? RowRule::adagrad
                             : RowRule::rowwise_adagrad;
}

// The updates of a table, but for rows and sums.
inline RowUpdate row_job(const Tensor& table, const std::optional<Tensor>& state, const Text& rule,
                         double lr, double eps, int64_t seed) {
  STD_TORCH_CHECK(table.dim() == 2, "table: must be [H, d]");
  RowUpdate job{};
  job.table = table.mutable_data_ptr();
  job.type = row_type(table);
  job.stride = table.stride(0), job.column_stride = table.stride(1);
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
  return job;
}

}  // namespace livrec
