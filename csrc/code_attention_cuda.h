// Attention over histories of codes on a GPU, where few columns (candidate, head) meet small
// tables: all look-ups and sums are in shared memory, and no key or value is ever made.
//
// A history is cut into pieces; a block takes a piece and a tile of up to 32 columns. It makes the
// logits of every table row, S_f[r][c] = scale <q_c, K_f[r]>, finds the greatest logit m_c of the
// piece, adds the terms exp(sum_f S_f[row_f(t)][c] + bias_t - m_c) up by row, P_f[r][c], and
// multiplies those sums with the values: sum_f sum_r P_f[r][c] V_f[r]. A second kernel puts the
// pieces together, in their order.
//
// Terms are exponentials of an item's own logit, so that none is lost whatever the logits. The
// products of exponentials per row that a CPU takes (code_attention.h) would save little here: at
// the rates of an H100's SM, 32 columns of an item take 2 cycles of exponentials, while the 3
// numbers per field and column that are read and written in shared memory take 9 with 3 fields.
//
// Sums have no atomics. A lane owns a column of an item group, with sums of its own for each row,
// and walks its items in order, four at a time: an item that names the row of one before it goes on
// from that one's sum in a register, so that four loads are under way at once. A warp has the lanes
// of one field, and lanes lie side by side: no two meet in a bank, and codes are read once for all
// columns. More lanes hide more latency and take more memory: see `shape_of` in code_blocks_cuda.h.
// Rows of logits are read in 128 bits, four columns a thread; codes with plain loads, as they are a
// small part of the bytes that an item moves.
//
// Bad contents touch no memory that is not theirs: a code out of range counts as unknown, offsets
// are kept to the items there are, and where they descend, histories overlap or are empty.
#pragma once

#include <cuda_runtime_api.h>

#include "prefix_ngram.h"

namespace livrec {

// What a launch can take: with 4 columns and 4 lanes, so many rows of tables, one more per field
// for codes that are unknown, leave room for the rest in the 99 KB of shared memory that every GPU
// from compute capability 8.0 on gives to a block.
constexpr int64_t kMostCodeFields = 8, kMostCodeRows = 2048, kMostCodeDim = 256;

struct CodeAttentionCuda {
  const void* q;      // [users, candidates, heads, dim], contiguous, as are the tables
  const void* codes;  // [items, fields], contiguous
  CodeType code_type;
  int64_t items, fields;
  const void* const* keys;    // on the host: [rows, heads, dim] each, at multiples of 16 bytes
  const void* const* values;  // on the host: [rows, heads, value_dim] each
  const int64_t* rows;        // on the host
  TableType type;             // of q, tables and out
  const int64_t* offsets;     // [users + 1], on the GPU
  int64_t users, candidates, heads, dim, value_dim;
  const float* bias;   // [items, bias_heads] or null
  int64_t bias_heads;  // 1 or heads
  float scale;
  void* out;   // [users, candidates, heads, value_dim]
  float* lse;  // [users, candidates, heads]
};

// Bytes of workspace that the current device needs. cudaErrorInvalidValue: more than the limits.
cudaError_t code_attention_cuda_space(const CodeAttentionCuda& job, int64_t* bytes);
// Enqueues the attention, given that workspace at a multiple of 16 bytes. Returns
// cudaErrorInvalidValue, having done nothing, for what exceeds the limits.
cudaError_t code_attention_cuda(const CodeAttentionCuda& job, void* space, cudaStream_t stream);

}  // namespace livrec
