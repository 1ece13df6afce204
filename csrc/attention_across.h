// Attention of up to sixteen candidates, or of sixteens of them, to keys and values whose rows are
// whole vectors, for the CPU kernels of target attention; see vectors.h for how it is included.
//
// Nothing is transposed but q and the gradient, once: logits of an item are a vector across the
// candidates, to which each number of its key is broadcast; sums of weighed items are vectors of
// their numbers, to which weights are broadcast. Sums stay in registers while a tile goes by, and
// a row of dk or dv is complete in one. On the way the next tile is asked of memory, a line with
// each item: so little at a time stops nothing.
#pragma once

#include "attention_items.h"

namespace livrec {
namespace LIVREC_ISA {
namespace {

#if defined(LIVREC_ACROSS)
// Candidates in a vector of as few lanes as hold them; by itself, one needs none.
constexpr int width_of(int rows) { return rows == 1 ? 1 : rows <= 4 ? 4 : rows <= 8 ? 8 : 16; }

// Calls run(Number<rows>(), Number<W>()); rows are from kFirst to kLanes.
template <int kFirst, typename Run>
LIVREC_INLINE void with_rows(int64_t rows, const Run& run) {
  if (rows == kFirst) return run(Number<kFirst>(), Number<width_of(kFirst)>());
  if constexpr (kFirst < kLanes) with_rows<kFirst + 1>(rows, run);
}

// By so many sets of up to kLanes candidates a group's are gone through: those of a piece that can
// be are of one size, and lie one after the other.
LIVREC_INLINE int64_t sets_of(const AttentionPiece& piece) {
  return piece.rows <= kLanes ? 1 : piece.rows / kLanes;
}

// Whether a piece can be, if its type can.
LIVREC_INLINE bool goes_across(const AttentionPiece& piece) {
  return piece.dim == piece.padded && piece.value_dim == piece.value_padded && !piece.shared &&
         piece.bias_heads == 0 && piece.activation == Activation::softmax && piece.rows >= 1 &&
         (piece.rows <= kLanes || piece.rows % kLanes == 0);
}

// Calls run(FloatItems() or PairItems(), Number<rows of a set>(), Number<W>()) if it can; returns
// whether.
template <typename Run>
LIVREC_INLINE bool across(const AttentionPiece& piece, const Run& run) {
  if (!goes_across(piece)) return false;
  const int64_t rows_of_set = least(piece.rows, kLanes);
  if (piece.type == TableType::f32) {
    with_rows<1>(rows_of_set, [&](auto rows, auto width) { run(FloatItems(), rows, width); });
    return true;
  }
#if defined(LIVREC_PAIRS)
  if (in_pairs(piece)) {
    with_rows<1>(rows_of_set, [&](auto rows, auto width) { run(PairItems(), rows, width); });
    return true;
  }
#endif
  return false;
}

// x [rows, words] of every set to [words, W]; candidates past the last are zeros.
template <int W>
inline void turn_across(const float* x, int64_t sets, int64_t rows, int64_t words, float* out) {
  for (int64_t i = 0; i < sets; ++i, x += rows * words)
    for (int64_t d = 0; d < words; ++d, out += W)
      for (int64_t r = 0; r < W; ++r) out[r] = r < rows ? x[r * words + d] : 0.0f;
}

// Rows of float32 as they are multiplied with items. Returns what products are to be multiplied
// with then; `space` is as large as x.
template <int R, int W>
inline float asked_across(FloatItems, const float* x, int64_t sets, int64_t dim, float, float*,
                          float* out) {
  turn_across<W>(x, sets, R, dim, out);
  return 1.0f;
}

#if defined(LIVREC_PAIRS)
template <int R, int W>
inline float asked_across(PairItems, const float* x, int64_t sets, int64_t dim, float scale,
                          float* space, float* out) {
  const float factor = pair_rows(x, sets * R, dim, scale, space);
  turn_across<W>(space, sets, R, dim / 2, out);
  return factor;
}
#endif

// A number of each candidate as a vector, as often as it takes to fill one of kLanes; zeros for
// candidates past the last.
template <int W>
LIVREC_INLINE Floats repeated(const float* x, int64_t rows) {
  float numbers[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) numbers[i] = i % W < rows ? x[i % W] : 0.0f;
  return load(numbers);
}

// What the candidates in a vector of kLanes add up to, in the first W lanes.
template <int W>
LIVREC_INLINE Floats folded_across(Floats x) {
  for (int step = kLanes / 2; step >= W; step /= 2) x += turn(x, step);
  return x;
}

// What exponentials are taken less: where nothing counts, the greatest logit is -inf.
LIVREC_INLINE Floats shift_across(Floats peak) { return peak == -kInfinity ? Floats{} : peak; }

// A group's items in a tile, and memory to be asked for, a line with every kLanes words of them.
template <typename Kind>
struct Items {
  typedef typename Kind::Type Type;
  const Type* first;
  int64_t stride, count, dim;
  const char* next;

