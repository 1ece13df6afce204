#include <memory>

#include "prefix_runs_torch.h"

namespace livrec {
namespace {

// Tables and states are written by several tasks at once: no two may share memory.
void check_apart(const std::vector<Tensor>& tensors) {
  std::vector<std::pair<uintptr_t, uintptr_t>> spans;
  for (const Tensor& tensor : tensors) {
    if (tensor.numel() == 0) continue;
    int64_t last = 0;
    for (int64_t d = 0; d < tensor.dim(); ++d) last += (tensor.size(d) - 1) * tensor.stride(d);
    const auto from = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
    spans.emplace_back(from, from + static_cast<uintptr_t>(last + 1) * tensor.element_size());
  }
  std::sort(spans.begin(), spans.end());
  for (size_t i = 1; i < spans.size(); ++i)
    STD_TORCH_CHECK(spans[i].first >= spans[i - 1].second,
                    "tables: no two of them, nor of the states, may share memory");
}

void prefix_ngram_update(const std::vector<Tensor>& tables, const std::vector<Tensor>& states,
                         const Tensor& grad, const Tensor& codes, const std::vector<int64_t>& sizes,
                         const Text& mode, const Optional& offsets, const std::optional<Text>& pool,
                         const Text& hashing, const std::vector<int64_t>& groups, bool packed,
                         const Text& rule, double lr, double eps,
                         const std::vector<int64_t>& seeds) {
  STD_TORCH_CHECK(
      seeds.size() == tables.size() && (states.empty() || states.size() == seeds.size()),
      "states, seeds: must be one per table");
  std::vector<RowUpdate> jobs;
  std::vector<int64_t> rows, dims;
  std::vector<Tensor> changed(tables);
  changed.insert(changed.end(), states.begin(), states.end());
  check_apart(changed);
  for (size_t l = 0; l < tables.size(); ++l) {
    jobs.push_back(row_job(tables[l], states.empty() ? Optional() : Optional(states[l]), rule, lr,
                           eps, seeds[l]));
    rows.push_back(tables[l].size(0)), dims.push_back(tables[l].size(1));
  }
  const bool sum = mode == "sum";
  const UpstreamGradient given(grad, codes, Levels(sizes, rows, dims, groups, sum, hashing), sizes,
                               sum, offsets, pool, packed);
  std::vector<std::unique_ptr<PrefixRuns>> runs;  // all codes are checked before a row changes
  int64_t from = 0;
  for (const int64_t group : groups) {
    runs.push_back(std::make_unique<PrefixRuns>(given.of_levels(from, group)));
    from += group;
  }
  const RowUpdate* own = jobs.data();
  for (size_t i = 0; i < runs.size(); own += groups[i++]) {
    runs[i]->share_rows();
    runs[i]->go(own);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(livrec, CPU, m) {
  m.impl("prefix_ngram_update.native", TORCH_BOX(&prefix_ngram_update));
}

}  // namespace livrec
