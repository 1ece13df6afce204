#include "majority_vote.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>
#include <string>

#include "torch_glue.h"

namespace livrec {
namespace {

constexpr int64_t kThreadWork = 8192;  // codes that are worth another thread
constexpr int64_t kPieceWork = 32768;  // slices that are worth a piece of their own
constexpr int64_t kSmallLevel = 65536;

Integer integer_type(const Tensor& codes) {
  const auto type = codes.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Byte || type == ScalarType::Char ||
                      type == ScalarType::Short || type == ScalarType::Int ||
                      type == ScalarType::Long,
                  "codes: must be uint8, int8, int16, int32 or int64");
  return type == ScalarType::Byte    ? Integer::u8
         : type == ScalarType::Char  ? Integer::i8
         : type == ScalarType::Short ? Integer::i16
         : type == ScalarType::Int   ? Integer::i32
                                     : Integer::i64;
}

// How much memory counting takes. An array has at most eight counters per slice, or is small.
struct Sizes {
  int64_t stride = 1, table = 0;

  Sizes(const MajorityVote& job, int64_t longest) {
    const int64_t limit = std::max(2 * longest, kSmallLevel);
    for (int64_t l = 0; l < job.level_count; ++l)
      if (job.levels[l] <= limit)
        stride = std::max(stride, job.levels[l]);
      else
        table = int64_t{1} << LIVREC_CALL(majority_vote_table_bits, longest);
  }
};

// A piece and its memory, but for the list.
class Counting {
 public:
  Counting(const Sizes& sizes, int64_t table)
      : dense_(kVoteGroup * sizes.stride * 4),
        table_(table * static_cast<int64_t>(sizeof(VoteEntry))) {
    std::memset(dense_.data(), 0, static_cast<std::size_t>(kVoteGroup * sizes.stride * 4));
    std::memset(table_.data(), 0, static_cast<std::size_t>(table) * sizeof(VoteEntry));
    piece.counters = {static_cast<uint32_t*>(dense_.data()),
                      sizes.stride,
                      table == 0 ? nullptr : static_cast<VoteEntry*>(table_.data()),
                      table,
                      1,
                      0};
  }

  VotePiece piece{};

 private:
  Scratch dense_, table_;
};

class MajorityVoting {
 public:
  MajorityVoting(const MajorityVote& job, int64_t histories) : job_(job), histories_(histories) {}

  void run() {
    const int64_t work = job_.offsets[histories_] * job_.level_count + histories_;
    const int64_t most = torch::stable::get_num_threads();
    threads_ = std::clamp<int64_t>(work / kThreadWork, 1, most);
    // Beyond this a history keeps a thread busy when the others are done.
    whole_ = threads_ == 1 ? job_.offsets[histories_]
                           : std::max(job_.offsets[histories_] / (2 * threads_), 2 * kPieceWork);
    vote_whole();
    for (int64_t h = 0; h < histories_ && bad_ < 0; ++h)
      if (slices(h) > whole_) vote_in_pieces(h);
    STD_TORCH_CHECK(bad_ < 0, "codes: a code of slice ", bad_.load(), " is outside [-1, N_l)");
  }

 private:
  int64_t slices(int64_t history) const {
    return job_.offsets[history + 1] - job_.offsets[history];
  }

  void report(int64_t bad) {
    int64_t known = bad_;
    while (bad >= 0 && (known < 0 || bad < known) && !bad_.compare_exchange_weak(known, bad)) {
    }
  }

  // All histories but the longest ones, in runs of about equally many slices.
  void vote_whole() {
    int64_t longest = 0, total = 0;
    for (int64_t h = 0; h < histories_; ++h)
      if (slices(h) <= whole_) longest = std::max(longest, slices(h)), total += slices(h) + 1;
    std::vector<int64_t> bounds{0};
    int64_t seen = 0;
    for (int64_t h = 0; h < histories_; ++h) {
      const int64_t run = static_cast<int64_t>(bounds.size());
      if (run < threads_ && seen >= total * run / threads_) bounds.push_back(h);
      if (slices(h) <= whole_) seen += slices(h) + 1;
    }
    bounds.push_back(histories_);
    const Sizes sizes(job_, longest);
    const int64_t runs = static_cast<int64_t>(bounds.size()) - 1;
    torch::stable::parallel_for(0, runs, 1, [&](int64_t begin, int64_t end) {
      Counting counting(sizes, sizes.table);
      const Scratch list(job_.path ? longest * 4 : 0);
      if (job_.path) counting.piece.list = static_cast<uint32_t*>(list.data());
      for (int64_t i = begin; i < end; ++i)
        report(LIVREC_CALL(majority_vote_histories, job_, bounds[i], bounds[i + 1], longest,
                           counting.piece));
    });
  }

