#include "code_attention_gradient.h"

#include <numeric>

#include "code_attention_torch.h"

namespace livrec {
namespace {

constexpr int64_t kLittleSums = 1 << 16;  // numbers that one thread had better add up alone
constexpr int64_t kGroups = 16;           // sums of users are added up in so many parts, or fewer
constexpr int64_t kDenseBytes = 4 << 20;  // a field's sums, where every row has its place

// Gradients of one field's rows, [heads, d + dv] each, from the users of a group.
class FieldSums {
 public:
  FieldSums(int64_t rows, int64_t size) : rows_(rows), size_(size) {
    dense_ = rows * size * 4 <= kDenseBytes;
  }

  void add(int64_t row, const float* keys, const float* values, int64_t heads, int64_t dim,
           int64_t padded, int64_t value_dim, int64_t value_padded) {
    float* to = place(row);
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t d = 0; d < dim; ++d) *to++ += keys[h * padded + d];
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t d = 0; d < value_dim; ++d) *to++ += values[h * value_padded + d];
  }

  bool dense() const { return dense_; }
  bool has(int64_t row) const { return !sums_.empty() && touched_[static_cast<size_t>(row)]; }
  const float* at(int64_t i) const { return sums_.data() + i * size_; }
  const std::vector<int64_t>& named() const { return named_; }

 private:
  float* place(int64_t row) {
    if (!dense_) {
      named_.push_back(row);
      sums_.resize(sums_.size() + static_cast<size_t>(size_), 0.0f);
      return sums_.data() + sums_.size() - size_;
    }
    if (sums_.empty()) {
      sums_.assign(static_cast<size_t>(rows_ * size_), 0.0f);
      touched_.assign(static_cast<size_t>(rows_), 0);
    }
    touched_[static_cast<size_t>(row)] = 1;
    return sums_.data() + row * size_;
  }

  int64_t rows_, size_;
  bool dense_;
  std::vector<float> sums_;
  std::vector<uint8_t> touched_;
  std::vector<int64_t> named_;  // rows in order of arrival, where not dense
};

// What is known of one output row: where its terms lie, in order.
struct RowTerms {
  std::vector<int64_t> rows;    // ascending
  std::vector<int64_t> starts;  // [rows + 1] into `from`
  std::vector<const float*> from;
};

RowTerms terms_of(const std::vector<std::vector<FieldSums>>& groups, size_t field, int64_t height) {
  RowTerms terms;
  if (groups.empty() || groups[0][field].dense()) {
    for (int64_t row = 0; row < (groups.empty() ? 0 : height); ++row) {
      const size_t before = terms.from.size();
      for (const auto& group : groups)
        if (group[field].has(row)) terms.from.push_back(group[field].at(row));
      if (terms.from.size() == before) continue;
      terms.rows.push_back(row);
      terms.starts.push_back(static_cast<int64_t>(before));
    }
  } else {
    std::vector<std::pair<int64_t, const float*>> all;
    for (const auto& group : groups)
      for (size_t i = 0; i < group[field].named().size(); ++i)
        all.emplace_back(group[field].named()[i], group[field].at(static_cast<int64_t>(i)));
    std::stable_sort(all.begin(), all.end(),
                     [](const auto& a, const auto& b) { return a.first < b.first; });
    for (size_t i = 0; i < all.size(); ++i) {
      if (i == 0 || all[i].first != all[i - 1].first) {
        terms.rows.push_back(all[i].first);
        terms.starts.push_back(static_cast<int64_t>(i));
      }
      terms.from.push_back(all[i].second);
    }
  }
  terms.starts.push_back(static_cast<int64_t>(terms.from.size()));
  return terms;
}

class Gradient {
 public:
  Gradient(const CodeCall& call, const Tensor& grad, const Optional& grad_lse, const Tensor& out)
      : call_(call),
        grad_(grad),
        grad_lse_(grad_lse),
        out_(out),
        columns_(call.candidates * call.heads),
        grad_q_(
            empty_cpu({call.users, call.candidates, call.heads, call.dim}, call.q.scalar_type())),
        grad_bias_(call.bias && call.bias->dim() == 2
                       ? empty_cpu({call.codes.items, call.heads}, ScalarType::Float)
                       : empty_cpu({call.bias ? call.codes.items : 0}, ScalarType::Float)) {}

  // Every part has sums for all rows of small tables: not worth it where items are fewer than they,
  // nor where one thread does it all.
  int64_t parts() const {
    if (is_little(call_)) return std::min<int64_t>(call_.users, 1);
    int64_t rows = 1;
    for (const Tensor& table : call_.key_tables) rows += table.size(0);
    const int64_t reads = call_.codes.items * static_cast<int64_t>(call_.keys.size());
    return std::min(call_.users, std::clamp<int64_t>(reads / (2 * rows), 2, kGroups));
  }

