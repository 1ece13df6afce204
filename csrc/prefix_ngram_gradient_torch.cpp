#include "prefix_ngram_gradient.h"

#include "prefix_runs_torch.h"

namespace livrec {
namespace {

constexpr int64_t kLarge = 4 << 20;  // bytes of a level's sums, of which caches hold little

std::vector<Tensor> prefix_ngram_gradient(const Tensor& grad, const Tensor& codes,
                                          const std::vector<int64_t>& sizes,
                                          const std::vector<int64_t>& rows,
                                          const std::vector<int64_t>& dims, const Text& mode,
                                          const Optional& offsets, const std::optional<Text>& pool,
                                          const Text& hashing, const std::vector<int64_t>& groups,
                                          bool packed) {
  const UpstreamGradient given(grad, codes,
                               Levels(sizes, rows, dims, groups, mode == "sum", hashing), sizes,
                               mode == "sum", offsets, pool, packed);
  std::vector<Tensor> out;
  int64_t from = 0;
  for (const int64_t group : groups) {
    const PrefixGradient job = given.of_levels(from, group);
    PrefixRuns runs(job);
    std::vector<RowUpdate> stores;
    for (int64_t l = 0; l < group; ++l) {
      const int64_t dim = job.codes.levels[l].dim;
      out.push_back(runs.number_rows(l));
      out.push_back(empty_cpu({out.back().size(0), dim}, ScalarType::Float));
      RowUpdate store{};
      store.table = out.back().mutable_data_ptr(), store.stride = dim, store.dim = dim;
      store.rule = RowRule::store;
      store.past_caches = out.back().numel() * 4 >= kLarge;
      stores.push_back(store);
    }
    runs.go(stores.data());
    from += group;
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(livrec, CPU, m) {
  m.impl("prefix_ngram_gradient.native", TORCH_BOX(&prefix_ngram_gradient));
}

}  // namespace livrec
