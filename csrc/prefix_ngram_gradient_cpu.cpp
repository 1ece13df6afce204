#include "prefix_ngram_gradient.h"

#include "prefix_grads.h"

namespace livrec {
namespace LIVREC_ISA {
namespace {

constexpr int kAhead = 8;  // items whose gradients are asked for in advance

// Which runs an item goes on with, and which it begins.
struct Step {
  int64_t item;
  int64_t depth;  // known levels
  int64_t fresh;  // the first level where a run begins; depth where none does
};

Step step_at(const PrefixGradient& job, int64_t at) {
  Step step{job.order[at], job.codes.level_count, 0};
  if (job.depths) step.depth = job.depths[step.item];
  if (at == 0) return step;
  const int64_t before = job.depths ? job.depths[job.order[at - 1]] : job.codes.level_count;
  const uint64_t changed = job.sorted[at] ^ job.sorted[at - 1];
  while (step.fresh < step.depth && step.fresh < before && changed >> job.shifts[step.fresh] == 0)
    ++step.fresh;
  return step;
}

// Begins the runs of an item from level `fresh` on, and notes their keys.
void begin_runs(const PrefixGradient& job, int64_t at, const Step& step, const PrefixRuns& runs,
                float** to) {
  const uint64_t word = job.sorted[at];
  int64_t key = 0, above = 64;
  for (int64_t l = 0; l < step.depth; ++l) {
    const PrefixLevel& level = job.codes.levels[l];
    const int64_t shift = job.shifts[l], bits = above - shift;
    const uint64_t code = bits >= 64 ? word : (word >> shift) & ((uint64_t{1} << bits) - 1);
    key = key * level.size + static_cast<int64_t>(code);
    above = shift;
    if (l < step.fresh) continue;
    const int64_t run = runs.starts[l]++;
    runs.keys[l][run] = key;
    to[l] = runs.values[l] + run * level.dim;
  }
}

void add_side_by_side(const PrefixGradient& job, const Step& step, const float* grad, float** to) {
  for (int64_t l = 0; l < step.depth; ++l) {
    const PrefixLevel& level = job.codes.levels[l];
    if (l < step.fresh)
      add(grad + level.column, level.dim, to[l]);
    else
      copy(grad + level.column, level.dim, to[l]);
  }
}

// Ends all runs from level `from` on: what is inside a run belongs to the run around it.
void end_runs(const PrefixGradient& job, int64_t from, float** to) {
  for (int64_t l = job.codes.level_count - 1; l >= from; --l) {
    if (l > 0 && to[l]) add(to[l], job.codes.levels[l].dim, to[l - 1]);
    to[l] = nullptr;
  }
}

}  // namespace

void prefix_gradient_count(const PrefixGradient& job, int64_t chunk, int64_t* counts) {
  const int64_t begin = chunk * kRunChunk, end = end_of(job, chunk);
  for (int64_t l = 0; l < job.codes.level_count; ++l) counts[l] = 0;
  for (int64_t at = begin; at < end; ++at) {
    const Step step = step_at(job, at);
    for (int64_t l = step.fresh; l < step.depth; ++l) ++counts[l];
  }
}

void prefix_gradient_add(const PrefixGradient& job, int64_t chunk, const PrefixRuns& runs,
                         float* scratch) {
  const int64_t begin = chunk * kRunChunk, end = end_of(job, chunk), depth = job.codes.level_count;
  const int64_t width = width_of(job);
  float* to[kMostLevels] = {};
  int64_t carry = 0;
  const Step first = step_at(job, begin);
  for (int64_t l = 0; l < depth; ++l) {
    if (l < first.fresh) to[l] = runs.carries + carry;
    carry += job.codes.levels[l].dim;
  }
  for (int64_t at = begin; at < end; ++at) {
    const Step step = step_at(job, at);
    if (at + kAhead < end) fetch(grad_at(job, at + kAhead), width * grad_size(job));
    const float* grad = grad_of(job, step.item, width, scratch);
    if (job.sum) end_runs(job, step.fresh, to);
    begin_runs(job, at, step, runs, to);
    if (!job.sum) {
      add_side_by_side(job, step, grad, to);
      continue;
    }
    for (int64_t l = step.fresh; l < step.depth; ++l)
      for (int64_t d = 0; d < job.codes.levels[l].dim; ++d) to[l][d] = 0.0f;
    if (step.depth > 0)
      add(grad + job.codes.levels[0].column, job.codes.levels[0].dim, to[step.depth - 1]);
  }
  if (job.sum) end_runs(job, 0, to);
}

}  // namespace LIVREC_ISA
}  // namespace livrec
