// What the torch operators of the contrastive loss share: a call that is safe to run, cut into
// chunks.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>

#include "buffers_torch.h"
#include "contrastive.h"
#include "prefix_torch.h"

namespace livrec {

// The arguments of an operator, in its order.
struct ContrastiveArguments {
  const Tensor &query, &key, &temperature;
  bool normalize, symmetric;
  const Optional &query_ids, &key_ids, &group_ids;
  const std::optional<double>& threshold;
  const Optional& pair_vectors;
  bool keep_pairs;
  int64_t keep_products;  // at most
  const Optional& log_q;
  const Text& log_q_rule;
  const Optional &valid, &extra_keys;
  const Text& precision;
};

inline double number_at(const Tensor& x, int64_t at) {
  switch (x.scalar_type()) {
    case ScalarType::Double:
      return x.const_data_ptr<double>()[at];
    case ScalarType::Float:
      return x.const_data_ptr<float>()[at];
    case ScalarType::Half:
      return static_cast<float>(
          static_cast<const torch::headeronly::Half*>(x.const_data_ptr())[at]);
    default:
      break;
  }
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::BFloat16, "temperature, log_q: must be floats");
  return static_cast<float>(
      static_cast<const torch::headeronly::BFloat16*>(x.const_data_ptr())[at]);
}

inline void put_number(const Tensor& x, int64_t at, double value) {
  void* to = x.mutable_data_ptr();
  switch (x.scalar_type()) {
    case ScalarType::Double:
      static_cast<double*>(to)[at] = value;
      return;
    case ScalarType::Float:
      static_cast<float*>(to)[at] = static_cast<float>(value);
      return;
    case ScalarType::Half:
      static_cast<torch::headeronly::Half*>(to)[at] = static_cast<float>(value);
      return;
    default:
      break;
  }
  static_cast<torch::headeronly::BFloat16*>(to)[at] = static_cast<float>(value);
}

// Which tensors' gradients a backward operator is asked for: of those that it is given, in order.
class ContrastiveNeeds {
 public:
  explicit ContrastiveNeeds(const std::vector<bool>& needs) : needs_(needs) {}
  bool next() {
    check(at_ < needs_.size());
    return needs_[at_++];
  }
  bool next(const Optional& given) { return given && next(); }
  void end() const { check(at_ == needs_.size()); }

 private:
  void check(bool fits) const {
    STD_TORCH_CHECK(fits, "needs: must be one bool per tensor that is given, got ", needs_.size());
  }
  const std::vector<bool>& needs_;
  size_t at_ = 0;
};

// Numbers that are equal where ids are: those of columns, -1 past the last.
inline std::vector<int32_t> ranks_of(const Tensor& ids, int64_t padded) {
  const int64_t* from = ids.const_data_ptr<int64_t>();
  std::vector<int64_t> sorted(from, from + ids.numel());
  std::sort(sorted.begin(), sorted.end());
  sorted.erase(std::unique(sorted.begin(), sorted.end()), sorted.end());
  std::vector<int32_t> ranks(static_cast<size_t>(padded), -1);
  for (int64_t i = 0; i < ids.numel(); ++i)
    ranks[static_cast<size_t>(i)] = static_cast<int32_t>(
        std::lower_bound(sorted.begin(), sorted.end(), from[i]) - sorted.begin());
  return ranks;
}

// The positives of rows and of columns, by group: how many, and the sum of their log Q.
struct ContrastiveGroups {
  std::vector<int32_t> of;  // [columns, padded]
  std::vector<int64_t> keys, queries;
  std::vector<double> log_q;
};

constexpr int64_t kMostChunks = 32;   // no more threads have work
constexpr int64_t kChunk = 256;       // columns of a chunk, unless there are many
constexpr int64_t kRowsAtATime = 64;  // of work that is done row by row

class ContrastiveCall;
using ContrastiveCalls = std::vector<const ContrastiveCall*>;  // of terms

