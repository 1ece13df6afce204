#include "prefix_ngram.h"

#include "halves.h"

namespace livrec {
namespace LIVREC_ISA {
namespace {

int64_t bytes_of(TableType type) {
  return type == TableType::f32 ? 4 : type == TableType::i8 ? 1 : 2;
}

const char* row_of(const PrefixLevel& level, TableType type, int64_t row) {
  return static_cast<const char*>(level.table) + row * level.table_stride * bytes_of(type);
}

void fetch(const char* row, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(row + at);
}

// memcpy for sizes that are mostly a few cache lines: no call, no branch on alignment.
LIVREC_INLINE void copy(const char* from, int64_t bytes, char* to) {
  constexpr int64_t kStep = kLanes * 4;
  int64_t at = 0;
  for (; at + kStep <= bytes; at += kStep)
    store(reinterpret_cast<float*>(to + at), load(reinterpret_cast<const float*>(from + at)));
  for (; at < bytes; ++at) to[at] = from[at];
}

// out (+)= scale * row, in float32.
void add_row(const char* row, TableType type, float scale, int64_t dim, bool first, float* out) {
  const auto* floats = reinterpret_cast<const float*>(row);
  const auto* halves = reinterpret_cast<const uint16_t*>(row);
  const auto* bytes = reinterpret_cast<const int8_t*>(row);
  if (type == TableType::f32)
    for (int64_t d = 0; d < dim; ++d) out[d] = first ? floats[d] : out[d] + floats[d];
  else if (type == TableType::i8)
    for (int64_t d = 0; d < dim; ++d)
      out[d] = (first ? 0.0f : out[d]) + scale * static_cast<float>(bytes[d]);
  else if (type == TableType::f16)
    for (int64_t d = 0; d < dim; ++d) out[d] = (first ? 0.0f : out[d]) + float_of_f16(halves[d]);
  else
    for (int64_t d = 0; d < dim; ++d) out[d] = (first ? 0.0f : out[d]) + float_of_bf16(halves[d]);
}

// Writes a row of sums in the output's type.
void finish(const float* sums, float count, TableType type, int64_t width, void* out, int64_t row) {
  auto* halves = static_cast<uint16_t*>(out) + row * width;
  auto* floats = static_cast<float*>(out) + row * width;
  if (type == TableType::f16)
    for (int64_t d = 0; d < width; ++d) halves[d] = f16_of(sums[d] / count);
  else if (type == TableType::bf16)
    for (int64_t d = 0; d < width; ++d) halves[d] = bf16_of(sums[d] / count);
  else
    for (int64_t d = 0; d < width; ++d) floats[d] = sums[d] / count;
}

void fetch_rows(const PrefixLookup& job, const int64_t* rows, int64_t count) {
  for (int64_t l = 0; l < job.codes.level_count; ++l) {
    const PrefixLevel& level = job.codes.levels[l];
    for (int64_t i = 0; i < count; ++i)
      if (rows[l * kPrefixBlock + i] >= 0)
        fetch(row_of(level, job.type, rows[l * kPrefixBlock + i]), level.dim * bytes_of(job.type));
  }
}

// Side by side, nothing to add: rows are copied as they are.
void copy_item(const PrefixLookup& job, const int64_t* rows, int64_t item) {
  const int64_t size = bytes_of(job.type);
  char* out = static_cast<char*>(job.out) + item * job.width * size;
  for (int64_t l = 0; l < job.codes.level_count; ++l) {
    const PrefixLevel& level = job.codes.levels[l];
    const int64_t row = rows[l * kPrefixBlock];
    if (row < 0)
      __builtin_memset(out + level.column * size, 0, static_cast<std::size_t>(level.dim * size));
    else
      copy(row_of(level, job.type, row), level.dim * size, out + level.column * size);
  }
}

void add_item(const PrefixLookup& job, const int64_t* rows, float* sums) {
  for (int64_t l = 0; l < job.codes.level_count; ++l) {
    const PrefixLevel& level = job.codes.levels[l];
    const int64_t row = rows[l * kPrefixBlock];
    if (row < 0) continue;
    const float scale = level.scales ? level.scales[row] : 1.0f;
    add_row(row_of(level, job.type, row), job.type, scale, level.dim, false, sums + level.column);
  }
}

// Finds the rows of the next block before it reads those of this one: memory answers meanwhile.
int64_t look_up_items(const PrefixLookup& job, int64_t begin, int64_t end, int64_t* rows,
                      float* sums) {
  const bool plain = !job.sum && job.type != TableType::i8;
  int64_t first_bad = -1;
  int64_t* next = rows + job.codes.level_count * kPrefixBlock;
  const auto find = [&](int64_t item, int64_t* to) {
    const int64_t last = item + kPrefixBlock < end ? item + kPrefixBlock : end;
    if (item >= last) return;
    const int64_t bad = prefix_ngram_rows(job.codes, item, last, to);
    if (bad >= 0 && first_bad < 0) first_bad = bad;
    fetch_rows(job, to, last - item);
  };
  find(begin, rows);
  for (int64_t item = begin; item < end; item += kPrefixBlock) {
    const int64_t last = item + kPrefixBlock < end ? item + kPrefixBlock : end;
    find(item + kPrefixBlock, next);
    for (int64_t i = item; i < last; ++i) {
      if (plain) {
        copy_item(job, rows + i - item, i);
        continue;
      }
      for (int64_t d = 0; d < job.width; ++d) sums[d] = 0.0f;
      add_item(job, rows + i - item, sums);
      finish(sums, 1.0f, job.type, job.width, job.out, i);
    }
    int64_t* const done = rows;
    rows = next;
    next = done;
  }
  return first_bad;
}

int64_t look_up_histories(const PrefixLookup& job, int64_t begin, int64_t end, int64_t* rows,
                          float* sums) {
  int64_t first_bad = -1;
  for (int64_t history = begin; history < end; ++history) {
    const int64_t from = job.offsets[history], to = job.offsets[history + 1];
    for (int64_t d = 0; d < job.width; ++d) sums[d] = 0.0f;
    for (int64_t item = from; item < to; item += kPrefixBlock) {
      const int64_t last = item + kPrefixBlock < to ? item + kPrefixBlock : to;
      const int64_t bad = prefix_ngram_rows(job.codes, item, last, rows);
      if (bad >= 0 && first_bad < 0) first_bad = bad;
      fetch_rows(job, rows, last - item);
      for (int64_t i = item; i < last; ++i) add_item(job, rows + i - item, sums);
    }
    const float count = job.mean && to > from ? static_cast<float>(to - from) : 1.0f;
    finish(sums, count, job.type, job.width, job.out, history);
  }
  return first_bad;
}

}  // namespace

int64_t prefix_ngram_scratch(const PrefixLookup& job) {
  return 2 * job.codes.level_count * kPrefixBlock * 8 + job.width * 4;
}

int64_t prefix_ngram_lookup(const PrefixLookup& job, int64_t begin, int64_t end, void* scratch) {
  auto* rows = static_cast<int64_t*>(scratch);
  auto* sums = reinterpret_cast<float*>(rows + 2 * job.codes.level_count * kPrefixBlock);
  return job.offsets ? look_up_histories(job, begin, end, rows, sums)
                     : look_up_items(job, begin, end, rows, sums);
}

}  // namespace LIVREC_ISA
}  // namespace livrec
