// In-batch contrastive loss: logits tile by tile, forward and backward, none of them stored.
//
//   s_ij = <q_i, k_j> / T - log Q_j,   loss_i = logsumexp_j s_ij - s_ii
//
// over the columns j that no mask takes from row i: keys of the batch, then extra keys. Columns of
// the batch have a loss of their own where it is symmetric, over the same pairs without log Q. With
// groups the loss is less the mean of s_ip over the positives p, the n_i columns of i's group.
//
// The forward pass computes the logits once and keeps, of each row and column, the greatest logit
// and the sum of exp(s - greatest) of its negatives R; the positive is added at the end, as
// loss = log(1 + R exp(greatest - s_ii)), which has all digits where the loss is small. With
// lse = s_ii + loss, the backward pass computes the logits again and from them, tile by tile,
//
//   W_ij = g_i exp(s_ij - lse_i) + h_j exp(s'_ij - lse'_j),   W_ii = -(g_i m_i + h_i m'_i),
//   dq_i = sum_j W_ij k_j / T,   dk_j = sum_i W_ij q_i / T,   dT = -sum_i <q_i, dq_i> / T
//
// where m = 1 - exp(s_ii - lse) is what the positive misses: four matrix products in all, one way
// or both, and three where the forward pass keeps its own. With groups, W_ip loses g_i / n_i (and
// h_p / n'_p), and m = 1 / n - exp(s_ii - lse).
//
// Where the positive is no sample, the loss of a row is w (log R' - s_ii), its logits less log Q
// but for s_ii and R' = R (1 - Q_i); then exp(s_ij - log R) has the factor g_i w, and m = w.
//
// Several losses of the same queries, each with keys of its own, are terms of one pass: for a tile
// of queries and columns, what masks pairs by the queries is found once, then the terms' logits
// come one after the other, and all add to the same dq.
//
// Rows and columns are cut into as many chunks. In phase p the task t computes the rows of chunk t
// with the columns of chunk t + p (mod chunks): in a phase no two tasks share a row or a column, so
// that all add to the same results without locks, in an order that no number of threads changes.
#pragma once

#include "prefix_ngram.h"