class ContrastiveCall {
 public:
  Tensor query, key;
  Optional extra_keys, log_q, valid, pairs;
  TableType type;
  bool normalize, symmetric, unsampled, keeps_pairs, rounds;
  int64_t batch, columns, padded_columns, dim, stride, chunks;
  double temperature;
  Scratch units;                  // of queries, then of all keys: [batch + columns, stride]
  std::vector<float> norms;       // [batch + columns]
  std::vector<double> positives;  // <q_i, k_i>
  Contrastive call{};

  // shared: the first of several terms, whose queries, and what they mask, this one uses; it must
  // outlive it. query_valid: rows whose queries are read, if not those that are valid.
  explicit ContrastiveCall(const ContrastiveArguments& given,
                           const ContrastiveCall* shared = nullptr,
                           const bool* query_valid = nullptr)
      : query(contiguous_of(given.query)),
        key(contiguous_of(given.key)),
        type(float_type(query.scalar_type(), "query")),
        normalize(given.normalize),
        symmetric(given.symmetric),
        unsampled(given.log_q && given.log_q_rule == "unsampled_positive"),
        keeps_pairs(given.threshold && given.keep_pairs),
        rounds(given.precision == "bf16" || type == TableType::bf16),
        batch(query.size(0)),
        columns(batch + (given.extra_keys ? given.extra_keys->size(0) : 0)),
        padded_columns((columns + kTileColumns - 1) / kTileColumns * kTileColumns),
        dim(query.size(1)),
        stride(LIVREC_CALL_AMX(contrastive_stride, dim)),
        chunks(std::clamp<int64_t>((columns + kChunk - 1) / kChunk, 1, kMostChunks)),
        temperature(given.temperature.numel() == 1 ? number_at(given.temperature, 0) : NAN),
        units(((shared ? 0 : batch) + columns) * stride * 4),
        norms(static_cast<size_t>(batch + columns)),
        positives(static_cast<size_t>(batch)),
        shared_(shared) {
    check(given);
    if (given.extra_keys) extra_keys = contiguous_of(*given.extra_keys);
    if (given.valid) valid = contiguous_of(*given.valid);
    if (given.log_q) log_q = contiguous_of(*given.log_q);
    call.dim = dim, call.stride = stride;
    call.kept_rows = std::min(batch, given.keep_products / std::max<int64_t>(columns, 1));
    call.per_temperature = static_cast<float>(1.0 / temperature);
    if (call.per_temperature > 1.0 / temperature)
      call.per_temperature = std::nextafter(call.per_temperature, 0.0f);
    call.rest = std::max(static_cast<float>(1.0 / temperature - call.per_temperature),
                         std::numeric_limits<float>::min());
    call.queries = {units_of(0), batch, nullptr, nullptr};
    call.keys = {units_of(batch), columns, nullptr, nullptr};
    call.valid = valid ? valid->const_data_ptr<bool>() : nullptr;
    fill_biases();
    number_ids(given);
    query_valid_ = query_valid ? query_valid : call.valid;
    make_units();
    if (rounds && LIVREC_CALL_AMX(contrastive_packs)) pack_units();
    if (given.threshold && !shared_) make_similar(given);
  }

  float* units_of(int64_t row) const {
    if (shared_ && row < batch) return shared_->units_of(row);
    return static_cast<float*>(units.data()) + (shared_ ? row - batch : row) * stride;
  }
  bool counts(int64_t row) const { return call.valid == nullptr || call.valid[row]; }
  double log_q_of(int64_t column) const {
    return log_q && column < log_q->size(0) && (column >= batch || counts(column))
               ? number_at(*log_q, column)
               : 0.0;
  }
  // s_ii, of the row's own loss or of the column's.
  double positive(int64_t row, bool of_column) const {
    const double scaled = positives[static_cast<size_t>(row)] / temperature;
    return of_column || unsampled ? scaled : scaled - log_q_of(row);
  }
  bool has_groups() const { return call.groups != nullptr; }
  // How many positives a valid row or column has.
  double positives_of(int64_t row, bool of_column) const {
    if (!has_groups()) return 1.0;
    const auto group = static_cast<size_t>(groups_.of[static_cast<size_t>(row)]);
    return static_cast<double>((of_column ? groups_.queries : groups_.keys)[group]);
  }
  // The mean of their logits, from the sum of the products of all but the own one.
  double mean_positive(int64_t row, bool of_column, double others) const {
    if (!has_groups()) return positive(row, of_column);
    const auto group = static_cast<size_t>(groups_.of[static_cast<size_t>(row)]);
    const double sum = (others + positives[static_cast<size_t>(row)]) / temperature;
    return (of_column ? sum : sum - groups_.log_q[group]) / positives_of(row, of_column);
  }
  int64_t space(int64_t terms = 1) const {
    return LIVREC_CALL_AMX(contrastive_space, dim, call.similar_dim, terms);
  }
  // Of the bits that are kept for the gradient, [rows, words].
  std::array<int64_t, 2> kept_shape() const {
    return keeps_pairs ? std::array<int64_t, 2>{batch, call.words} : std::array<int64_t, 2>{0, 0};
  }
  // Likewise of the masked products.
  std::array<int64_t, 2> products_shape() const { return {call.kept_rows, columns}; }
  int64_t kept_sums() const { return 1 + symmetric + unsampled; }

