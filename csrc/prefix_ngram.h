// Prefix n-gram embedding: lookup, and the sums of gradients per table row.
//
//   key_l = key_{l-1} N_l + c_l (anew where a group of levels begins);   row_l = hash_l(key_l)
//   out = E_1[row_1] || ... || E_L[row_L], or their sum; pooled over histories where asked for
//
// An unknown code (-1) ends its group: that level and the deeper ones add nothing.
//
// Keys are hierarchical: rows of codes sorted by all their levels are sorted by every prefix, so
// that one sort serves the gradients of all levels. Sorted rows are cut into chunks of fixed size;
// a chunk adds up its own runs of equal prefixes in order, and what a run has in several chunks is
// added chunk by chunk: sums do not depend on the number of threads.
#pragma once

#include <cstdint>

#include "isa.h"

namespace livrec {

enum class CodeType : int { u8, i8, i16, i32, i64, packed };
enum class TableType : int { f32, f16, bf16, i8 };
enum class KeyHash : int { none, modulo, murmur3, order_preserving };

struct PrefixLevel {
  int64_t size;    // N_l
  bool begins;     // whether keys begin anew here
  KeyHash hash;    // none: rows hold all keys
  uint64_t rows;   // H_l
  uint64_t keys;   // N_1 ... N_l of the group
  int64_t dim;     // d_l
  int64_t column;  // where d_l numbers go in a row of the output
  // Lookup only:
  const void* table;     // [rows, dim], unit stride
  int64_t table_stride;  // elements from row to row
  const float* scales;   // of int8 rows, or null
};

// Where codes lie: [items, level_count] of some integer type, or packed rows of bits, the first
// level in the lowest.
struct Codes {
  const void* data;
  CodeType type;
  int64_t items;
  int64_t row_stride, column_stride;  // elements; bytes where packed
  const PrefixLevel* levels;
  int64_t level_count;
  int64_t skipped;  // levels that lie before these in a row (and before `levels` in memory)
};

struct PrefixLookup {
  Codes codes;
  TableType type;
  bool sum;                // over levels, instead of side by side
  const int64_t* offsets;  // [histories + 1] to pool over, or null
  bool mean;
  void* out;  // [items or histories, width]; float32 where tables are int8
  int64_t width;
};

// Items whose table rows are found, and asked for, before the first of them is read.
constexpr int64_t kPrefixBlock = 32;

// The table rows of items [begin, end), at most kPrefixBlock: rows[l * kPrefixBlock + i], -1 where
// the code is unknown. Returns the first item with a code outside [-1, N_l), or -1.
LIVREC_DECLARE(int64_t, prefix_ngram_rows,
               (const Codes& codes, int64_t begin, int64_t end, int64_t* rows))

// Bytes of scratch that one call of prefix_ngram_lookup needs.
LIVREC_DECLARE(int64_t, prefix_ngram_scratch, (const PrefixLookup& job))
// Looks up output rows [begin, end). Returns the first item with a code outside [-1, N_l), having
// read no row for it, or -1.
LIVREC_DECLARE(int64_t, prefix_ngram_lookup,
               (const PrefixLookup& job, int64_t begin, int64_t end, void* scratch))

}  // namespace livrec
