// Attention over histories of codes: keys and values are sums of rows of tables, never built.
//
//   s_ct = scale <q_c, sum_f K_f[row_f(t)]> + bias_t = sum_f S_f[row_f(t)][c] + bias_t
//
// S_f is the product of the queries with the rows that occur (code_products). The softmax's terms
// are products of exponentials of S_f, taken per row and not per item:
//
//   p_ct = exp(s_ct - m_c) = exp(bias_t - max) prod_f exp(S_f[row_f(t)][c] - max_f)
//   out_c = sum_f sum_r P_f[r][c] V_f[r] / Z_c,   P_f[r][c] = sum of p_ct over items with row r
//
// where m is a bound of the greatest logit, not that logit. Where all terms are so far below it
// that float32 might lose some above about 2^-80 of the rest (Z < T 2^-60, before the terms are
// raised by 2^64 to leave room below), the columns are done again with the greatest logit itself
// and an exponential per item (`exact`).
//
// The gradient has the same shape. With D_ct = sum_f G_f[row_f(t)][c], G_f = <grad_c, V_f[r]>, and
// Q_f[r] the sums of p D, and d = sum p D / Z:
//
//   dS_f[r] = (Q_f[r] - (d - grad_lse) P_f[r]) / Z,   dq = scale sum_f dS_f^T K_f,
//   dK_f[r] = scale sum_c dS_f[r][c] q_c,   dV_f[r] = sum_c P_f[r][c] grad_c / Z.
//
// Field 0's G is less <grad, out>, which is about d: sums of D lose nothing to a common part.
//
// Columns are (head, candidate), head by head, done in blocks of `lanes x vectors`.
#pragma once

#include "code_fields.h"

namespace livrec {

// How a block of columns is cut into vectors; dimensions are padded to a multiple of `pad`.
struct CodeShape {
  int64_t lanes, vectors, pad;
  int64_t width() const { return lanes * vectors; }
};

LIVREC_DECLARE(CodeShape, code_shape, (int64_t columns, int64_t parts, int64_t slots))

struct CodeBlock {
  const CodeRows* rows;
  int64_t heads, candidates;
  int64_t first;  // column
  CodeShape shape;
  int64_t parts;         // numbers per slot and column: 1, or 2 for a gradient
  float* tables;         // [slots, parts, width]: S or its exponentials; and G
  float* peaks;          // [width]: m
  bool exact;            // `tables` holds S and peaks the greatest logits
  const float* factors;  // [items, bias_heads]: exponentials of the bias, or where exact the bias;
                         // the items as `rows` orders them
  int64_t bias_heads;    // 1 or heads; 0: no bias
};

// Where the rows of `tables` that occur lie, [distinct], each [heads, padded dim] in float32: in
// their tables, if they are such there, or in `space` [distinct + 1, heads, padded dim].
LIVREC_DECLARE(void, code_gather,
               (const void* const* tables, TableType type, const CodeRows& rows, int64_t heads,
                int64_t dim, int64_t padded, float* space, const float** out))
// x [candidates x heads, dim] in float32, [candidates x heads, padded dim].
LIVREC_DECLARE(void, code_widen,
               (const void* x, TableType type, int64_t count, int64_t dim, int64_t padded,
                float* out))

// Products of rows [distinct][heads, padded] with x [candidates, heads, padded], times scale, into
// part `part` of the block's tables; `peaks` [fields, width], if given, gets the greatest per
// field, and `less` [width], if given, is subtracted in the first field. scratch [code_lane_space
// floats].
LIVREC_DECLARE(int64_t, code_lane_space, (const CodeBlock& block, int64_t padded))
LIVREC_DECLARE(void, code_products,
               (const CodeBlock& block, int64_t part, const float* const* rows, const float* x,
                int64_t padded, float scale, const float* less, float* peaks, float* scratch))
// S to exp(S - peak of the field).
LIVREC_DECLARE(void, code_exponentials, (const CodeBlock& block, const float* peaks))
LIVREC_DECLARE(void, code_exp, (const float* x, int64_t count, float* out))

// Adds the items [begin, end) to sums [slots, parts, width]. Where exact, block.peaks must be the
// greatest logits, which code_greatest raises `peaks` to.
LIVREC_DECLARE(void, code_scan, (const CodeBlock& block, int64_t begin, int64_t end, float* sums))
LIVREC_DECLARE(void, code_greatest,
               (const CodeBlock& block, int64_t begin, int64_t end, float* peaks))

// Adds copies of a row up in its first slot, and the sums of all rows, [parts, width], in totals.
LIVREC_DECLARE(void, code_fold, (const CodeBlock& block, float* sums, float* totals))
// out [candidates, heads, padded] += factor per column x sum over rows of sums x rows.
LIVREC_DECLARE(void, code_columns,
               (const CodeBlock& block, const float* sums, const float* const* rows, int64_t padded,
                const float* factor, float* out))

// x in `type`, [count, dim], of padded float32.
LIVREC_DECLARE(void, code_narrow,
               (const float* x, int64_t count, int64_t dim, int64_t padded, TableType type,
                void* out))

}  // namespace livrec
