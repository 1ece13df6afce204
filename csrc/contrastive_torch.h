// What the torch operators of the contrastive loss share: a call that is safe to run, cut into
// chunks.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "buffers_torch.h"
#include "contrastive.h"
#include "prefix_torch.h"

namespace livrec {

// The arguments of an operator, in its order.
struct ContrastiveArguments {
  const Tensor &query, &key, &temperature;
  bool normalize, symmetric;
  const Optional &query_ids, &key_ids;
  const std::optional<double>& threshold;
  const Optional &log_q, &valid, &extra_keys;
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

constexpr int64_t kMostChunks = 32;   // no more threads have work
constexpr int64_t kChunk = 256;       // columns of a chunk, unless there are many
constexpr int64_t kRowsAtATime = 64;  // of work that is done row by row

class ContrastiveCall {
 public:
  Tensor query, key;
  Optional extra_keys, log_q, valid, pairs;
  TableType type;
  bool normalize, symmetric;
  int64_t batch, columns, padded_columns, dim, stride, chunks;
  double temperature;
  Scratch units;                  // of queries, then of all keys: [batch + columns, stride]
  std::vector<float> norms;       // [batch + columns]
  std::vector<double> positives;  // <q_i, k_i>
  Contrastive call{};

  explicit ContrastiveCall(const ContrastiveArguments& given)
      : query(torch::stable::contiguous(given.query)),
        key(torch::stable::contiguous(given.key)),
        type(table_type(query.scalar_type())),
        normalize(given.normalize),
        symmetric(given.symmetric),
        batch(query.size(0)),
        columns(batch + (given.extra_keys ? given.extra_keys->size(0) : 0)),
        padded_columns((columns + kTileColumns - 1) / kTileColumns * kTileColumns),
        dim(query.size(1)),
        stride(LIVREC_CALL(contrastive_stride, dim)),
        chunks(std::clamp<int64_t>((columns + kChunk - 1) / kChunk, 1, kMostChunks)),
        temperature(number_at(given.temperature, 0)),
        units((batch + columns) * stride * 4),
        norms(static_cast<size_t>(batch + columns)),
        positives(static_cast<size_t>(batch)) {
    check(given);
    if (given.extra_keys) extra_keys = torch::stable::contiguous(*given.extra_keys);
    if (given.valid) valid = torch::stable::contiguous(*given.valid);
    if (given.log_q) log_q = torch::stable::contiguous(*given.log_q);
    call.dim = dim, call.stride = stride;
    call.per_temperature = static_cast<float>(1.0 / temperature);
    if (call.per_temperature > 1.0 / temperature)
      call.per_temperature = std::nextafter(call.per_temperature, 0.0f);
    call.rest = std::max(static_cast<float>(1.0 / temperature - call.per_temperature),
                         std::numeric_limits<float>::min());
    call.queries = {units_of(0), batch}, call.keys = {units_of(batch), columns};
    call.valid = valid ? valid->const_data_ptr<bool>() : nullptr;
    fill_biases();
    number_ids(given);
    make_units();
    if (given.threshold) make_similar(static_cast<float>(*given.threshold));
  }

  float* units_of(int64_t row) const { return static_cast<float*>(units.data()) + row * stride; }
  bool counts(int64_t row) const { return call.valid == nullptr || call.valid[row]; }
  double log_q_of(int64_t column) const {
    return log_q && column < log_q->size(0) && (column >= batch || counts(column))
               ? number_at(*log_q, column)
               : 0.0;
  }
  // s_ii, of the row's own loss or of the column's.
  double positive(int64_t row, bool of_column) const {
    const double scaled = positives[static_cast<size_t>(row)] / temperature;
    return of_column ? scaled : scaled - log_q_of(row);
  }

  // Bits of false negatives, kept for both passes.
  void find_pairs(const Tensor& found) {
    auto* bits = reinterpret_cast<uint64_t*>(found.mutable_data_ptr<int64_t>());
    const int64_t words = (batch + kPairsPerWord - 1) / kPairsPerWord,
                  blocks = (batch + kPairsBlock - 1) / kPairsBlock;
    std::vector<std::pair<int64_t, int64_t>> tasks;
    for (int64_t block = 0; block < blocks; ++block)
      for (int64_t above = 0; above <= block; ++above) tasks.emplace_back(above, block);
    torch::stable::parallel_for(0, static_cast<int64_t>(tasks.size()), 1,
                                [&](int64_t begin, int64_t end) {
                                  Buffer scratch;
                                  float* space = scratch.of(LIVREC_CALL(contrastive_space, dim));
                                  for (int64_t t = begin; t < end; ++t) {
                                    const auto [above, block] = tasks[static_cast<size_t>(t)];
                                    LIVREC_CALL(contrastive_pairs, call.similar, dim, stride,
                                                call.threshold, above, block, words, bits, space);
                                  }
                                });
    use_pairs(found);
  }
  void use_pairs(const Tensor& found) {
    pairs = found;
    call.pairs = reinterpret_cast<const uint64_t*>(found.const_data_ptr<int64_t>());
    call.words = (batch + kPairsPerWord - 1) / kPairsPerWord;
    call.similar = {nullptr, 0};
  }

