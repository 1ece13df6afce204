// Search of a user's own history: scores of items, a block of candidates at a time.
//
//   dense:  score_ct = <query_c, key_t>               codes:  score_ct = sum_f S_f[row_f(t)][c]
//
// with S_f the products of the queries with the rows of table f that occur (code_attention.h).
// Every score is a sum in one fixed order, so that equal items have equal scores whatever their
// place. The scores of a few items are held at a time; those among the best so far are kept (TopK
// in history_search_torch.h).
//
// Where a history is much longer than what is asked of it, a sample of its items is scored first:
// all but a few of the rest are below the least score that the sample says can be among the best.
// Where too few turn out to be above it, the history is scored once more without a bound.
#pragma once

#include "code_attention.h"

namespace livrec {

constexpr int64_t kSearchBlock = 64;  // items whose scores are held at a time
constexpr int64_t kSearchSample = 8;  // items of each block that tell where the best may begin

struct SearchKeys {
  const void* keys;  // [items, dim], unit stride
  TableType type;
  int64_t stride, dim;
};

// Queries [candidates, dim], float32, as the lanes of a block of candidates from `first` on:
// [vectors, dim, lanes], zeros past the last.
LIVREC_DECLARE(void, search_lanes,
               (const CodeShape& shape, const float* query, int64_t candidates, int64_t dim,
                int64_t first, float* lanes))
// scores [end - begin, width] of items [begin, end). scratch [8 dim].
LIVREC_DECLARE(void, search_dense,
               (const CodeShape& shape, const SearchKeys& keys, const float* lanes, int64_t begin,
                int64_t end, float* scratch, float* scores))
LIVREC_DECLARE(void, search_codes,
               (const CodeBlock& block, int64_t begin, int64_t end, float* scores))

// Which of `count` items have a score of at least `least` [width] for which candidates: bits
// [count, width], the first bit of a word being its lowest. Returns whether any score is infinite
// or no number.
LIVREC_DECLARE(bool, search_above,
               (const CodeShape& shape, const float* scores, int64_t count, const float* least,
                uint64_t* marks))

}  // namespace livrec
