#include <atomic>

#include "residual_kmeans.h"
#include "torch_glue.h"

namespace livrec {
namespace {

Float float_type(const Tensor& x) {
  const auto type = x.scalar_type();
  STD_TORCH_CHECK(
      type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16,
      "x: must be float32, float16 or bfloat16");
  return type == ScalarType::Float  ? Float::f32
         : type == ScalarType::Half ? Float::f16
                                    : Float::bf16;
}

// The smallest of uint8, int16 and int32 that holds every code.
ScalarType code_type(int64_t most_codewords) {
  return most_codewords <= 256     ? ScalarType::Byte
         : most_codewords <= 32768 ? ScalarType::Short
                                   : ScalarType::Int;
}

// Codebooks as float32 and repacked: all of the op's workspace, apart from O(dim) per thread.
struct Levels {
  std::vector<Tensor> storage;
  std::vector<ResidualKMeansLevel> levels;
  int64_t most_codewords = 0;

  Levels(const std::vector<Tensor>& codebooks, int64_t dim) {
    const int64_t width = LIVREC_CALL(residual_kmeans_panel_width);
    for (const Tensor& given : codebooks) {
      STD_TORCH_CHECK(given.dim() == 2 && given.size(1) == dim && given.size(0) > 0,
                      "codebooks: each must be [N_l, D] with N_l > 0 and the D of x");
      const Tensor codebook =
          torch::stable::contiguous(torch::stable::to(given, ScalarType::Float));
      const int64_t size = codebook.size(0), padded = (size + width - 1) / width * width;
      const Tensor panels = empty_cpu({padded * dim}, ScalarType::Float);
      const Tensor half_norms = empty_cpu({padded}, ScalarType::Float);
      levels.push_back({codebook.const_data_ptr<float>(), size, panels.mutable_data_ptr<float>(),
                        half_norms.mutable_data_ptr<float>()});
      LIVREC_CALL(residual_kmeans_pack, levels.back(), dim);
      storage.insert(storage.end(), {codebook, panels, half_norms});
      if (size > most_codewords) most_codewords = size;
    }
  }
};

Tensor residual_kmeans_encode(const Tensor& x_given, const std::vector<Tensor>& codebooks) {
  STD_TORCH_CHECK(x_given.dim() == 2 && x_given.size(1) > 0, "x: must be [M, D] with D > 0");
  STD_TORCH_CHECK(!codebooks.empty(), "codebooks: at least one level is needed");
  const Tensor x = x_given.stride(1) == 1 ? x_given : torch::stable::contiguous(x_given);
  const int64_t rows = x.size(0), dim = x.size(1);
  const Levels packed(codebooks, dim);
  const int64_t depth = static_cast<int64_t>(codebooks.size());
  const ScalarType type = code_type(packed.most_codewords);
  Tensor codes = empty_cpu({rows, depth}, type);
  const int64_t code_size = type == ScalarType::Byte ? 1 : type == ScalarType::Short ? 2 : 4;
  const ResidualKMeansEncode job{
      x.const_data_ptr(),       float_type(x), x.stride(0), dim, packed.levels.data(), depth,
      codes.mutable_data_ptr(), code_size};
  std::atomic<int64_t> first_bad{rows};
  torch::stable::parallel_for(0, rows, 256, [&](int64_t begin, int64_t end) {
    const Scratch scratch(LIVREC_CALL(residual_kmeans_scratch, dim));
    const int64_t bad = LIVREC_CALL(residual_kmeans_encode, job, begin, end, scratch.data());
    int64_t known = first_bad.load();
    while (bad >= 0 && bad < known && !first_bad.compare_exchange_weak(known, bad)) {
    }
  });
  STD_TORCH_CHECK(first_bad.load() == rows, "x: row ", first_bad.load(),
                  " has no nearest codeword: it is not finite, or too large for float32 distances");
  return codes;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(livrec, CPU, m) {
  m.impl("residual_kmeans_encode.native", TORCH_BOX(&residual_kmeans_encode));
}

}  // namespace livrec