  void run() {
    std::fill_n(grad_bias_.mutable_data_ptr<float>(), grad_bias_.numel(), 0.0f);
    const int64_t count = parts();
    const size_t fields = call_.keys.size();
    const int64_t size = call_.heads * (call_.dim + call_.value_dim);
    for (int64_t g = 0; g < count; ++g) {
      groups_.emplace_back();
      for (size_t f = 0; f < fields; ++f)
        groups_.back().emplace_back(call_.key_tables[f].size(0), size);
    }
    FirstBad first_bad;
    const auto add_groups = [&](int64_t begin, int64_t end) {
      CodePass pass(call_, 2);
      Space space;
      for (int64_t g = begin; g < end; ++g)
        for (int64_t user = call_.users * g / count; user < call_.users * (g + 1) / count; ++user)
          add(pass, space, user, groups_[static_cast<size_t>(g)], first_bad);
    };
    each_user(call_, count, add_groups);
    check_codes(first_bad);
  }

  // grad_q, grad_bias, and of each field the rows that were read, ascending, and their sums.
  std::vector<Tensor> by_rows() const {
    std::vector<Tensor> found{grad_q_, grad_bias_};
    for (size_t f = 0; f < call_.keys.size(); ++f) {
      const RowTerms terms = terms_of(groups_, f, call_.key_tables[f].size(0));
      const auto count = static_cast<int64_t>(terms.rows.size());
      found.push_back(empty_cpu({count}, ScalarType::Long));
      std::copy(terms.rows.begin(), terms.rows.end(), found.back().mutable_data_ptr<int64_t>());
      const Sums sums(call_, count, ScalarType::Float);
      each_row(count,
               [&](int64_t i, std::vector<float>& space) { sums.write(i, terms, i, space); });
      found.push_back(sums.keys), found.push_back(sums.values);
    }
    return found;
  }

  // The gradients of a field's tables.
  std::pair<Tensor, Tensor> dense(size_t field) const {
    const int64_t height = call_.key_tables[field].size(0);
    const RowTerms terms = terms_of(groups_, field, height);
    std::vector<int64_t> places(static_cast<size_t>(height), -1);
    for (size_t i = 0; i < terms.rows.size(); ++i)
      places[static_cast<size_t>(terms.rows[i])] = static_cast<int64_t>(i);
    const Sums sums(call_, height, call_.q.scalar_type());
    each_row(height, [&](int64_t row, std::vector<float>& space) {
      sums.write(row, terms, places[static_cast<size_t>(row)], space);
    });
    return {sums.keys, sums.values};
  }

  const Tensor& grad_q() const { return grad_q_; }
  const Tensor& grad_bias() const { return grad_bias_; }

 private:
  // Memory of one thread, user after user.
  struct Space {
    Buffer grad, out, queries, keys, values, lines;
    HistoryRows history;
  };

  void add(CodePass& pass, Space& space, int64_t user, std::vector<FieldSums>& sums,
           FirstBad& first_bad) {
    const auto element = static_cast<int64_t>(grad_q_.element_size());
    char* own =
        static_cast<char*>(grad_q_.mutable_data_ptr()) + user * columns_ * call_.dim * element;
    if (!pass.begin(user, first_bad)) {
      std::fill_n(own, columns_ * call_.dim * element, 0);
      return name_rows(space.history, user, sums, first_bad);
    }
    const float* grad =
        pass.widened(space.grad, call_.of_user(grad_, user), call_.value_dim, pass.value_padded);
    const float* out =
        pass.widened(space.out, call_.of_user(out_, user), call_.value_dim, pass.value_padded);
    const int64_t distinct = pass.rows().ends[pass.rows().fields];
    float* queries = space.queries.zeros(columns_ * pass.padded);
    float* keys = space.keys.zeros(distinct * call_.heads * pass.padded);
    float* values = space.values.zeros(distinct * call_.heads * pass.value_padded);
    float* lines = space.lines.of(4 * pass.width());
    float *less = lines, *inverse = less + pass.width(), *mean = inverse + pass.width(),
          *scale = mean + pass.width();
    std::fill_n(scale, pass.width(), call_.scale);
    for (int64_t first = 0; first < columns_; first += pass.width()) {
      guess(pass, first, grad, out, less);
      pass.run(first, grad, less);
      means(pass, user, first, inverse, mean);
      LIVREC_CALL(code_slopes, pass.block, inverse, mean, pass.sums);
      LIVREC_CALL(code_columns, pass.block, pass.sums + pass.width(), pass.keys, pass.padded, scale,
                  queries);
      LIVREC_CALL(code_row_sums, pass.block, 1, pass.sums, pass.q, pass.padded, call_.scale, keys);
      LIVREC_CALL(code_row_sums, pass.block, 0, pass.sums, grad, pass.value_padded, 1.0f, values);
      if (call_.bias) add_bias(pass, user, inverse, mean);
    }
    LIVREC_CALL(code_narrow, queries, columns_, call_.dim, pass.padded, call_.type, own);
    const CodeRows& rows = pass.rows();
    for (int64_t f = 0; f < rows.fields; ++f)
      for (int64_t i = rows.ends[f]; i < rows.ends[f + 1]; ++i)
        if (rows.distinct[i].row >= 0)
          sums[static_cast<size_t>(f)].add(
              rows.distinct[i].row, keys + i * call_.heads * pass.padded,
              values + i * call_.heads * pass.value_padded, call_.heads, call_.dim, pass.padded,
              call_.value_dim, pass.value_padded);
  }