  // Bits of false negatives, kept for both passes.
  void find_pairs(const Tensor& found) {
    auto* bits = reinterpret_cast<uint64_t*>(found.mutable_data_ptr<int64_t>());
    const int64_t rows = (batch + kPairsBlock - 1) / kPairsBlock,
                  blocks = (call.similar.count + kPairsBlock - 1) / kPairsBlock;
    std::vector<std::pair<int64_t, int64_t>> tasks;
    for (int64_t block = 0; block < blocks; ++block)
      for (int64_t above = 0; above <= block && above < rows; ++above)
        tasks.emplace_back(above, block);
    torch::stable::parallel_for(
        0, static_cast<int64_t>(tasks.size()), 1, [&](int64_t begin, int64_t end) {
          Buffer scratch;
          float* scratched = scratch.of(space());
          for (int64_t t = begin; t < end; ++t) {
            const auto [above, block] = tasks[static_cast<size_t>(t)];
            LIVREC_CALL_AMX(contrastive_pairs, call, above, block, bits, scratched);
          }
        });
    use_pairs(found);
  }
  void use_pairs(const Tensor& found) {
    pairs = found;
    call.pairs = reinterpret_cast<const uint64_t*>(found.const_data_ptr<int64_t>());
    call.finds_similar = false;
  }

