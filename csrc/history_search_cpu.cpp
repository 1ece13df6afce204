#include "history_search.h"

#include "code_blocks.h"
#include "halves.h"

namespace livrec {
namespace LIVREC_ISA {
namespace {

constexpr int kRows = 8;  // items multiplied at once

// Products of kCount rows with a vector of candidates.
template <int N, int kCount>
LIVREC_INLINE void multiply(const float* const* rows, const float* lanes, int64_t dim, float* out,
                            int64_t width) {
  typename Lanes<N>::V sums[kCount];
  for (int r = 0; r < kCount; ++r) sums[r] = typename Lanes<N>::V{};
  for (int64_t d = 0; d < dim; ++d) {
    const auto column = read<N>(lanes + d * N);
    for (int r = 0; r < kCount; ++r) sums[r] += rows[r][d] * column;
  }
  for (int r = 0; r < kCount; ++r) write<N>(out + r * width, sums[r]);
}

// Row `item` in float32: as it lies, or in `space`.
const float* row_of(const SearchKeys& keys, int64_t item, float* space) {
  const auto* floats = static_cast<const float*>(keys.keys) + item * keys.stride;
  const auto* halves = static_cast<const uint16_t*>(keys.keys) + item * keys.stride;
  if (keys.type == TableType::f32) return floats;
  widen_row(halves, keys.type == TableType::f16, keys.dim, space);
  return space;
}

struct Dense {
  const SearchKeys& keys;
  const float* lanes;
  int64_t begin, end;
  float *scratch, *scores;

  // Of the block that comes next, the one before this: a search looks at the latest items first.
  // Before the first item nothing is read: what is asked for need not be there.
  LIVREC_INLINE void ask_before(int64_t item, int64_t count, int64_t size) const {
    const int64_t row = keys.stride * size, line = 64;
    const auto from = reinterpret_cast<uintptr_t>(keys.keys) +
                      static_cast<uintptr_t>((item - kSearchBlock) * row);
    for (int64_t at = 0; at < count * row; at += line)
      __builtin_prefetch(reinterpret_cast<const void*>(from + static_cast<uintptr_t>(at)), 0, 2);
  }

  template <int N, int V>
  void run() const {
    const float* rows[kRows];
    const int64_t size = keys.type == TableType::f32 ? 4 : 2;
    for (int64_t item = begin; item < end; item += kRows) {
      const int64_t some = least(kRows, end - item);
      for (int64_t r = 0; r < some; ++r) rows[r] = row_of(keys, item + r, scratch + r * keys.dim);
      ask_before(item, some, size);
      float* out = scores + (item - begin) * (N * V);
      for (int v = 0; v < V; ++v) {
        const float* own = lanes + v * keys.dim * N;
        if (some == kRows)
          multiply<N, kRows>(rows, own, keys.dim, out + v * N, N * V);
        else
          for (int64_t r = 0; r < some; ++r)
            multiply<N, 1>(rows + r, own, keys.dim, out + r * (N * V) + v * N, N * V);
      }
    }
  }
};

struct FromCodes {
  const CodeBlock& block;
  int64_t begin, end;
  float* scores;

  template <int N, int V>
  LIVREC_INLINE void run() const {
    switch (block.rows->fields) {
      case 2:
        return add<N, V, 2>();
      case 3:
        return add<N, V, 3>();
      case 4:
        return add<N, V, 4>();
      default:
        return add<N, V, 0>();
    }
  }

  template <int N, int V, int kFields>
  void add() const {
    const Terms<N, V, kFields, true, 1> terms(block);
    typename Lanes<N>::V sums[V];
    for (int64_t item = begin; item < end; ++item) {
      terms.combine(item, terms.rows_of(item), sums);
      for (int v = 0; v < V; ++v) write<N>(scores + (item - begin) * (N * V) + v * N, sums[v]);
    }
  }
};

struct Above {
  const float* scores;
  int64_t count;
  const float* least;
  uint64_t* marks;
  bool* odd;

  template <int N, int V>
  void run() const {
    static_assert(64 % (N * V) == 0, "no item's marks in two words");
    constexpr int64_t kEach = 64 / (N * V);
    typename Lanes<N>::V bounds[V];
    typename Lanes<N>::I strange{};
    for (int v = 0; v < V; ++v) bounds[v] = read<N>(least + v * N);
    for (int64_t first = 0; first < count; first += kEach) {
      const int64_t some = first + kEach <= count ? kEach : count - first;
      uint64_t bits = 0;
      for (int64_t i = 0; i < some; ++i)
        for (int v = 0; v < V; ++v) {
          const auto score = read<N>(scores + ((first + i) * V + v) * N);
          strange |= (score - score) != 0.0f;
          bits |= static_cast<uint64_t>(bits_of_lanes<N>(score >= bounds[v])) << ((i * V + v) * N);
        }
      marks[first / kEach] = bits;
    }
    *odd = bits_of_lanes<N>(strange) != 0;
  }
};

}  // namespace

void search_lanes(const CodeShape& shape, const float* query, int64_t candidates, int64_t dim,
                  int64_t first, float* lanes) {
  for (int64_t w = 0; w < shape.width(); ++w) {
    float* to = lanes + w / shape.lanes * dim * shape.lanes + w % shape.lanes;
    const bool inside = first + w < candidates;
    for (int64_t d = 0; d < dim; ++d)
      to[d * shape.lanes] = inside ? query[(first + w) * dim + d] : 0.0f;
  }
}

void search_dense(const CodeShape& shape, const SearchKeys& keys, const float* lanes, int64_t begin,
                  int64_t end, float* scratch, float* scores) {
  shaped(shape, Dense{keys, lanes, begin, end, scratch, scores});
}

void search_codes(const CodeBlock& block, int64_t begin, int64_t end, float* scores) {
  shaped(block.shape, FromCodes{block, begin, end, scores});
}

bool search_above(const CodeShape& shape, const float* scores, int64_t count, const float* least,
                  uint64_t* marks) {
  bool odd = false;
  shaped(shape, Above{scores, count, least, marks, &odd});
  return odd;
}

}  // namespace LIVREC_ISA
}  // namespace livrec
