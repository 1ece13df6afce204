#include "prefix_ngram_gradient.h"

#include "prefix_grads.h"
#include "row_steps.h"

namespace livrec {
namespace LIVREC_ISA {
namespace {

constexpr int64_t kPlanned = 64;    // items that are planned level by level
constexpr int64_t kBlock = 16;      // items that are gone through level by level, from the cache
constexpr int64_t kRowsAhead = 16;  // runs whose rows are asked for before they are updated
constexpr int64_t kListAhead = 64;  // runs of which it is asked which rows they have

// The runs of a level, as a chunk is gone through.
struct LevelRuns {
  const RowUpdate* table;
  int64_t column;
  const int64_t* next;  // the rows of the runs that will begin
  const int64_t* last;  // where these end
  float* slots;
  float* head;
  float* tail;
  float* open;  // where the sum of the open run is kept between blocks, head or tail; null: none
};

// The sum of a run: in registers where it is V whole vectors, in `space` where V is 0.
template <int V>
struct Sum {
  Floats lanes[V];
  alignas(64) float numbers[V * kLanes];
  Sum(int64_t, float*) {}
  LIVREC_INLINE void start(const float* x) {
    for (int v = 0; v < V; ++v) lanes[v] = load(x + v * kLanes);
  }
  LIVREC_INLINE void go_on(const float* x) {
    for (int v = 0; v < V; ++v) lanes[v] += load(x + v * kLanes);
  }
  LIVREC_INLINE void put(float* to) const {
    for (int v = 0; v < V; ++v) store(to + v * kLanes, lanes[v]);
  }
  LIVREC_INLINE const float* in_memory() {
    put(numbers);
    return numbers;
  }
};

template <>
struct Sum<0> {
  int64_t dim;
  float* space;
  Sum(int64_t dim, float* space) : dim(dim), space(space) {}
  void start(const float* x) { copy(x, dim, space); }
  void go_on(const float* x) { add(x, dim, space); }
  void put(float* to) const { copy(space, dim, to); }
  const float* in_memory() const { return space; }
};

// Some items and their gradients: in float32 of those at hand, as they lie of those to come.
struct Block {
  int64_t begin, count, coming;
  const float* grads[kBlock];
  const char* to_come[kBlock];
};

// Goes through a block of items at one level, and asks for what it will need of the next block.
template <int V>
class LevelPass {
 public:
  // Copies of what is read for every item: stores may change all but these.
  LevelPass(const LevelRuns& runs, float* scratch)
      : runs_(runs),
        table_(*runs.table),
        scratch_(scratch),
        sum_(runs.table->dim, scratch + 2 * runs.table->dim) {}

  LIVREC_INLINE LevelRuns go(int64_t level, const PrefixPlan& plan, const Block& block,
                             int64_t asked, int64_t bytes) {
    const uint8_t *fresh = plan.fresh + block.begin, *depth = plan.depth + block.begin;
    if (runs_.open) sum_.start(runs_.open);
    for (int64_t i = 0; i < block.count; ++i) {
      if (i < block.coming) fetch(block.to_come[i] + asked, bytes);
      const float* grad = block.grads[i] + runs_.column;
      if (fresh[i] > level) {
        sum_.go_on(grad);
        continue;
      }
      finish();
      if (depth[i] <= level) continue;
      begin();
      sum_.start(grad);
    }
    if (runs_.open) sum_.put(runs_.open);
    return runs_;
  }

 private:
  LIVREC_INLINE int64_t dim() const { return V > 0 ? V * kLanes : table_.dim; }

  LIVREC_INLINE void begin() {
    fetch(runs_.next + kListAhead, 1);
    if (runs_.next + kRowsAhead < runs_.last && runs_.next[kRowsAhead] >= 0)
      ask(table_, runs_.next[kRowsAhead]);
    ++runs_.next;
    runs_.open = runs_.tail;
  }

  LIVREC_INLINE void finish() {
    const float* open = runs_.open;
    runs_.open = nullptr;
    if (!open) return;
    if (open == runs_.head) return sum_.put(runs_.head);
    const int64_t row = runs_.next[-1];
    if (row < 0) return sum_.put(runs_.slots + ~row * dim());
    step_row(table_, dim(), row, sum_.in_memory(), scratch_);
  }