  // Runs on every part of the terms' logits, so that no two at a time share rows or columns, and
  // those that do come in one order: run(terms, part, scratch).
  template <typename Run>
  static void each_part(const ContrastiveCalls& calls, const Run& run) {
    std::vector<Contrastive> terms;
    for (const ContrastiveCall* called : calls) terms.push_back(called->call);
    const auto count = static_cast<int64_t>(terms.size());
    calls[0]->each_part(count, [&](const ContrastivePart& part, float* scratch) {
      run(ContrastiveTerms{terms.data(), count}, part, scratch);
    });
  }
  template <typename Run>
  static void each_rows(int64_t count, const Run& run) {
    const int64_t blocks = (count + kRowsAtATime - 1) / kRowsAtATime;
    torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      run(begin * kRowsAtATime, std::min(count, end * kRowsAtATime));
    });
  }

 private:
  template <typename Run>
  void each_part(int64_t terms, const Run& run) const {
    const int64_t panels = (columns + kPanel - 1) / kPanel;
    for (int64_t phase = 0; phase < chunks && batch > 0; ++phase)
      torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
        Buffer scratch;
        float* scratched = scratch.of(space(terms));
        for (int64_t t = begin; t < end; ++t) {
          const int64_t of = (t + phase) % chunks, row = first_row(t),
                        first = of * panels / chunks * kPanel,
                        last = std::min(columns, (of + 1) * panels / chunks * kPanel);
          run(ContrastivePart{row, first_row(t + 1) - row, first, last - first}, scratched);
        }
      });
  }
  int64_t first_row(int64_t chunk) const {  // an even one, as rows may come in pairs
    return chunk == chunks ? batch : chunk * batch / chunks / 2 * 2;
  }

  void check(const ContrastiveArguments& given) const {
    STD_TORCH_CHECK(temperature > 0 && std::isfinite(temperature),
                    "temperature: must be one number, positive and finite");
    STD_TORCH_CHECK(query.dim() == 2 && key.dim() == 2 && key.size(0) == batch &&
                        key.size(1) == dim && key.scalar_type() == query.scalar_type() &&
                        (!given.extra_keys ||
                         (given.extra_keys->dim() == 2 && given.extra_keys->size(1) == dim &&
                          given.extra_keys->scalar_type() == query.scalar_type())),
                    "query, key, extra_keys: must be [B, D], [B, D] and [E, D] of one dtype");
    STD_TORCH_CHECK(
        !given.pair_vectors ||
            (given.pair_vectors->dim() == 2 &&
             given.pair_vectors->scalar_type() == query.scalar_type() &&
             (given.pair_vectors->size(0) == batch || given.pair_vectors->size(0) == columns)),
        "pair_vectors: must be [B, P] or [B + E, P] of query's dtype");
    STD_TORCH_CHECK(!unsampled || !given.group_ids,
                    "log_q_rule: 'unsampled_positive' is of one positive a row");
    const auto fits = [&](const Optional& x, bool extras, ScalarType wanted) {
      return !x || (x->dim() == 1 && x->scalar_type() == wanted &&
                    (x->size(0) == batch || (extras && x->size(0) == columns)));
    };
    const ScalarType wide = given.log_q ? given.log_q->scalar_type() : ScalarType::Float;
    STD_TORCH_CHECK(fits(given.query_ids, true, ScalarType::Long) &&
                        fits(given.key_ids, true, ScalarType::Long) &&
                        fits(given.group_ids, true, ScalarType::Long) &&
                        fits(given.valid, false, ScalarType::Bool) && fits(given.log_q, true, wide),
                    "query_ids, key_ids, group_ids, log_q, valid: must be [B], or [B + E]");
  }

  void fill_biases() {
    row_bias_.assign(static_cast<size_t>(padded_columns), -INFINITY);
    if (symmetric) column_bias_ = row_bias_;
    for (int64_t j = 0; j < columns; ++j) {
      if (j < batch && !counts(j)) continue;
      const auto at = static_cast<size_t>(j);
      row_bias_[at] = static_cast<float>(-log_q_of(j));
      STD_TORCH_CHECK(std::isfinite(row_bias_[at]), "log_q: must be finite");
      STD_TORCH_CHECK(!unsampled || j >= batch || log_q_of(j) < 0, "log_q: must be negative");
      if (symmetric && j < batch) column_bias_[at] = 0.0f;
    }
    call.row_bias = row_bias_.data();
    call.column_bias = symmetric ? column_bias_.data() : nullptr;
  }

  void number_ids(const ContrastiveArguments& given) {
    const auto number = [&](const Optional& ids, std::vector<int32_t>& held,
                            const int32_t*& of_rows, const int32_t*& of_columns) {
      if (!ids) return;
      held = ranks_of(contiguous_of(*ids), padded_columns);
      of_rows = of_columns = held.data();
    };
    if (!shared_) number(given.query_ids, query_ids_, call.row_query_ids, call.query_ids);
    number(given.key_ids, key_ids_, call.row_key_ids, call.key_ids);
    number(given.group_ids, groups_.of, call.row_groups, call.groups);
    if (given.group_ids) count_groups(given.group_ids->size(0));
  }

  void count_groups(int64_t numbered) {
    groups_.keys.assign(static_cast<size_t>(numbered), 0);
    groups_.queries = groups_.keys;
    groups_.log_q.assign(static_cast<size_t>(numbered), 0.0);
    for (int64_t j = 0; j < numbered; ++j) {
      int32_t& group = groups_.of[static_cast<size_t>(j)];
      if (j < batch && !counts(j)) {
        group = -1;
        continue;
      }
      const auto at = static_cast<size_t>(group);
      groups_.keys[at] += 1;
      groups_.queries[at] += j < batch;
      groups_.log_q[at] += log_q_of(j);
    }
  }

  void make_units() {
    const auto make = [&](const Tensor& x, int64_t first, const bool* of_valid) {
      each_rows(x.size(0), [&](int64_t begin, int64_t end) {
        widen(x, begin, end, normalize, rounds ? TableType::bf16 : type, of_valid,
              units_of(first + begin), stride, norms.data() + first + begin);
      });
    };
    if (shared_)
      std::copy_n(shared_->norms.begin(), batch, norms.begin());
    else
      make(query, 0, query_valid_);
    make(key, batch, call.valid);
    if (extra_keys) make(*extra_keys, 2 * batch, nullptr);
    each_rows(batch, [&](int64_t begin, int64_t end) {
      LIVREC_CALL_AMX(contrastive_products, units_of(begin), units_of(batch + begin), end - begin,
                      dim, stride, positives.data() + begin);
    });
  }

  // Rows to units that are rounded to `rounded`, where it is of 16 bits; of valid rows, if not
  // null.
  void widen(const Tensor& x, int64_t begin, int64_t end, bool to_unit, TableType rounded,
             const bool* of_valid, float* out, int64_t apart, float* divisors) const {
    const int64_t width = x.size(1);
    const auto* from = static_cast<const char*>(x.const_data_ptr()) +
                       begin * width * static_cast<int64_t>(x.element_size());
    LIVREC_CALL_AMX(contrastive_units, from, type, to_unit, rounded,
                    of_valid != nullptr ? of_valid + begin : nullptr, end - begin, width, apart,
                    out, divisors);
  }

  void pack_units() {
    call.words_stride = LIVREC_CALL_AMX(contrastive_stride, (dim + 1) / 2);
    const auto pack = [&](ContrastiveSide& side, std::unique_ptr<Scratch>& held) {
      const int64_t words = (side.count + 15) * call.words_stride,  // rows are read by tiles
          paired = (side.count + 1) / 2 * stride, past = 16 * stride;
      held = std::make_unique<Scratch>((words + paired + past) * 4);
      auto* out = static_cast<float*>(held->data());
      std::fill_n(out + words + paired, past, 0.0f);
      each_rows(side.count, [&](int64_t begin, int64_t end) {
        LIVREC_CALL_AMX(contrastive_pack, side.units, begin, end, stride, out, call.words_stride,
                        out + words);
      });
      side.words = out, side.paired = out + words;
    };
    if (shared_)
      call.queries = shared_->call.queries;
    else
      pack(call.queries, packed_queries_);
    pack(call.keys, packed_keys_);
  }

  // Units in float32, whatever the dtype, the precision and whether `normalize`.
  void make_similar(const ContrastiveArguments& given) {
    const Tensor vectors = given.pair_vectors ? contiguous_of(*given.pair_vectors) : query;
    const int64_t count = vectors.size(0);
    call.threshold = static_cast<float>(*given.threshold);
    call.similar = {units_of(0), count, nullptr, nullptr}, call.finds_similar = true;
    call.words = (count + kPairsPerWord - 1) / kPairsPerWord;
    call.similar_dim = vectors.size(1);
    call.similar_stride = LIVREC_CALL_AMX(contrastive_stride, call.similar_dim);
    if (!given.pair_vectors && normalize && type == TableType::f32 && !rounds) return;
    const int64_t apart = call.similar_stride;
    similar_ = std::make_unique<Scratch>((count + 1) * apart * 4);  // one past the last is read
    auto* out = static_cast<float*>(similar_->data());
    const auto make = [&](int64_t first, int64_t last, const bool* of_valid) {
      each_rows(last - first, [&](int64_t begin, int64_t end) {
        widen(vectors, first + begin, first + end, true, TableType::f32, of_valid,
              out + (first + begin) * apart, apart, nullptr);
      });
    };
    make(0, batch, query_valid_);
    make(batch, count, nullptr);
    call.similar.units = out;
  }

  std::vector<float> row_bias_, column_bias_;
  std::vector<int32_t> query_ids_, key_ids_;
  ContrastiveGroups groups_;
  const ContrastiveCall* shared_;
  const bool* query_valid_ = nullptr;
  std::unique_ptr<Scratch> similar_, packed_queries_, packed_keys_;
};

}  // namespace livrec
