// A step of an optimiser on the rows of prefix tables that a lookup read, straight from the
// gradient of the lookup: what row_update makes of the sums of prefix_ngram_gradient, to the bit,
// but the sums are not written down.
//
// Codes are sorted and cut into chunks as for the gradient. A run's row is updated when the run
// ends, while its sum is in the first-level cache. What cannot be done there and then:
//   - a run that goes on in the next chunk is added up chunk by chunk, when all chunks are done;
//   - rows that several runs were hashed to wait for all of them: each of these runs has a slot,
//     ordered by row and key, for its sum, and rows are updated from slots at the end.
// So each row is updated once, by one task, whatever the number of threads.
#pragma once

#include <cstdint>

#include "prefix_ngram_gradient.h"
#include "row_update.h"

namespace livrec {

constexpr int64_t kNoRow = INT64_MIN;

// Notes the table rows of the runs that begin in a chunk, in order: rows[l] [items] holds those of
// level l from place chunk * kRunChunk on. counts [levels]: how many there are.
LIVREC_DECLARE(void, prefix_update_rows,
               (const PrefixGradient& job, int64_t chunk, int64_t* const* rows, int64_t* counts))

struct PrefixUpdate {
  const RowUpdate* tables;     // [levels]; their rows and sums are not looked at
  const int64_t* const* rows;  // [levels]: as noted, but ~slot where a run's sum goes to a slot
  float* const* slots;         // [levels]: [slots, d_l]
};

// What is left of a chunk. Sums of all levels lie side by side.
struct PrefixEnds {
  float* head;    // sums of what goes on with runs of chunks before; zeroed
  bool* goes_on;  // [levels]: whether there is such a run
  float* tail;    // sums of runs that begin here and may go on
  int64_t* rows;  // [levels]: their rows, or ~slots; kNoRow where there is none
};

// Adds up the runs of a chunk and updates the rows of those that end. counts: as noted. scratch
// [width + 2 max d_l].
LIVREC_DECLARE(void, prefix_update_chunk,
               (const PrefixGradient& job, int64_t chunk, const int64_t* counts,
                const PrefixUpdate& update, const PrefixEnds& ends, float* scratch))

// Adds up slots of the same row, in order, and updates those rows whose first slot is in [begin,
// end). rows [count], ascending: of the slots. scratch [2 dim].
LIVREC_DECLARE(void, prefix_update_slots,
               (const RowUpdate& table, const int64_t* rows, float* slots, int64_t count,
                int64_t begin, int64_t end, float* scratch))

}  // namespace livrec
