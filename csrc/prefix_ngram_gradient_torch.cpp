#include "prefix_ngram_gradient.h"

#include <mutex>

#include "prefix_torch.h"

namespace livrec {
namespace {

constexpr int64_t kSortChunks = 16;  // a fixed number: the order does not depend on the threads

// The numbers 0 .. count - 1 ordered by `words`, equal ones as they were: a radix sort of eight
// bits at a time, over words of `bits` bits. `order` comes in some order and leaves sorted, as
// words do.
void sort(std::vector<uint64_t>& words, std::vector<uint32_t>& order, int64_t bits) {
  const int64_t count = static_cast<int64_t>(words.size());
  const int64_t chunk = (count + kSortChunks - 1) / kSortChunks;
  std::vector<uint64_t> words_to(words.size());
  std::vector<uint32_t> order_to(words.size());
  std::vector<int64_t> places(kSortChunks * 256);
  for (int64_t shift = 0; shift < bits; shift += 8) {
    const auto each = [&](int64_t c, const auto& visit) {
      const int64_t end = std::min(count, (c + 1) * chunk);
      for (int64_t i = c * chunk; i < end; ++i)
        visit(static_cast<size_t>(i), (words[static_cast<size_t>(i)] >> shift) & 255);
    };
    std::fill(places.begin(), places.end(), 0);
    torch::stable::parallel_for(0, kSortChunks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c)
        each(c, [&](size_t, uint64_t digit) { ++places[static_cast<size_t>(c) * 256 + digit]; });
    });
    int64_t place = 0;
    for (size_t digit = 0; digit < 256; ++digit)
      for (size_t c = 0; c < kSortChunks; ++c) {
        const int64_t size = places[c * 256 + digit];
        places[c * 256 + digit] = place;
        place += size;
      }
    torch::stable::parallel_for(0, kSortChunks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c)
        each(c, [&](size_t i, uint64_t digit) {
          const auto to = static_cast<size_t>(places[static_cast<size_t>(c) * 256 + digit]++);
          words_to[to] = words[i];
          order_to[to] = order[i];
        });
    });
    words.swap(words_to);
    order.swap(order_to);
  }
}

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
  std::vector<int64_t> shifts(static_cast<size_t>(depth));
  int64_t bits = 0;
  for (int64_t l = depth - 1; l >= 0; --l) {
    shifts[static_cast<size_t>(l)] = bits;
    bits += bits_of(job.codes.levels[l].size);
  }
  STD_TORCH_CHECK(bits < 64 && depth <= 63, "levels: codes side by side must fit in 63 bits");
  std::vector<uint64_t> words(static_cast<size_t>(items));
  std::vector<uint8_t> depths(static_cast<size_t>(items));
  FirstBad first_bad;
  torch::stable::parallel_for(0, items, 4096, [&](int64_t begin, int64_t end) {
    first_bad.note(LIVREC_CALL(prefix_gradient_words, job.codes, shifts.data(), begin, end,
                               words.data(), depths.data()));
  });
  check_codes(first_bad);
  std::vector<uint32_t> order(static_cast<size_t>(items));
  std::iota(order.begin(), order.end(), 0u);
  const bool unknown =
      std::any_of(depths.begin(), depths.end(), [&](uint8_t known) { return known < depth; });
  if (unknown) {  // shallow items first, so that they come first among equal words
    std::vector<uint64_t> known(depths.begin(), depths.end());
    sort(known, order, 8);
    std::vector<uint64_t> moved(words.size());
    for (size_t i = 0; i < words.size(); ++i) moved[i] = words[order[i]];
    words.swap(moved);
  }
  sort(words, order, bits);
  job.depths = unknown ? depths.data() : nullptr;
  job.sorted = words.data();
  job.order = order.data();
  job.shifts = shifts.data();

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

// The history of every item.
std::vector<int64_t> histories_of(const Offsets& offsets, int64_t items) {
  std::vector<int64_t> history(static_cast<size_t>(offsets.data ? items : 0));
  for (int64_t h = 0; h < offsets.histories; ++h)
    std::fill(history.begin() + offsets.data[h], history.begin() + offsets.data[h + 1], h);
  return history;
}

std::vector<Tensor> prefix_ngram_gradient(
    const Tensor& grad_given, const Tensor& codes_given, const std::vector<int64_t>& sizes,
    const std::vector<int64_t>& rows, const std::vector<int64_t>& dims, const std::string& mode,
    const Optional& offsets_given, const std::optional<std::string>& pool,
    const std::string& hashing, const std::vector<int64_t>& groups, bool packed) {
  const Levels all(sizes, rows, dims, groups, mode == "sum", hashing);
  const Tensor codes = readable(codes_given, packed, sizes);
  STD_TORCH_CHECK(codes.size(0) <= UINT32_MAX, "codes: at most 2^32 - 1 items");
  const Offsets offsets(offsets_given, codes.size(0));
  const int64_t grad_rows = offsets.data ? offsets.histories : codes.size(0);
  STD_TORCH_CHECK(
      grad_given.dim() == 2 && grad_given.size(0) == grad_rows && grad_given.size(1) == all.width,
      "grad: must have the shape of the lookup");
  const Tensor grad = grad_given.size(1) == 1 || grad_given.stride(1) == 1
                          ? grad_given
                          : torch::stable::contiguous(grad_given);
  const std::vector<int64_t> history = histories_of(offsets, codes.size(0));
  PrefixGradient job{};
  job.grad = grad.const_data_ptr();
  job.grad_type = table_type(grad.scalar_type());
  job.grad_stride = grad.stride(0);
  job.sum = mode == "sum";
  job.history = offsets.data ? history.data() : nullptr;
  job.offsets = pool && *pool == "mean" ? offsets.data : nullptr;
  std::vector<Tensor> out;
  size_t from = 0;
  for (const int64_t group : groups) {
    job.codes = all.codes_of(codes, packed);
    job.codes.levels += from;
    job.codes.level_count = group;
    job.codes.skipped = static_cast<int64_t>(from);
    for (const LevelSums& sums : sums_of(job)) {
      out.push_back(sums.keys);
      out.push_back(sums.values);
    }
    from += static_cast<size_t>(group);
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(livrec, CPU, m) {
  m.impl("prefix_ngram_gradient.native", TORCH_BOX(&prefix_ngram_gradient));
}

}  // namespace livrec
