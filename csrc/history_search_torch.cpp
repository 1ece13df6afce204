#include "history_search_torch.h"

#include <cmath>
#include <iterator>
#include <tuple>

#include "buffers_torch.h"
#include "code_fields_torch.h"

namespace livrec {
namespace {

constexpr int64_t kLeastChunk = 4096;  // items that are worth a task of their own

// Whether all numbers of a tensor are finite.
bool all_finite(const Tensor& given) {
  const Tensor x = contiguous_of(given);
  std::atomic<bool> odd{false};
  const bool wide = x.scalar_type() == ScalarType::Float;
  const void* data = x.const_data_ptr();
  const uint16_t exponent = x.scalar_type() == ScalarType::Half ? 0x7c00 : 0x7f80;
  torch::stable::parallel_for(0, x.numel(), 1 << 16, [&](int64_t begin, int64_t end) {
    bool found = false;
    if (wide)
      for (int64_t i = begin; i < end; ++i)
        found |= (static_cast<const uint32_t*>(data)[i] & 0x7f800000u) == 0x7f800000u;
    else
      for (int64_t i = begin; i < end; ++i)
        found |= (static_cast<const uint16_t*>(data)[i] & exponent) == exponent;
    if (found) odd = true;
  });
  return !odd;
}

// A search: what is asked for, and where the answers go.
struct Search {
  Tensor query, scores, positions;
  Offsets offsets;
  SearchMasks masks;
  TableType type;
  int64_t users, candidates, dim, k;

  Search(const Tensor& query_given, const Tensor& offsets_given, int64_t items, int64_t count,
         SearchMasks given_masks)
      : query(contiguous_of(query_given)),
        scores(empty_cpu({query.size(0), query.size(1), count}, ScalarType::Float)),
        positions(empty_cpu({query.size(0), query.size(1), count}, ScalarType::Long)),
        offsets(offsets_given, items),
        masks(std::move(given_masks)),
        type(float_type(query.scalar_type(), "query")),
        users(query.size(0)),
        candidates(query.size(1)),
        dim(query.size(2)),
        k(count) {
    STD_TORCH_CHECK(offsets.histories == users && k > 0, "offsets: must be [B + 1]; k: positive");
    STD_TORCH_CHECK(items < UINT32_MAX, "offsets: at most 2^32 - 2 items");
  }

  int64_t length(int64_t user) const { return offsets.data[user + 1] - offsets.data[user]; }
  const void* query_of(int64_t user) const {
    const auto* bytes = static_cast<const char*>(query.const_data_ptr());
    return bytes + user * candidates * dim * static_cast<int64_t>(query.element_size());
  }
};

// Scores of dense keys.
class DenseScores {
 public:
  DenseScores(const Search& search, const Tensor& keys) : search_(search), held_(keys) {
    keys_ = {held_.const_data_ptr(), search.type, held_.stride(0), search.dim};
  }
  void begin(int64_t user, int64_t, int64_t, FirstBad&) {
    const int64_t count = search_.candidates * search_.dim;
    float* query = query_.of(count);
    LIVREC_CALL(code_widen, search_.query_of(user), search_.type, search_.candidates, search_.dim,
                search_.dim, query);
    shape = LIVREC_CALL(code_shape, search_.candidates, 1, 1);
  }
  void candidates_from(int64_t first) {
    LIVREC_CALL(search_lanes, shape, query_.of(0), search_.candidates, search_.dim, first,
                lanes_.of(shape.width() * search_.dim));
  }
  void score(int64_t begin, int64_t end, float* scores) {
    LIVREC_CALL(search_dense, shape, keys_, lanes_.of(0), begin, end, rows_.of(8 * search_.dim),
                scores);
  }
  CodeShape shape{};

 private:
  const Search& search_;
  const Tensor held_;
  SearchKeys keys_;
  Buffer query_, lanes_, rows_;
};

// Scores of sums of rows that codes name.
class CodeScores {
 public:
  CodeScores(const Search& search, const Codes& codes, const std::vector<const void*>& tables)
      : search_(search), codes_(codes), tables_(tables) {}

