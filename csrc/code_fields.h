// Histories of codes, as the kernels over them read them: which rows of each field's table a
// user's history names, each of them once.
//
// A row's products with the queries are taken once per user, whatever the length of the history.
// They lie in slots, field after field; an item has a slot in every field. A row that very many
// items name has several slots, which take turns, so that no sum has more than kSlotTurns terms and
// that neighbouring items do not wait for each other's sums.
//
// Items may come in runs: all that share a row of the key field, the one of the most rows, after
// each other. What belongs to that row is then read and written once for all of them.
#pragma once

#include <cstdint>

#include "prefix_ngram.h"

namespace livrec {

constexpr int64_t kSlotTurns = 256;

struct CodeRow {
  int64_t row;  // of the field's table; -1: unknown codes, a row of zeros
  uint32_t slot, copies;
};

struct CodeRows {
  int64_t items, fields;
  const uint32_t* slots;    // [fields, items]
  const CodeRow* distinct;  // field by field
  const int64_t* ends;      // [fields + 1]: where a field's rows begin in `distinct`
  int64_t slot_count;
  int64_t key;               // field of the runs, or -1: items lie as in the history
  const uint32_t* places;    // [items]: where an item of the history lies in the runs, or null
  const uint32_t* run_ends;  // for each row of the key field
};

// Numbers of codes: each code plus 1, `past` for those that would have a higher one. counts
// [past + 1] grow by the items of each.
LIVREC_DECLARE(void, code_numbers,
               (const void* codes, CodeType type, int64_t stride, int64_t items, uint32_t past,
                uint32_t* numbers, uint32_t* counts))

}  // namespace livrec
