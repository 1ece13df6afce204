#include "prefix_ngram_update.h"

#include "prefix_runs.h"
#include "row_steps.h"

namespace livrec {
namespace LIVREC_ISA {
namespace {

constexpr int64_t kRowsAhead = 16;  // runs whose rows are asked for before they are updated

// The runs of a chunk, as it is gone through.
struct OpenRuns {
  const PrefixGradient& job;
  const PrefixUpdate& update;
  float* scratch;
  const int64_t* next[kMostLevels];  // the rows of the runs that will begin
  const int64_t* last[kMostLevels];  // where they end
  float* tail[kMostLevels];
  float* to[kMostLevels];  // where the open run of a level is added up; null: none is open

  // Ends all runs from level `from` on. Where levels are added up, what is inside a run belongs to
  // the run around it.
  void end(int64_t from, bool finished) {
    for (int64_t l = job.codes.level_count - 1; l >= from; --l) {
      if (!to[l]) continue;
      const RowUpdate& table = update.tables[l];
      if (job.sum && l > 0) add(to[l], table.dim, to[l - 1]);
      if (!finished) continue;
      if (to[l] == tail[l]) {
        const int64_t row = next[l][-1];
        if (row >= 0)
          step_row(table, row, tail[l], scratch);
        else
          copy(tail[l], table.dim, update.slots[l] + ~row * table.dim);
      }
      to[l] = nullptr;
    }
  }

  LIVREC_INLINE void begin(int64_t l) {
    to[l] = tail[l];
    if (next[l] + kRowsAhead < last[l]) ask_for(l, next[l][kRowsAhead]);
    ++next[l];
  }

  LIVREC_INLINE void ask_for(int64_t l, int64_t row) {
    if (row >= 0) ask(update.tables[l], row);
  }
};

}  // namespace

void prefix_update_rows(const PrefixGradient& job, int64_t chunk, int64_t* const* rows,
                        int64_t* counts) {
  const int64_t begin = chunk * kRunChunk, depth = job.codes.level_count;
  const int64_t end = begin + kRunChunk < job.codes.items ? begin + kRunChunk : job.codes.items;
  int64_t keys[kMostLevels];
  for (int64_t l = 0; l < depth; ++l) counts[l] = 0;
  for (int64_t at = begin; at < end; ++at) {
    const Step step = step_at(job, at);
    if (step.fresh == step.depth) continue;
    keys_at(job, at, step.depth, keys);
    for (int64_t l = step.fresh; l < step.depth; ++l) rows[l][begin + counts[l]++] = keys[l];
  }
  for (int64_t l = 0; l < depth; ++l)
    if (job.codes.levels[l].hash != KeyHash::none)
      prefix_gradient_hash(job.codes.levels[l], rows[l] + begin, counts[l], rows[l] + begin);
}

void prefix_update_chunk(const PrefixGradient& job, int64_t chunk, const int64_t* counts,
                         const PrefixUpdate& update, const PrefixEnds& ends, float* scratch) {
  const int64_t begin = chunk * kRunChunk, depth = job.codes.level_count;
  const int64_t end = begin + kRunChunk < job.codes.items ? begin + kRunChunk : job.codes.items;
  OpenRuns runs{job, update, nullptr, {}, {}, {}, {}};
  int64_t width = 0, place = 0;
  const Step first = step_at(job, begin);
  for (int64_t l = 0; l < depth; ++l) {
    const PrefixLevel& level = job.codes.levels[l];
    if (level.column + level.dim > width) width = level.column + level.dim;
    runs.next[l] = update.rows[l] + begin;
    runs.last[l] = runs.next[l] + counts[l];
    runs.tail[l] = ends.tail + place;
    ends.goes_on[l] = l < first.fresh;
    if (ends.goes_on[l]) runs.to[l] = ends.head + place;
    for (int64_t i = 0; i < kRowsAhead && i < counts[l]; ++i) runs.ask_for(l, runs.next[l][i]);
    place += level.dim;
  }
  runs.scratch = scratch + width;
  for (int64_t at = begin; at < end; ++at) {
    const Step step = step_at(job, at);
    if (at + kAhead < end) {
      const int64_t row = grad_row(job, job.order[at + kAhead]) * job.grad_stride;
      const int64_t size = job.grad_type == TableType::f32 ? 4 : 2;
      fetch(static_cast<const char*>(job.grad) + row * size, width * size);
    }
    const float* grad = grad_of(job, step.item, width, scratch);
    runs.end(step.fresh, true);
    for (int64_t l = step.fresh; l < step.depth; ++l) runs.begin(l);
    if (job.sum) {
      for (int64_t l = step.fresh; l < step.depth; ++l)
        for (int64_t d = 0; d < job.codes.levels[l].dim; ++d) runs.to[l][d] = 0.0f;
      if (step.depth > 0)
        add(grad + job.codes.levels[0].column, job.codes.levels[0].dim, runs.to[step.depth - 1]);
      continue;
    }
    for (int64_t l = 0; l < step.depth; ++l) {
      const PrefixLevel& level = job.codes.levels[l];
      if (l < step.fresh)
        add(grad + level.column, level.dim, runs.to[l]);
      else
        copy(grad + level.column, level.dim, runs.to[l]);
    }
  }
  runs.end(0, false);
  for (int64_t l = 0; l < depth; ++l)
    ends.rows[l] = runs.to[l] == runs.tail[l] ? runs.next[l][-1] : kNoRow;
}

void prefix_update_slots(const RowUpdate& table, const int64_t* rows, float* slots, int64_t count,
                         int64_t begin, int64_t end, float* scratch) {
  while (begin > 0 && begin < end && rows[begin] == rows[begin - 1]) ++begin;
  for (int64_t i = begin; i < end;) {
    if (i + kRowsAhead < count) ask(table, rows[i + kRowsAhead]);
    float* sum = slots + i * table.dim;
    int64_t next = i + 1;
    for (; next < count && rows[next] == rows[i]; ++next)
      add(slots + next * table.dim, table.dim, sum);
    step_row(table, rows[i], sum, scratch);
    i = next;
  }
}

}  // namespace LIVREC_ISA
}  // namespace livrec
