#include "majority_vote.h"

#include <cstddef>

#if !defined(LIVREC_ISA)
#error "compile once per instruction-set level, with -DLIVREC_ISA=<level>"
#endif

namespace livrec {
namespace LIVREC_ISA {
namespace {

constexpr uint64_t kUnknown = ~uint64_t{0};  // -1, as codes are read

// A code as an unsigned number: whatever is negative lies past every N_l.
template <typename Code>
inline uint64_t code_at(const MajorityVote& job, int64_t slice, int64_t level) {
  const Code* codes = static_cast<const Code*>(job.codes);
  return static_cast<uint64_t>(
      static_cast<int64_t>(codes[slice * job.slice_stride + level * job.level_stride]));
}

// The counter of a code in the hash table; an entry that counts no more than `base` is free.
inline uint32_t& counter_of(const VoteCounters& counters, uint64_t code) {
  const uint64_t last = (uint64_t{1} << counters.table_bits) - 1;
  uint64_t slot = code * 0x9e3779b97f4a7c15u >> (64 - counters.table_bits);
  while (counters.table[slot].count > counters.base && counters.table[slot].code != code)
    slot = (slot + 1) & last;
  counters.table[slot].code = static_cast<uint32_t>(code);
  return counters.table[slot].count;
}

// Counts the votes of a piece at kLevels levels from `level` on. Returns the first slice with a bad
// code, where it stops, or -1.
template <typename Code, int kLevels, bool kDense, bool kListed>
int64_t tally(const MajorityVote& job, const VotePiece& piece, int64_t level,
              const VoteCounters& counters, VoteLead* leads) {
  uint64_t size[kLevels], lead[kLevels];
  uint32_t most[kLevels];
  for (int j = 0; j < kLevels; ++j) {
    size[j] = static_cast<uint64_t>(job.levels[level + j]);
    lead[j] = static_cast<uint64_t>(leads[j].code), most[j] = leads[j].count;
  }
  const uint32_t base = counters.base;
  const int64_t slices = kListed ? piece.listed : piece.end - piece.begin;
  for (int64_t i = 0; i < slices; ++i) {
    const int64_t slice = piece.begin + (kListed ? piece.list[i] : i);
#pragma GCC unroll 4
    for (int j = 0; j < kLevels; ++j) {
      const uint64_t code = code_at<Code>(job, slice, level + j);
      if (__builtin_expect(code >= size[j], 0)) {
        if (code != kUnknown) return slice;
        continue;
      }
      uint32_t& counter = kDense ? counters.dense[j * counters.stride + static_cast<int64_t>(code)]
                                 : counter_of(counters, code);
      const uint32_t votes = (counter > base ? counter : base) + 1;
      counter = votes;
      lead[j] = votes >= most[j] ? code : lead[j];
      most[j] = votes >= most[j] ? votes : most[j];
    }
  }
  for (int j = 0; j < kLevels; ++j) leads[j] = {most[j], static_cast<int64_t>(lead[j])};
  return -1;
}

template <typename Code>
int64_t tally(const MajorityVote& job, const VotePiece& piece, int64_t level, int levels,
              const VoteCounters& counters, VoteLead* leads) {
  const bool listed = piece.listed >= 0;
  if (job.levels[level] > counters.stride)
    return listed ? tally<Code, 1, false, true>(job, piece, level, counters, leads)
                  : tally<Code, 1, false, false>(job, piece, level, counters, leads);
  if (listed) return tally<Code, 1, true, true>(job, piece, level, counters, leads);
  return levels == 1   ? tally<Code, 1, true, false>(job, piece, level, counters, leads)
         : levels == 2 ? tally<Code, 2, true, false>(job, piece, level, counters, leads)
         : levels == 3 ? tally<Code, 3, true, false>(job, piece, level, counters, leads)
                       : tally<Code, 4, true, false>(job, piece, level, counters, leads);
}

// Lists those slices of a piece whose code at `level` is `winner`; none where nobody voted.
template <typename Code>
void keep(const MajorityVote& job, VotePiece& piece, int64_t level, int64_t winner) {
  const bool all = piece.listed < 0;
  const int64_t slices = winner < 0 ? 0 : all ? piece.end - piece.begin : piece.listed;
  int64_t kept = 0;
  for (int64_t i = 0; i < slices; ++i) {
    const uint32_t slice = all ? static_cast<uint32_t>(i) : piece.list[i];
    piece.list[kept] = slice;
    kept += code_at<Code>(job, piece.begin + slice, level) == static_cast<uint64_t>(winner);
  }
  piece.listed = kept;
}

// The code of the last slice of a piece whose codeword has `most` votes in `counts`, or -1.
template <typename Code>
int64_t latest(const MajorityVote& job, const VotePiece& piece, int64_t level,
               const uint32_t* counts, uint32_t most) {
  const bool all = piece.listed < 0;
  for (int64_t i = all ? piece.end - piece.begin : piece.listed; i-- > 0;) {
    const uint64_t code = code_at<Code>(job, piece.begin + (all ? i : piece.list[i]), level);
    if (code != kUnknown && counts[code] == most) return static_cast<int64_t>(code);
  }
  return -1;
}

// The first slice with a bad code at any level, or -1: by rule "path" not every code is counted.
template <typename Code>
int64_t check(const MajorityVote& job, const VotePiece& piece) {
  int64_t first = piece.end;
  for (int64_t level = 0; level < job.level_count; ++level) {
    const uint64_t size = static_cast<uint64_t>(job.levels[level]);
    bool bad = false;
    for (int64_t slice = piece.begin; slice < first; ++slice)
      bad |= code_at<Code>(job, slice, level) + 1 > size;
    if (!bad) continue;
    first = piece.begin;
    while (code_at<Code>(job, first, level) + 1 <= size) ++first;
  }
  return first < piece.end ? first : -1;
}

// Makes room above `base` for the counts of one more history.
void rebase(VoteCounters& counters, int64_t slices) {
  if (counters.base <= UINT32_MAX - static_cast<uint32_t>(slices)) return;
  __builtin_memset(counters.dense, 0, static_cast<std::size_t>(kVoteGroup * counters.stride * 4));
  if (counters.table != nullptr)
    __builtin_memset(counters.table, 0,
                     sizeof(VoteEntry) * static_cast<std::size_t>(counters.table_size));
  counters.base = 0;
}

void store(const MajorityVote& job, int64_t history, int64_t level, int64_t code) {
  const int64_t at = history * job.level_count + level;
  if (job.voted_type == Integer::i16)
    static_cast<int16_t*>(job.voted)[at] = static_cast<int16_t>(code);
  else
    static_cast<int32_t*>(job.voted)[at] = static_cast<int32_t>(code);
}

// The voting of one history, cut into pieces.
template <typename Code>
class Voting {
 public:
  Voting(const MajorityVote& job, int64_t history, VotePiece* pieces, int64_t count)
      : job_(job), history_(history), pieces_(pieces), count_(count) {
    const int64_t begin = job.offsets[history];
    slices_ = job.offsets[history + 1] - begin;
    for (int64_t i = 0; i < count; ++i) {
      pieces[i].begin = begin + slices_ * i / count;
      pieces[i].end = begin + slices_ * (i + 1) / count;
      pieces[i].listed = pieces[i].bad = -1;
    }
    pieces->counters.table_bits = majority_vote_table_bits(slices_);
  }

