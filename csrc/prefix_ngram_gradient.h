// The sums of gradients per table row of a prefix n-gram embedding, for one group of levels, and
// steps of an optimiser by them.
//
// Codes of all levels, side by side in bits, are sorted once, unknown ones as 0 and shallow rows
// first: then every prefix is a run of neighbours, whatever its level, and rows that do not know
// a level lie before those that do. Sorted items are cut into chunks of kRunChunk, which are gone
// through by several tasks. Where a run ends, its sum is in the first-level cache, and the step is
// taken there and then: a row of a table is updated, or the sum is stored where it is wanted. What
// cannot be done so:
//   - a run that goes on in the next chunk is added up chunk by chunk, when all chunks are done;
//   - rows that several runs were hashed to wait for all of them: each of these runs has a slot,
//     ordered by row and key, for its sum, and steps are taken from slots at the end.
// So each row's step is taken once, by one task, and sums are added in one order, whatever the
// number of threads.
#pragma once

#include <cstdint>

#include "prefix_ngram.h"
#include "row_update.h"

namespace livrec {

constexpr int64_t kRunChunk = 1024;
constexpr int64_t kNoRow = INT64_MIN;

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

// rows[i] of keys[i], as in the lookup.
LIVREC_DECLARE(void, prefix_gradient_hash,
               (const PrefixLevel& level, const int64_t* keys, int64_t count, int64_t* rows))

// Codes side by side in bits, the first level highest, 0 where unknown; and depths. Items [begin,
// end). Returns the first item with a code outside [-1, N_l), or -1.
LIVREC_DECLARE(int64_t, prefix_gradient_words,
               (const Codes& codes, const int64_t* shifts, int64_t begin, int64_t end,
                uint64_t* words, uint8_t* depths))

// The runs of a group's sorted items.
struct PrefixPlan {
  uint8_t* fresh;        // [items]: the first level where an item begins a run, or its depth
  uint8_t* depth;        // [items]: how many levels it knows
  int64_t* const* rows;  // [levels]: [items], see below
  int64_t* counts;       // [chunks, levels]: how many runs begin in a chunk
};

// Finds the runs of a chunk. The table rows of those that begin there are rows[l] + chunk *
// kRunChunk and on.
LIVREC_DECLARE(void, prefix_runs_plan,
               (const PrefixGradient& job, int64_t chunk, const PrefixPlan& plan))

struct PrefixSteps {
  const RowUpdate* tables;  // [levels]; their rows and sums are not looked at
  PrefixPlan plan;          // rows are ~slot where a run's sum goes to a slot
  float* const* slots;      // [levels]: [slots, d_l]
};

// What is left of a chunk. Sums of all levels lie side by side.
struct PrefixEnds {
  float* head;    // sums of what goes on with runs of chunks before; zeroed
  float* tail;    // sums of runs that begin here and may go on
  int64_t* rows;  // [levels]: their rows, or ~slots; kNoRow where there is none
};

// Numbers of scratch that prefix_runs_chunk needs.
LIVREC_DECLARE(int64_t, prefix_runs_scratch, (const PrefixGradient& job, const PrefixSteps& steps))
// Adds up the runs of a chunk and updates the rows of those that end.
LIVREC_DECLARE(void, prefix_runs_chunk,
               (const PrefixGradient& job, int64_t chunk, const PrefixSteps& steps,
                const PrefixEnds& ends, float* scratch))

// Adds up slots of the same row, in order, and updates those rows whose first slot is in [begin,
// end). rows [count], ascending: of the slots. scratch [2 dim].
LIVREC_DECLARE(void, prefix_runs_slots,
               (const RowUpdate& table, const int64_t* rows, float* slots, int64_t count,
                int64_t begin, int64_t end, float* scratch))

}  // namespace livrec
