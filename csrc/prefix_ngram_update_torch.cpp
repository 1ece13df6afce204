#include "prefix_ngram_update.h"

#include <memory>

#include "prefix_sorted_torch.h"
#include "row_update_torch.h"

namespace livrec {
namespace {

constexpr int64_t kBitsOfRun = 16;  // of which one is set

// A group on its way through the update.
class GroupUpdate {
 public:
  GroupUpdate(PrefixGradient job, const RowUpdate* tables)
      : job_(job),
        tables_(tables),
        sorted_(job_),
        items_(job.codes.items),
        depth_(job.codes.level_count),
        chunks_((items_ + kRunChunk - 1) / kRunChunk),
        fresh_(static_cast<size_t>(items_)),
        known_(fresh_.size()),
        noted_(depth_ * items_ * 8),
        counts_(static_cast<size_t>(chunks_ * depth_)) {
    for (int64_t l = 0; l < depth_; ++l) {
      rows_.push_back(static_cast<int64_t*>(noted_.data()) + l * items_);
      wide_ += tables_[l].dim;
    }
  }

  void run() {
    const PrefixPlan plan{fresh_.data(), known_.data(), rows_.data(), counts_.data()};
    torch::stable::parallel_for(0, chunks_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) LIVREC_CALL(prefix_update_plan, job_, c, plan);
    });
    for (int64_t l = 0; l < depth_; ++l) {
      slots_.emplace_back();
      if (job_.codes.levels[l].hash != KeyHash::none) give_slots(l);
    }
    go_through_chunks(plan);
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

  // Calls visit(row, place) for the runs of a level, in the order of their keys.
  template <typename Visit>
  void each_run(int64_t l, const Visit& visit) const {
    const int64_t* rows = rows_[static_cast<size_t>(l)];
    for (int64_t c = 0; c < chunks_; ++c)
      for (int64_t i = 0; i < counts_[static_cast<size_t>(c * depth_ + l)]; ++i)
        visit(static_cast<uint64_t>(rows[c * kRunChunk + i]), c * kRunChunk + i);
  }

  // Finds the runs of a level whose rows other runs have, too: they get ~slot in place of the row.
  // Bits by what is left of a row, of which each run sets one, leave few to be sorted.
  void give_slots(int64_t l) {
    int64_t width = 6;
    while (int64_t{1} << width < kBitsOfRun * items_) ++width;
    const uint64_t mask = (uint64_t{1} << width) - 1;
    std::vector<uint64_t> once(static_cast<size_t>((mask + 1) / 64)), again(once.size());
    each_run(l, [&](uint64_t row, int64_t) {
      const uint64_t word = (row & mask) / 64, bit = uint64_t{1} << row % 64;
      again[word] |= once[word] & bit;
      once[word] |= bit;
    });
    std::vector<uint64_t> rows;
    std::vector<uint32_t> places;
    each_run(l, [&](uint64_t row, int64_t place) {
      if ((again[(row & mask) / 64] >> row % 64 & 1) == 0) return;
      rows.push_back(row);
      places.push_back(static_cast<uint32_t>(place));
    });
    const uint64_t height = job_.codes.levels[l].rows;
    sort(rows, places, bits_of(static_cast<int64_t>(std::min<uint64_t>(height, INT64_MAX))));
    Slots& slots = slots_.back();
    for (size_t i = 0; i < rows.size(); ++i) {
      const bool shared =
          (i > 0 && rows[i] == rows[i - 1]) || (i + 1 < rows.size() && rows[i] == rows[i + 1]);
      if (!shared) continue;
      rows_[static_cast<size_t>(l)][places[i]] = ~static_cast<int64_t>(slots.rows.size());
      slots.rows.push_back(static_cast<int64_t>(rows[i]));
    }
    const auto count = static_cast<int64_t>(slots.rows.size());
    slots.sums = std::make_unique<Scratch>(count * tables_[l].dim * 4);
  }

