// Kernels with faults that the emulation must find.
#include "cuda_launch.h"

namespace {

__global__ void uneven_barrier() {
  if (threadIdx.x > 0) __syncthreads();
}

__global__ void beyond_the_end() {
  LIVREC_SHARED(int, numbers);
  numbers[threadIdx.x + 1] = 0;
}

// Without a barrier, each thread sees its neighbour's number or none.
__global__ void race(int* out) {
  LIVREC_SHARED(int, numbers);
  numbers[threadIdx.x] = static_cast<int>(threadIdx.x);
  out[threadIdx.x] = numbers[threadIdx.x ^ 1u];
}

}  // namespace

extern "C" void run_uneven_barrier() { LIVREC_LAUNCH(uneven_barrier, 1, 64, 0, nullptr); }
extern "C" void run_beyond_the_end() { LIVREC_LAUNCH(beyond_the_end, 1, 64, 64 * 4, nullptr); }
extern "C" void run_too_much_memory() { LIVREC_LAUNCH(beyond_the_end, 1, 64, 49 << 10, nullptr); }
extern "C" void run_race(int* out, unsigned order) {
  emulated::order = order;
  LIVREC_LAUNCH(race, 1, 64, 64 * 4, nullptr, out);
}
extern "C" void* guarded(int64_t bytes) { return emulated::guarded(bytes); }
