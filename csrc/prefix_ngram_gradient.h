// The sums of gradients per table row of a prefix n-gram embedding, for one group of levels.
//
// Codes of all levels, side by side in bits, are sorted once, unknown ones as 0 and shallow rows
// first: then every prefix is a run of neighbours, whatever its level, and rows that do not know
// a level lie before those that do. Sorted items are cut into chunks of kRunChunk; a chunk adds up
// its runs in order, straight into the result, but for what continues a run of the chunk before,
// which waits in `carries` and is added chunk by chunk. Where levels are added up, a run's sum is
// that of the runs inside it: an item's gradient is then read for its deepest level alone.
#pragma once

#include <cstdint>

#include "prefix_ngram.h"

namespace livrec {

constexpr int64_t kRunChunk = 1024;

struct PrefixGradient {
  Codes codes;             // of the group
  const uint8_t* depths;   // [items]: how many levels of an item are known; null: all of all
  const uint64_t* sorted;  // [items], codes side by side, ascending
  const uint32_t* order;   // [items], the items in that order
  const int64_t* shifts;   // [levels]: a prefix of l levels is sorted >> shifts[l - 1]
  const void* grad;        // [rows, width], unit stride
  TableType grad_type;     // f32, f16 or bf16
  int64_t grad_stride;
  bool sum;
  const int64_t* history;  // [items]: the row of grad that an item belongs to; null: its own
  const int64_t* offsets;  // [histories + 1] where gradients are divided by lengths, else null
};

// What a chunk holds: of each level how many runs begin in it.
// counts [levels]
LIVREC_DECLARE(void, prefix_gradient_count,
               (const PrefixGradient& job, int64_t chunk, int64_t* counts))

struct PrefixRuns {
  float** values;   // [levels]: [runs, d_l]
  int64_t** keys;   // [levels]: [runs]
  float* carries;   // [width of all levels], of this chunk; zeroed
  int64_t* starts;  // [levels]: the first run that begins in this chunk
};

// Adds up the runs of a chunk.
LIVREC_DECLARE(void, prefix_gradient_add,
               (const PrefixGradient& job, int64_t chunk, const PrefixRuns& runs, float* scratch))

// rows[i] of keys[i], as in the lookup.
LIVREC_DECLARE(void, prefix_gradient_hash,
               (const PrefixLevel& level, const int64_t* keys, int64_t count, int64_t* rows))

// Codes side by side in bits, the first level highest, 0 where unknown; and depths. Items [begin,
// end). Returns the first item with a code outside [-1, N_l), or -1.
LIVREC_DECLARE(int64_t, prefix_gradient_words,
               (const Codes& codes, const int64_t* shifts, int64_t begin, int64_t end,
                uint64_t* words, uint8_t* depths))

}  // namespace livrec
