// What the torch operators of attention over codes share: a call that is safe to run, and the
// passes over one user's history that both its results and its gradients take.
#pragma once

#include <cmath>
#include <memory>

#include "buffers_torch.h"
#include "code_attention.h"
#include "code_fields_torch.h"

namespace livrec {

constexpr int64_t kFewUsers = 8;          // below it, long histories are read by several threads
constexpr int64_t kLittleWork = 1 << 12;  // items times columns that one thread had better do alone
constexpr int64_t kRunColumns = 16;       // below it, runs save less than they take to find
constexpr float kHeadroom = 64.0f;        // powers of two
constexpr int64_t kHistoryChunk = 2048;   // items at a time, then: whatever the number of threads

// The arguments of a call, checked, and as the kernels read them.
struct CodeCall {
  Tensor q, codes_held;
  std::vector<Tensor> key_tables, value_tables;
  Optional bias;
  std::vector<const void*> keys, values;
  std::unique_ptr<Levels> levels;
  Codes codes;
  std::unique_ptr<Offsets> offsets;
  TableType type;
  int64_t users, candidates, heads, dim, value_dim, bias_heads;
  float scale;

  CodeCall(const Tensor& q_given, const Tensor& codes_given, const std::vector<Tensor>& key_given,
           const std::vector<Tensor>& value_given, const Tensor& offsets_given,
           const Optional& bias_given, double scale_given, const std::vector<int64_t>& sizes,
           const std::vector<int64_t>& groups, const Text& hashing, bool packed) {
    STD_TORCH_CHECK(
        q_given.dim() == 4 && !key_given.empty() && key_given.size() == value_given.size(),
        "q: must be [B, C, H, d], with a table of keys and one of values per field");
    q = contiguous_of(q_given);
    users = q.size(0), candidates = q.size(1), heads = q.size(2), dim = q.size(3);
    value_dim = value_given[0].size(2);
    type = float_type(q.scalar_type(), "q");
    std::vector<int64_t> rows;
    for (size_t f = 0; f < key_given.size(); ++f) {
      const Tensor &key = key_given[f], &value = value_given[f];
      STD_TORCH_CHECK(key.dim() == 3 && value.dim() == 3 && key.size(0) == value.size(0) &&
                          key.size(1) == heads && value.size(1) == heads && key.size(2) == dim &&
                          value.size(2) == value_dim && key.scalar_type() == q.scalar_type() &&
                          value.scalar_type() == q.scalar_type(),
                      "key_tables, value_tables: must be [N, H, d] and [N, H, dv] of q's dtype");
      key_tables.push_back(contiguous_of(key));
      value_tables.push_back(contiguous_of(value));
      keys.push_back(key_tables.back().const_data_ptr());
      values.push_back(value_tables.back().const_data_ptr());
      rows.push_back(key.size(0));
    }
    levels = std::make_unique<Levels>(sizes, rows, std::vector<int64_t>(sizes.size(), 1), groups,
                                      true, hashing);
    STD_TORCH_CHECK(sizes.size() == key_given.size(), "levels: must be one per table");
    codes_held = readable(codes_given, packed, sizes);
    codes = levels->codes_of(codes_held, packed);
    offsets = std::make_unique<Offsets>(offsets_given, codes.items);
    STD_TORCH_CHECK(offsets->histories == users, "offsets: must be [B + 1]");
    bias_heads = 0;
    if (bias_given) {
      bias = contiguous_of(*bias_given);
      bias_heads = bias->dim() == 2 ? heads : 1;
      STD_TORCH_CHECK(bias->scalar_type() == ScalarType::Float &&
                          bias->numel() == codes.items * bias_heads &&
                          (bias->dim() == 1 || bias->size(1) == heads),
                      "bias: must be float32 [T] or [T, H]");
    }
    scale = static_cast<float>(scale_given);
  }

  const float* bias_of(int64_t user) const {
    return bias ? bias->const_data_ptr<float>() + offsets->data[user] * bias_heads : nullptr;
  }
  const void* of_user(const Tensor& x, int64_t user) const {
    const auto* bytes = static_cast<const char*>(x.const_data_ptr());
    return bytes + user * (x.numel() / users) * static_cast<int64_t>(x.element_size());
  }
};

// One user's history, block of columns after block. `parts` is 1, or 2 for gradients.
class CodePass {
 public:
  CodePass(const CodeCall& call, int64_t parts) : call_(call), parts_(parts) {}

