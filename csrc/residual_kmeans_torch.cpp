#include "residual_kmeans.h"

#include <memory>
#include <tuple>

#include "codebook_torch.h"

namespace livrec {
namespace {

// The smallest of uint8, int16 and int32 that holds every code.
ScalarType code_type(int64_t most_codewords) {
  return most_codewords <= 256     ? ScalarType::Byte
         : most_codewords <= 32768 ? ScalarType::Short
                                   : ScalarType::Int;
}

struct Outputs {
  Tensor codes, norms, reconstruction, second, gap;
};

// Encodes, with norms, reconstruction and second codes where wanted; what is not is left empty.
Outputs encode(const Tensor& x_given, const std::vector<Tensor>& codebooks, bool norms,
               bool reconstruction, bool second) {
  STD_TORCH_CHECK(!codebooks.empty(), "codebooks: at least one level is needed");
  const Tensor x = rows_of(x_given);
  const int64_t rows = x.size(0), dim = x.size(1), depth = static_cast<int64_t>(codebooks.size());
  std::vector<std::unique_ptr<PackedCodebook>> packed;
  std::vector<Codebook> levels;
  int64_t most_codewords = 0;
  for (const Tensor& given : codebooks) {
    packed.push_back(std::make_unique<PackedCodebook>(given, nullptr, dim));
    levels.push_back(packed.back()->codebook);
    if (given.size(0) > most_codewords) most_codewords = given.size(0);
  }
  const ScalarType type = code_type(most_codewords);
  const auto per_level = [&](bool wanted, ScalarType kind) {
    return wanted ? empty_cpu({rows, depth}, kind) : empty_cpu({0}, kind);
  };
  Outputs out{per_level(true, type), per_level(norms, ScalarType::Float),
              reconstruction ? empty_cpu({rows, dim}, ScalarType::Float)
                             : empty_cpu({0}, ScalarType::Float),
              per_level(second, type), per_level(second, ScalarType::Float)};
  ResidualKMeansEncode job{};
  job.x = x.const_data_ptr();
  job.x_type = float_type(x);
  job.x_stride = x.stride(0);
  job.dim = dim;
  job.levels = levels.data();
  job.level_count = depth;
  job.code_size = type == ScalarType::Byte ? 1 : type == ScalarType::Short ? 2 : 4;
  job.codes = out.codes.mutable_data_ptr();
  if (norms) job.residual_norms = out.norms.mutable_data_ptr<float>();
  if (reconstruction) job.reconstruction = out.reconstruction.mutable_data_ptr<float>();
  if (second) job.second = out.second.mutable_data_ptr();
  if (second) job.gap = out.gap.mutable_data_ptr<float>();
  FirstBad first_bad;
  torch::stable::parallel_for(0, rows, 256, [&](int64_t begin, int64_t end) {
    const Scratch scratch(LIVREC_CALL_VNNI(residual_kmeans_scratch, dim));
    first_bad.note(LIVREC_CALL_VNNI(residual_kmeans_encode, job, begin, end, scratch.data()));
  });
  check_rows(first_bad);
  return out;
}

Tensor residual_kmeans_encode(const Tensor& x, const std::vector<Tensor>& codebooks) {
  return encode(x, codebooks, false, false, false).codes;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> residual_kmeans_details(
    const Tensor& x, const std::vector<Tensor>& codebooks, bool reconstruction, bool second) {
  Outputs out = encode(x, codebooks, true, reconstruction, second);
  return {out.codes, out.norms, out.reconstruction, out.second, out.gap};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(livrec, CPU, m) {
  m.impl("residual_kmeans_encode.native", TORCH_BOX(&residual_kmeans_encode));
  m.impl("residual_kmeans_details.native", TORCH_BOX(&residual_kmeans_details));
}

}  // namespace livrec