namespace livrec {

constexpr int64_t kPanel = 64;         // columns that are transposed together
constexpr int64_t kTileRows = 96;      // of a tile of logits
constexpr int64_t kTileColumns = 128;  // two panels
constexpr int64_t kTileStride = 144;   // not a power of two, for the caches
constexpr int64_t kPairsPerWord = 64;
constexpr int64_t kPairsBlock = 512;  // rows whose bits fill a cache line
constexpr int64_t kBlockWords = kPairsBlock / kPairsPerWord;

// Vectors in float32, `stride` numbers apart; and where products are of bfloat16 the same in words
// of two: of a vector's numbers 2n and 2n + 1, and of the vectors 2n and 2n + 1 (`stride` words
// apart).
struct ContrastiveSide {
  const float* units;
  int64_t count;
  const float *words, *paired;  // or null
};

struct Contrastive {
  ContrastiveSide queries, keys;  // keys: of the batch, then extra ones
  int64_t dim, stride, words_stride;
  float per_temperature, rest;  // their sum is 1 / T; both positive, as products are -inf
  const float* row_bias;        // [columns, padded]: -log Q, -inf for what is no key
  const float* column_bias;     // likewise, 0 for a key of the batch; null: one way
  const bool* valid;            // of the batch, or null
  const int32_t *row_query_ids, *query_ids;  // of rows, and of columns (padded); null: no such mask
  const int32_t *row_key_ids, *key_ids;
  const int32_t *row_groups, *groups;  // of positives; -1 for columns that are not valid
  const uint64_t* pairs;               // [rows, words]: bits of false negatives; null: none, or
  int64_t words;                       // ceil(similar.count / 64)
  ContrastiveSide similar;  // what pairs are compared by: of rows, then of some or all extra keys
  int64_t similar_dim, similar_stride;
  bool finds_similar;  // again in every tile
  float threshold;
  int64_t kept_rows;  // of which products are kept
  float* keeps;       // [kept_rows, columns]: where they are, -inf where pairs are masked; or null
  const float* kept;  // likewise, what was kept and is not computed again; or null
};

// Calls on the same queries, as many columns and the same masks by queries: the first call's.
struct ContrastiveTerms {
  const Contrastive* calls;
  int64_t count;
};

// A part of the matrix of logits; columns begin at a panel.
struct ContrastivePart {
  int64_t row, rows, column, columns;
};

LIVREC_DECLARE_AMX(int64_t, contrastive_stride, (int64_t dim))
LIVREC_DECLARE_AMX(int64_t, contrastive_space,
                   (int64_t dim, int64_t similar_dim, int64_t terms))  // floats of scratch

// Rows of x [count, dim], of unit length where `normalize`, rounded to `rounded` and as float32;
// zeros where not valid. norms [count], or null: what they were divided by, 0 for less than 1e-12.
LIVREC_DECLARE_AMX(void, contrastive_units,
                   (const void* x, TableType type, bool normalize, TableType rounded,
                    const bool* valid, int64_t count, int64_t dim, int64_t stride, float* units,
                    float* norms))

// Whether this level multiplies bfloat16, and units as it wants them, which are rounded already: of
// rows begin .. end - 1, from an even one to an even one or the last; zeros where there is nothing.
LIVREC_DECLARE_AMX(bool, contrastive_packs, ())
LIVREC_DECLARE_AMX(void, contrastive_pack,
                   (const float* units, int64_t begin, int64_t end, int64_t stride, float* words,
                    int64_t words_stride, float* paired))

// products [count]: <a_i, b_i>.
LIVREC_DECLARE_AMX(void, contrastive_products,
                   (const float* a, const float* b, int64_t count, int64_t dim, int64_t stride,
                    double* products))

// Bits of pairs with a product above the threshold, [rows, words]: those of a block of rows with a
// later block, or with itself, both ways.
LIVREC_DECLARE_AMX(void, contrastive_pairs,
                   (const Contrastive& call, int64_t above, int64_t block, uint64_t* pairs,
                    float* scratch))

// Of rows, or of columns (padded), brought up to date by a part: the greatest logit, the sum of
// exponentials, how many negatives there are (or null: not asked), and with groups the sum of the
// products of positives. The own key, or row, is left out. Kernels take those of every term.
struct ContrastiveSums {
  float *peaks, *sums;
  int32_t* negatives;
  double* positives;
};
LIVREC_DECLARE_AMX(void, contrastive_forward,
                   (const ContrastiveTerms& terms, const ContrastivePart& part, float* scratch,
                    const ContrastiveSums* rows, const ContrastiveSums* columns))

struct ContrastiveSlopes {
  const float *row_shifts, *row_factors;        // lse_i and g_i
  const float *column_shifts, *column_factors;  // [columns, padded]: lse'_j and h_j
  const float *row_means, *column_means;        // with groups: g_i / n_i and h_j / n'_j
  float *dq, *dk;                               // added up; or null. Terms may share dq
  float* row_weights;                           // [columns, padded]: sum_i of the rows' own part
};

LIVREC_DECLARE_AMX(void, contrastive_backward,
                   (const ContrastiveTerms& terms, const ContrastivePart& part, float* scratch,
                    const ContrastiveSlopes* slopes))

// The gradient of rows of x from that of their units, (du + factor_i other_i) scale, in `type`.
// slopes [count], or null: <unit_i, that gradient>.
struct ContrastiveRows {
  const void* x;
  TableType type;
  const float *units, *norms;         // norms null: as they are
  const float *du, *other, *factors;  // others and factors may be null
  const bool* valid;
  float scale;
  int64_t dim, stride;
};
LIVREC_DECLARE_AMX(void, contrastive_finish,
                   (const ContrastiveRows& rows, int64_t begin, int64_t end, void* out,
                    double* slopes, float* scratch))

}  // namespace livrec