  // Returns the first slice with a bad code, or -1.
  int64_t run(VoteThreads threads) {
    if (job_.path && on_pieces(threads, check_piece) >= 0) return first_bad();
    for (level_ = 0; level_ < job_.level_count; level_ += levels_) {
      levels_ = levels_together();
      const bool in_order = count_ == 1 || job_.levels[level_] > pieces_->counters.stride;
      if ((in_order ? tally_in_order() : on_pieces(threads, tally_piece)) >= 0) return first_bad();
      if (!in_order) add_up();
      for (int j = 0; j < levels_; ++j) store(job_, history_, level_ + j, pieces_->leads[j].code);
      if (job_.path && level_ + 1 < job_.level_count) on_pieces(threads, keep_piece);
    }
    return -1;
  }

 private:
  typedef void (*Work)(void* voting, int64_t piece);

  int64_t first_bad() const {
    for (int64_t i = 0; i < count_; ++i)
      if (pieces_[i].bad >= 0) return pieces_[i].bad;
    return -1;
  }

  int64_t on_pieces(VoteThreads threads, Work work) {
    if (count_ == 1)
      work(this, 0);
    else
      threads(count_, work, this);
    return first_bad();
  }

  int levels_together() const {
    int levels = 1;
    while (!job_.path && levels < kVoteGroup && level_ + levels < job_.level_count &&
           job_.levels[level_] <= pieces_->counters.stride &&
           job_.levels[level_ + levels] <= pieces_->counters.stride)
      ++levels;
    return levels;
  }

