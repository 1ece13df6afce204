#include "code_attention.h"

#include "code_blocks.h"
#include "halves.h"

namespace livrec {
namespace LIVREC_ISA {
namespace {

template <int N, int V, int kFields, bool kExact, int kParts>
void scan(const CodeBlock& block, int64_t begin, int64_t end, float* sums) {
  const Terms<N, V, kFields, kExact, kParts> terms(block);
  typename Lanes<N>::V p[V], g[V];
  for (int64_t item = begin; item < end; ++item) {
    const auto rows = terms.rows_of(item);
    terms.weigh(item, rows, p);
    if (kParts == 2) {
      terms.slope(rows, g);
      for (int v = 0; v < V; ++v) g[v] *= p[v];
    }
    for (int64_t f = 0; f < terms.fields; ++f) {
      float* row = sums + rows[f];
      for (int v = 0; v < V; ++v) write<N>(row + v * N, read<N>(row + v * N) + p[v]);
      if (kParts == 1) continue;
      row += N * V;
      for (int v = 0; v < V; ++v) write<N>(row + v * N, read<N>(row + v * N) + g[v]);
    }
  }
}

// The same over runs, where all items share a row of the key field: p = e t, with e that row's
// exponentials and t the product of the others'.
template <int N, int V, int kOthers>
void scan_runs(const CodeBlock& block, int64_t begin, int64_t end, float* sums) {
  typedef typename Lanes<N>::V Vector;
  constexpr int64_t kWidth = N * V;
  const CodeRows& all = *block.rows;
  const int64_t others = kOthers ? kOthers : all.fields - 1, items = all.items, key = all.key;
  const auto at = [&](int64_t other, int64_t item) {
    return all.slots[(other + (other >= key)) * items + item] * kWidth;
  };
  const CodeRow* row = all.distinct + all.ends[key];
  const uint32_t* run_end = all.run_ends;
  while (*run_end <= begin) ++row, ++run_end;
  int32_t heads[kWidth];
  bias_heads_of<kWidth>(block, heads);
  for (int64_t item = begin; item < end; ++row, ++run_end) {
    Vector e[V];
    for (int v = 0; v < V; ++v) e[v] = read<N>(block.tables + row->slot * kWidth + v * N);
    const int64_t last = least(*run_end, end);
    while (item < last) {
      const int64_t stop = least(item + kSlotTurns, last);
      Vector total[V] = {};
      for (; item < stop; ++item) {
        Vector t[V];
        for (int v = 0; v < V; ++v) t[v] = Vector{} + 1.0f;
        for (int64_t o = 0; o < others; ++o) {
          const float* table = block.tables + at(o, item);
          for (int v = 0; v < V; ++v)
            t[v] = o == 0 ? read<N>(table + v * N) : t[v] * read<N>(table + v * N);
        }
        if (block.bias_heads) {
          float bias[kWidth];
          spread<kWidth>(block, heads, item, bias);
          for (int v = 0; v < V; ++v) t[v] *= read<N>(bias + v * N);
        }
        for (int v = 0; v < V; ++v) total[v] += t[v];
        for (int v = 0; v < V; ++v) t[v] *= e[v];
        for (int64_t o = 0; o < others; ++o) {
          float* sum = sums + at(o, item);
          for (int v = 0; v < V; ++v) write<N>(sum + v * N, read<N>(sum + v * N) + t[v]);
        }
      }
      float* sum = sums + row->slot * kWidth;
      for (int v = 0; v < V; ++v) write<N>(sum + v * N, read<N>(sum + v * N) + total[v] * e[v]);
    }
  }
}

struct Scan {
  const CodeBlock& block;
  int64_t begin, end;
  float* sums;

  template <int N, int V, int kFields, bool kExact>
  LIVREC_INLINE void parts() const {
    if (block.parts == 2) return scan<N, V, kFields, kExact, 2>(block, begin, end, sums);
    scan<N, V, kFields, kExact, 1>(block, begin, end, sums);
  }

