// A step of an optimiser on the rows of prefix tables that a lookup read, straight from the
// gradient of the lookup: what row_update makes of the sums of prefix_ngram_gradient, but the sums
// are not written down.
//
// Codes are sorted and cut into chunks as for the gradient. A run's row is updated when the run
// ends, while its sum is in the first-level cache. What cannot be done there and then:
//   - a run that goes on in the next chunk is added up chunk by chunk, when all chunks are done;
//   - rows that several runs were hashed to wait for all of them: each of these runs has a slot,
//     ordered by row and key, for its sum, and rows are updated from slots at the end.
// So each row is updated once, by one task, whatever the number of threads; and sums are added in
// the order that prefix_ngram_gradient has where levels lie side by side.
#pragma once

#include <cstdint>

#include "prefix_ngram_gradient.h"
#include "row_update.h"

namespace livrec {

constexpr int64_t kNoRow = INT64_MIN;

// The runs of a group's sorted items.
struct PrefixPlan {
  uint8_t* fresh;        // [items]: the first level where an item begins a run, or its depth
  uint8_t* depth;        // [items]: how many levels it knows
  int64_t* const* rows;  // [levels]: [items], see below
  int64_t* counts;       // [chunks, levels]: how many runs begin in a chunk
};

// Finds the runs of a chunk. The table rows of those that begin there are rows[l] + chunk *
// kRunChunk and on.
LIVREC_DECLARE(void, prefix_update_plan,
               (const PrefixGradient& job, int64_t chunk, const PrefixPlan& plan))

struct PrefixUpdate {
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

// Numbers of scratch that prefix_update_chunk needs.
LIVREC_DECLARE(int64_t, prefix_update_scratch,
               (const PrefixGradient& job, const PrefixUpdate& update))
// Adds up the runs of a chunk and updates the rows of those that end.
LIVREC_DECLARE(void, prefix_update_chunk,
               (const PrefixGradient& job, int64_t chunk, const PrefixUpdate& update,
                const PrefixEnds& ends, float* scratch))

// Adds up slots of the same row, in order, and updates those rows whose first slot is in [begin,
// end). rows [count], ascending: of the slots. scratch [2 dim].
LIVREC_DECLARE(void, prefix_update_slots,
               (const RowUpdate& table, const int64_t* rows, float* slots, int64_t count,
                int64_t begin, int64_t end, float* scratch))

}  // namespace livrec
