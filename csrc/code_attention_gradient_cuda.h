// The gradient of attention over histories of codes on a GPU, where forward and gradient both find
// room in shared memory; see code_attention_cuda.h for pieces, rows and lanes.
//
// With D_ct = <g_c, v_t> = sum_f G_f[row_f(t)][c] and weights P = exp(s - m) / Z,
//
//   dS_ct = P_ct (D_ct - d_c + g'_c),  d_c = sum_t P_ct D_ct,
//   dq_c = scale sum_f sum_r dS_f[r][c] K_f[r],  dK_f[r] = scale sum_c dS_f[r][c] q_c,
//   dV_f[r] = sum_c P_f[r][c] g_c,  where dS_f[r] and P_f[r] are sums over the items with row r.
//
// `measure` finds m, Z and d of each piece, all threads at once, as nothing is added by row;
// `settle` puts those of a history together. `spread` adds P and dS up by row, in blocks of their
// own, and writes the sums of a piece; `gather` multiplies them with q and g. The sums of all
// pieces take much memory: `spread` and `gather` take turns with as many pieces as there is room
// for, in order. D is less <g_c, out_c>, which is about d: sums of D lose nothing to a common part.
#pragma once

#include "code_attention_cuda.h"

namespace livrec {

// Two tables of logits' size instead of one: fewer rows.
constexpr int64_t kMostCodeGradientRows = 1024;

struct CodeAttentionGradientCuda {
  CodeAttentionCuda attention;  // but for its results
  const void *grad, *out;       // [users, candidates, heads, value_dim]
  const float* grad_lse;        // [users, candidates, heads] or null
  void* grad_q;
  float* grad_bias;  // as the bias; null without one
  // Of all fields after each other, without rows for unknown codes:
  float *key_sums, *value_sums;  // [rows, heads, dim] and [rows, heads, value_dim]
  int64_t* rows;                 // of a field: first those that items name, ascending
  int64_t* counts;               // [fields]: how many they are
  int64_t room;                  // bytes of sums by row at a time; at least a piece's are taken
};

// As for the attention.
cudaError_t code_attention_gradient_cuda_space(const CodeAttentionGradientCuda& job,
                                               int64_t* bytes);
cudaError_t code_attention_gradient_cuda(const CodeAttentionGradientCuda& job, void* space,
                                         cudaStream_t stream);

// Copies `count` rows of `size` numbers, those that `rows` names, of `from` to `to`.
cudaError_t code_take_rows_cuda(const float* from, const int64_t* rows, int64_t count, int64_t size,
                                float* to, cudaStream_t stream);

}  // namespace livrec
