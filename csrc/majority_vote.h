// Majority voting.
//
//   voted[b, l] = argmax_c |{t in S_l(b) : codes[t, l] = c}|, the codeword seen last on ties, -1
//
// where nobody votes. S_l(b) are all slices of history b (rule "per_level"), or those whose codes
// up to level l - 1 were voted themselves (rule "path").
//
// On a CPU, slices are counted in order, and whoever draws level with the greatest count takes the
// lead: a codeword gets its last vote where it is seen last, so the lead ends with the codeword
// seen last among the most frequent. Levels are counted in an array, up to four of them at once,
// or, where the array would be far larger than the history, in a hash table. Neither is cleared
// between histories: a count starts from `base`, which no count of an earlier history exceeds.
//
// A history longer than its share of the threads is cut into pieces, counted each by itself. Their
// counts are added up, and the latest slice whose codeword has the greatest count decides: the
// same codeword, whatever the pieces.
#pragma once

#include <cstdint>

#include "isa.h"

namespace livrec {

enum class Integer : int { u8, i8, i16, i32, i64 };

struct MajorityVote {
  const void* codes;  // code (t, l) is element t * slice_stride + l * level_stride
  Integer code_type;
  int64_t slice_stride, level_stride;
  const int64_t* levels;  // [level_count]: N_l, 1 to 2^31
  int64_t level_count;
  bool path;
  const int64_t* offsets;  // [histories + 1], checked: from 0 to the number of slices, not falling
  void* voted;             // [histories, level_count], contiguous
  Integer voted_type;      // i16 or i32
};

constexpr int kVoteGroup = 4;  // levels that are counted together

struct VoteEntry {
  uint32_t code, count;
};

// The codeword in the lead, or -1, and its votes above VoteCounters::base.
struct VoteLead {
  uint32_t count;
  int64_t code;
};

// Where votes are counted. All counts are `base` or less when a level's counting begins.
struct VoteCounters {
  uint32_t* dense;   // [kVoteGroup, stride], for levels of at most `stride` codewords
  int64_t stride;    // at least 1
  VoteEntry* table;  // [table_size], for other levels; null where there are none
  int64_t table_size;
  int table_bits;  // 2^table_bits entries are in use: more than slices
  uint32_t base;
};

// Slices [begin, end) of a history, or those of them that are listed, relative to begin. Counters
// and `list` are the caller's memory, the former all zero; the kernel sets the rest.
struct VotePiece {
  VoteCounters counters;
  uint32_t* list;  // as long as the piece; null by rule "per_level"
  int64_t begin, end;
  int64_t listed;  // -1: all slices
  VoteLead leads[kVoteGroup];
  int64_t bad;  // the first slice with a bad code, or -1
};

// Calls work(context, i) for each i of [0, count), on several threads, and returns after the last.
typedef void (*VoteThreads)(int64_t count, void (*work)(void* context, int64_t i), void* context);

// The least table_bits for a history of so many slices.
LIVREC_DECLARE(int, majority_vote_table_bits, (int64_t slices))
// Votes histories [first, last) but for those of more than `longest` slices, for which the memory
// of `piece` has room. Returns the first slice with a code outside [-1, N_l), or -1.
LIVREC_DECLARE(int64_t, majority_vote_histories,
               (const MajorityVote& job, int64_t first, int64_t last, int64_t longest,
                VotePiece& piece))
// Votes one history in `count` pieces of equal size. The table of the first has room for the whole
// history; the others need none. Returns as above.
LIVREC_DECLARE(int64_t, majority_vote_history,
               (const MajorityVote& job, int64_t history, VotePiece* pieces, int64_t count,
                VoteThreads threads))

}  // namespace livrec
