#include "code_attention_torch.h"

#include <tuple>

namespace livrec {
namespace {

std::tuple<Tensor, Tensor> code_attention(const Tensor& q, const Tensor& codes,
                                          const std::vector<Tensor>& key_tables,
                                          const std::vector<Tensor>& value_tables,
                                          const Tensor& offsets, const Optional& bias, double scale,
                                          const std::vector<int64_t>& levels,
                                          const std::vector<int64_t>& groups, const Text& hashing,
                                          bool packed) {
  const CodeCall call(q, codes, key_tables, value_tables, offsets, bias, scale, levels, groups,
                      hashing, packed);
  const int64_t columns = call.candidates * call.heads;
  Tensor out =
      empty_cpu({call.users, call.candidates, call.heads, call.value_dim}, q.scalar_type());
  Tensor lse = empty_cpu({call.users, call.candidates, call.heads}, ScalarType::Float);
  auto* out_data = static_cast<char*>(out.mutable_data_ptr());
  float* lse_data = lse.mutable_data_ptr<float>();
  const int64_t out_size = columns * call.value_dim * static_cast<int64_t>(out.element_size());
  FirstBad first_bad;
  each_user(call, call.users, [&](int64_t begin, int64_t end) {
    CodePass pass(call, 1);
    Buffer found, factor;
    for (int64_t user = begin; user < end; ++user) {
      char* own = out_data + user * out_size;
      float* own_lse = lse_data + user * columns;
      if (!pass.begin(user, first_bad)) {
        std::fill_n(own, out_size, 0);
        std::fill_n(own_lse, columns, -INFINITY);
        continue;
      }
      float* wide = found.zeros(columns * pass.value_padded);
      float* inverse = factor.of(pass.width());
      for (int64_t first = 0; first < columns; first += pass.width()) {
        pass.run(first, nullptr, nullptr);
        for (int64_t w = 0; w < pass.width(); ++w) {
          const float total = pass.totals[w];
          inverse[w] = total == 0.0f ? 0.0f : 1.0f / total;
          if (first + w >= columns) continue;
          own_lse[pass.place_of(first + w)] =
              total == 0.0f ? -INFINITY : pass.block.peaks[w] + std::log(total);
        }
        LIVREC_CALL(code_columns, pass.block, pass.sums, pass.values, pass.value_padded, inverse,
                    wide);
      }
      LIVREC_CALL(code_narrow, wide, columns, call.value_dim, pass.value_padded, call.type, own);
    }
  });
  check_codes(first_bad);
  return {out, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(livrec, CPU, m) {
  m.impl("code_attention.native", TORCH_BOX(&code_attention));
}

}  // namespace livrec
