#include "code_attention_cuda.cu"

// Attends as on a GPU that gives a block `limit` bytes of shared memory; see emulated::order.
extern "C" int code_attention(const livrec::CodeAttentionCuda* job, int limit, unsigned order) {
  emulated::shared_limit = limit, emulated::order = order;
  int64_t bytes = 0;
  const cudaError_t error = livrec::code_attention_cuda_space(*job, &bytes);
  return error ? error
               : livrec::code_attention_cuda(*job, emulated::guarded((bytes + 15) / 16 * 16),
                                             nullptr);
}

extern "C" void* guarded(int64_t bytes) { return emulated::guarded(bytes); }