  // Runs on every part of the logits, so that no two at a time share rows or columns, and those
  // that do come in one order.
  template <typename Run>
  void each_part(const Run& run) const {
    const int64_t panels = (columns + kPanel - 1) / kPanel;
    for (int64_t phase = 0; phase < chunks && batch > 0; ++phase)
      torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
        Buffer scratch;
        float* space = scratch.of(LIVREC_CALL(contrastive_space, dim));
        for (int64_t t = begin; t < end; ++t) {
          const int64_t of = (t + phase) % chunks, row = t * batch / chunks,
                        first = of * panels / chunks * kPanel,
                        last = std::min(columns, (of + 1) * panels / chunks * kPanel);
          run(ContrastivePart{row, (t + 1) * batch / chunks - row, first, last - first}, space);
        }
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
  void check(const ContrastiveArguments& given) const {
    STD_TORCH_CHECK(temperature > 0 && std::isfinite(temperature),
                    "temperature: must be positive and finite");
    STD_TORCH_CHECK(query.dim() == 2 && key.dim() == 2 && key.size(0) == batch &&
                        key.size(1) == dim && key.scalar_type() == query.scalar_type() &&
                        (!given.extra_keys ||
                         (given.extra_keys->dim() == 2 && given.extra_keys->size(1) == dim &&
                          given.extra_keys->scalar_type() == query.scalar_type())),
                    "query, key, extra_keys: must be [B, D], [B, D] and [E, D] of one dtype");
    const auto fits = [&](const Optional& x, bool extras, ScalarType wanted) {
      return !x || (x->dim() == 1 && x->scalar_type() == wanted &&
                    (x->size(0) == batch || (extras && x->size(0) == columns)));
    };
    const ScalarType wide = given.log_q ? given.log_q->scalar_type() : ScalarType::Float;
    STD_TORCH_CHECK(fits(given.query_ids, false, ScalarType::Long) &&
                        fits(given.key_ids, true, ScalarType::Long) &&
                        fits(given.valid, false, ScalarType::Bool) && fits(given.log_q, true, wide),
                    "query_ids, key_ids, log_q, valid: must be [B], or [B + E]");
  }

  void fill_biases() {
    row_bias_.assign(static_cast<size_t>(padded_columns), -INFINITY);
    if (symmetric) column_bias_ = row_bias_;
    for (int64_t j = 0; j < columns; ++j) {
      if (j < batch && !counts(j)) continue;
      const auto at = static_cast<size_t>(j);
      row_bias_[at] = static_cast<float>(-log_q_of(j));
      STD_TORCH_CHECK(std::isfinite(row_bias_[at]), "log_q: must be finite");
      if (symmetric && j < batch) column_bias_[at] = 0.0f;
    }
    call.row_bias = row_bias_.data();
    call.column_bias = symmetric ? column_bias_.data() : nullptr;
  }

  void number_ids(const ContrastiveArguments& given) {
    const auto number = [&](const Optional& ids, std::vector<int32_t>& held,
                            const int32_t*& of_rows, const int32_t*& of_columns) {
      if (!ids) return;
      held = ranks_of(torch::stable::contiguous(*ids), padded_columns);
      of_rows = of_columns = held.data();
    };
    number(given.query_ids, query_ids_, call.row_query_ids, call.query_ids);
    number(given.key_ids, key_ids_, call.row_key_ids, call.key_ids);
  }

  void make_units() {
    const auto make = [&](const Tensor& x, int64_t first, bool masked) {
      each_rows(x.size(0), [&](int64_t begin, int64_t end) {
        widen(x, begin, end, normalize, true, masked, units_of(first + begin),
              norms.data() + first + begin);
      });
    };
    make(query, 0, true);
    make(key, batch, true);
    if (extra_keys) make(*extra_keys, 2 * batch, false);
    each_rows(batch, [&](int64_t begin, int64_t end) {
      LIVREC_CALL(contrastive_products, units_of(begin), units_of(batch + begin), end - begin, dim,
                  stride, positives.data() + begin);
    });
  }

  void widen(const Tensor& x, int64_t begin, int64_t end, bool to_unit, bool rounds, bool masked,
             float* out, float* divisors) const {
    const auto* from = static_cast<const char*>(x.const_data_ptr()) +
                       begin * dim * static_cast<int64_t>(x.element_size());
    LIVREC_CALL(contrastive_units, from, type, to_unit, rounds,
                masked && call.valid != nullptr ? call.valid + begin : nullptr, end - begin, dim,
                stride, out, divisors);
  }

  // Units in float32, whatever the dtype and whether `normalize`.
  void make_similar(float threshold) {
    call.threshold = threshold;
    call.similar = call.queries;
    if (normalize && type == TableType::f32) return;
    similar_ = std::make_unique<Scratch>((batch + 1) * stride * 4);  // one past the last is read
    auto* out = static_cast<float*>(similar_->data());
    each_rows(batch, [&](int64_t begin, int64_t end) {
      widen(query, begin, end, true, false, true, out + begin * stride, nullptr);
    });
    call.similar.units = out;
  }

  std::vector<float> row_bias_, column_bias_;
  std::vector<int32_t> query_ids_, key_ids_;
  std::unique_ptr<Scratch> similar_;
};

}  // namespace livrec