  // Finds the rows that the history names, and widens them and the queries. False: nothing to do.
  bool begin(int64_t user, FirstBad& first_bad) {
    const int64_t from = call_.offsets->data[user], to = call_.offsets->data[user + 1];
    if (from == to || call_.candidates == 0) return false;
    const bool in_runs = parts_ == 1 && call_.heads * call_.candidates >= kRunColumns;
    history_.read(call_.codes, from, to, in_runs, first_bad);
    rows_ = history_.rows();
    columns_ = call_.heads * call_.candidates;
    shape_ = LIVREC_CALL(code_shape, columns_, parts_, rows_.slot_count);
    padded = round_up(call_.dim), value_padded = round_up(call_.value_dim);
    q = widened(q_, call_.of_user(call_.q, user), call_.dim, padded);
    keys = gathered(key_space_, keys_, call_.keys, call_.dim, padded);
    values = gathered(value_space_, values_, call_.values, call_.value_dim, value_padded);
    bias_ = call_.bias_of(user);
    weigh_bias();
    chunk_ = call_.users < kFewUsers ? kHistoryChunk : INT64_MAX;
    return true;
  }

  int64_t width() const { return shape_.width(); }
  const CodeRows& rows() const { return rows_; }

  float* widened(Buffer& buffer, const void* x, int64_t dim, int64_t padded_dim) const {
    float* out = buffer.of(columns_ * padded_dim);
    LIVREC_CALL(code_widen, x, call_.type, columns_, dim, padded_dim, out);
    return out;
  }

  // Sums over the items for columns [first, first + width). grad [columns, value_padded] and less
  // [width] where there are two parts.
  void run(int64_t first, const float* grad, const float* less) {
    const int64_t width = shape_.width(), size = rows_.slot_count * parts_ * width;
    block = CodeBlock{&rows_, call_.heads, call_.candidates, first,
                      shape_, parts_,      tables_.of(size), peaks_.of(width),
                      false,  factors,     call_.bias_heads};
    float* lanes = lanes_.of(std::max(LIVREC_CALL(code_lane_space, block, padded),
                                      LIVREC_CALL(code_lane_space, block, value_padded)));
    float* field_peaks = field_peaks_.of(rows_.fields * width);
    LIVREC_CALL(code_products, block, 0, keys, q, padded, call_.scale, nullptr, field_peaks, lanes);
    if (parts_ == 2)
      LIVREC_CALL(code_products, block, 1, values, grad, value_padded, 1.0f, less, nullptr, lanes);
    // Terms are kept 2^64 times as large as they are: small ones stay above float32's least.
    const float shift = kHeadroom * 0.6931472f / static_cast<float>(rows_.fields);
    for (int64_t i = 0; i < rows_.fields * width; ++i) field_peaks[i] -= shift;
    LIVREC_CALL(code_exponentials, block, field_peaks);
    for (int64_t w = 0; w < width; ++w) {
      double peak = bias_ ? shifts_[static_cast<size_t>(bias_head(first + w))] : 0.0;
      for (int64_t f = 0; f < rows_.fields; ++f) peak += field_peaks[f * width + w];
      block.peaks[w] = static_cast<float>(peak);
    }
    scan();
    const float least = static_cast<float>(rows_.items) * 0x1p4f;  // of 2^kHeadroom
    for (int64_t w = 0; w < std::min(width, columns_ - first); ++w)
      if (!(totals[w] >= least)) return run_exactly(lanes);
  }