  void begin(int64_t user, int64_t from, int64_t to, FirstBad& first_bad) {
    history_.read(codes_, from, to, false, first_bad);
    rows_ = history_.rows(), from_ = from;
    shape = LIVREC_CALL(code_shape, search_.candidates, 1, rows_.slot_count);
    padded_ = (search_.dim + shape.pad - 1) / shape.pad * shape.pad;
    LIVREC_CALL(code_widen, search_.query_of(user), search_.type, search_.candidates, search_.dim,
                padded_, query_.of(search_.candidates * padded_));
    gathered_.resize(static_cast<size_t>(history_.distinct()));
    LIVREC_CALL(code_gather, tables_.data(), search_.type, rows_, 1, search_.dim, padded_,
                space_.of((history_.distinct() + 1) * padded_), gathered_.data());
  }
  void candidates_from(int64_t first) {
    block_ = CodeBlock{&rows_,
                       1,
                       search_.candidates,
                       first,
                       shape,
                       1,
                       products_.of(rows_.slot_count * shape.width()),
                       nullptr,
                       true,
                       nullptr,
                       0};
    float* lanes = lanes_.of(LIVREC_CALL(code_lane_space, block_, padded_));
    LIVREC_CALL(code_products, block_, 0, gathered_.data(), query_.of(0), padded_, 1.0f, nullptr,
                nullptr, lanes);
  }
  void score(int64_t begin, int64_t end, float* scores) {
    LIVREC_CALL(search_codes, block_, begin - from_, end - from_, scores);
  }
  CodeShape shape{};

 private:
  const Search& search_;
  const Codes codes_;
  const std::vector<const void*>& tables_;
  HistoryRows history_;
  CodeRows rows_{};
  CodeBlock block_{};
  int64_t from_ = 0, padded_ = 0;
  std::vector<const float*> gathered_;
  Buffer query_, space_, products_, lanes_;
};

// Items of a user's history, scored for a block of candidates and shown to those who keep the best.
template <typename Scores>
class Shown {
 public:
  Shown(const Search& search, Scores& scores, int64_t user)
      : search_(search),
        scores_(scores),
        width_(scores.shape.width()),
        shift_(__builtin_ctzll(static_cast<uint64_t>(width_))),
        first_candidate_(user * search.candidates),
        start_(search.offsets.data[user]),
        block_(block_space_.of(kSearchBlock * width_)),
        least_(least_space_.of(width_)) {}

  // Of items [from, to) the last `most` of every kSearchBlock, the latest first, to those of
  // candidates [first, first + best.size()) who want to see them. Returns whether any score is odd.
  bool show(int64_t from, int64_t to, int64_t most, int64_t first, std::vector<TopK>& best,
            const std::vector<bool>& wanting) {
    bool odd = false;
    for (int64_t end = to; end > from; end -= kSearchBlock)
      odd |= block(std::max(from, end - most), end, first, best, wanting);
    return odd;
  }

 private:
  bool block(int64_t begin, int64_t end, int64_t first, std::vector<TopK>& best,
             const std::vector<bool>& wanting) {
    const auto count = static_cast<int64_t>(best.size());
    for (int64_t w = 0; w < width_; ++w) {
      const auto c = static_cast<size_t>(w);
      least_[w] = w < count && wanting[c] ? best[c].least() : INFINITY;
    }
    scores_.score(begin, end, block_);
    const bool odd = LIVREC_CALL(search_above, scores_.shape, block_, end - begin, least_, marks_);
    for (TopK& one : best) one.expect(end - begin);
    const int64_t bits = (end - begin) * width_;
    for (int64_t word = (bits + 63) / 64 - 1; word >= 0; --word)
      for (uint64_t marks = marks_[word]; marks != 0;) {
        const int64_t bit = 63 - __builtin_clzll(marks), at = word * 64 + bit;
        marks ^= uint64_t{1} << bit;
        const int64_t item = begin + (at >> shift_), w = at & (width_ - 1);
        if (!search_.masks.any() || search_.masks.may(item, first_candidate_ + first + w))
          best[static_cast<size_t>(w)].show(block_[at], item - start_);
      }
    for (TopK& one : best) one.settle();
    return odd;
  }

