#include "prefix_ngram_gradient.h"

#include "prefix_sorted_torch.h"

namespace livrec {
namespace {

// Sums of one level as they are found, run by run, and then row by row.
struct LevelSums {
  Tensor keys, values;
};

// Rows that several runs were hashed to are added up in the order of their keys.
LevelSums merged(const PrefixLevel& level, const LevelSums& runs) {
  const int64_t count = runs.keys.size(0);
  Tensor hashed = empty_cpu({count}, ScalarType::Long);
  int64_t* row = hashed.mutable_data_ptr<int64_t>();
  LIVREC_CALL(prefix_gradient_hash, level, runs.keys.const_data_ptr<int64_t>(), count, row);
  if (level.hash == KeyHash::none) return {hashed, runs.values};
  std::vector<uint64_t> words(row, row + count);
  std::vector<uint32_t> order(static_cast<size_t>(count));
  std::iota(order.begin(), order.end(), 0u);
  sort(words, order, bits_of(static_cast<int64_t>(std::min<uint64_t>(level.rows, INT64_MAX))));
  std::vector<int64_t> starts;
  for (size_t i = 0; i < words.size(); ++i)
    if (i == 0 || words[i] != words[i - 1]) starts.push_back(static_cast<int64_t>(i));
  const int64_t distinct = static_cast<int64_t>(starts.size()), dim = level.dim;
  starts.push_back(count);
  LevelSums out{empty_cpu({distinct}, ScalarType::Long),
                empty_cpu({distinct, dim}, ScalarType::Float)};
  int64_t* keys = out.keys.mutable_data_ptr<int64_t>();
  float* values = out.values.mutable_data_ptr<float>();
  const float* from = runs.values.const_data_ptr<float>();
  torch::stable::parallel_for(0, distinct, 512, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const auto first = static_cast<size_t>(starts[static_cast<size_t>(k)]);
      const auto last = static_cast<size_t>(starts[static_cast<size_t>(k) + 1]);
      keys[k] = static_cast<int64_t>(words[first]);
      std::copy_n(from + order[first] * dim, dim, values + k * dim);
      for (size_t i = first + 1; i < last; ++i)
        for (int64_t d = 0; d < dim; ++d) values[k * dim + d] += from[order[i] * dim + d];
    }
  });
  return out;
}

// One group: sorts its codes, then adds up all its levels. `job` knows the gradient.
std::vector<LevelSums> sums_of(PrefixGradient job) {
  const int64_t items = job.codes.items, depth = job.codes.level_count;
  const SortedCodes sorted(job);
  const int64_t chunks = (items + kRunChunk - 1) / kRunChunk;
  std::vector<int64_t> starts(static_cast<size_t>((chunks + 1) * depth), 0);
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c)
      LIVREC_CALL(prefix_gradient_count, job, c, starts.data() + (c + 1) * depth);
  });
  for (size_t i = static_cast<size_t>(depth); i < starts.size(); ++i)
    starts[i] += starts[i - static_cast<size_t>(depth)];
  const std::vector<int64_t> first(starts);  // chunks move theirs on

  std::vector<LevelSums> runs;
  std::vector<float*> values;
  std::vector<int64_t*> keys;
  int64_t wide = 0, width = 0;
  for (int64_t l = 0; l < depth; ++l) {
    const int64_t count = starts[static_cast<size_t>(chunks * depth + l)];
    const int64_t dim = job.codes.levels[l].dim;
    runs.push_back(
        {empty_cpu({count}, ScalarType::Long), empty_cpu({count, dim}, ScalarType::Float)});
    keys.push_back(runs.back().keys.mutable_data_ptr<int64_t>());
    values.push_back(runs.back().values.mutable_data_ptr<float>());
    wide += dim;
    width = std::max(width, job.codes.levels[l].column + dim);
  }
  std::vector<float> carries(static_cast<size_t>(chunks * wide), 0.0f);
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(static_cast<size_t>(width));
    for (int64_t c = begin; c < end; ++c)
      LIVREC_CALL(prefix_gradient_add, job, c,
                  PrefixRuns{values.data(), keys.data(), carries.data() + c * wide,
                             starts.data() + c * depth},
                  scratch.data());
  });
  for (int64_t c = 1; c < chunks; ++c) {  // in order: the sums do not depend on the threads
    const float* carry = carries.data() + c * wide;
    for (int64_t l = 0; l < depth; carry += job.codes.levels[l++].dim) {
      const int64_t run = first[static_cast<size_t>(c * depth + l)] - 1,
                    dim = job.codes.levels[l].dim;
      for (int64_t d = 0; run >= 0 && d < dim; ++d)
        values[static_cast<size_t>(l)][run * dim + d] += carry[d];
    }
  }
  for (int64_t l = 0; l < depth; ++l)
    runs[static_cast<size_t>(l)] = merged(job.codes.levels[l], runs[static_cast<size_t>(l)]);
  return runs;
}

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
    for (const LevelSums& sums : sums_of(given.of_levels(from, group))) {
      out.push_back(sums.keys);
      out.push_back(sums.values);
    }
    from += group;
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(livrec, CPU, m) {
  m.impl("prefix_ngram_gradient.native", TORCH_BOX(&prefix_ngram_gradient));
}

}  // namespace livrec
