#include "code_attention_gradient_cuda.cu"

extern "C" int code_attention_gradient(const livrec::CodeAttentionGradientCuda* job, int limit,
                                       unsigned order) {
  emulated::shared_limit = limit, emulated::order = order;
  int64_t bytes = 0;
  const cudaError_t error = livrec::code_attention_gradient_cuda_space(*job, &bytes);
  void* space = emulated::guarded((bytes + 15) / 16 * 16);
  return error ? error : livrec::code_attention_gradient_cuda(*job, space, nullptr);
}

extern "C" int take_rows(const float* from, const int64_t* rows, int64_t count, int64_t size,
                         float* to) {
  return livrec::code_take_rows_cuda(from, rows, count, size, to, nullptr);
}

extern "C" void* guarded(int64_t bytes) { return emulated::guarded(bytes); }