  // Visits the items, several threads at once where users are few; chunks do not depend on them.
  template <typename Visit>
  void each_chunk(const Visit& visit) const {
    const int64_t chunks = chunk_ == INT64_MAX ? 1 : (rows_.items + chunk_ - 1) / chunk_;
    if (chunks == 1) return visit(0, 0, rows_.items);
    torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c)
        visit(c, c * chunk_, std::min(rows_.items, (c + 1) * chunk_));
    });
  }

  // Where a column, (head, candidate), lies in arrays [candidates, heads].
  int64_t place_of(int64_t column) const {
    return column % call_.candidates * call_.heads + column / call_.candidates;
  }

  int64_t padded = 0, value_padded = 0;
  float* q = nullptr;
  const float *const *keys = nullptr, *const *values = nullptr;
  CodeBlock block{};
  float* sums = nullptr;    // [slots, parts, width]
  float* totals = nullptr;  // [parts, width]

 private:
  int64_t round_up(int64_t dim) const { return (dim + shape_.pad - 1) / shape_.pad * shape_.pad; }
  int64_t bias_head(int64_t column) const {
    return call_.bias_heads > 1 ? std::min(column, columns_ - 1) / call_.candidates : 0;
  }

  const float* const* gathered(Buffer& space, std::vector<const float*>& rows,
                               const std::vector<const void*>& tables, int64_t dim,
                               int64_t padded_dim) {
    const int64_t distinct = history_.distinct();
    rows.resize(static_cast<size_t>(distinct));
    LIVREC_CALL(code_gather, tables.data(), call_.type, rows_, call_.heads, dim, padded_dim,
                space.of((distinct + 1) * call_.heads * padded_dim), rows.data());
    return rows.data();
  }

  // Exponentials of the bias less its greatest value, head by head, in the order of the items.
  void weigh_bias() {
    if (!bias_) return;
    const int64_t heads = call_.bias_heads, count = rows_.items * heads;
    if (rows_.places) {
      float* ordered = ordered_.of(count);
      for (int64_t i = 0; i < rows_.items; ++i)
        std::copy_n(bias_ + i * heads, heads, ordered + rows_.places[i] * heads);
      bias_ = ordered;
    }
    shifts_.assign(static_cast<size_t>(heads), -INFINITY);
    for (int64_t i = 0; i < count; ++i)
      shifts_[static_cast<size_t>(i % heads)] =
          std::max(shifts_[static_cast<size_t>(i % heads)], bias_[i]);
    for (float& shift : shifts_)
      if (shift == -INFINITY) shift = 0.0f;  // nothing is left, whatever is subtracted
    factors = factors_.of(count);
    for (int64_t i = 0; i < count; ++i)
      factors[i] = bias_[i] - shifts_[static_cast<size_t>(i % heads)];
    LIVREC_CALL(code_exp, factors, count, factors);
  }

  void scan() {
    const int64_t size = rows_.slot_count * parts_ * shape_.width();
    const int64_t chunks = chunk_ == INT64_MAX ? 1 : (rows_.items + chunk_ - 1) / chunk_;
    sums = sums_.zeros(chunks * size);
    totals = totals_.of(parts_ * shape_.width());
    each_chunk([&](int64_t c, int64_t begin, int64_t end) {
      LIVREC_CALL(code_scan, block, begin, end, sums + c * size);
    });
    for (int64_t c = 1; c < chunks; ++c)
      for (int64_t i = 0; i < size; ++i) sums[i] += sums[c * size + i];
    LIVREC_CALL(code_fold, block, sums, totals);
  }

  // Again, with the greatest logits themselves: some terms were too small for float32.
  void run_exactly(float* lanes) {
    const int64_t width = shape_.width();
    LIVREC_CALL(code_products, block, 0, keys, q, padded, call_.scale, nullptr, nullptr, lanes);
    block.exact = true;
    block.factors = bias_;
    std::fill_n(block.peaks, width, -INFINITY);
    LIVREC_CALL(code_greatest, block, 0, rows_.items, block.peaks);
    for (int64_t w = 0; w < width; ++w)
      if (block.peaks[w] == -INFINITY) block.peaks[w] = 0.0f;
    scan();
  }

  const CodeCall& call_;
  const int64_t parts_;
  HistoryRows history_;
  CodeRows rows_{};
  CodeShape shape_{1, 1, 16};
  int64_t columns_ = 0, chunk_ = INT64_MAX;
  const float* bias_ = nullptr;
  float* factors = nullptr;
  std::vector<float> shifts_;
  std::vector<const float*> keys_, values_;
  Buffer q_, key_space_, value_space_, ordered_, tables_, sums_, totals_, peaks_, field_peaks_,
      lanes_, factors_;
};

// Whether a call has no work for more than the time that it takes to wake a thread.
inline bool is_little(const CodeCall& call) {
  return call.codes.items * call.heads * call.candidates < kLittleWork;
}

// Runs visit(begin, end) over users, or `count` groups of them: several at once where they are
// many and the work is not little.
template <typename Visit>
void each_user(const CodeCall& call, int64_t count, const Visit& visit) {
  if (call.users < kFewUsers || is_little(call)) return visit(0, count);
  torch::stable::parallel_for(0, count, 1, visit);
}

}  // namespace livrec
