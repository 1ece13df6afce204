#include "contrastive_tiles.h"

namespace livrec {
namespace LIVREC_ISA {
namespace {

// Exponentials of a row of products, added to those of earlier tiles. They are as exact as those of
// the gradient, whose weights then add up to what they should.
LIVREC_INLINE void add_row(const Contrastive& call, const float* bias, int64_t width,
                           const float* s, float* peak, float* sum) {
  Floats most = Floats{} + *peak;
  for (int64_t v = 0; v < width; v += kLanes)
    most = greater<kLanes>(logits_of(call, load(s + v), load(bias + v), Floats{}), most);
  const float greatest = greatest_of(most), shift = shift_of(greatest);
  if (greatest != *peak) {
    *sum *= exp_of(*peak - shift);
    *peak = greatest;
  }
  Floats total{};
  for (int64_t v = 0; v < width; v += kLanes)
    total += exponential<kLanes>(logits_of(call, load(s + v), load(bias + v), Floats{} + shift));
  *sum += sum_of(total);
}

// Likewise the columns of a tile, kLanes at a time.
LIVREC_INLINE void add_columns(const Contrastive& call, const float* bias, int64_t rows,
                               const float* s, float* peaks, float* sums) {
  const Floats known = load(peaks), none = Floats{} - kInfinity, added = load(bias);
  Floats most = known;
  for (int64_t i = 0; i < rows; ++i)
    most = greater<kLanes>(logits_of(call, load(s + i * kTileStride), added, Floats{}), most);
  const Floats shift = most == none ? Floats{} : most;
  Floats total{};
  for (int64_t i = 0; i < rows; ++i)
    total += exponential<kLanes>(logits_of(call, load(s + i * kTileStride), added, shift));
  store(sums, load(sums) * exponential<kLanes>(known - shift) + total);
  store(peaks, most);
}

// Adds up how many negatives a row has in a tile, and the products of its positives.
void tally_row(const Contrastive& call, int64_t row, int64_t column, int64_t width, const float* s,
               const ContrastiveSums& rows) {
  const Ints group = Ints{} + (call.groups != nullptr ? call.row_groups[row] : 0);
  Ints count{};
  Floats positives{};
  for (int64_t v = 0; v < width; v += kLanes) {
    const Floats products = load(s + v);
    Ints counts = (products != -kInfinity) & (load(call.row_bias + column + v) != -kInfinity);
    if (call.groups != nullptr) {
      const Ints own = (load_ids(call.groups + column + v) == group) & counts;
      positives += own ? products : Floats{};
      counts &= ~own;
    }
    count -= counts;
  }
  for (int j = 0; j < kLanes; ++j) rows.negatives[row] += count[j];
  if (rows.positives != nullptr) rows.positives[row] += sum_of(positives);
}

// Likewise kLanes columns of a tile of some rows; there are groups.
void tally_columns(const Contrastive& call, int64_t row, int64_t rows, int64_t column,
                   const float* s, const ContrastiveSums& columns) {
  const Ints alive = load(call.column_bias + column) != -kInfinity,
             groups = load_ids(call.groups + column);
  Ints count{};
  Floats positives{};
  for (int64_t i = 0; i < rows; ++i) {
    const Floats products = load(s + i * kTileStride);
    const Ints counts = (products != -kInfinity) & alive,
               own = (groups == call.row_groups[row + i]) & counts;
    positives += own ? products : Floats{};
    count -= counts & ~own;
  }
  for (int j = 0; j < kLanes; ++j) {
    columns.negatives[column + j] += count[j];
    columns.positives[column + j] += positives[j];
  }
}

double product_of(const float* a, const float* b, int64_t dim) {
  Doubles sum{};
  for (int64_t d = 0; d < dim; d += kLanes)
    sum += __builtin_convertvector(load(a + d), Doubles) *
           __builtin_convertvector(load(b + d), Doubles);
  double total = 0.0;
  for (int j = 0; j < kLanes; ++j) total += sum[j];
  return total;
}

void round_row(float* row, TableType type, int64_t dim) {
  uint16_t halves[kPanel];
  for (int64_t d = 0; d < dim; d += kPanel) {
    const int64_t count = least(kPanel, dim - d);
    narrow_row(row + d, type == TableType::f16, count, halves);
    widen_row(halves, type == TableType::f16, count, row + d);
  }
}

}  // namespace

// An odd number of cache lines: rows do not crowd in a few sets of a cache.
int64_t contrastive_stride(int64_t dim) {
  const int64_t lines = (dim + 15) / 16;
  return 16 * (lines % 2 == 0 ? lines + 1 : lines);
}

int64_t contrastive_space(int64_t dim, int64_t similar_dim, int64_t terms) {
  return 2 * kTileRows * kTileStride +
         kTileColumns * ((dim + 15) / 16 * 16 * terms + (similar_dim + 15) / 16 * 16);
}

void contrastive_units(const void* x, TableType type, bool normalize, TableType rounded,
                       const bool* valid, int64_t count, int64_t dim, int64_t stride, float* units,
                       float* norms) {
  for (int64_t i = 0; i < count; ++i) {
    float* unit = units + i * stride;
    for (int64_t d = 0; d < stride; ++d) unit[d] = 0.0f;
    if (norms != nullptr) norms[i] = 0.0f;
    if (valid != nullptr && !valid[i]) continue;
    if (type == TableType::f32)
      for (int64_t d = 0; d < dim; ++d) unit[d] = static_cast<const float*>(x)[i * dim + d];
    else
      widen_row(static_cast<const uint16_t*>(x) + i * dim, type == TableType::f16, dim, unit);
    if (normalize) {
      const auto norm = static_cast<float>(__builtin_sqrt(product_of(unit, unit, dim)));
      const Floats divisor = Floats{} + (norm < 1e-12f ? 1e-12f : norm);
      if (norms != nullptr) norms[i] = norm < 1e-12f ? 0.0f : norm;
      for (int64_t d = 0; d < dim; d += kLanes) store(unit + d, load(unit + d) / divisor);
    }
    if (rounded != TableType::f32) round_row(unit, rounded, dim);
  }
}

#if defined(LIVREC_PAIRS) || defined(LIVREC_TILED)
bool contrastive_packs() { return true; }
#else
bool contrastive_packs() { return false; }
#endif

void contrastive_pack(const float* units, int64_t begin, int64_t end, int64_t stride, float* words,
                      int64_t words_stride, float* paired) {
  const auto joined = [](Floats first, Floats second) {
    return same_bits<Floats>(same_bits<Bits>(first) >> 16 |
                             (same_bits<Bits>(second) & 0xffff0000u));
  };
  const Ints even = lane_numbers() * 2;
  for (int64_t i = begin; i < end; ++i) {
    const float* unit = units + i * stride;  // zeros past dim
    for (int64_t w = 0; w < words_stride; w += kLanes) {
      const int64_t d = 2 * w, next = d + kLanes;
      const Floats low = d < stride ? load(unit + d) : Floats{},
                   high = next < stride ? load(unit + next) : Floats{};
      store(words + i * words_stride + w, joined(pick(low, high, even), pick(low, high, even + 1)));
    }
    if (i % 2 == 0)
      for (int64_t d = 0; d < stride; d += kLanes)
        store(paired + i / 2 * stride + d,
              joined(load(unit + d), i + 1 < end ? load(unit + stride + d) : Floats{}));
  }
}

void contrastive_products(const float* a, const float* b, int64_t count, int64_t dim,
                          int64_t stride, double* products) {
  for (int64_t i = 0; i < count; ++i) products[i] = product_of(a + i * stride, b + i * stride, dim);
}

void contrastive_pairs(const Contrastive& call, int64_t above, int64_t block, uint64_t* pairs,
                       float* scratch) {
  const int64_t dim = call.similar_dim, stride = call.similar_stride, batch = call.queries.count;
  const TileSpace space(scratch, call.dim, dim);
  const int64_t first = above * kPairsBlock, column = block * kPairsBlock,
                rows = least(kPairsBlock, batch - first),
                columns = least(kPairsBlock, call.similar.count - column);
  uint64_t found[kPairsBlock][kBlockWords] = {}, turned[kPairsBlock][kBlockWords] = {};
  for (int64_t at = 0; at < columns; at += kPanel) {
    turn_panel(call.similar, dim, stride, column + at, space.similar_panels);
    for (int64_t r = 0; r < rows; r += kPanel) {
      const int64_t count = least(kPanel, rows - r);
      tile_products(call.similar.units + (first + r) * stride, count, stride, space.similar_panels,
                    kPanel, dim, space.s);
      for (int64_t i = 0; i < count; ++i) {
        uint64_t bits = bits_above(space.s + i * kTileStride, call.threshold, columns - at);
        found[r + i][at / kPanel] = bits;
        for (; bits != 0; bits &= bits - 1)
          turned[at + __builtin_ctzll(bits)][r / kPanel] |= uint64_t{1} << i;
      }
    }
  }
  const auto write = [=](const uint64_t (*bits)[kBlockWords], int64_t row, int64_t count,
                         int64_t word) {
    for (int64_t i = 0; i < count; ++i)
      for (int64_t w = 0; w < least(kBlockWords, call.words - word); ++w)
        pairs[(row + i) * call.words + word + w] = bits[i][w];
  };
  write(found, first, rows, block * kBlockWords);
  if (above != block) write(turned, column, least(columns, batch - column), above * kBlockWords);
}

void contrastive_forward(const ContrastiveTerms& terms, const ContrastivePart& part, float* scratch,
                         const ContrastiveSums* of_rows, const ContrastiveSums* of_columns) {
  const TileSpace space(scratch, terms.calls[0].dim, terms.calls[0].similar_dim);
  PairProducts pairs(terms.calls[0].keys.words != nullptr);
  each_tile(terms, part, space, pairs,
            [&](int64_t term, int64_t column, int64_t width, int64_t row, int64_t count) {
              const Contrastive& call = terms.calls[term];
              const ContrastiveSums &rows = of_rows[term], &columns = of_columns[term];
              for (int64_t i = 0; i < count; ++i) {
                const float* s = space.s + i * kTileStride;
                add_row(call, call.row_bias + column, width, s, rows.peaks + row + i,
                        rows.sums + row + i);
                if (rows.negatives != nullptr) tally_row(call, row + i, column, width, s, rows);
              }
              if (call.column_bias == nullptr) return;
              for (int64_t v = 0; v < width; v += kLanes) {
                add_columns(call, call.column_bias + column + v, count, space.s + v,
                            columns.peaks + column + v, columns.sums + column + v);
                if (columns.negatives != nullptr)
                  tally_columns(call, row, count, column + v, space.s + v, columns);
              }
            });
  end_stream();  // of products that are kept
}

}  // namespace LIVREC_ISA
}  // namespace livrec
