// The gradients of DIN attention (din_attention.h), candidate by candidate.
//
// A candidate's first layer is start + matrix^T k, so its weights' gradients come from two sums,
// M = sum_t k_t dz_t^T and s = sum_t dz_t, of which the parts A + D, B - D and P of W_1 get q s^T,
// M and diag(q) M, and q gets (A + D) s + (P o M) 1. Sums are taken per candidate, then over the
// candidates of a group, then over groups, whose number does not depend on the threads.
//
// Blocks go through the layers once more, forward and backward, and are not kept.
#pragma once

#include "din_attention.h"

namespace livrec {

// Sums over items: weights [wide of the layer before, wide], of the first layer M [wide, padded d];
// the others [wide], null where the activation has none.
struct DinLayerSums {
  float *weights, *bias, *slope, *gain, *shift;
};

struct DinSums {
  const DinLayerSums* layers;
  float* last;  // of W_n; that of b_n is the sum of `flow`
};

struct DinGradient {
  const float* rows;          // k, [items, padded d]
  const float* plain_back;    // B - D, [d in tiles / tile, h_1, tile]
  const float* product_back;  // P, likewise
  const float* product_rows;  // P, [wide, padded d]
  const float* query_rows;    // A + D, likewise
};

// matrix_back [d in tiles / tile, h_1, tile] of a candidate.
LIVREC_DECLARE(void, din_begin_back,
               (const DinUnit& unit, const DinGradient& gradient, const float* q,
                float* matrix_back))
// Numbers that din_backward needs as space.
LIVREC_DECLARE(int64_t, din_space, (const DinUnit& unit))
// From the gradient of w, `flow` [items in whole blocks], zeros past the last, adds up `sums` and
// the gradient of k in `columns` [blocks, d in tiles, block]; w goes to `logits`, if not null.
LIVREC_DECLARE(void, din_backward,
               (const DinUnit& unit, const DinGradient& gradient, const float* matrix,
                const float* matrix_back, const float* start, const DinHistory& history,
                const float* flow, const DinSums& sums, float* columns, float* logits,
                float* space))
// <values, grad> item by item, added up in float64; returns their sum, the gradient of b_n.
LIVREC_DECLARE(double, din_dots, (const DinHistory& history, const float* grad, float* out))
// w (dots - sum w dots), in dots: the gradient of what the softmax took; returns its sum, about 0.
LIVREC_DECLARE(double, din_softmax_back, (const float* weights, int64_t items, float* dots))
// rows [items, padded] += weights x grad.
LIVREC_DECLARE(void, din_spread,
               (const float* weights, const float* grad, int64_t items, int64_t padded,
                float* rows))
// The gradient of q [padded d], from M and s.
LIVREC_DECLARE(void, din_query,
               (const DinUnit& unit, const DinGradient& gradient, const DinSums& sums, float* out))
// Adds a candidate's `count` sums to a group's, and what q makes of them to product and query
// [wide, padded d].
LIVREC_DECLARE(void, din_fold,
               (const DinUnit& unit, const float* q, const float* from, int64_t count,
                const DinSums& sums, float* to, float* product, float* query))
// rows [items, padded] += columns.
LIVREC_DECLARE(void, din_rows,
               (const float* columns, int64_t items, int64_t dim, int64_t padded, float* rows))

}  // namespace livrec
