// The gradient of attention over histories of codes, on the blocks of code_attention.h with two
// parts.
#pragma once

#include "code_attention.h"

namespace livrec {

// P and Q of `sums` become P / Z and dS, given 1 / Z and d - grad_lse [width].
LIVREC_DECLARE(void, code_slopes,
               (const CodeBlock& block, const float* inverse, const float* mean, float* sums))
// out [distinct, heads, padded] += factor x sum over the block's columns of part `part` x x.
LIVREC_DECLARE(void, code_row_sums,
               (const CodeBlock& block, int64_t part, const float* sums, const float* x,
                int64_t padded, float factor, float* out))
// Adds the gradient of the bias of items [begin, end), [items, bias_heads].
LIVREC_DECLARE(void, code_bias_slopes,
               (const CodeBlock& block, int64_t begin, int64_t end, const float* inverse,
                const float* mean, float* out))

}  // namespace livrec
