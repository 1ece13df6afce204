// Attention of few candidates to long histories, forward and backward, piece by piece.
//
//   s_rt = <q_r, k_t> + b_t,   w_rt = exp(s_rt - m_r) / Z_r  (or s, silu(s), sigmoid(s)),
//   out_r = sum_t w_rt v_t
//
// A row r is a candidate in a head, its q times the scale. Rows go head by head, candidate by
// candidate. Keys come in `groups` that share them: a group is a head, or all heads where they read
// the same features. A piece is a stretch of one user's history; what it gives lies in memory of
// its own, and the pieces are added up in their order, so that results do not depend on threads.
// Keys are read in tiles of kTile items, transposed once for all rows: a row's logits are then
// vectors along the items. Few rows go another way: see attention_across.h.
//
// The gradient takes two passes. The first finds m, Z and
//
//   e_r = sum_t w_rt (D_rt - base_r) = 0 but for rounding,   D_rt = <grad_r, v_t>,
//   base_r = <grad_r, out_r>,
//
// by which dS_rt = w_rt (D_rt - base_r - e_r + grad_lse_r) is exact where one item has all the
// weight. The second writes dk_t = sum_r dS_rt q_r and dv_t = sum_r w_rt grad_r, each row of both
// once, and adds up dq_r = scale sum_t dS_rt k_t, db_t = sum_r dS_rt. Other activations need no
// first pass: dS = D w'(s). Nor do users all of whose lse are small: with lse, and what rounding
// took from it, as the forward pass gives them, m and Z are known; e, which is then left in dS, is
// sum_t dS_rt - grad_lse_r, and taken from dq times sum_t w_rt k_t (estimated from a part of the
// items, where candidates are few): elsewhere it is rounding like any other.
#pragma once

#include "prefix_ngram.h"

namespace livrec {

constexpr int64_t kTile = 64;             // items at a time
constexpr int64_t kRowTile = 32;          // rows at a time
constexpr int64_t kNarrowTile = 1 << 15;  // numbers of a tile's gradient in 16 bits, held together

enum class Activation : int { softmax, none, silu, sigmoid };

struct AttentionPiece {
  bool shared;        // keys are values, and their gradients are one
  const void *k, *v;  // of the piece's first item, [items, groups, dim] of `type`
  const float* bias;  // [items, bias_heads], or null
  TableType type;
  Activation activation;
  int64_t items, groups, rows;  // rows of a group
  int64_t candidates, bias_heads;
  int64_t dim, value_dim, padded, value_padded;  // padded: to whole vectors
  const float* q;                                // [groups x rows, padded], scaled
  float scale;                                   // of q
  float* scratch;                                // target_attention_space() floats
};

LIVREC_DECLARE_BF16(int64_t, target_attention_pad, ())
LIVREC_DECLARE_BF16(int64_t, target_attention_space, (const AttentionPiece& piece, bool gradient))

// x [candidates, heads, dim] in `type`, times factor, to [heads x candidates, padded] in float32.
LIVREC_DECLARE_BF16(void, target_attention_widen,
                    (const void* x, TableType type, int64_t candidates, int64_t heads, int64_t dim,
                     int64_t padded, float factor, float* out))
// And back, every row times its factor, or all times `factor` where there are none.
LIVREC_DECLARE_BF16(void, target_attention_narrow,
                    (const float* x, const float* factors, float factor, TableType type,
                     int64_t candidates, int64_t heads, int64_t dim, int64_t padded, void* out))

// out [groups x rows, value_padded], peaks and sums [groups x rows]: sum of exp(s - peak) v, the
// greatest s or one not far below, and the sum of exp(s - peak). Other activations: out is the sum
// of w v.
LIVREC_DECLARE_BF16(void, target_attention_forward,
                    (const AttentionPiece& piece, float* out, float* peaks, float* sums))

struct AttentionSlopes {
  const float *grad, *base;             // [groups x rows, value_padded] and [groups x rows]
  const float *peaks, *factors, *less;  // m, 1 / Z, and base + e - grad_lse; null: no softmax
  float *sums, *keys;  // [groups x rows] and [groups x rows, padded]: of dS and of w k; or null
  float* dq;           // [groups x rows, padded], added up
  void *dk, *dv;       // as k and v, or null; the same for both where they are one tensor
  bool past_caches;    // dk and dv are too large for them
  float* dbias;        // as bias, or null
};

// peaks, sums and slopes [groups x rows]: m, Z and the sum of exp(s - m) (D - base).
LIVREC_DECLARE_BF16(void, target_attention_slopes,
                    (const AttentionPiece& piece, const float* grad, const float* base,
                     float* peaks, float* sums, float* slopes))
LIVREC_DECLARE_BF16(void, target_attention_backward,
                    (const AttentionPiece& piece, const AttentionSlopes& slopes))

}  // namespace livrec
