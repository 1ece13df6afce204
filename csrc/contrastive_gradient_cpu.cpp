#include "contrastive_tiles.h"

namespace livrec {
namespace LIVREC_ISA {
namespace {

// A row of products to the weights W of its pairs; both: of rows and columns.
template <bool kBoth, bool kGroups>
void weigh_row(const Contrastive& call, const ContrastiveSlopes& slopes, int64_t row,
               int64_t column, int64_t width, float* s) {
  const Floats shift = Floats{} + slopes.row_shifts[row];
  const float factor = slopes.row_factors[row];
  const Ints group = Ints{} + (kGroups ? call.row_groups[row] : 0);
  for (int64_t v = 0; v < width; v += kLanes) {
    const Floats products = load(s + v), bias = load(call.row_bias + column + v);
    Floats weight = exponential<kLanes>(logits_of(call, products, bias, shift)) * factor;
    Ints own{};
    if (kGroups) {
      own = (load_ids(call.groups + column + v) == group) & (products != -kInfinity);
      weight -= own ? Floats{} + slopes.row_means[row] : Floats{};
    }
    if (slopes.row_weights != nullptr) {
      float* sum = slopes.row_weights + column + v;
      store(sum, load(sum) + weight);
    }
    if (kBoth)
      weight += exponential<kLanes>(logits_of(call, products, load(call.column_bias + column + v),
                                              load(slopes.column_shifts + column + v))) *
                load(slopes.column_factors + column + v);
    if (kBoth && kGroups) weight -= own ? load(slopes.column_means + column + v) : Floats{};
    store(s + v, weight);
  }
}

constexpr int64_t kWordStride = kTileStride / 2;

// Numbers rounded to bfloat16, as words of one number of each vector.
LIVREC_INLINE Floats words_of_both(Floats first, Floats second) {
#if defined(LIVREC_PAIRS)
  const auto halves = [](Floats from) { return same_bits<Halves>(_mm512_cvtneps_pbh(from)); };
#else
  const auto halves = [](Floats from) { return narrow_bf16(from); };
#endif
  return same_bits<Floats>(__builtin_convertvector(halves(first), Bits) |
                           __builtin_convertvector(halves(second), Bits) << 16);
}

// Likewise of neighbours in two vectors.
LIVREC_INLINE Floats words_of_neighbours(Floats low, Floats high) {
#if defined(LIVREC_PAIRS)
  return same_bits<Floats>(_mm512_cvtne2ps_pbh(high, low));
#else
  const Ints even = lane_numbers() * 2;
  return words_of_both(pick(low, high, even), pick(low, high, even + 1));
#endif
}

// Weights of a tile in words of two: of neighbouring columns, and of neighbouring rows, which are
// returned as the left of a product.
Left pack_weights(const float* s, int64_t rows, int64_t width, float* by_column, float* by_row,
                  [[maybe_unused]] float* turned) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t v = 0; v < width; v += 2 * kLanes) {
      const float* from = s + i * kTileStride + v;
      store(by_column + i * kWordStride + v / 2,
            words_of_neighbours(load(from), load(from + kLanes)));
    }
  for (int64_t i = 0; i < rows; i += 2)
    for (int64_t v = 0; v < width; v += kLanes) {
      const float* from = s + i * kTileStride + v;
      store(by_row + i / 2 * kTileStride + v,
            words_of_both(load(from), i + 1 < rows ? load(from + kTileStride) : Floats{}));
    }
#if defined(LIVREC_TILED)
  const int64_t depth = words_of(rows), whole = padded_to_line(depth);
  transpose([=](int64_t i, int64_t d) { return load(by_row + i * kTileStride + d); }, depth, width,
            turned, whole);
  return {turned, whole, 1};
#else
  return {by_row, 1, kTileStride};
#endif
}

void narrow(const float* row, TableType type, int64_t dim, int64_t at, void* out) {
  if (type == TableType::f32)
    for (int64_t d = 0; d < dim; ++d) static_cast<float*>(out)[at + d] = row[d];
  else
    narrow_row(row, type == TableType::f16, dim, static_cast<uint16_t*>(out) + at);
}

}  // namespace

