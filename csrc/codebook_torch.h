// Codebooks and rows as the torch operators of k-means get them.
#pragma once

#include "codebook.h"
#include "torch_glue.h"

namespace livrec {

inline Float float_type(const Tensor& x) {
  const auto type = x.scalar_type();
  STD_TORCH_CHECK(
      type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16,
      "x: must be float32, float16 or bfloat16");
  return type == ScalarType::Float  ? Float::f32
         : type == ScalarType::Half ? Float::f16
                                    : Float::bf16;
}

// Checks rows [M, D] and gives them unit stride along D.
inline Tensor rows_of(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 2 && x.size(1) > 0, "x: must be [M, D] with D > 0");
  return x.stride(1) == 1 ? x : contiguous_of(x);
}

// A codebook as float32, repacked, and the memory that holds it.
struct PackedCodebook {
  Tensor codewords, penalty;
  Scratch memory;
  Codebook codebook;

  PackedCodebook(const Tensor& given, const Tensor* penalty_given, int64_t dim)
      : codewords(checked(given, dim)),
        memory(LIVREC_CALL_VNNI(codebook_bytes, given.size(0), dim)),
        codebook{} {
    codebook.codewords = codewords.const_data_ptr<float>();
    if (penalty_given != nullptr) {
      penalty = contiguous_of(*penalty_given);
      codebook.penalty = penalty.const_data_ptr<float>();
    }
    codebook.size = codewords.size(0);
    codebook.dim = dim;
    LIVREC_CALL_VNNI(codebook_pack, codebook, memory.data());
  }

 private:
  static Tensor checked(const Tensor& given, int64_t dim) {
    STD_TORCH_CHECK(given.dim() == 2 && given.size(1) == dim && given.size(0) > 0,
                    "codebook: must be [N, D] with N > 0 and the D of x");
    return contiguous_of(torch::stable::to(given, ScalarType::Float));
  }
};

inline void check_rows(const FirstBad& bad) {
  STD_TORCH_CHECK(!bad.any(), "x: row ", bad.first(),
                  " has no nearest codeword: it is not finite, or too large for float32");
}

}  // namespace livrec