  template <int N, int V>
  LIVREC_INLINE void runs() const {
    switch (block.rows->fields) {
      case 3:
        return scan_runs<N, V, 2>(block, begin, end, sums);
      case 4:
        return scan_runs<N, V, 3>(block, begin, end, sums);
      default:
        return scan_runs<N, V, 0>(block, begin, end, sums);
    }
  }

  template <int N, int V>
  LIVREC_INLINE void run() const {
    if (block.exact) return parts<N, V, 0, true>();
    if (block.parts == 1 && block.rows->key >= 0) return runs<N, V>();
    switch (block.rows->fields) {
      case 1:
        return parts<N, V, 1, false>();
      case 2:
        return parts<N, V, 2, false>();
      case 3:
        return parts<N, V, 3, false>();
      case 4:
        return parts<N, V, 4, false>();
      default:
        return parts<N, V, 0, false>();
    }
  }
};

struct Greatest {
  const CodeBlock& block;
  int64_t begin, end;
  float* peaks;

  template <int N, int V, int kParts>
  LIVREC_INLINE void raise() const {
    const Terms<N, V, 0, true, kParts> terms(block);
    typename Lanes<N>::V p[V], most[V];
    for (int v = 0; v < V; ++v) most[v] = read<N>(peaks + v * N);
    for (int64_t item = begin; item < end; ++item) {
      terms.combine(item, terms.rows_of(item), p);
      for (int v = 0; v < V; ++v) most[v] = greater<N>(p[v], most[v]);
    }
    for (int v = 0; v < V; ++v) write<N>(peaks + v * N, most[v]);
  }

  template <int N, int V>
  LIVREC_INLINE void run() const {
    block.parts == 2 ? raise<N, V, 2>() : raise<N, V, 1>();
  }
};

// x of the columns that a vector holds, lane by lane: [span heads x padded, lanes], times scale.
// Lanes of other heads, and past the last column, hold zeros.
template <int N>
void spread_lanes(const CodeBlock& block, int64_t vector, const float* x, int64_t padded,
                  float scale, int64_t first_head, int64_t span, float* out) {
  for (int64_t i = 0; i < span * padded * N; ++i) out[i] = 0.0f;
  for (int64_t lane = 0; lane < N; ++lane) {
    const int64_t column = block.first + vector * N + lane;
    if (column >= block.heads * block.candidates) break;
    const int64_t head = column / block.candidates, candidate = column % block.candidates;
    const float* from = x + (candidate * block.heads + head) * padded;
    float* to = out + (head - first_head) * padded * N + lane;
    for (int64_t d = 0; d < padded; ++d) to[d * N] = scale * from[d];
  }
}

// Products of kRows rows with a vector of columns.
template <int N, int kRows>
LIVREC_INLINE void multiply(const float* const* rows, int64_t at, const float* lanes, int64_t count,
                            typename Lanes<N>::V* out) {
  const float* from[kRows];
  for (int r = 0; r < kRows; ++r) from[r] = rows[r] + at, out[r] = typename Lanes<N>::V{};
  for (int64_t j = 0; j < count; ++j) {
    const auto column = read<N>(lanes + j * N);
    for (int r = 0; r < kRows; ++r) out[r] += from[r][j] * column;
  }
}

// Products of a row with N columns, each with the row's part of its head.
template <int N>
LIVREC_INLINE typename Lanes<N>::V multiply_columns(const float* row, const int64_t* offsets,
                                                    const float* const* columns, int64_t padded) {
  if constexpr (N > kLanes) {
    return {};
  } else {
    Floats sums[N] = {};
    for (int64_t d = 0; d < padded; d += kLanes)
      for (int l = 0; l < N; ++l) sums[l] += load(row + offsets[l] + d) * load(columns[l] + d);
    const Floats found = sums_of<N>(sums);
    typename Lanes<N>::V first;
    __builtin_memcpy(&first, &found, sizeof(first));
    return first;
  }
}

struct Products {
  const CodeBlock& block;
  int64_t part;
  const float* const* rows;
  const float* x;
  int64_t padded;
  float scale;
  const float* less;
  float *peaks, *lanes;

