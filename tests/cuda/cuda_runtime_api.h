// CUDA's words for a CPU: what it takes to run the .cu files here as they are, one block after the
// other, a block's threads as fibers.
//
// Stricter than a GPU where that finds faults: shared memory is full of NaNs when a block begins
// and ends where no more can be read; a barrier that not all threads reach, or a launch that asks
// for more shared memory than it was allowed, stops the program; blocks run in any order that is
// asked for, and so do the threads between barriers, so that races show as other results.
#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <numeric>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
#define LIVREC_SHARED(type, name) type* const name = static_cast<type*>(emulated::shared)
#define LIVREC_LAUNCH(kernel, blocks, threads, bytes, stream, ...)                \
  emulated::launch(reinterpret_cast<const void*>(kernel), blocks, threads, bytes, \
                   [&] { kernel(__VA_ARGS__); })

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin };
typedef struct Stream* cudaStream_t;
struct Place {
  unsigned x;
};
inline Place threadIdx, blockIdx, blockDim, gridDim;

namespace emulated {

enum class State { runs, at_barrier, at_warp, done };

struct Fiber {
  ucontext_t start;
  jmp_buf now;
  bool begun;
  State state;
  uint64_t told;  // to the other lanes of its warp
};

constexpr int64_t kWarp = 32, kStack = 1 << 16;

inline int shared_limit = 227 << 10;  // what a block may have, and what one has without asking
constexpr int kSharedUnasked = 48 << 10;
// Of blocks and threads. 0: ascending, 1: descending, else drawn, and no more than 3 blocks, as a
// kernel here goes through its work with whatever number of them.
inline unsigned order = 0;
inline void* shared = nullptr;
inline std::map<const void*, int> allowed;
inline std::vector<Fiber> fibers;
inline const std::function<void()>* work = nullptr;
inline jmp_buf scheduler;
inline ucontext_t scheduler_start;

[[noreturn]] inline void stop(const char* why) {
  std::fprintf(stderr, "emulated GPU: %s\n", why);
  std::abort();
}

// Memory full of 0xff that ends where no more can be read or written; never given back.
inline void* guarded(int64_t bytes) {
  const int64_t page = sysconf(_SC_PAGESIZE), size = (bytes + page - 1) / page * page;
  void* made =
      mmap(nullptr, size + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (made == MAP_FAILED) stop("no memory");
  std::memset(made, 0xff, size);
  mprotect(static_cast<char*>(made) + size, page, PROT_NONE);
  return static_cast<char*>(made) + size - bytes;
}

inline void wait(State state) {
  Fiber& own = fibers[threadIdx.x];
  own.state = state;
  if (!_setjmp(own.now)) _longjmp(scheduler, 1);
}

inline void enter() {
  (*work)();
  fibers[threadIdx.x].state = State::done;
  _longjmp(scheduler, 1);
}

// Runs a thread up to its next barrier, or its end. A function of its own: setjmp returns twice.
__attribute__((noinline)) inline void resume(unsigned thread) {
  threadIdx.x = thread;
  Fiber& own = fibers[thread];
  if (_setjmp(scheduler)) return;
  if (own.begun) _longjmp(own.now, 1);
  own.begun = true;
  swapcontext(&scheduler_start, &own.start);
}

// Lets threads go on that wait for nobody any more. False: all are done.
inline bool release() {
  bool any = false, all_wait = true, all_done = true;
  for (size_t first = 0; first < fibers.size(); first += kWarp) {
    const size_t end = std::min(first + kWarp, fibers.size());
    bool warp_waits = true;
    for (size_t t = first; t < end; ++t) {
      warp_waits &= fibers[t].state == State::at_warp;
      all_wait &= fibers[t].state == State::at_barrier;
      all_done &= fibers[t].state == State::done;
    }
    if (!warp_waits) continue;
    any = true;
    for (size_t t = first; t < end; ++t) fibers[t].state = State::runs;
  }
  if (all_done) return false;
  if (!any && !all_wait) stop("a barrier that not all threads reach");
  if (all_wait)
    for (Fiber& fiber : fibers) fiber.state = State::runs;
  return true;
}

inline std::vector<unsigned> in_order(unsigned count) {
  std::vector<unsigned> every(count);
  std::iota(every.begin(), every.end(), 0u);
  if (order == 1) std::reverse(every.begin(), every.end());
  if (order > 1) std::shuffle(every.begin(), every.end(), std::mt19937(order));
  return every;
}

inline void launch(const void* kernel, int64_t blocks, unsigned threads, int bytes,
                   const std::function<void()>& body) {
  const auto asked = allowed.find(kernel);
  if (bytes > std::max(kSharedUnasked, asked == allowed.end() ? 0 : asked->second))
    stop("more shared memory than was asked for");
  if (blocks < 1 || blocks > INT32_MAX || threads < 1 || threads > 1024) stop("no such launch");
  if (order > 1) blocks = std::min<int64_t>(blocks, 3);
  const std::vector<unsigned> turns = in_order(threads);
  std::vector<char> stacks(threads * kStack);
  void* own_shared = guarded(bytes);
  gridDim.x = static_cast<unsigned>(blocks), blockDim.x = threads;
  work = &body, shared = own_shared;
  for (unsigned block : in_order(gridDim.x)) {
    blockIdx.x = block;
    std::memset(shared, 0xff, static_cast<size_t>(bytes));
    fibers.assign(threads, Fiber{});
    for (unsigned t = 0; t < threads; ++t) {
      getcontext(&fibers[t].start);
      fibers[t].start.uc_stack.ss_sp = stacks.data() + t * kStack;
      fibers[t].start.uc_stack.ss_size = kStack;
      makecontext(&fibers[t].start, enter, 0);
    }
    do {
      for (unsigned t : turns)
        if (fibers[t].state == State::runs) resume(t);
    } while (release());
  }
  const int64_t page = sysconf(_SC_PAGESIZE), size = (bytes + page - 1) / page * page;
  munmap(static_cast<char*>(own_shared) + bytes - size, static_cast<size_t>(size + page));
}

}  // namespace emulated

inline void __syncthreads() { emulated::wait(emulated::State::at_barrier); }

template <typename Number>
Number __shfl_xor_sync(unsigned, Number value, int step) {
  std::memcpy(&emulated::fibers[threadIdx.x].told, &value, sizeof(value));
  emulated::wait(emulated::State::at_warp);
  std::memcpy(&value, &emulated::fibers[threadIdx.x ^ static_cast<unsigned>(step)].told,
              sizeof(value));
  emulated::wait(emulated::State::at_warp);
  return value;
}

template <typename Number>
Number atomicAdd(Number* at, Number value) {
  const Number old = *at;
  *at = old + value;
  return old;
}

template <typename Number>
Number atomicMax(Number* at, Number value) {
  const Number old = *at;
  *at = std::max(old, value);
  return old;
}

inline cudaError_t cudaGetLastError() { return cudaSuccess; }

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = emulated::shared_limit;
  return cudaSuccess;
}

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
  if (bytes > emulated::shared_limit) return cudaErrorInvalidValue;
  emulated::allowed[reinterpret_cast<const void*>(kernel)] = bytes;
  return cudaSuccess;
}