  LevelRuns runs_;
  const RowUpdate table_;
  float* scratch_;
  Sum<V> sum_;
};

// The first level where each of some items begins a run, or its depth; and depths.
LIVREC_INLINE void find_fresh(const PrefixGradient& job, int64_t at, int64_t count, uint8_t* fresh,
                              uint8_t* known) {
  const int64_t depth = job.codes.level_count;
  uint64_t changed[kPlanned], same[kPlanned] = {};
  for (int64_t i = 0; i < count; ++i)
    changed[i] = job.sorted[at + i] ^ job.sorted[at + i - (at + i > 0)];
  for (int64_t l = 0; l < depth; ++l)
    for (int64_t i = 0; i < count; ++i) same[i] += changed[i] >> job.shifts[l] == 0 ? 1 : 0;
  for (int64_t i = 0; i < count; ++i) {
    fresh[i] = static_cast<uint8_t>(same[i]);
    known[i] = static_cast<uint8_t>(depth);
  }
  for (int64_t i = 0; job.depths && i < count; ++i) {
    const uint8_t before = at + i > 0 ? job.depths[job.order[at + i - 1]] : 0;
    known[i] = job.depths[job.order[at + i]];
    fresh[i] = fresh[i] < before ? fresh[i] : before;
    fresh[i] = fresh[i] < known[i] ? fresh[i] : known[i];
  }
  if (at == 0) fresh[0] = 0;
}

}  // namespace

void prefix_runs_plan(const PrefixGradient& job, int64_t chunk, const PrefixPlan& plan) {
  const int64_t begin = chunk * kRunChunk, end = end_of(job, chunk), depth = job.codes.level_count;
  int64_t counts[kMostLevels] = {};
  for (int64_t at = begin; at < end; at += kPlanned) {
    const int64_t count = least(kPlanned, end - at);
    const uint64_t* words = job.sorted + at;
    uint8_t *fresh = plan.fresh + at, *known = plan.depth + at;
    find_fresh(job, at, count, fresh, known);
    uint64_t keys[kPlanned] = {};
    for (int64_t l = 0; l < depth; ++l) {
      const int64_t above = l > 0 ? job.shifts[l - 1] : 64, shift = job.shifts[l];
      const uint64_t size = static_cast<uint64_t>(job.codes.levels[l].size);
      const uint64_t mask =
          above - shift < 64 ? (uint64_t{1} << (above - shift)) - 1 : ~uint64_t{0};
      for (int64_t i = 0; i < count; ++i) keys[i] = keys[i] * size + ((words[i] >> shift) & mask);
      int64_t* rows = plan.rows[l] + begin;
      int64_t next = counts[l];
      for (int64_t i = 0; i < count; ++i) {  // what is no run's is written over
        rows[next] = static_cast<int64_t>(keys[i]);
        next += (fresh[i] <= l) & (l < known[i]);
      }
      counts[l] = next;
    }
  }
  for (int64_t l = 0; l < depth; ++l) {
    plan.counts[chunk * depth + l] = counts[l];
    if (job.codes.levels[l].hash == KeyHash::none) continue;
    int64_t* rows = plan.rows[l] + begin;
    prefix_gradient_hash(job.codes.levels[l], rows, counts[l], rows);
  }
}

int64_t prefix_runs_scratch(const PrefixGradient& job, const PrefixSteps& steps) {
  int64_t widest = 0;
  for (int64_t l = 0; l < job.codes.level_count; ++l)
    widest = steps.tables[l].dim > widest ? steps.tables[l].dim : widest;
  return kBlock * width_of(job) + 3 * widest;
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
    if (l < plan.fresh[begin]) runs[l].open = runs[l].head;
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
      by_vectors(runs[l].table->dim, [&](auto vectors) {
        LevelPass<vectors.value> pass(runs[l], space);
        runs[l] = pass.go(l, plan, block, runs[l].column * size, bytes);
      });
    }
  }
  for (int64_t l = 0; l < depth; ++l)
    ends.rows[l] = runs[l].open && runs[l].open == runs[l].tail ? runs[l].next[-1] : kNoRow;
  end_stream();  // of rules that store
}

void prefix_runs_slots(const RowUpdate& table, const int64_t* rows, float* slots, int64_t count,
                       int64_t begin, int64_t end, float* scratch) {
  while (begin > 0 && begin < end && rows[begin] == rows[begin - 1]) ++begin;
  by_vectors(table.dim, [&](auto vectors) {
    const int64_t dim = vectors.value > 0 ? vectors.value * kLanes : table.dim;
    for (int64_t i = begin; i < end;) {
      if (i + kRowsAhead < count) ask(table, rows[i + kRowsAhead]);
      float* sum = slots + i * dim;
      int64_t next = i + 1;
      for (; next < count && rows[next] == rows[i]; ++next) add(slots + next * dim, dim, sum);
      step_row(table, dim, rows[i], sum, scratch);
      i = next;
    }
  });
  end_stream();
}

}  // namespace LIVREC_ISA
}  // namespace livrec
