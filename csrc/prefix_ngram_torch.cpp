#include "prefix_torch.h"

namespace livrec {
namespace {

constexpr int64_t kAlone = 256 << 10;  // bytes that one thread writes before another wakes up

Tensor prefix_ngram_lookup(const Tensor& codes_given, const std::vector<Tensor>& tables,
                           const std::vector<int64_t>& sizes, const Text& mode,
                           const Optional& offsets_given, const std::optional<Text>& pool,
                           const Text& hashing, const std::vector<int64_t>& groups, bool packed,
                           const std::vector<Tensor>& scales) {
  std::vector<Tensor> held;
  std::vector<int64_t> rows, dims;
  for (const Tensor& table : tables) {
    STD_TORCH_CHECK(table.dim() == 2, "tables: each must be [H, d]");
    held.push_back(table.stride(1) == 1 ? table : contiguous_of(table));
    rows.push_back(table.size(0)), dims.push_back(table.size(1));
  }
  Levels all(sizes, rows, dims, groups, mode == "sum", hashing);
  PrefixLookup job{};
  job.type = table_type(tables[0].scalar_type());
  for (size_t l = 0; l < tables.size(); ++l) {
    STD_TORCH_CHECK(table_type(held[l].scalar_type()) == job.type, "tables: must share a dtype");
    all.levels[l].table = held[l].const_data_ptr();
    all.levels[l].table_stride = held[l].stride(0);
    if (job.type != TableType::i8) continue;
    STD_TORCH_CHECK(
        scales.size() == tables.size() && scales[l].dim() == 1 && scales[l].size(0) == rows[l],
        "scales: must be one per row of each int8 table");
    held.push_back(contiguous_of(scales[l]));
    all.levels[l].scales = held.back().const_data_ptr<float>();
  }
  const Tensor codes = readable(codes_given, packed, sizes);
  const Offsets offsets(offsets_given, codes.size(0));
  const ScalarType out_type =
      job.type == TableType::i8 ? ScalarType::Float : tables[0].scalar_type();
  const int64_t out_rows = offsets.data ? offsets.histories : codes.size(0);
  Tensor out = empty_cpu({out_rows, all.width}, out_type);
  job.codes = all.codes_of(codes, packed);
  job.sum = mode == "sum";
  job.offsets = offsets.data;
  job.mean = pool && *pool == "mean";
  job.out = out.mutable_data_ptr();
  job.width = all.width;
  FirstBad first_bad;
  const int64_t row_bytes =
      std::max<int64_t>(1, all.width * static_cast<int64_t>(out.element_size()));
  torch::stable::parallel_for(
      0, out_rows, offsets.data ? 16 : std::max<int64_t>(1024, kAlone / row_bytes),
      [&](int64_t begin, int64_t end) {
        const Scratch scratch(LIVREC_CALL(prefix_ngram_scratch, job));
        first_bad.note(LIVREC_CALL(prefix_ngram_lookup, job, begin, end, scratch.data()));
      });
  check_codes(first_bad);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(livrec, CPU, m) {
  m.impl("prefix_ngram_lookup.native", TORCH_BOX(&prefix_ngram_lookup));
}

}  // namespace livrec