  template <int N, int V>
  void run() const {
    for (int v = 0; v < V; ++v) vector<N, V>(v);
  }

  template <int N, int V>
  void vector(int64_t v) const {
    constexpr int kRows = 8;
    typedef typename Lanes<N>::V Vector;
    const int64_t first = head_of(block, v * N), span = head_of(block, v * N + N - 1) - first + 1;
    // Few columns of a head: products of each alone are fewer than with zeros for the other heads.
    const bool by_columns = N <= 8 && 2 * span >= N;
    if (!by_columns) spread_lanes<N>(block, v, x, padded, scale, first, span, lanes);
    const int64_t at = first * padded, count = span * padded;
    const CodeRows& all = *block.rows;
    const float* columns[N];
    int64_t offsets[N];
    Vector factor{};
    for (int lane = 0; lane < N; ++lane) {
      const int64_t column = least(block.first + v * N + lane, block.heads * block.candidates - 1);
      const int64_t head = column / block.candidates, candidate = column % block.candidates;
      columns[lane] = x + (candidate * block.heads + head) * padded;
      offsets[lane] = head * padded;
      factor[lane] = block.first + v * N + lane == column ? scale : 0.0f;
    }
    for (int64_t f = 0; f < all.fields; ++f) {
      Vector most = Vector{} - kInfinity, found[kRows];
      const Vector shift = less && f == 0 ? read<N>(less + v * N) : Vector{};
      for (int64_t i = all.ends[f]; i < all.ends[f + 1]; i += kRows) {
        const int64_t some = least(kRows, all.ends[f + 1] - i);
        if (by_columns)
          for (int64_t r = 0; r < some; ++r)
            found[r] = factor * multiply_columns<N>(rows[i + r], offsets, columns, padded);
        else if (some == kRows)
          multiply<N, kRows>(rows + i, at, lanes, count, found);
        else
          for (int64_t r = 0; r < some; ++r)
            multiply<N, 1>(rows + i + r, at, lanes, count, found + r);
        for (int64_t r = 0; r < some; ++r) {
          const CodeRow& row = all.distinct[i + r];
          const Vector value = found[r] - shift;
          most = greater<N>(value, most);
          for (uint32_t copy = 0; copy < row.copies; ++copy)
            write<N>(block.tables + ((row.slot + copy) * block.parts + part) * (N * V) + v * N,
                     value);
        }
      }
      if (peaks) write<N>(peaks + f * (N * V) + v * N, most);
    }
  }
};

struct Exponentials {
  const CodeBlock& block;
  const float* peaks;

  template <int N, int V>
  void run() const {
    constexpr int kRows = N * V < kLanes ? kLanes / (N * V) : 1;  // that fill a vector
    const CodeRows& all = *block.rows;
    for (int64_t f = 0; f < all.fields; ++f) {
      const float* own_peaks = peaks + f * (N * V);
      int64_t i = all.ends[f];
      if (kRows > 1 && block.parts == 1) {
        float repeated[kLanes];
        for (int l = 0; l < kLanes; ++l) repeated[l] = own_peaks[l % (N * V)];
        for (; i + kRows <= all.ends[f + 1] && together(all.distinct + i, kRows); i += kRows) {
          float* rows = block.tables + all.distinct[i].slot * (N * V);
          store(rows, exponential<kLanes>(load(rows) - load(repeated)));
        }
      }
      for (; i < all.ends[f + 1]; ++i) raise<N, V>(all.distinct[i], own_peaks);
    }
  }

  // Whether rows have one slot each, and those follow each other.
  static bool together(const CodeRow* rows, int64_t count) {
    for (int64_t i = 0; i < count; ++i)
      if (rows[i].copies != 1 || rows[i].slot != rows[0].slot + i) return false;
    return true;
  }