  // One history with all threads; a piece counts at least as many slices as it has counters.
  void vote_in_pieces(int64_t history) {
    const Sizes sizes(job_, slices(history));
    const int64_t count =
        std::clamp<int64_t>(slices(history) / std::max(kPieceWork, sizes.stride), 1, threads_);
    const Scratch list(job_.path ? slices(history) * 4 : 0);
    std::vector<Counting> countings;
    std::vector<VotePiece> pieces;
    for (int64_t i = 0; i < count; ++i) {
      countings.emplace_back(sizes, i == 0 ? sizes.table : 0);
      pieces.push_back(countings.back().piece);
      if (job_.path)
        pieces.back().list = static_cast<uint32_t*>(list.data()) + slices(history) * i / count;
    }
    const VoteThreads threads = [](int64_t tasks, void (*work)(void*, int64_t), void* context) {
      torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) work(context, i);
      });
    };
    report(LIVREC_CALL(majority_vote_history, job_, history, pieces.data(), count, threads));
  }

  const MajorityVote& job_;
  const int64_t histories_;
  int64_t threads_ = 1, whole_ = 0;
  std::atomic<int64_t> bad_{-1};
};

void check_offsets(const int64_t* offsets, int64_t histories, int64_t slices) {
  bool falls = false;
  for (int64_t h = 0; h < histories; ++h) falls |= offsets[h] > offsets[h + 1];
  STD_TORCH_CHECK(offsets[0] == 0 && !falls && offsets[histories] == slices,
                  "offsets: must go from 0 to the number of rows of codes, and never decrease");
}

Tensor majority_vote(const Tensor& codes, const Tensor& offsets_given,
                     const std::vector<int64_t>& levels, const Text& rule) {
  STD_TORCH_CHECK(rule == "per_level" || rule == "path", "rule: must be per_level or path");
  const int64_t depth = static_cast<int64_t>(levels.size());
  STD_TORCH_CHECK(depth > 0 && codes.dim() == 2 && codes.size(1) == depth &&
                      codes.size(0) < std::numeric_limits<uint32_t>::max(),
                  "codes: must be [T, L] with L levels and T below 2^32 - 1");
  const auto [least, most] = std::minmax_element(levels.begin(), levels.end());
  STD_TORCH_CHECK(*least >= 1 && *most <= int64_t{1} << 31, "levels: each must be 1 to 2^31");
  STD_TORCH_CHECK(offsets_given.dim() == 1 && offsets_given.size(0) > 0 &&
                      offsets_given.scalar_type() == ScalarType::Long,
                  "offsets: must be int64 [B + 1]");
  const Tensor offsets = contiguous_of(offsets_given);
  const int64_t histories = offsets.size(0) - 1;
  check_offsets(offsets.const_data_ptr<int64_t>(), histories, codes.size(0));
  const bool narrow = *most <= 32767;
  Tensor voted = empty_cpu({histories, depth}, narrow ? ScalarType::Short : ScalarType::Int);
  const MajorityVote job{codes.const_data_ptr(),
                         integer_type(codes),
                         codes.stride(0),
                         codes.stride(1),
                         levels.data(),
                         depth,
                         rule == "path",
                         offsets.const_data_ptr<int64_t>(),
                         voted.mutable_data_ptr(),
                         narrow ? Integer::i16 : Integer::i32};
  MajorityVoting(job, histories).run();
  return voted;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(livrec, CPU, m) {
  m.impl("majority_vote.native", TORCH_BOX(&majority_vote));
}

}  // namespace livrec
