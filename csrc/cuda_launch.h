// What CUDA sources write in words of CUDA's own that only nvcc reads: launches, and the shared
// memory whose size a launch tells. A compiler for CPUs, with which tests run the same sources, is
// given other words by its cuda_runtime_api.h.
#pragma once

#include <cuda_runtime_api.h>

#if defined(__CUDACC__)
#define LIVREC_LAUNCH(kernel, blocks, threads, bytes, stream, ...) \
  kernel<<<static_cast<unsigned>(blocks), threads, bytes, stream>>>(__VA_ARGS__)
#define LIVREC_SHARED(type, name) extern __shared__ type name[]
#endif
