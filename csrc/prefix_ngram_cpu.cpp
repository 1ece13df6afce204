#include "prefix_ngram.h"

#include "halves.h"

namespace livrec {
namespace LIVREC_ISA {
namespace {

constexpr int64_t kCached = 256 << 10;  // bytes of a table that stays in caches by itself

int64_t bytes_of(TableType type) {
  return type == TableType::f32 ? 4 : type == TableType::i8 ? 1 : 2;
}

const char* row_of(const PrefixLevel& level, TableType type, int64_t row) {
  return static_cast<const char*>(level.table) + row * level.table_stride * bytes_of(type);
}

// memcpy for sizes that are mostly a few cache lines: no call, no branch on alignment.
LIVREC_INLINE void copy(const char* from, int64_t bytes, char* to) {
  constexpr int64_t kStep = kLanes * 4;
  int64_t at = 0;
  for (; at + kStep <= bytes; at += kStep)
    store(reinterpret_cast<float*>(to + at), load(reinterpret_cast<const float*>(from + at)));
  for (; at < bytes; ++at) to[at] = from[at];
}

// Whether rows go past the caches: output larger than these would push out tables for nothing.
bool streams(const PrefixLookup& job) {
  constexpr int64_t kLarge = 16 << 20;
  const int64_t size = bytes_of(job.type);
  bool whole =
      job.codes.items * job.width * size >= kLarge && streamable(job.out, job.width * size);
  for (int64_t l = 0; l < job.codes.level_count; ++l)
    whole &= streamable(nullptr, job.codes.levels[l].dim * size);
  return whole;
}

// out += scale * row, in float32.
LIVREC_INLINE void add_row(const char* row, TableType type, float scale, int64_t dim, float* out) {
  const auto* floats = reinterpret_cast<const float*>(row);
  const auto* halves = reinterpret_cast<const uint16_t*>(row);
  const auto* bytes = reinterpret_cast<const int8_t*>(row);
  int64_t d = 0;
  if (type == TableType::f32) {
    for (; d + kLanes <= dim; d += kLanes) store(out + d, load(out + d) + load(floats + d));
    for (; d < dim; ++d) out[d] += floats[d];
  } else if (type == TableType::i8) {
    for (; d < dim; ++d) out[d] += scale * static_cast<float>(bytes[d]);
  } else if (type == TableType::f16) {
    for (; d < dim; ++d) out[d] += float_of_f16(halves[d]);
  } else {
    for (; d < dim; ++d) out[d] += float_of_bf16(halves[d]);
  }
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

// The table rows of a block of items at one level, and of the block after it.
struct Column {
  const char* table;
  int64_t stride, bytes;  // from row to row, and of a row
  const int64_t *rows, *next;
  int64_t count, next_count;
};

// Copies rows as they are to `out`, a row of the output apart, while memory is asked for those of
// the next block. V: whole vectors in a row, or 0 where it has another size.
template <int V, bool kPast>
void copy_column(const Column& column, char* out, int64_t apart) {
  constexpr int64_t kBytes = V * kLanes * 4;
  const int64_t bytes = V > 0 ? kBytes : column.bytes;
  for (int64_t i = 0; i < column.count; ++i, out += apart) {
    if (i < column.next_count && column.next[i] >= 0)
      fetch(column.table + column.next[i] * column.stride, bytes);
    const char* row = column.table + column.rows[i] * column.stride;
    if (column.rows[i] < 0)
      __builtin_memset(out, 0, static_cast<std::size_t>(bytes));
    else if (kPast)
      stream(row, bytes, out);
    else
      copy(row, bytes, out);
  }
}

template <bool kPast>
void copy_column(const Column& column, char* out, int64_t apart) {
  by_vectors(column.bytes % 4 == 0 ? column.bytes / 4 : 1,
             [&](auto vectors) { copy_column<vectors.value, kPast>(column, out, apart); });
}

// Side by side, nothing to add: block after block, level by level.
int64_t copy_items(const PrefixLookup& job, int64_t begin, int64_t end, int64_t* space) {
  const int64_t size = bytes_of(job.type), apart = job.width * size;
  const int64_t block = job.codes.level_count * kPrefixBlock;
  const bool past_caches = streams(job);
  int64_t first_bad = -1, found = begin;
  const auto find = [&]() {
    const int64_t to = least(found + kPrefixBlock, end), count = to - found;
    int64_t* rows = space + (found - begin) / kPrefixBlock % 2 * block;
    const int64_t bad = count > 0 ? prefix_ngram_rows(job.codes, found, to, rows) : -1;
    if (bad >= 0 && first_bad < 0) first_bad = bad;
    found = to;
    return count;
  };
  int64_t count = find();
  for (int64_t at = begin, turn = 0; at < end; at += kPrefixBlock, turn ^= 1) {
    const int64_t next_count = find();
    for (int64_t l = 0; l < job.codes.level_count; ++l) {
      const PrefixLevel& level = job.codes.levels[l];
      const bool small = static_cast<int64_t>(level.rows) * level.dim * size <= kCached;
      const int64_t* rows = space + l * kPrefixBlock;
      const Column column{static_cast<const char*>(level.table),
                          level.table_stride * size,
                          level.dim * size,
                          rows + turn * block,
                          rows + (1 - turn) * block,
                          count,
                          small ? 0 : next_count};
      char* out = static_cast<char*>(job.out) + at * apart + level.column * size;
      if (past_caches)
        copy_column<true>(column, out, apart);
      else
        copy_column<false>(column, out, apart);
    }
    count = next_count;
  }
  if (past_caches) end_stream();
  return first_bad;
}

void add_item(const PrefixLookup& job, const int64_t* rows, float* sums) {
  for (int64_t l = 0; l < job.codes.level_count; ++l) {
    const PrefixLevel& level = job.codes.levels[l];
    const int64_t row = rows[l * kPrefixBlock];
    if (row < 0) continue;
    const float scale = level.scales ? level.scales[row] : 1.0f;
    add_row(row_of(level, job.type, row), job.type, scale, level.dim, sums + level.column);
  }
}

// The table rows of items [begin, end), in order. Memory is asked for those of the next block, a
// few items at a time: asked for all at once, most would wait in line.
class Rows {
 public:
  Rows(const PrefixLookup& job, int64_t begin, int64_t end, int64_t* space)
      : job_(job), space_(space), begin_(begin), end_(end), found_(begin) {
    find();
    ask(begin, found_);
    find();
  }

  // Those of the next item: rows[l * kPrefixBlock] of level l.
  LIVREC_INLINE const int64_t* of(int64_t item) {
    const int64_t i = item - begin_;
    if (i % kPrefixBlock == 0 && i > 0) find();
    if (i % kAtOnce == 0)
      ask(least(item + kPrefixBlock, found_), least(item + kPrefixBlock + kAtOnce, found_));
    return at(item);
  }

  int64_t first_bad() const { return first_bad_; }

 private:
  static constexpr int64_t kAtOnce = 4;

  int64_t* at(int64_t item) const {  // two blocks take turns
    const int64_t i = item - begin_, turn = i / kPrefixBlock % 2;
    return space_ + turn * job_.codes.level_count * kPrefixBlock + i % kPrefixBlock;
  }

  void find() {
    const int64_t end = least(found_ + kPrefixBlock, end_);
    if (end == found_) return;
    const int64_t bad = prefix_ngram_rows(job_.codes, found_, end, at(found_));
    if (bad >= 0 && first_bad_ < 0) first_bad_ = bad;
    found_ = end;
  }

  LIVREC_INLINE void ask(int64_t from, int64_t to) const {
    if (from >= to) return;
    const int64_t* rows = at(from);
    const int64_t size = bytes_of(job_.type);
    for (int64_t l = 0; l < job_.codes.level_count; ++l, rows += kPrefixBlock) {
      const PrefixLevel& level = job_.codes.levels[l];
      const int64_t bytes = level.dim * size, stride = level.table_stride * size;
      if (static_cast<int64_t>(level.rows) * bytes <= kCached) continue;
      const char* table = static_cast<const char*>(level.table);
      for (int64_t i = 0; i < to - from; ++i)
        if (rows[i] >= 0) fetch(table + rows[i] * stride, bytes);
    }
  }

  const PrefixLookup& job_;
  int64_t* space_;
  int64_t begin_, end_, found_, first_bad_ = -1;
};

int64_t look_up_items(const PrefixLookup& job, int64_t begin, int64_t end, int64_t* space,
                      float* sums) {
  if (!job.sum && job.type != TableType::i8) return copy_items(job, begin, end, space);
  Rows rows(job, begin, end, space);
  for (int64_t item = begin; item < end; ++item) {
    for (int64_t d = 0; d < job.width; ++d) sums[d] = 0.0f;
    add_item(job, rows.of(item), sums);
    finish(sums, 1.0f, job.type, job.width, job.out, item);
  }
  return rows.first_bad();
}

int64_t look_up_histories(const PrefixLookup& job, int64_t begin, int64_t end, int64_t* space,
                          float* sums) {
  Rows rows(job, job.offsets[begin], job.offsets[end], space);
  for (int64_t history = begin; history < end; ++history) {
    const int64_t from = job.offsets[history], to = job.offsets[history + 1];
    for (int64_t d = 0; d < job.width; ++d) sums[d] = 0.0f;
    for (int64_t item = from; item < to; ++item) add_item(job, rows.of(item), sums);
    const float count = job.mean && to > from ? static_cast<float>(to - from) : 1.0f;
    finish(sums, count, job.type, job.width, job.out, history);
  }
  return rows.first_bad();
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
