// DIN attention: a perceptron weighs each item of a history for each candidate.
//
//   w_ct = W_n^T f(... f(W_1^T [q_c, k_t, q_c - k_t, q_c k_t] + b_1) ...) + b_n,  o_c = sum w_ct
//   v_t
//
// W_1 has four parts of d rows, A, B, D and P, and its product is
//
//   (A + D)^T q + (B - D)^T k + P^T (q k) = start(q) + matrix(q)^T k,
//   start = b_1 + (A + D)^T q,  matrix = B - D + diag(q) P,
//
// which is made once per candidate: pairs [4 d] never are, and a pair costs d h_1 products in the
// first layer instead of 4 d h_1. Items lie in the lanes of vectors: a block of items goes through
// all layers before the next one comes, and between layers it stays in a core's own cache.
#pragma once

#include <cstdint>

#include "isa.h"
#include "prefix_ngram.h"

namespace livrec {

enum class DinActivation : int { sigmoid, relu, silu, prelu, dice };

// Items are done in blocks; units of a layer in tiles; rows are padded to whole vectors.
struct DinShape {
  int64_t lanes, tile, block;
};

struct DinLayer {
  int64_t in, out, wide;                     // wide: `out` in whole tiles, and in whole vectors
  const float* weights;                      // [wide / tile, in, tile]; of the first layer none
  const float* weights_back;                 // [in in tiles / tile, out, tile], for gradients
  const float *bias, *slope, *gain, *shift;  // [wide]; those that the activation has not are null
};

struct DinUnit {
  int64_t dim, padded;  // d, and in whole vectors
  DinActivation activation;
  const DinLayer* layers;  // the hidden ones
  int64_t depth;
  const float *plain, *product;  // B - D and P, [wide / tile, d, tile]
  const float* query;            // A + D, [d, wide]
  const float* last;             // W_n, [wide of the last hidden layer]
  float last_bias;
  int64_t widest;  // of the layers
};

// One user's items, in float32.
struct DinHistory {
  int64_t items;
  const float* columns;  // k by blocks, [blocks, d, block]; zeros past the last item
  const float* values;   // [items, value_padded]
  int64_t value_padded;
};

LIVREC_DECLARE(DinShape, din_shape, ())
// x [count, dim] in float32, [count, padded].
LIVREC_DECLARE(void, din_widen,
               (const void* x, TableType type, int64_t count, int64_t dim, int64_t padded,
                float* out))
LIVREC_DECLARE(void, din_narrow,
               (const float* x, TableType type, int64_t count, int64_t dim, int64_t padded,
                void* out))
// rows [items, padded] by blocks of columns.
LIVREC_DECLARE(void, din_columns,
               (const float* rows, int64_t items, int64_t dim, int64_t padded, float* out))

// matrix [wide / tile, d, tile] and start [wide] of a candidate.
LIVREC_DECLARE(void, din_begin, (const DinUnit& unit, const float* q, float* matrix, float* start))
// w [items]; space [2, widest, block].
LIVREC_DECLARE(void, din_logits,
               (const DinUnit& unit, const float* matrix, const float* start,
                const DinHistory& history, float* space, float* logits))
LIVREC_DECLARE(void, din_softmax, (float* weights, int64_t items))
// out [value_padded] = sum of weights x values.
LIVREC_DECLARE(void, din_sum, (const DinHistory& history, const float* weights, float* out))

}  // namespace livrec
