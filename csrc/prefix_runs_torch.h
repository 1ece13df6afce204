// The runs of a group's sorted codes, for torch operators: whose steps they are is the caller's.
#pragma once

#include <memory>

#include "prefix_sorted_torch.h"
#include "row_update_torch.h"

namespace livrec {

constexpr int64_t kBitsOfRun = 16;  // of which one is set

class PrefixRuns {
 public:
  explicit PrefixRuns(const PrefixGradient& job)
      : job_(job),
        sorted_(job_),
        items_(job.codes.items),
        depth_(job.codes.level_count),
        chunks_((items_ + kRunChunk - 1) / kRunChunk),
        fresh_(static_cast<size_t>(items_)),
        known_(fresh_.size()),
        noted_(depth_ * items_ * 8),
        counts_(static_cast<size_t>(chunks_ * depth_)),
        slots_(static_cast<size_t>(depth_)) {
    for (int64_t l = 0; l < depth_; ++l)
      rows_.push_back(static_cast<int64_t*>(noted_.data()) + l * items_);
    torch::stable::parallel_for(0, chunks_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) LIVREC_CALL(prefix_runs_plan, job_, c, plan());
    });
  }
  PrefixRuns(const PrefixRuns&) = delete;

  // Gives slots to runs of hashed levels whose rows other runs have, too. Bits by what is left of a
  // row, of which each run sets one, leave few to be sorted.
  void share_rows() {
    int64_t width = 6;
    while (int64_t{1} << width < kBitsOfRun * items_) ++width;
    const uint64_t mask = (uint64_t{1} << width) - 1;
    for (int64_t l = 0; l < depth_; ++l) {
      if (job_.codes.levels[l].hash == KeyHash::none) continue;
      std::vector<uint64_t> once(static_cast<size_t>((mask + 1) / 64)), again(once.size());
      each_run(l, [&](int64_t& run) {
        const auto row = static_cast<uint64_t>(run);
        const uint64_t word = (row & mask) / 64, bit = uint64_t{1} << row % 64;
        again[word] |= once[word] & bit;
        once[word] |= bit;
      });
      const ByRow runs =
          by_row(l, [&](uint64_t row) { return (again[(row & mask) / 64] >> row % 64 & 1) != 0; });
      for (size_t i = 0; i < runs.rows.size(); ++i)
        if (runs.shares(i)) give_slot(l, runs.places[i], static_cast<int64_t>(runs.rows[i]));
    }
  }

  // Returns the rows of a level that occur, ascending; runs are then of places among these.
  Tensor number_rows(int64_t l) {
    int64_t count = 0, next = 0;
    if (job_.codes.levels[l].hash == KeyHash::none) {  // a run each, in order
      each_run(l, [&](int64_t&) { ++count; });
      const Tensor found = empty_cpu({count}, ScalarType::Long);
      auto* rows = found.mutable_data_ptr<int64_t>();
      each_run(l, [&](int64_t& run) { rows[next] = run, run = next++; });
      return found;
    }
    const ByRow runs = by_row(l, [](uint64_t) { return true; });
    for (size_t i = 0; i < runs.rows.size(); ++i) count += runs.begins(i) ? 1 : 0;
    const Tensor found = empty_cpu({count}, ScalarType::Long);
    auto* rows = found.mutable_data_ptr<int64_t>();
    for (size_t i = 0; i < runs.rows.size(); ++i) {
      if (runs.begins(i)) rows[next++] = static_cast<int64_t>(runs.rows[i]);
      if (runs.shares(i))
        give_slot(l, runs.places[i], next - 1);
      else
        rows_[static_cast<size_t>(l)][runs.places[i]] = next - 1;
    }
    return found;
  }

  // Adds up the runs, and takes the step of each row. tables [levels].
  void go(const RowUpdate* tables) {
    tables_ = tables;
    for (int64_t l = 0; l < depth_; ++l) {
      Slots& slots = slots_[static_cast<size_t>(l)];
      const auto count = static_cast<int64_t>(slots.rows.size());
      if (count > 0) slots.sums = std::make_unique<Scratch>(count * tables_[l].dim * 4);
      wide_ += tables_[l].dim;
    }
    go_through_chunks();
    for (int64_t l = 0; l < depth_; ++l) {
      finish_long_runs(l);
      finish_slots(l);
    }
  }

 private:
  // The sums of runs that share rows with others, ordered by row and key.
  struct Slots {
    std::vector<int64_t> rows;
    std::unique_ptr<Scratch> sums;
    float* data() const { return sums ? static_cast<float*>(sums->data()) : nullptr; }
  };

  // Runs ordered by row and key, and where they are noted.
  struct ByRow {
    std::vector<uint64_t> rows;
    std::vector<uint32_t> places;
    bool begins(size_t i) const { return i == 0 || rows[i] != rows[i - 1]; }
    bool shares(size_t i) const {
      return !begins(i) || (i + 1 < rows.size() && rows[i] == rows[i + 1]);
    }
  };

  PrefixPlan plan() { return {fresh_.data(), known_.data(), rows_.data(), counts_.data()}; }

  // Visits the rows of a level's runs, in the order of their keys.
  template <typename Visit>
  void each_run(int64_t l, const Visit& visit) const {
    int64_t* rows = rows_[static_cast<size_t>(l)];
    for (int64_t c = 0; c < chunks_; ++c)
      for (int64_t i = 0; i < counts_[static_cast<size_t>(c * depth_ + l)]; ++i)
        visit(rows[c * kRunChunk + i]);
  }

  // Sorts those runs of a level whose rows are wanted.
  template <typename Wanted>
  ByRow by_row(int64_t l, const Wanted& wanted) const {
    ByRow found;
    const int64_t* first = rows_[static_cast<size_t>(l)];
    each_run(l, [&](int64_t& run) {
      if (!wanted(static_cast<uint64_t>(run))) return;
      found.rows.push_back(static_cast<uint64_t>(run));
      found.places.push_back(static_cast<uint32_t>(&run - first));
    });
    const uint64_t height = job_.codes.levels[l].rows;
    sort(found.rows.data(), found.places.data(), static_cast<int64_t>(found.rows.size()),
         bits_of(static_cast<int64_t>(std::min<uint64_t>(height, INT64_MAX))), true);
    return found;
  }

  void give_slot(int64_t l, uint32_t place, int64_t row) {
    Slots& slots = slots_[static_cast<size_t>(l)];
    rows_[static_cast<size_t>(l)][place] = ~static_cast<int64_t>(slots.rows.size());
    slots.rows.push_back(row);
  }

  void go_through_chunks() {
    heads_.assign(static_cast<size_t>(chunks_ * wide_), 0.0f);
    tails_.resize(heads_.size());
    open_.resize(static_cast<size_t>(chunks_ * depth_));
    std::vector<float*> slots;
    for (const Slots& level : slots_) slots.push_back(level.data());
    const PrefixSteps steps{tables_, plan(), slots.data()};
    const auto room = static_cast<size_t>(LIVREC_CALL(prefix_runs_scratch, job_, steps));
    std::atomic<int64_t> next{0};  // sparse codes take longer than dense ones, and lie together
    torch::stable::parallel_for(0, chunks_, 1, [&](int64_t, int64_t) {
      std::vector<float> scratch(room);
      for (int64_t c = next++; c < chunks_; c = next++) {
        const PrefixEnds ends{heads_.data() + c * wide_, tails_.data() + c * wide_,
                              open_.data() + c * depth_};
        LIVREC_CALL(prefix_runs_chunk, job_, c, steps, ends, scratch.data());
      }
    });
  }

  // Adds up what the runs that were open at the end of a chunk have in later ones, in order.
  void finish_long_runs(int64_t l) {
    const int64_t dim = tables_[l].dim;
    int64_t place = 0;
    for (int64_t before = 0; before < l; ++before) place += tables_[before].dim;
    std::vector<int64_t> rows;
    std::vector<float> sums;
    float* sum = nullptr;
    int64_t row = kNoRow;
    const auto finish = [&] {
      if (row >= 0) {
        rows.push_back(row);
        sums.insert(sums.end(), sum, sum + dim);
      } else if (row != kNoRow) {
        std::copy_n(sum, dim, slots_[static_cast<size_t>(l)].data() + ~row * dim);
      }
    };
    for (int64_t c = 0; c < chunks_; ++c) {
      const auto at = static_cast<size_t>(c * depth_ + l);
      const float* head = heads_.data() + c * wide_ + place;
      const bool goes_on = l < fresh_[static_cast<size_t>(c * kRunChunk)];
      for (int64_t d = 0; goes_on && d < dim; ++d) sum[d] += head[d];
      if (open_[at] == kNoRow) continue;
      finish();
      row = open_[at], sum = tails_.data() + c * wide_ + place;
    }
    finish();
    RowUpdate job = tables_[l];
    job.rows = rows.data(), job.sums = sums.data();
    const Scratch scratch(2 * dim * 4);
    LIVREC_CALL(row_update, job, 0, static_cast<int64_t>(rows.size()),
                static_cast<float*>(scratch.data()));
  }

  void finish_slots(int64_t l) {
    const Slots& slots = slots_[static_cast<size_t>(l)];
    const auto count = static_cast<int64_t>(slots.rows.size());
    torch::stable::parallel_for(0, count, 512, [&](int64_t begin, int64_t end) {
      const Scratch scratch(2 * tables_[l].dim * 4);
      LIVREC_CALL(prefix_runs_slots, tables_[l], slots.rows.data(), slots.data(), count, begin, end,
                  static_cast<float*>(scratch.data()));
    });
  }

  PrefixGradient job_;
  SortedCodes sorted_;
  int64_t items_, depth_, chunks_;
  const RowUpdate* tables_ = nullptr;
  int64_t wide_ = 0;  // of the sums of all levels
  std::vector<uint8_t> fresh_, known_;
  Scratch noted_;
  std::vector<int64_t*> rows_;   // [levels]: [items], the rows of runs, chunk by chunk
  std::vector<int64_t> counts_;  // [chunks, levels]: the runs that begin in a chunk
  std::vector<Slots> slots_;
  std::vector<float> heads_, tails_;  // [chunks, wide]
  std::vector<int64_t> open_;         // [chunks, levels]
};

}  // namespace livrec