  const Search& search_;
  Scores& scores_;
  const int64_t width_, shift_;  // candidates of a block: a power of two
  const int64_t first_candidate_, start_;
  Buffer block_space_, least_space_;
  float *const block_, *const least_;
  uint64_t marks_[kSearchBlock];
};

// The best `wanted` of items [from, to) for each of `count` candidates from `first` on.
template <typename Scores>
std::vector<TopK> best_of(Shown<Scores>& shown, int64_t from, int64_t to, int64_t first,
                          int64_t count, int64_t wanted, bool sampled, bool& odd) {
  std::vector<TopK> best(static_cast<size_t>(count), TopK(wanted));
  std::vector<bool> wanting(best.size(), true);
  if (sampled && to - from >= 4 * (wanted + kSearchBlock)) {
    // The best of the sample at this rank is almost surely below the best that are wanted.
    const double expected = static_cast<double>(wanted) * kSearchSample / kSearchBlock;
    const auto rank = static_cast<int64_t>(expected + 4 * std::sqrt(expected) + 4);
    std::vector<TopK> sample(best.size(), TopK(rank));
    shown.show(from, to, kSearchSample, first, sample, wanting);
    for (size_t c = 0; c < best.size(); ++c) best[c].start_from(sample[c].last());
    odd |= shown.show(from, to, kSearchBlock, first, best, wanting);
    for (size_t c = 0; c < best.size(); ++c)
      if ((wanting[c] = best[c].found() < wanted)) best[c] = TopK(wanted);
    if (std::none_of(wanting.begin(), wanting.end(), [](bool one) { return one; })) return best;
  }
  odd |= shown.show(from, to, kSearchBlock, first, best, wanting);
  return best;
}

// The best of items [from, to) of a user's history, candidate by candidate.
template <typename Scores>
std::vector<TopK> best_of(const Search& search, Scores& scores, int64_t user, int64_t from,
                          int64_t to, FirstBad& first_bad, std::atomic<bool>& odd) {
  const int64_t wanted = std::min(search.k, search.length(user));
  if (from == to || search.candidates == 0)
    return std::vector<TopK>(static_cast<size_t>(search.candidates), TopK(wanted));
  std::vector<TopK> best;
  scores.begin(user, from, to, first_bad);
  Shown<Scores> shown(search, scores, user);
  bool strange = false;
  for (int64_t first = 0; first < search.candidates; first += scores.shape.width()) {
    scores.candidates_from(first);
    const int64_t count = std::min(search.candidates - first, scores.shape.width());
    auto some = best_of(shown, from, to, first, count, wanted, !search.masks.any(), strange);
    std::move(some.begin(), some.end(), std::back_inserter(best));
  }
  if (strange) odd = true;
  return best;
}

// Runs the search; returns whether any score was odd. A history is shared by several threads where
// users are fewer than they: the best are the best, however it is cut.
template <typename MakeScores>
bool run(Search& search, const MakeScores& make, FirstBad& first_bad) {
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t share =
      search.users >= 2 * threads ? 1 : 2 * threads / std::max<int64_t>(search.users, 1);
  std::vector<std::pair<int64_t, int64_t>> tasks;  // a user and the end of a part of its history
  for (int64_t user = 0; user < search.users; ++user) {
    const int64_t length = search.length(user);
    const int64_t parts = std::clamp<int64_t>(length / kLeastChunk, 1, share);
    for (int64_t part = 1; part <= parts; ++part)
      tasks.emplace_back(user, search.offsets.data[user] + length * part / parts);
  }
  const auto count = static_cast<int64_t>(tasks.size());
  std::vector<std::vector<TopK>> parts(tasks.size());
  std::atomic<bool> odd{false};
  const auto finish = [&](int64_t user, std::vector<TopK>& best) {
    for (int64_t c = 0; c < search.candidates; ++c) {
      TopK& own = best[static_cast<size_t>(c)];
      const int64_t at = (user * search.candidates + c) * search.k;
      own.write(search.k, search.scores.mutable_data_ptr<float>() + at,
                search.positions.mutable_data_ptr<int64_t>() + at);
    }
    best.clear();
  };
  const auto alone = [&](int64_t t) {
    const auto same = [&](int64_t other) {
      return other >= 0 && other < count &&
             tasks[static_cast<size_t>(other)].first == tasks[static_cast<size_t>(t)].first;
    };
    return !same(t - 1) && !same(t + 1);
  };
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    auto scores = make();
    for (int64_t t = begin; t < end; ++t) {
      const auto [user, to] = tasks[static_cast<size_t>(t)];
      const bool starts = t == 0 || tasks[static_cast<size_t>(t) - 1].first != user;
      const int64_t from =
          starts ? search.offsets.data[user] : tasks[static_cast<size_t>(t) - 1].second;
      parts[static_cast<size_t>(t)] = best_of(search, scores, user, from, to, first_bad, odd);
      if (alone(t)) finish(user, parts[static_cast<size_t>(t)]);
    }
  });
  for (int64_t t = 0; t < count;) {
    std::vector<TopK>& best = parts[static_cast<size_t>(t)];
    const int64_t user = tasks[static_cast<size_t>(t)].first;
    const bool done = alone(t);
    for (++t; t < count && tasks[static_cast<size_t>(t)].first == user; ++t)
      for (size_t c = 0; c < best.size(); ++c) best[c].take(parts[static_cast<size_t>(t)][c]);
    if (!done) finish(user, best);
  }
  return odd;
}

