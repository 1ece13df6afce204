#include "majority_vote_cuda.h"

#include "cuda_launch.h"

namespace livrec {
namespace {

constexpr int kThreads = 128, kWarp = 32;
constexpr int64_t kMostBlocks = 1 << 30;

struct Levels {
  int count;
  int start[kMostVotedLevels +
            1];  // where a level's codewords begin in the histogram; last: the end
};

__device__ int64_t clamp(int64_t value, int64_t least, int64_t greatest) {
  return value < least ? least : value > greatest ? greatest : value;
}

// A warp finds the winner of a level. Keys order codewords by count, then by last position, which
// no two share; 0 is nobody's.
template <typename Voted>
__device__ void elect(const unsigned* counts, const unsigned* last, int size, Voted* voted) {
  const int lane = threadIdx.x % kWarp;
  unsigned long long best = 0;
  int winner = -1;
  for (int code = lane; code < size; code += kWarp) {
    const unsigned long long key =
        (static_cast<unsigned long long>(counts[code]) << 32) | last[code];
    if (counts[code] > 0 && key > best) best = key, winner = code;
  }
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const unsigned long long other = __shfl_xor_sync(~0u, best, step);
    const int other_winner = __shfl_xor_sync(~0u, winner, step);
    if (other > best) best = other, winner = other_winner;
  }
  if (lane == 0) *voted = static_cast<Voted>(winner);
}

template <typename Code, typename Voted>
__global__ void __launch_bounds__(kThreads)
    vote(const Code* codes, int64_t slices, const int64_t* offsets, int64_t histories,
         Levels levels, Voted* voted) {
  LIVREC_SHARED(unsigned, counts);
  const int codewords = levels.start[levels.count];
  unsigned* last = counts + codewords;
  for (int64_t history = blockIdx.x; history < histories; history += gridDim.x) {
    for (int i = threadIdx.x; i < 2 * codewords; i += kThreads) counts[i] = 0;
    __syncthreads();
    const int64_t begin = clamp(offsets[history], 0, slices);
    const int64_t end = clamp(offsets[history + 1], begin, slices);
    for (int64_t t = begin + threadIdx.x; t < end; t += kThreads) {
      for (int level = 0; level < levels.count; ++level) {
        const int code = static_cast<int>(codes[t * levels.count + level]);
        const int start = levels.start[level];
        if (code < 0 || code >= levels.start[level + 1] - start) continue;
        atomicAdd(counts + start + code, 1u);
        atomicMax(last + start + code, static_cast<unsigned>(t - begin));
      }
    }
    __syncthreads();
    for (int level = threadIdx.x / kWarp; level < levels.count; level += kThreads / kWarp) {
      const int start = levels.start[level];
      elect(counts + start, last + start, levels.start[level + 1] - start,
            voted + history * levels.count + level);
    }
    __syncthreads();
  }
}

template <typename Code, typename Voted>
cudaError_t launch(const MajorityVoteCuda& job, const Levels& levels, cudaStream_t stream) {
  const int bytes = levels.start[levels.count] * 2 * static_cast<int>(sizeof(unsigned));
  const auto kernel = vote<Code, Voted>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  const int64_t blocks = job.histories < kMostBlocks ? job.histories : kMostBlocks;
  LIVREC_LAUNCH(kernel, blocks, kThreads, bytes, stream, static_cast<const Code*>(job.codes),
                job.slices, job.offsets, job.histories, levels, static_cast<Voted*>(job.voted));
  return cudaGetLastError();
}

template <typename Code>
cudaError_t launch(const MajorityVoteCuda& job, const Levels& levels, cudaStream_t stream) {
  return job.voted_type == Integer::i16 ? launch<Code, int16_t>(job, levels, stream)
                                        : launch<Code, int32_t>(job, levels, stream);
}

}  // namespace

cudaError_t majority_vote_cuda(const MajorityVoteCuda& job, cudaStream_t stream) {
  if (job.level_count < 1 || job.level_count > kMostVotedLevels || job.slices > INT32_MAX)
    return cudaErrorInvalidValue;
  Levels levels{static_cast<int>(job.level_count), {0}};
  for (int l = 0; l < levels.count; ++l) {
    if (job.levels[l] < 1 || job.levels[l] > kMostVotedCodewords - levels.start[l])
      return cudaErrorInvalidValue;
    levels.start[l + 1] = levels.start[l] + static_cast<int>(job.levels[l]);
  }
  if (job.histories == 0) return cudaSuccess;
  return job.code_type == Integer::u8    ? launch<uint8_t>(job, levels, stream)
         : job.code_type == Integer::i16 ? launch<int16_t>(job, levels, stream)
                                         : launch<int32_t>(job, levels, stream);
}

}  // namespace livrec