  void go_through_chunks(const PrefixPlan& plan) {
    heads_.assign(static_cast<size_t>(chunks_ * wide_), 0.0f);
    tails_.resize(heads_.size());
    open_.resize(static_cast<size_t>(chunks_ * depth_));
    std::vector<float*> slots;
    for (const Slots& level : slots_) slots.push_back(level.data());
    const PrefixUpdate update{tables_, plan, slots.data()};
    const auto room = static_cast<size_t>(LIVREC_CALL(prefix_update_scratch, job_, update));
    std::atomic<int64_t> next{0};  // sparse codes take longer than dense ones, and lie together
    torch::stable::parallel_for(0, chunks_, 1, [&](int64_t, int64_t) {
      std::vector<float> scratch(room);
      for (int64_t c = next++; c < chunks_; c = next++) {
        const PrefixEnds ends{heads_.data() + c * wide_, tails_.data() + c * wide_,
                              open_.data() + c * depth_};
        LIVREC_CALL(prefix_update_chunk, job_, c, update, ends, scratch.data());
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
      LIVREC_CALL(prefix_update_slots, tables_[l], slots.rows.data(), slots.data(), count, begin,
                  end, static_cast<float*>(scratch.data()));
    });
  }

  PrefixGradient job_;
  const RowUpdate* tables_;
  SortedCodes sorted_;
  int64_t items_, depth_, chunks_;
  int64_t wide_ = 0;  // of the sums of all levels
  std::vector<uint8_t> fresh_, known_;
  Scratch noted_;
  std::vector<int64_t*> rows_;   // [levels]: [items], the rows of runs, chunk by chunk
  std::vector<int64_t> counts_;  // [chunks, levels]: the runs that begin in a chunk
  std::vector<Slots> slots_;
  std::vector<float> heads_, tails_;  // [chunks, wide]
  std::vector<int64_t> open_;         // [chunks, levels]
};

// Tables and states are written by several tasks at once: no two may share memory.
void check_apart(const std::vector<Tensor>& tensors) {
  std::vector<std::pair<uintptr_t, uintptr_t>> spans;
  for (const Tensor& tensor : tensors) {
    if (tensor.numel() == 0) continue;
    int64_t last = 0;
    for (int64_t d = 0; d < tensor.dim(); ++d) last += (tensor.size(d) - 1) * tensor.stride(d);
    const auto from = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
    spans.emplace_back(from, from + static_cast<uintptr_t>(last + 1) * tensor.element_size());
  }
  std::sort(spans.begin(), spans.end());
  for (size_t i = 1; i < spans.size(); ++i)
    STD_TORCH_CHECK(spans[i].first >= spans[i - 1].second,
                    "tables: no two of them, nor of the states, may share memory");
}

void prefix_ngram_update(const std::vector<Tensor>& tables, const std::vector<Tensor>& states,
                         const Tensor& grad, const Tensor& codes, const std::vector<int64_t>& sizes,
                         const Text& mode, const Optional& offsets, const std::optional<Text>& pool,
                         const Text& hashing, const std::vector<int64_t>& groups, bool packed,
                         const Text& rule, double lr, double eps,
                         const std::vector<int64_t>& seeds) {
  STD_TORCH_CHECK(
      seeds.size() == tables.size() && (states.empty() || states.size() == seeds.size()),
      "states, seeds: must be one per table");
  std::vector<RowUpdate> jobs;
  std::vector<int64_t> rows, dims;
  std::vector<Tensor> changed(tables);
  changed.insert(changed.end(), states.begin(), states.end());
  check_apart(changed);
  for (size_t l = 0; l < tables.size(); ++l) {
    jobs.push_back(row_job(tables[l], states.empty() ? Optional() : Optional(states[l]), rule, lr,
                           eps, seeds[l]));
    rows.push_back(tables[l].size(0)), dims.push_back(tables[l].size(1));
  }
  const bool sum = mode == "sum";
  const UpstreamGradient given(grad, codes, Levels(sizes, rows, dims, groups, sum, hashing), sizes,
                               sum, offsets, pool, packed);
  std::vector<std::unique_ptr<GroupUpdate>> updates;  // all codes are checked before a row changes
  int64_t from = 0;
  for (const int64_t group : groups) {
    updates.push_back(
        std::make_unique<GroupUpdate>(given.of_levels(from, group), jobs.data() + from));
    from += group;
  }
  for (const auto& update : updates) update->run();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(livrec, CPU, m) {
  m.impl("prefix_ngram_update.native", TORCH_BOX(&prefix_ngram_update));
}

}  // namespace livrec
