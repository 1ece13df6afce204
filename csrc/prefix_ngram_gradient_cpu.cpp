#include "prefix_ngram_gradient.h"

#include "prefix_grads.h"
#include "row_steps.h"

namespace livrec {
namespace LIVREC_ISA {
namespace {

constexpr int64_t kBlock = 16;      // items that are gone through level by level, from the cache
constexpr int64_t kRowsAhead = 16;  // runs whose rows are asked for before they are updated

// The runs of a level, as a chunk is gone through.
struct LevelRuns {
  const RowUpdate* table;
  int64_t column;
  const int64_t* next;  // the rows of the runs that will begin
  const int64_t* last;  // where these end
  float* slots;
  float* head;
  float* tail;
  const float* sum;  // of the open run: an item's gradient as it lies, head or tail; null: none
};

LIVREC_INLINE void finish(LevelRuns& runs, float* scratch) {
  if (!runs.sum || runs.sum == runs.head) return;
  const RowUpdate& table = *runs.table;
  const int64_t row = runs.next[-1];
  if (row >= 0)
    step_row(table, row, runs.sum, scratch);
  else
    copy(runs.sum, table.dim, runs.slots + ~row * table.dim);
}

// Some items and their gradients: in float32 of those at hand, as they lie of those to come.
struct Block {
  int64_t begin, count, coming;
  const float* grads[kBlock];
  const char* to_come[kBlock];
};

// Goes through a block of items, and asks for what its level will need of the next one.
void add_block(LevelRuns& runs, int64_t level, const PrefixPlan& plan, const Block& block,
               int64_t asked, int64_t bytes, float* scratch) {
  const uint8_t *fresh = plan.fresh + block.begin, *depth = plan.depth + block.begin;
  const float* const* grads = block.grads;
  const int64_t dim = runs.table->dim;
  for (int64_t i = 0; i < block.count; ++i) {
    if (i < block.coming) fetch(block.to_come[i] + asked, bytes);
    const float* grad = grads[i] + runs.column;
    if (fresh[i] <= level) {
      finish(runs, scratch);
      runs.sum = nullptr;
      if (depth[i] <= level) continue;
      if (runs.next + kRowsAhead < runs.last && runs.next[kRowsAhead] >= 0)
        ask(*runs.table, runs.next[kRowsAhead]);
      ++runs.next;
      runs.sum = grad;
    } else if (runs.sum == runs.head || runs.sum == runs.tail) {
      add(grad, dim, const_cast<float*>(runs.sum));
    } else {
      sum_up(runs.sum, grad, dim, runs.tail);
      runs.sum = runs.tail;
    }
  }
  if (runs.sum && runs.sum != runs.head && runs.sum != runs.tail) {
    copy(runs.sum, dim, runs.tail);
    runs.sum = runs.tail;
  }
}

}  // namespace

void prefix_runs_plan(const PrefixGradient& job, int64_t chunk, const PrefixPlan& plan) {
  const int64_t begin = chunk * kRunChunk, end = end_of(job, chunk), depth = job.codes.level_count;
  // Copies of what is read for every item: stores of bytes may change all but these.
  const uint64_t* words = job.sorted;
  int64_t shifts[kMostLevels], sizes[kMostLevels], keys[kMostLevels];
  int64_t* next[kMostLevels];
  uint64_t masks[kMostLevels];
  uint8_t same[65];  // levels that words share whose highest different bit is this one; 64: none
  for (int64_t l = depth - 1, bit = 0; l >= 0; --l) {
    const int64_t above = l > 0 ? job.shifts[l - 1] : 64;
    for (; bit < above; ++bit) same[bit] = static_cast<uint8_t>(l);
    const int64_t bits = above - job.shifts[l];
    masks[l] = bits >= 64 ? ~uint64_t{0} : (uint64_t{1} << bits) - 1;
    shifts[l] = job.shifts[l], sizes[l] = job.codes.levels[l].size;
    next[l] = plan.rows[l] + begin;
  }
  same[64] = static_cast<uint8_t>(depth);
  for (int64_t at = begin; at < end; ++at) {
    const uint64_t word = words[at], changed = at > 0 ? word ^ words[at - 1] : 0;
    const int64_t known = job.depths ? job.depths[job.order[at]] : depth;
    int64_t fresh = same[changed ? 63 - __builtin_clzll(changed) : 64];
    if (job.depths && at > 0) {
      const int64_t before = job.depths[job.order[at - 1]];
      fresh = fresh < before ? fresh : before;
    }
    fresh = at == 0 ? 0 : fresh < known ? fresh : known;
    plan.fresh[at] = static_cast<uint8_t>(fresh);
    plan.depth[at] = static_cast<uint8_t>(known);
    for (int64_t l = at > begin ? fresh : 0; l < known; ++l) {
      const auto code = static_cast<int64_t>((word >> shifts[l]) & masks[l]);
      keys[l] = l > 0 ? keys[l - 1] * sizes[l] + code : code;
      if (l >= fresh) *next[l]++ = keys[l];
    }
  }
  int64_t* counts = plan.counts + chunk * depth;
  for (int64_t l = 0; l < depth; ++l) counts[l] = next[l] - (plan.rows[l] + begin);
  for (int64_t l = 0; l < depth; ++l)
    if (job.codes.levels[l].hash != KeyHash::none)
      prefix_gradient_hash(job.codes.levels[l], plan.rows[l] + begin, counts[l],
                           plan.rows[l] + begin);
}

int64_t prefix_runs_scratch(const PrefixGradient& job, const PrefixSteps& steps) {
  int64_t widest = 0;
  for (int64_t l = 0; l < job.codes.level_count; ++l)
    widest = steps.tables[l].dim > widest ? steps.tables[l].dim : widest;
  return kBlock * width_of(job) + 2 * widest;
}

void prefix_runs_chunk(const PrefixGradient& job, int64_t chunk, const PrefixSteps& steps,
                       const PrefixEnds& ends, float* scratch) {
  const int64_t begin = chunk * kRunChunk, end = end_of(job, chunk), depth = job.codes.level_count;
  const int64_t width = width_of(job);
  const PrefixPlan& plan = steps.plan;
  float* space = scratch + kBlock * width;
  LevelRuns runs[kMostLevels];
  int64_t place = 0;
  for (int64_t l = 0; l < depth; ++l) {
    const RowUpdate& table = steps.tables[l];
    const int64_t* rows = plan.rows[l] + begin;
    runs[l] = {&table,
               job.codes.levels[l].column,
               rows,
               rows + plan.counts[chunk * depth + l],
               steps.slots[l],
               ends.head + place,
               ends.tail + place,
               nullptr};
    if (l < plan.fresh[begin]) runs[l].sum = runs[l].head;
    for (const int64_t* row = rows; row < runs[l].last && row < rows + kRowsAhead; ++row)
      if (*row >= 0) ask(table, *row);
    place += table.dim;
  }
  const int64_t size = grad_size(job);
  Block block;
  for (int64_t at = begin; at < begin + kBlock && at < end; ++at)
    fetch(grad_at(job, at), width * size);
  for (int64_t at = begin; at < end; at += kBlock) {
    const int64_t stop = at + kBlock < end ? at + kBlock : end;
    const int64_t after = stop + kBlock < end ? stop + kBlock : end;
    block.begin = at, block.count = stop - at, block.coming = after - stop;
    for (int64_t i = 0; i < block.count; ++i)
      block.grads[i] = grad_of(job, job.order[at + i], width, scratch + i * width);
    for (int64_t i = 0; i < block.coming; ++i) block.to_come[i] = grad_at(job, stop + i);
    for (int64_t l = 0; l < depth; ++l) {
      const int64_t bytes = job.sum && l > 0 ? 0 : runs[l].table->dim * size;
      add_block(runs[l], l, plan, block, runs[l].column * size, bytes, space);
    }
  }
  for (int64_t l = 0; l < depth; ++l)
    ends.rows[l] = runs[l].sum && runs[l].sum == runs[l].tail ? runs[l].next[-1] : kNoRow;
  end_stream();  // of rules that store
}

void prefix_runs_slots(const RowUpdate& table, const int64_t* rows, float* slots, int64_t count,
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
  end_stream();
}

}  // namespace LIVREC_ISA
}  // namespace livrec