  Items(const void* x, const AttentionPiece& piece, int64_t width, int64_t group, int64_t at)
      : stride(piece.groups * width), count(least(kTile, piece.items - at)), dim(width) {
    first = static_cast<const Type*>(x) + at * stride + group * dim;
    // It may lie past the end, where nothing is read: what is asked for need not be there.
    const int64_t ahead = (at + kTile) * stride + group * kTile * dim;
    next = reinterpret_cast<const char*>(reinterpret_cast<uintptr_t>(x) +
                                         static_cast<uintptr_t>(ahead) * sizeof(Type));
  }
};

template <int kCount>
LIVREC_INLINE void ask_lines(const char*& next) {
  for (int i = 0; i < kCount; ++i, next += 64) __builtin_prefetch(next, 0, 2);
}

// s_t = sum_d x_td y_d across the candidates: y [words, W], s [count, W]. Each is a sum of two,
// over every other word.
template <typename Kind, int W>
__attribute__((noinline)) void products_across(const Items<Kind>& items, const float* y,
                                               float factor, float* s) {
  typedef typename Lanes<W>::V V;
  constexpr int kMany = 4, kWords = kLanes / Kind::kStep;
  const int64_t stride = items.stride, count = items.count;
  const char* next = items.next;
  for (int64_t d = 0; d < items.dim; d += kLanes, y += kWords * W) {
    V columns[kWords];
    for (int j = 0; j < kWords; ++j) columns[j] = read<W>(y + j * W);
    const auto some = [&](auto many, int64_t t) {
      constexpr int kSome = decltype(many)::value;
      const LooseWord* rows[kSome];
      for (int i = 0; i < kSome; ++i)
        rows[i] = reinterpret_cast<const LooseWord*>(items.first + (t + i) * stride + d);
      float* to = s + t * W;
      ask_lines<kSome / Kind::kStep>(next);
      V even[kSome], odd[kSome];
      for (int i = 0; i < kSome; ++i) even[i] = d > 0 ? read<W>(to + i * W) : V{}, odd[i] = V{};
#pragma GCC unroll 8
      for (int j = 0; j < kWords; j += 2)
#pragma GCC unroll 4
        for (int i = 0; i < kSome; ++i) {
          even[i] = Kind::template add<W>(even[i], rows[i][j], columns[j]);
          odd[i] = Kind::template add<W>(odd[i], rows[i][j + 1], columns[j + 1]);
        }
      for (int i = 0; i < kSome; ++i) write<W>(to + i * W, even[i] + odd[i]);
    };
    int64_t t = 0;
    for (; t + kMany <= count; t += kMany) some(Number<kMany>(), t);
    for (; t < count; ++t) some(Number<1>(), t);
  }
  for (int64_t i = 0; factor != 1.0f && i < count * W; i += W)
    write<W>(s + i, read<W>(s + i) * factor);
}

// The same for one candidate: products lane by lane, and lanes added up.
template <typename Kind>
__attribute__((noinline)) void products_of_one(const Items<Kind>& items, const float* y,
                                               float factor, float* s) {
  const char* next = items.next;
  for (int64_t t = 0; t < items.count; t += kLanes) {
    for (int64_t d = 0; d < items.dim; d += kLanes) ask_lines<kLanes / Kind::kStep>(next);
    const typename Kind::Type* row = items.first + t * items.stride;
    const Floats sums = t + kLanes <= items.count
                            ? Kind::dots(row, items.stride, Number<kLanes>(), items.dim, y)
                            : Kind::dots(row, items.stride, items.count - t, items.dim, y);
    store(s + t, factor == 1.0f ? sums : sums * factor);
  }
}

// Fills the vectors that the last item begins, if it does not fill them itself.
template <typename Kind, int W>
LIVREC_INLINE void end_across(float* s, int64_t count, float value) {
  for (int64_t i = count * W; i % (Kind::kStep * kLanes) != 0; ++i) s[i] = value;
}

// The greatest of a tile's logits and of those known, for every candidate.
template <int W>
LIVREC_INLINE Floats peak_across(const float* s, int64_t count, Floats known) {
  Floats most = known;
  for (int64_t i = 0; i < count * W; i += kLanes) most = greater<kLanes>(load(s + i), most);
  for (int step = kLanes / 2; step >= W; step /= 2) most = greater<kLanes>(turn(most, step), most);
  return most;
}

// to_r += sum_t w_tr x_t. Of few candidates, several sums are taken in turns: one waits for itself.
template <typename Kind, int R, int W>
__attribute__((noinline)) void gather_items(const float* w, const Items<Kind>& items, float* to) {
  constexpr int kTurns = R >= 4 ? 1 : 4 / R;
  const int64_t stride = items.stride, count = items.count, dim = items.dim;
  const char* next = items.next;
  for (int64_t d = 0; d < dim; d += kLanes) {
    Floats sums[kTurns][R];
    for (auto& turn : sums)
      for (Floats& sum : turn) sum = Floats{};
    const typename Kind::Type* row = items.first + d;
    const float* weights = w;
    const auto some = [&](auto many, int64_t t) {
#pragma GCC unroll 4
      for (int i = 0; i < decltype(many)::value;
           ++i, t += Kind::kStep, row += Kind::kStep * stride, weights += W) {
        const Floats numbers = Kind::load_items(row, stride, t + 1 < count);
        ask_lines<1>(next);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r)
          sums[i][r] = Kind::template add<kLanes>(sums[i][r], weights[r], numbers);
      }
    };
    int64_t t = 0;
    for (; t + kTurns * Kind::kStep <= count; t += kTurns * Kind::kStep) some(Number<kTurns>(), t);
    for (; t < count; t += Kind::kStep) some(Number<1>(), t);
    for (int r = 0; r < R; ++r) {
      for (int i = 1; i < kTurns; ++i) sums[0][r] += sums[i][r];
      store(to + r * dim + d, load(to + r * dim + d) + sums[0][r]);
    }
  }
}
#endif

}  // namespace
}  // namespace LIVREC_ISA
}  // namespace livrec
