// Majority voting, rule "per_level", on a GPU.
//
// A block takes a history: a histogram and the last position of every codeword of every level lie
// in shared memory, so that codes are read once, in order. Counts and positions come of integer
// atomics: the result is the same in every run.
//
// Bad contents touch no memory that is not theirs: a code outside [0, N_l) casts no vote, an offset
// counts as the nearest in [0, slices], and a history that ends before it begins is empty.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "majority_vote.h"

namespace livrec {

struct MajorityVoteCuda {
  const void* codes;       // [slices, level_count], contiguous
  Integer code_type;       // u8, i16 or i32
  int64_t slices;          // below 2^31
  const int64_t* offsets;  // [histories + 1], on the GPU
  int64_t histories;
  const int64_t* levels;  // [level_count], on the host: N_l
  int64_t level_count;
  void* voted;         // [histories, level_count], contiguous
  Integer voted_type;  // i16 or i32
};

// What a launch can take: 8 bytes of shared memory for each codeword of all levels, within the 99
// KB that every GPU from compute capability 8.0 on gives to a block.
constexpr int64_t kMostVotedCodewords = 12288, kMostVotedLevels = 32;

// Enqueues the voting. Returns cudaErrorInvalidValue, having done nothing, for what exceeds the
// limits.
cudaError_t majority_vote_cuda(const MajorityVoteCuda& job, cudaStream_t stream);

}  // namespace livrec