  // Without candidates nothing is added, but the rows of the history are named all the same.
  void name_rows(HistoryRows& history, int64_t user, std::vector<FieldSums>& sums,
                 FirstBad& first_bad) {
    const int64_t from = call_.offsets->data[user], to = call_.offsets->data[user + 1];
    if (from == to) return;
    history.read(call_.codes, from, to, false, first_bad);
    const CodeRows rows = history.rows();
    for (int64_t f = 0; f < rows.fields; ++f)
      for (int64_t i = rows.ends[f]; i < rows.ends[f + 1]; ++i)
        if (rows.distinct[i].row >= 0)
          sums[static_cast<size_t>(f)].add(rows.distinct[i].row, nullptr, nullptr, 0, 0, 0, 0, 0);
  }

  // <grad, out>: about the mean of D, so that what is added up is small.
  void guess(const CodePass& pass, int64_t first, const float* grad, const float* out,
             float* less) const {
    for (int64_t w = 0; w < pass.width(); ++w) {
      less[w] = 0.0f;
      if (first + w >= columns_) continue;
      const int64_t at = pass.place_of(first + w) * pass.value_padded;
      float sum = 0.0f;
      for (int64_t d = 0; d < call_.value_dim; ++d) sum += grad[at + d] * out[at + d];
      if (std::isfinite(sum)) less[w] = sum;
    }
  }

  void means(const CodePass& pass, int64_t user, int64_t first, float* inverse, float* mean) const {
    const float* own_lse =
        grad_lse_ ? grad_lse_->const_data_ptr<float>() + user * columns_ : nullptr;
    for (int64_t w = 0; w < pass.width(); ++w) {
      const float total = pass.totals[w];
      inverse[w] = mean[w] = 0.0f;
      if (total == 0.0f || first + w >= columns_) continue;  // nothing is left of this history
      inverse[w] = 1.0f / total;
      mean[w] = pass.totals[pass.width() + w] * inverse[w];
      if (own_lse) mean[w] -= own_lse[pass.place_of(first + w)];
    }
  }

  void add_bias(const CodePass& pass, int64_t user, const float* inverse, const float* mean) {
    float* own =
        grad_bias_.mutable_data_ptr<float>() + call_.offsets->data[user] * call_.bias_heads;
    pass.each_chunk([&](int64_t, int64_t begin, int64_t end) {
      LIVREC_CALL(code_bias_slopes, pass.block, begin, end, inverse, mean, own);
    });
  }

  // Sums of a field's rows, in `type`.
  struct Sums {
    Sums(const CodeCall& given, int64_t rows, ScalarType type)
        : call(given),
          keys(empty_cpu({rows, call.heads, call.dim}, type)),
          values(empty_cpu({rows, call.heads, call.value_dim}, type)),
          float_type_(float_type(type, "type")) {}

    // Adds up the users' parts of a row in order, number `at` of the terms; none at -1.
    void write(int64_t row, const RowTerms& terms, int64_t at, std::vector<float>& sum) const {
      const int64_t key_size = call.heads * call.dim, value_size = call.heads * call.value_dim;
      sum.assign(static_cast<size_t>(key_size + value_size), 0.0f);
      const auto place = static_cast<size_t>(at);
      for (int64_t i = at < 0 ? 0 : terms.starts[place]; at >= 0 && i < terms.starts[place + 1];
           ++i) {
        const float* from = terms.from[static_cast<size_t>(i)];
        for (size_t d = 0; d < sum.size(); ++d) sum[d] += from[d];
      }
      narrow(sum.data(), key_size, keys, row);
      narrow(sum.data() + key_size, value_size, values, row);
    }

    const CodeCall& call;
    const Tensor keys, values;

