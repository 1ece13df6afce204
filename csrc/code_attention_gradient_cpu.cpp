#include "code_attention_gradient.h"

#include "code_blocks.h"

namespace livrec {
namespace LIVREC_ISA {
namespace {

template <int N, int V, bool kExact>
void bias_slopes(const CodeBlock& block, int64_t begin, int64_t end, const float* inverse,
                 const float* mean, float* out) {
  constexpr int kWidth = N * V;
  const Terms<N, V, 0, kExact, 2> terms(block);
  const int64_t columns = block.heads * block.candidates - block.first;
  const int64_t width = least(kWidth, columns);
  typename Lanes<N>::V p[V], g[V];
  float slopes[kWidth];
  for (int64_t item = begin; item < end; ++item) {
    const auto rows = terms.rows_of(item);
    terms.weigh(item, rows, p);
    terms.slope(rows, g);
    for (int v = 0; v < V; ++v)
      write<N>(slopes + v * N, p[v] * read<N>(inverse + v * N) * (g[v] - read<N>(mean + v * N)));
    float* to = out + item * block.bias_heads;
    for (int64_t w = 0; w < width; ++w) to[terms.heads[w]] += slopes[w];
  }
}

struct BiasSlopes {
  const CodeBlock& block;
  int64_t begin, end;
  const float *inverse, *mean;
  float* out;

  template <int N, int V>
  LIVREC_INLINE void run() const {
    block.exact ? bias_slopes<N, V, true>(block, begin, end, inverse, mean, out)
                : bias_slopes<N, V, false>(block, begin, end, inverse, mean, out);
  }
};

// Sums over a head's candidates for kRows rows and a vector of dimensions.
template <int kRows>
LIVREC_INLINE void row_tile(const CodeBlock& block, int64_t part, const float* sums,
                            const CodeRow* rows, int64_t column, int64_t some, const float* x,
                            int64_t stride, Floats* out) {
  const int64_t width = block.shape.width();
  const float* weights[kRows];
  for (int r = 0; r < kRows; ++r) {
    weights[r] = sums + (rows[r].slot * block.parts + part) * width + column;
    out[r] = Floats{};
  }
  for (int64_t c = 0; c < some; ++c) {
    const Floats from = load(x + c * stride);
    for (int r = 0; r < kRows; ++r) out[r] += weights[r][c] * from;
  }
}

}  // namespace

void code_slopes(const CodeBlock& block, const float* inverse, const float* mean, float* sums) {
  const int64_t width = block.shape.width();
  const CodeRows& all = *block.rows;
  for (int64_t i = 0; i < all.ends[all.fields]; ++i) {
    float* p = sums + all.distinct[i].slot * 2 * width;
    float* q = p + width;
    for (int64_t w = 0; w < width; ++w) {
      q[w] = (q[w] - mean[w] * p[w]) * inverse[w];
      p[w] *= inverse[w];
    }
  }
}

void code_row_sums(const CodeBlock& block, int64_t part, const float* sums, const float* x,
                   int64_t padded, float factor, float* out) {
  constexpr int kRows = 8;
  const int64_t stride = block.heads * padded;
  const int64_t width = least(block.shape.width(), block.heads * block.candidates - block.first);
  const CodeRows& all = *block.rows;
  const int64_t count = all.ends[all.fields];
  Floats found[kRows];
  for (int64_t w = 0, some; w < width; w += some) {
    const int64_t head = (block.first + w) / block.candidates;
    const int64_t candidate = (block.first + w) % block.candidates;
    some = least(width - w, block.candidates - candidate);
    for (int64_t i = 0; i < count; i += kRows) {
      const int64_t rows = least(kRows, count - i);
      for (int64_t d = 0; d < padded; d += kLanes) {
        const float* from = x + candidate * stride + head * padded + d;
        if (rows == kRows)
          row_tile<kRows>(block, part, sums, all.distinct + i, w, some, from, stride, found);
        else
          for (int64_t r = 0; r < rows; ++r)
            row_tile<1>(block, part, sums, all.distinct + i + r, w, some, from, stride, found + r);
        for (int64_t r = 0; r < rows; ++r) {
          float* to = out + (i + r) * stride + head * padded + d;
          store(to, load(to) + factor * found[r]);
        }
      }
    }
  }
}

void code_bias_slopes(const CodeBlock& block, int64_t begin, int64_t end, const float* inverse,
                      const float* mean, float* out) {
  shaped(block.shape, BiasSlopes{block, begin, end, inverse, mean, out});
}

}  // namespace LIVREC_ISA
}  // namespace livrec