using Found = std::tuple<Tensor, Tensor>;

Found history_search(const Tensor& query, const Tensor& keys_given, const Tensor& offsets,
                     int64_t k, const Optional& item_ids, const Optional& query_ids,
                     const Optional& item_bits, const Optional& required_bits,
                     const Optional& item_times, const Optional& since, const Optional& until) {
  STD_TORCH_CHECK(query.dim() == 3 && keys_given.dim() == 2 &&
                      keys_given.size(1) == query.size(2) &&
                      keys_given.scalar_type() == query.scalar_type(),
                  "keys: must be [T, D] of query's dtype, query [B, C, D]");
  const Tensor keys =
      keys_given.size(1) == 1 || keys_given.stride(1) == 1 ? keys_given : contiguous_of(keys_given);
  const int64_t items = keys.size(0), asked = query.size(0) * query.size(1);
  Search search(query, offsets, items, k,
                SearchMasks(item_ids, query_ids, item_bits, required_bits, item_times, since, until,
                            items, asked));
  FirstBad none;
  const bool odd = run(search, [&] { return DenseScores(search, keys); }, none);
  STD_TORCH_CHECK(!(odd || asked == 0) || (all_finite(query) && all_finite(keys)),
                  "query, keys: must be finite");
  return {search.scores, search.positions};
}

Found history_search_codes(const Tensor& query, const Tensor& codes_given,
                           const std::vector<Tensor>& tables_given, const Tensor& offsets,
                           int64_t k, const Optional& item_ids, const Optional& query_ids,
                           const Optional& item_bits, const Optional& required_bits,
                           const Optional& item_times, const Optional& since, const Optional& until,
                           const std::vector<int64_t>& sizes, const std::vector<int64_t>& groups,
                           const Text& hashing, bool packed) {
  STD_TORCH_CHECK(query.dim() == 3 && tables_given.size() == sizes.size(),
                  "tables: must be one per level, for query [B, C, D]");
  std::vector<Tensor> held;
  std::vector<const void*> tables;
  std::vector<int64_t> rows;
  for (const Tensor& table : tables_given) {
    STD_TORCH_CHECK(table.dim() == 2 && table.size(1) == query.size(2) &&
                        table.scalar_type() == query.scalar_type(),
                    "tables: must be [N, D] of query's dtype");
    held.push_back(contiguous_of(table));
    tables.push_back(held.back().const_data_ptr());
    rows.push_back(table.size(0));
    STD_TORCH_CHECK(all_finite(held.back()), "tables: must be finite");
  }
  STD_TORCH_CHECK(all_finite(query), "query: must be finite");
  const Levels levels(sizes, rows, std::vector<int64_t>(sizes.size(), 1), groups, true, hashing);
  const Tensor codes_held = readable(codes_given, packed, sizes);
  const Codes codes = levels.codes_of(codes_held, packed);
  Search search(query, offsets, codes.items, k,
                SearchMasks(item_ids, query_ids, item_bits, required_bits, item_times, since, until,
                            codes.items, query.size(0) * query.size(1)));
  FirstBad first_bad;
  run(search, [&] { return CodeScores(search, codes, tables); }, first_bad);
  check_codes(first_bad);
  return {search.scores, search.positions};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(livrec, CPU, m) {
  m.impl("history_search.native", TORCH_BOX(&history_search));
  m.impl("history_search_codes.native", TORCH_BOX(&history_search_codes));
}

}  // namespace livrec