  template <int N, int V>
  void raise(const CodeRow& row, const float* own_peaks) const {
    float* own = block.tables + row.slot * block.parts * (N * V);
    for (int v = 0; v < V; ++v) {
      const auto value = exponential<N>(read<N>(own + v * N) - read<N>(own_peaks + v * N));
      for (uint32_t copy = 0; copy < row.copies; ++copy)
        write<N>(own + copy * block.parts * (N * V) + v * N, value);
    }
  }
};

// Adds rows up two by two, whatever their number: errors grow with its logarithm.
void fold_copies(float* rows, int64_t copies, int64_t size) {
  while (copies > 1) {
    const int64_t half = (copies + 1) / 2;
    for (int64_t i = 0; i < (copies - half) * size; ++i) rows[i] += rows[half * size + i];
    copies = half;
  }
}

// Sums over the rows of the first field, which every item has one of; runs of rows by themselves.
struct Totals {
  const CodeRows& all;
  const float* sums;
  int64_t size;
  float* totals;

  template <int N, int V>
  void run() const {
    constexpr int64_t kRun = 16;
    for (int64_t w = 0; w < size; w += N) {
      typename Lanes<N>::V sum{};
      for (int64_t i = 0; i < all.ends[1]; i += kRun) {
        typename Lanes<N>::V part{};
        for (int64_t r = i; r < least(i + kRun, all.ends[1]); ++r)
          part += read<N>(sums + all.distinct[r].slot * size + w);
        sum += part;
      }
      write<N>(totals + w, sum);
    }
  }
};

void gather_row(const void* table, TableType type, int64_t row, int64_t heads, int64_t dim,
                int64_t padded, float* out) {
  const auto* floats = static_cast<const float*>(table) + row * heads * dim;
  if (type == TableType::f32 && dim == padded) {  // padded to whole vectors
    for (int64_t d = 0; d < heads * dim; d += kLanes) store(out + d, load(floats + d));
    return;
  }
  for (int64_t h = 0; h < heads; ++h, out += padded)
    pad_row(table, type, row * heads + h, dim, padded, out);
}

}  // namespace

CodeShape code_shape(int64_t columns, int64_t parts, int64_t slots) {
  const int64_t lanes = columns <= 4 ? 4 : columns <= 8 && kLanes > 4 ? 8 : kLanes;
  // Tables and sums of a block should stay in a core's own cache.
  const int64_t room = (int64_t{400} << 10) / (slots * parts * 2 * 4 + 1) / lanes;
  int64_t vectors = 1;
  while (vectors < 4 && vectors * lanes < columns && vectors * 2 <= room) vectors *= 2;
  return {lanes, vectors, kLanes};
}

void code_gather(const void* const* tables, TableType type, const CodeRows& rows, int64_t heads,
                 int64_t dim, int64_t padded, float* space, const float** out) {
  const bool as_they_lie = type == TableType::f32 && dim == padded;
  const float* zeros = space;
  for (int64_t d = 0; d < heads * padded; ++d) space[d] = 0.0f;
  for (int64_t f = 0; f < rows.fields; ++f)
    for (int64_t i = rows.ends[f]; i < rows.ends[f + 1]; ++i) {
      const int64_t row = rows.distinct[i].row;
      if (row < 0) {
        out[i] = zeros;
      } else if (as_they_lie) {
        out[i] = static_cast<const float*>(tables[f]) + row * heads * dim;
      } else {
        gather_row(tables[f], type, row, heads, dim, padded, space += heads * padded);
        out[i] = space;
      }
    }
}

void code_widen(const void* x, TableType type, int64_t count, int64_t dim, int64_t padded,
                float* out) {
  gather_row(x, type, 0, count, dim, padded, out);
}

int64_t code_lane_space(const CodeBlock& block, int64_t padded) {
  const int64_t most = block.shape.lanes / block.candidates + 2;
  return least(most, block.heads) * padded * block.shape.lanes;
}

void code_products(const CodeBlock& block, int64_t part, const float* const* rows, const float* x,
                   int64_t padded, float scale, const float* less, float* peaks, float* scratch) {
  shaped(block.shape, Products{block, part, rows, x, padded, scale, less, peaks, scratch});
}

void code_exponentials(const CodeBlock& block, const float* peaks) {
  shaped(block.shape, Exponentials{block, peaks});
}

void code_exp(const float* x, int64_t count, float* out) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    write<kLanes>(out + i, exponential<kLanes>(read<kLanes>(x + i)));
  for (; i < count; ++i) {
    Floats one{};
    one[0] = x[i];
    out[i] = exponential<kLanes>(one)[0];
  }
}

void code_scan(const CodeBlock& block, int64_t begin, int64_t end, float* sums) {
  shaped(block.shape, Scan{block, begin, end, sums});
}

void code_greatest(const CodeBlock& block, int64_t begin, int64_t end, float* peaks) {
  shaped(block.shape, Greatest{block, begin, end, peaks});
}

void code_fold(const CodeBlock& block, float* sums, float* totals) {
  const int64_t size = block.parts * block.shape.width();
  const CodeRows& all = *block.rows;
  for (int64_t i = 0; i < all.ends[all.fields]; ++i)
    fold_copies(sums + all.distinct[i].slot * size, all.distinct[i].copies, size);
  shaped(block.shape, Totals{all, sums, size, totals});
}

namespace {

// Sums over rows for up to kTile columns of one head and a vector of its dimensions.
template <int kTile>
LIVREC_INLINE void column_tile(const CodeBlock& block, const float* sums, int64_t column,
                               const float* const* rows, int64_t at, Floats* out) {
  constexpr int64_t kRun = 64;  // rows added up by themselves: errors grow with runs and their size
  const int64_t size = block.parts * block.shape.width();
  const CodeRows& all = *block.rows;
  const int64_t count = all.ends[all.fields];
  for (int c = 0; c < kTile; ++c) out[c] = Floats{};
  for (int64_t i = 0; i < count; i += kRun) {
    Floats run[kTile] = {};
    for (int64_t r = i; r < least(i + kRun, count); ++r) {
      const Floats row = load(rows[r] + at);
      const float* weights = sums + all.distinct[r].slot * size + column;
      for (int c = 0; c < kTile; ++c) run[c] += weights[c] * row;
    }
    for (int c = 0; c < kTile; ++c) out[c] += run[c];
  }
}

}  // namespace

void code_columns(const CodeBlock& block, const float* sums, const float* const* rows,
                  int64_t padded, const float* factor, float* out) {
  constexpr int kTile = 8;
  const int64_t last = block.heads * block.candidates;
  const int64_t width = least(block.shape.width(), last - block.first);
  Floats found[kTile];
  for (int64_t w = 0, some; w < width; w += some) {
    const int64_t head = (block.first + w) / block.candidates;
    const int64_t candidate = (block.first + w) % block.candidates;
    const int64_t left = least(width - w, block.candidates - candidate);
    some = left >= kTile ? kTile : 1;
    for (int64_t d = 0; d < padded; d += kLanes) {
      const int64_t at = head * padded + d;
      if (some == kTile)
        column_tile<kTile>(block, sums, w, rows, at, found);
      else
        column_tile<1>(block, sums, w, rows, at, found);
      for (int64_t c = 0; c < some; ++c) {
        float* to = out + ((candidate + c) * block.heads + head) * padded + d;
        store(to, load(to) + factor[w + c] * found[c]);
      }
    }
  }
}

void code_narrow(const float* x, int64_t count, int64_t dim, int64_t padded, TableType type,
                 void* out) {
  narrow_padded(x, type, count, dim, padded, out);
}

}  // namespace LIVREC_ISA
}  // namespace livrec