   private:
    void narrow(const float* from, int64_t size, const Tensor& to, int64_t row) const {
      auto* bytes = static_cast<char*>(to.mutable_data_ptr());
      bytes += row * size * static_cast<int64_t>(to.element_size());
      LIVREC_CALL(code_narrow, from, 1, size, size, float_type_, bytes);
    }
    TableType float_type_;
  };

  template <typename Visit>
  void each_row(int64_t count, const Visit& visit) const {
    const int64_t size = std::max<int64_t>(1, call_.heads * (call_.dim + call_.value_dim));
    torch::stable::parallel_for(0, count, std::max<int64_t>(1, kLittleSums / size),
                                [&](int64_t begin, int64_t end) {
                                  std::vector<float> space;
                                  for (int64_t i = begin; i < end; ++i) visit(i, space);
                                });
  }

  const CodeCall& call_;
  const Tensor grad_;
  const Optional grad_lse_;
  const Tensor out_;
  const int64_t columns_;
  Tensor grad_q_, grad_bias_;
  std::vector<std::vector<FieldSums>> groups_;
};

Gradient differentiated(const CodeCall& call, const Tensor& grad, const Optional& grad_lse,
                        const Tensor& out) {
  for (const Tensor* x : {&grad, &out})
    STD_TORCH_CHECK(x->dim() == 4 && x->size(0) == call.users && x->size(1) == call.candidates &&
                        x->size(2) == call.heads && x->size(3) == call.value_dim &&
                        x->scalar_type() == call.q.scalar_type(),
                    "grad, out: must be [B, C, H, dv] of q's dtype");
  Optional lse_slopes;
  if (grad_lse) {
    lse_slopes = contiguous_of(*grad_lse);
    STD_TORCH_CHECK(lse_slopes->numel() == call.users * call.candidates * call.heads &&
                        lse_slopes->scalar_type() == ScalarType::Float,
                    "grad_lse: must be float32 [B, C, H]");
  }
  Gradient gradient(call, contiguous_of(grad), lse_slopes, contiguous_of(out));
  gradient.run();
  return gradient;
}

std::vector<Tensor> code_attention_gradient(const Tensor& grad, const Optional& grad_lse,
                                            const Tensor& q, const Tensor& codes,
                                            const std::vector<Tensor>& key_tables,
                                            const std::vector<Tensor>& value_tables,
                                            const Tensor& offsets, const Optional& bias,
                                            double scale, const std::vector<int64_t>& levels,
                                            const std::vector<int64_t>& groups, const Text& hashing,
                                            bool packed, const Tensor& out, const Tensor& lse) {
  const CodeCall call(q, codes, key_tables, value_tables, offsets, bias, scale, levels, groups,
                      hashing, packed);
  return differentiated(call, grad, grad_lse, out).by_rows();
}

std::vector<Tensor> code_attention_backward(
    const std::vector<Optional>& grads, const Tensor& q, const Tensor& codes,
    const std::vector<Tensor>& key_tables, const std::vector<Tensor>& value_tables,
    const Tensor& offsets, const Optional& bias, double scale, const std::vector<int64_t>& levels,
    const std::vector<int64_t>& groups, const Text& hashing, bool packed,
    const std::vector<Tensor>& outputs, const std::vector<bool>& needs) {
  const CodeCall call(q, codes, key_tables, value_tables, offsets, bias, scale, levels, groups,
                      hashing, packed);
  STD_TORCH_CHECK(grads.size() == 2 && outputs.size() == 2,
                  "grads, outputs: must be of out and lse");
  const size_t fields = key_tables.size(), tables = 2;  // of q and codes, then come the tables
  check_needs(needs, tables + 2 * fields + 1 + bias.has_value());
  const Tensor& out = outputs[0];
  const Gradient gradient =
      differentiated(call, grads[0] ? *grads[0] : zeros_like_cpu(out), grads[1], out);
  std::vector<Tensor> found, values;
  if (needs[0]) found.push_back(gradient.grad_q());
  for (size_t f = 0; f < fields; ++f) {
    if (!needs[tables + f] && !needs[tables + fields + f]) continue;
    const auto [key, value] = gradient.dense(f);
    if (needs[tables + f]) found.push_back(key);
    if (needs[tables + fields + f]) values.push_back(value);
  }
  found.insert(found.end(), values.begin(), values.end());
  if (bias && needs.back()) found.push_back(gradient.grad_bias());
  return found;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(livrec, CPU, m) {
  m.impl("code_attention_gradient.native", TORCH_BOX(&code_attention_gradient));
  m.impl("code_attention_backward.native", TORCH_BOX(&code_attention_backward));
}

}  // namespace livrec