void contrastive_backward(const ContrastiveTerms& terms, const ContrastivePart& part,
                          float* scratch, const ContrastiveSlopes* of_terms) {
  const TileSpace space(scratch, terms.calls[0].dim, terms.calls[0].similar_dim);
  const int64_t padded = padded_to_line(terms.calls[0].dim), stride = terms.calls[0].stride;
  PairProducts pairs(terms.calls[0].keys.words != nullptr);
  each_tile(terms, part, space, pairs,
            [&](int64_t term, int64_t column, int64_t width, int64_t row, int64_t rows) {
              const Contrastive& call = terms.calls[term];
              const ContrastiveSlopes& slopes = of_terms[term];
              const bool both = call.column_bias != nullptr, groups = call.groups != nullptr;
              const auto weigh = both && groups ? weigh_row<true, true>
                                 : both         ? weigh_row<true, false>
                                 : groups       ? weigh_row<false, true>
                                                : weigh_row<false, false>;
              for (int64_t i = 0; i < rows; ++i)
                weigh(call, slopes, row + i, column, width, space.s + i * kTileStride);
              const int64_t columns = least(width, call.keys.count - column);
              if (call.keys.paired != nullptr) {
                float *by_column = space.other, *by_row = by_column + kTileRows * kWordStride;
                const Left turned = pack_weights(space.s, rows, width, by_column, by_row, space.s);
                if (slopes.dq != nullptr)
                  pairs.multiply({by_column, kWordStride, 1}, rows,
                                 call.keys.paired + column / 2 * stride, stride, words_of(columns),
                                 slopes.dq + row * stride, stride, padded, true);
                if (slopes.dk != nullptr)
                  pairs.multiply(turned, columns, call.queries.paired + row / 2 * stride, stride,
                                 words_of(rows), slopes.dk + column * stride, stride, padded, true);
                return;
              }
              if (slopes.dq != nullptr)
                multiply({space.s, kTileStride, 1}, rows, call.keys.units + column * stride, stride,
                         columns, slopes.dq + row * stride, stride, padded, true);
              if (slopes.dk != nullptr)
                multiply({space.s, 1, kTileStride}, columns, call.queries.units + row * stride,
                         stride, rows, slopes.dk + column * stride, stride, padded, true);
            });
}

void contrastive_finish(const ContrastiveRows& rows, int64_t begin, int64_t end, void* out,
                        double* slopes, float* scratch) {
  const int64_t dim = rows.dim;
  float *du = scratch, *x = scratch + rows.stride;
  for (int64_t i = begin; i < end; ++i) {
    const bool counts = rows.valid == nullptr || rows.valid[i];
    const float factor = rows.factors == nullptr ? 0.0f : rows.factors[i];
    for (int64_t d = 0; d < rows.stride; d += kLanes) {
      Floats sum = load(rows.du + i * rows.stride + d);
      if (factor != 0.0f) sum += factor * load(rows.other + i * rows.stride + d);
      store(du + d, counts ? sum * rows.scale : Floats{});
    }
    if (slopes != nullptr) {
      double slope = 0.0;
      if (counts)
        for (int64_t d = 0; d < dim; ++d)
          slope += static_cast<double>(du[d]) * rows.units[i * rows.stride + d];
      slopes[i] = slope;
    }
    if (rows.norms != nullptr && counts) {
      const float norm = rows.norms[i];
      const Floats divisor = Floats{} + (norm == 0.0f ? 1e-12f : norm);
      Floats along{};
      if (norm != 0.0f) {
        for (int64_t d = 0; d < rows.stride; ++d) x[d] = 0.0f;
        if (rows.type == TableType::f32)
          for (int64_t d = 0; d < dim; ++d) x[d] = static_cast<const float*>(rows.x)[i * dim + d];
        else
          widen_row(static_cast<const uint16_t*>(rows.x) + i * dim, rows.type == TableType::f16,
                    dim, x);
        for (int64_t d = 0; d < dim; d += kLanes) {
          store(x + d, load(x + d) / divisor);
          along += load(x + d) * load(du + d);
        }
      }
      const float length = norm == 0.0f ? 0.0f : sum_of(along);
      for (int64_t d = 0; d < dim; d += kLanes) {
        const Floats across = norm == 0.0f ? load(du + d) : load(du + d) - length * load(x + d);
        store(du + d, across / divisor);
      }
    }
    if (out != nullptr) narrow(du, rows.type, dim, i * dim, out);
  }
}

}  // namespace LIVREC_ISA
}  // namespace livrec