  // All pieces into the counters of the first.
  int64_t tally_in_order() {
    VoteCounters& counters = pieces_->counters;
    VoteLead* leads = pieces_->leads;
    rebase(counters, slices_);
    for (int j = 0; j < levels_; ++j) leads[j] = {counters.base, -1};
    for (int64_t i = 0; i < count_; ++i) {
      VotePiece& piece = pieces_[i];
      piece.bad = tally<Code>(job_, piece, level_, levels_, counters, leads);
      if (piece.bad >= 0) return piece.bad;
    }
    for (int j = 0; j < levels_; ++j)
      if (leads[j].count > counters.base) counters.base = leads[j].count;
    return -1;
  }

  // The counts of all pieces into those of the first, whose leads become those of the history.
  void add_up() {
    const int64_t stride = pieces_->counters.stride;
    for (int64_t i = 1; i < count_; ++i)
      for (int64_t at = 0; at < levels_ * stride; ++at)
        pieces_->counters.dense[at] += pieces_[i].counters.dense[at];
    for (int j = 0; j < levels_; ++j) {
      const uint32_t* counts = pieces_->counters.dense + j * stride;
      VoteLead lead{0, -1};
      for (int64_t code = 0; code < stride; ++code)
        lead.count = counts[code] > lead.count ? counts[code] : lead.count;
      for (int64_t i = count_; lead.count > 0 && lead.code < 0 && i-- > 0;)
        lead.code = latest<Code>(job_, pieces_[i], level_ + j, counts, lead.count);
      pieces_->leads[j] = lead;
    }
  }

  static void check_piece(void* voting, int64_t i) {
    const Voting& self = *static_cast<Voting*>(voting);
    self.pieces_[i].bad = check<Code>(self.job_, self.pieces_[i]);
  }

  static void tally_piece(void* voting, int64_t i) {
    const Voting& self = *static_cast<Voting*>(voting);
    VotePiece& piece = self.pieces_[i];
    VoteCounters counters = piece.counters;
    counters.base = 0;
    __builtin_memset(counters.dense, 0,
                     static_cast<std::size_t>(self.levels_ * counters.stride * 4));
    for (VoteLead& lead : piece.leads) lead = {0, -1};
    piece.bad = tally<Code>(self.job_, piece, self.level_, self.levels_, counters, piece.leads);
  }

  static void keep_piece(void* voting, int64_t i) {
    const Voting& self = *static_cast<Voting*>(voting);
    keep<Code>(self.job_, self.pieces_[i], self.level_, self.pieces_->leads[0].code);
  }

  const MajorityVote& job_;
  const int64_t history_;
  VotePiece* const pieces_;
  const int64_t count_;
  int64_t slices_, level_ = 0;
  int levels_ = 1;
};

template <typename Code>
int64_t vote(const MajorityVote& job, int64_t history, VotePiece* pieces, int64_t count,
             VoteThreads threads) {
  return Voting<Code>(job, history, pieces, count).run(threads);
}

template <typename Code>
int64_t histories(const MajorityVote& job, int64_t first, int64_t last, int64_t longest,
                  VotePiece& piece) {
  int64_t bad = -1;
  for (int64_t history = first; bad < 0 && history < last; ++history)
    if (job.offsets[history + 1] - job.offsets[history] <= longest)
      bad = vote<Code>(job, history, &piece, 1, nullptr);
  return bad;
}

// Calls `function` for the type of the codes.
#define LIVREC_BY_CODE(function, ...)                               \
  (job.code_type == Integer::u8    ? function<uint8_t>(__VA_ARGS__) \
   : job.code_type == Integer::i8  ? function<int8_t>(__VA_ARGS__)  \
   : job.code_type == Integer::i16 ? function<int16_t>(__VA_ARGS__) \
   : job.code_type == Integer::i32 ? function<int32_t>(__VA_ARGS__) \
                                   : function<int64_t>(__VA_ARGS__))

}  // namespace

int majority_vote_table_bits(int64_t slices) {
  int bits = 1;
  while (int64_t{2} << bits < 3 * slices) ++bits;  // no more than two thirds are taken
  return bits;
}

int64_t majority_vote_histories(const MajorityVote& job, int64_t first, int64_t last,
                                int64_t longest, VotePiece& piece) {
  return LIVREC_BY_CODE(histories, job, first, last, longest, piece);
}

int64_t majority_vote_history(const MajorityVote& job, int64_t history, VotePiece* pieces,
                              int64_t count, VoteThreads threads) {
  return LIVREC_BY_CODE(vote, job, history, pieces, count, threads);
}

}  // namespace LIVREC_ISA
}  // namespace livrec
