#include "codebook_bytes.h"

#include "vectors.h"

#if defined(__AVX512VNNI__)
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 suspects its own intrinsics
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#endif

namespace livrec {
namespace LIVREC_ISA {

#if !defined(__AVX512VNNI__)

int64_t bytes_memory(int64_t, int64_t) { return 0; }
void pack_bytes(Codebook& codebook, void*) { codebook.in_bytes = false; }
int64_t bytes_scratch(int64_t) { return 0; }
Rows nearest_in_bytes(const Codebook&, const Rows& rows, int32_t*, int32_t*, void*) { return rows; }

#else

namespace {

constexpr int kPanel = 32;     // codewords in a panel
constexpr int kTileRows = 12;  // rows that meet a panel in registers
constexpr int kChunk = 512;    // codewords whose scores are kept at a time
constexpr int kMost = 128;     // candidates of a row that there is room for
constexpr int kPairs = kBlockRows * kMost + kChunk + 16;
constexpr int kAhead = 16;  // rows to fetch ahead
constexpr float kTiny = 1e-30f;
constexpr float kEps = 0x1p-23f;

// Of each row: r - m = a q + dr.
struct alignas(64) Quantised {
  float step[kBlockRows];   // a
  float scale[kBlockRows];  // 1 / a
  float error[kBlockRows];  // E / ||c - m||, but for rounding
  float slack[kBlockRows];  // twice the rounding
};

struct alignas(64) Scratch {
  Quantised rows;
  __m512 best[kBlockRows];  // greatest lower bound per lane
  float least[kBlockRows];  // what a candidate's upper bound must reach
  int32_t found[kBlockRows];
  __m512 lanes[2][16];  // of 16 rows, to be added up
  // Candidates of all rows; a row's come in ascending order.
  int64_t pairs;
  int32_t row[kPairs], code[kPairs];
  float score[kPairs];
  alignas(64) float chunk[kBlockRows][kChunk + 16];  // a stride of no power of two spares the cache
};

int64_t quads_of(int64_t dim) { return (dim + 3) / 4; }
int64_t row_bytes(int64_t dim) { return (dim + 15) / 16 * 16; }
int64_t panels_of(int64_t size) { return (size + kPanel - 1) / kPanel; }

// Candidates of a row beyond which scoring every codeword in float32 is quicker.
int32_t most_candidates(int64_t size) {
  return static_cast<int32_t>(size < 128 ? 16 : size < 8 * kMost ? size / 8 : kMost);
}

LIVREC_INLINE __mmask16 lanes_left(int64_t count) {
  return count >= 16 ? static_cast<__mmask16>(0xffff) : static_cast<__mmask16>((1u << count) - 1u);
}

struct Sum {
  __m512 operator()(__m512 a, __m512 b) const { return _mm512_add_ps(a, b); }
};
struct Most {
  __m512 operator()(__m512 a, __m512 b) const { return _mm512_max_ps(a, b); }
};

// Lane i of the result joins all lanes of vectors[i]: 16 reductions for the price of four.
template <typename Join>
LIVREC_INLINE __m512 join_lanes(const __m512* v, Join join) {
  __m512 four[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512 a = join(_mm512_unpacklo_ps(v[4 * i], v[4 * i + 1]),
                          _mm512_unpackhi_ps(v[4 * i], v[4 * i + 1]));
    const __m512 b = join(_mm512_unpacklo_ps(v[4 * i + 2], v[4 * i + 3]),
                          _mm512_unpackhi_ps(v[4 * i + 2], v[4 * i + 3]));
    four[i] = join(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
  }
  const __m512 low = join(_mm512_shuffle_f32x4(four[0], four[1], 0x88),
                          _mm512_shuffle_f32x4(four[0], four[1], 0xdd));
  const __m512 high = join(_mm512_shuffle_f32x4(four[2], four[3], 0x88),
                           _mm512_shuffle_f32x4(four[2], four[3], 0xdd));
  return join(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd));
}

// Calls step(mask, d) for every 16 dims, the last of them perhaps in part.
template <typename Step>
LIVREC_INLINE void for_lanes(int64_t dim, Step step) {
  int64_t d = 0;
  for (; d + 16 <= dim; d += 16) step(static_cast<__mmask16>(0xffff), d);
  if (d < dim) step(lanes_left(dim - d), d);
}

LIVREC_INLINE __m512 load(__mmask16 in, const float* from) {
  if (__builtin_constant_p(in) && in == 0xffff) return _mm512_loadu_ps(from);
  return _mm512_maskz_loadu_ps(in, from);
}

// Fills rows [begin, begin + 16) of `made` and of q: q = round((r - m) / a), a = max |r - m| / 127.
// The norms are taken in units of a, so that nothing underflows; of a row that is not finite they
// are not finite either, nor is its slack.
void quantise(const Codebook& codebook, const Rows& rows, int64_t begin, uint8_t* q,
              Scratch* scratch) {
  const int64_t dim = codebook.dim, end = rows.count - begin < 16 ? rows.count - begin : 16;
  Quantised& made = scratch->rows;
  __m512(*lanes)[16] = scratch->lanes;
  for (int64_t i = 0; i < end; ++i) {
    const float* row = rows.first + (begin + i) * rows.stride;
    __m512 top = _mm512_setzero_ps();
    for_lanes(dim, [&](__mmask16 in, int64_t d) {
      _mm_prefetch(row + kAhead * rows.stride + d, _MM_HINT_T0);
      top = _mm512_max_ps(
          _mm512_abs_ps(_mm512_sub_ps(load(in, row + d), load(in, codebook.mean + d))), top);
    });
    lanes[0][i] = top;
  }
  const __m512 zero = _mm512_setzero_ps(), most = _mm512_set1_ps(127);
  const __m512 greatest = join_lanes(lanes[0], Most{});
  const __mmask16 seen = _mm512_cmp_ps_mask(greatest, _mm512_set1_ps(kTiny), _CMP_NLT_UQ);
  const __m512 step = _mm512_maskz_div_ps(seen, greatest, most);
  _mm512_store_ps(made.step + begin, step);
  _mm512_store_ps(made.scale + begin, _mm512_maskz_div_ps(seen, most, greatest));
  const __m512 shift = _mm512_set1_ps(0x1.8p23f + 128);
  for (int64_t i = 0; i < end; ++i) {
    const float* row = rows.first + (begin + i) * rows.stride;
    uint8_t* to = q + (begin + i) * row_bytes(dim);
    const __m512 scale = _mm512_set1_ps(made.scale[begin + i]);
    __m512 loss = zero, length = zero;
    for_lanes(dim, [&](__mmask16 in, int64_t d) {
      const __m512 v = _mm512_sub_ps(load(in, row + d), load(in, codebook.mean + d));
      const __m512 shifted = _mm512_fmadd_ps(v, scale, shift);  // q + 128 is its lowest byte
      const __m512 whole = _mm512_sub_ps(shifted, shift);
      const __m512 lost = _mm512_fmsub_ps(v, scale, whole);
      loss = _mm512_fmadd_ps(lost, lost, loss);
      length = _mm512_fmadd_ps(whole, whole, length);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + d),
                       _mm512_cvtepi32_epi8(_mm512_castps_si512(shifted)));
    });
    lanes[0][i] = loss, lanes[1][i] = length;
  }
  const __m512 eps = _mm512_set1_ps(8 * kEps), more = _mm512_set1_ps(1.0f + 0x1p-8f);
  const __m512 rest = _mm512_sqrt_ps(join_lanes(lanes[0], Sum{}));
  const __m512 whole = _mm512_sqrt_ps(join_lanes(lanes[1], Sum{}));
  // ||dr||, with what float32 rounds away of r - m, of its quotient by a, and of the norms; a row
  // all below kTiny is all loss.
  const __m512 rounded = _mm512_mul_ps(eps, _mm512_add_ps(whole, rest));
  __m512 loss = _mm512_mul_ps(step, _mm512_fmadd_ps(rest, more, rounded));
  const __m512 root = _mm512_set1_ps(__builtin_sqrtf(static_cast<float>(dim)));
  loss = _mm512_mask_mul_ps(loss, static_cast<__mmask16>(~seen), root, greatest);
  const __m512 length = _mm512_mul_ps(_mm512_mul_ps(step, whole), more);
  _mm512_store_ps(
      made.error + begin,
      _mm512_mul_ps(_mm512_fmadd_ps(length, _mm512_set1_ps(codebook.ratio), loss), more));
  const __m512 size = _mm512_fmadd_ps(_mm512_add_ps(length, loss), _mm512_set1_ps(codebook.longest),
                                      _mm512_set1_ps(codebook.offset));
  const __m512 slack = _mm512_fmadd_ps(eps, size, _mm512_set1_ps(1e-36f));
  _mm512_store_ps(made.slack + begin, _mm512_add_ps(slack, slack));
}

// Adds four products of a row's bytes with a codeword's to each lane. Through the intrinsic, GCC
// copies every accumulator twice.
LIVREC_INLINE void add_products(__m512i* sums, __m512i row, __m512i codewords) {
  asm("vpdpbusd %2, %1, %0" : "+v"(*sums) : "v"(row), "v"(codewords));
}

template <int kRows>
LIVREC_INLINE void score_tile(const Codebook& codebook, int64_t first, const uint8_t* q,
                              int64_t row, Scratch* scratch) {
  const int64_t stride = row_bytes(codebook.dim);
  q += row * stride;
  const int64_t quads = quads_of(codebook.dim);
  const int8_t* panel = codebook.bytes + first * quads * 4;
  __m512i low[kRows], high[kRows];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    low[i] = _mm512_loadu_si512(codebook.starts + first);
    high[i] = _mm512_loadu_si512(codebook.starts + first + 16);
  }
  for (int64_t d = 0; d < quads; ++d) {
    const __m512i c0 = _mm512_loadu_si512(panel + d * kPanel * 4);
    const __m512i c1 = _mm512_loadu_si512(panel + d * kPanel * 4 + 64);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      int32_t four;
      __builtin_memcpy(&four, q + i * stride + d * 4, 4);
      const __m512i r = _mm512_set1_epi32(four);
      add_products(&low[i], r, c0);
      add_products(&high[i], r, c1);
    }
  }
  const __m512 step0 = _mm512_loadu_ps(codebook.steps + first);
  const __m512 step1 = _mm512_loadu_ps(codebook.steps + first + 16);
  const __m512 h0 = _mm512_loadu_ps(codebook.offsets + first);
  const __m512 h1 = _mm512_loadu_ps(codebook.offsets + first + 16);
  const __m512 n0 = _mm512_loadu_ps(codebook.lengths + first);
  const __m512 n1 = _mm512_loadu_ps(codebook.lengths + first + 16);
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    float* to = &scratch->chunk[row + i][first % kChunk];
    const __m512 a = _mm512_set1_ps(scratch->rows.step[row + i]);
    const __m512 s0 = _mm512_fmsub_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(low[i]), step0), a, h0);
    const __m512 s1 = _mm512_fmsub_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(high[i]), step1), a, h1);
    const __m512 error = _mm512_set1_ps(scratch->rows.error[row + i]);
    _mm512_store_ps(to, _mm512_fmadd_ps(error, n0, s0));
    _mm512_store_ps(to + 16, _mm512_fmadd_ps(error, n1, s1));
    const __m512 low_end =
        _mm512_max_ps(_mm512_fnmadd_ps(error, n0, s0), _mm512_fnmadd_ps(error, n1, s1));
    scratch->best[row + i] = _mm512_max_ps(low_end, scratch->best[row + i]);
  }
}

void score_chunk(const Codebook& codebook, int64_t begin, int64_t end, const uint8_t* q,
                 int64_t count, Scratch* scratch) {
  for (int64_t first = begin; first < end; first += kPanel) {
    int64_t i = 0;
    for (; i + kTileRows <= count; i += kTileRows)
      score_tile<kTileRows>(codebook, first, q, i, scratch);
    for (; i + 4 <= count; i += 4) score_tile<4>(codebook, first, q, i, scratch);
    for (; i < count; ++i) score_tile<1>(codebook, first, q, i, scratch);
  }
}

// Adds to the candidates those of the chunk [begin, end) whose upper bound reaches the greatest
// lower bound of their row so far. A row with too many, or without a bound, is given up.
void collect(int64_t begin, int64_t end, int64_t count, int32_t most, Scratch* scratch) {
  for (int64_t i = 0; i < count; i += 16)
    _mm512_store_ps(scratch->least + i, _mm512_sub_ps(join_lanes(scratch->best + i, Most{}),
                                                      _mm512_load_ps(scratch->rows.slack + i)));
  int64_t pairs = scratch->pairs;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t before = pairs;
    const __m512 bar = _mm512_set1_ps(scratch->least[i]);
    const __m512i row = _mm512_set1_epi32(static_cast<int32_t>(i));
    const __m512i lanes = (__m512i)lane_numbers();
    const auto take = [&](int64_t j) {
      const __m512 score = _mm512_load_ps(&scratch->chunk[i][j - begin]);
      const __mmask16 in = _mm512_cmp_ps_mask(score, bar, _CMP_GE_OQ);
      const __m512i code = _mm512_add_epi32(lanes, _mm512_set1_epi32(static_cast<int32_t>(j)));
      _mm512_storeu_si512(scratch->row + pairs, row);
      _mm512_storeu_si512(scratch->code + pairs, _mm512_maskz_compress_epi32(in, code));
      _mm512_storeu_ps(scratch->score + pairs, _mm512_maskz_compress_ps(in, score));
      pairs += __builtin_popcount(in);
    };
    int64_t j = begin;
    for (; j + 64 <= end; j += 64) {
      const float* score = &scratch->chunk[i][j - begin];
      const __m512 top =
          _mm512_max_ps(_mm512_max_ps(_mm512_load_ps(score), _mm512_load_ps(score + 16)),
                        _mm512_max_ps(_mm512_load_ps(score + 32), _mm512_load_ps(score + 48)));
      if (_mm512_cmp_ps_mask(top, bar, _CMP_GE_OQ) == 0) continue;
      take(j), take(j + 16), take(j + 32), take(j + 48);
    }
    for (; j < end; j += 16) take(j);
    scratch->found[i] += static_cast<int32_t>(pairs - before);
    if (!(scratch->least[i] > -kInfinity)) scratch->found[i] = most + 1;
    if (scratch->found[i] > most) pairs = before;
  }
  scratch->pairs = pairs;
}

// Keeps of the candidates those that the bounds by now allow, and counts them anew.
void sift(int64_t count, int32_t most, Scratch* scratch) {
  int32_t kept[kBlockRows] = {};
  int64_t pairs = 0;
  for (int64_t k = 0; k < scratch->pairs; ++k) {
    const int32_t i = scratch->row[k];
    const bool stays = scratch->score[k] >= scratch->least[i] && scratch->found[i] <= most;
    scratch->row[pairs] = i;
    scratch->code[pairs] = scratch->code[k];
    scratch->score[pairs] = scratch->score[k];
    pairs += stays;
    kept[i] += stays;
  }
  scratch->pairs = pairs;
  for (int64_t i = 0; i < count; ++i)
    if (scratch->found[i] <= most) scratch->found[i] = kept[i];
}

LIVREC_INLINE __m512 products(const float* row, const float* codeword, int64_t dim) {
  __m512 sum = _mm512_setzero_ps();
  for_lanes(dim, [&](__mmask16 in, int64_t d) {
    sum = _mm512_fmadd_ps(load(in, row + d), load(in, codeword + d), sum);
  });
  return sum;
}

// Greatest score first, then lowest code, as one number; NaNs come out on top of +inf, or at the
// bottom.
LIVREC_INLINE void keys_of(__m512 scores, __m512i codes, int64_t* keys) {
  const __m512i bits = _mm512_castps_si512(_mm512_add_ps(scores, _mm512_setzero_ps()));  // no -0
  const __m512i flip = _mm512_and_si512(_mm512_srai_epi32(bits, 31), _mm512_set1_epi32(0x7fffffff));
  const __m512i high = _mm512_xor_si512(bits, flip);
  const __m512i low = _mm512_sub_epi32(_mm512_set1_epi32(0x7fffffff), codes);
  for (int half = 0; half < 2; ++half) {
    const __m256i part = half ? _mm512_extracti64x4_epi64(high, 1) : _mm512_castsi512_si256(high);
    const __m256i rest = half ? _mm512_extracti64x4_epi64(low, 1) : _mm512_castsi512_si256(low);
    _mm512_store_si512(keys + 8 * half,
                       _mm512_or_si512(_mm512_slli_epi64(_mm512_cvtepi32_epi64(part), 32),
                                       _mm512_cvtepi32_epi64(rest)));
  }
}

// The nearest of each row's candidates by its float32 score; -1 where float32 cannot tell.
void settle(const Codebook& codebook, const Rows& rows, int32_t* codes, Scratch* scratch) {
  int64_t best[kBlockRows];
  for (int64_t i = 0; i < rows.count; ++i) best[i] = INT64_MIN;
  __m512* lanes = scratch->lanes[0];
  for (int64_t k = 0; k < scratch->pairs; k += 16) {
    const int64_t end = scratch->pairs - k < 16 ? scratch->pairs - k : 16;
    for (int64_t p = 0; p < end; ++p)
      lanes[p] = products(rows.first + scratch->row[k + p] * rows.stride,
                          codebook.codewords + scratch->code[k + p] * codebook.dim, codebook.dim);
    const __m512i code = _mm512_maskz_loadu_epi32(lanes_left(end), scratch->code + k);
    const __m512 norms = _mm512_i32gather_ps(code, codebook.half_norms, 4);
    alignas(64) int64_t keys[16];
    keys_of(_mm512_sub_ps(join_lanes(lanes, Sum{}), norms), code, keys);
    for (int64_t p = 0; p < end; ++p) {
      int64_t& top = best[scratch->row[k + p]];
      top = keys[p] > top ? keys[p] : top;
    }
  }
  for (int64_t i = 0; i < rows.count; ++i) {
    const int32_t high = static_cast<int32_t>(best[i] >> 32);
    const bool finite = high > -0x7f800001 && high < 0x7f800000;
    codes[i] = finite ? 0x7fffffff - static_cast<int32_t>(best[i] & 0x7fffffff) : -1;
  }
}

LIVREC_INLINE __m512d less_mean(const Codebook& codebook, const float* codeword, int64_t d) {
  const int64_t left = codebook.dim - d;
  const auto in = static_cast<__mmask8>(left >= 8 ? 0xff : (1u << left) - 1u);
  return _mm512_sub_pd(_mm512_cvtps_pd(_mm256_maskz_loadu_ps(in, codeword + d)),
                       _mm512_cvtps_pd(_mm256_maskz_loadu_ps(in, codebook.mean + d)));
}

// One codeword to bytes: k = round((c - m) / b), b = max |c - m| / 127, in double.
void pack_codeword(Codebook& codebook, int64_t j) {
  const int64_t quads = quads_of(codebook.dim), quad_bytes = kPanel * 4;
  const float* codeword = codebook.codewords + j * codebook.dim;
  int8_t* to = codebook.bytes + j / kPanel * quads * quad_bytes + j % kPanel * 4;
  __m512d most = _mm512_setzero_pd(), squares = _mm512_setzero_pd();
  for (int64_t d = 0; d < codebook.dim; d += 8) {
    const __m512d v = less_mean(codebook, codeword, d);
    most = _mm512_max_pd(_mm512_abs_pd(v), most);
    squares = _mm512_fmadd_pd(v, v, squares);
  }
  const double greatest = _mm512_reduce_max_pd(most), norm = _mm512_reduce_add_pd(squares);
  const bool tiny = !(greatest >= kTiny);
  const float step = tiny ? 0.0f : static_cast<float>(greatest / 127);
  const __m512d scale = _mm512_set1_pd(tiny ? 0.0 : 1 / static_cast<double>(step));
  const __m512d unit = _mm512_set1_pd(step);
  __m512d losses = _mm512_setzero_pd(), sums = _mm512_setzero_pd();
  for (int64_t d = 0; d < codebook.dim; d += 8, to += 2 * quad_bytes) {
    const __m512d v = less_mean(codebook, codeword, d);
    const __m256i k = _mm512_cvtpd_epi32(_mm512_mul_pd(v, scale));
    const __m512d whole = _mm512_cvtepi32_pd(k), rest = _mm512_fnmadd_pd(unit, whole, v);
    losses = _mm512_fmadd_pd(rest, rest, losses);
    sums = _mm512_add_pd(sums, whole);
    alignas(16) char eight[16];
    _mm_store_si128(reinterpret_cast<__m128i*>(eight), _mm256_cvtepi32_epi8(k));
    __builtin_memcpy(to, eight, 4);
    if (d / 4 + 1 < quads) __builtin_memcpy(to + quad_bytes, eight + 4, 4);
  }
  const double lost = _mm512_reduce_add_pd(losses);
  const auto sum = static_cast<int32_t>(_mm512_reduce_add_pd(sums));
  codebook.starts[j] = -128 * sum;
  const double penalty = codebook.penalty ? codebook.penalty[j] : 0.0;
  codebook.steps[j] = step;
  codebook.offsets[j] = static_cast<float>((norm + penalty) / 2);
  // A codeword all below kTiny is all loss, and 256 times its length makes up for it.
  const float length = static_cast<float>(__builtin_sqrt(norm) * (tiny ? 256 : 1 + 1e-6));
  const float ratio = tiny ? 0.0f : static_cast<float>(__builtin_sqrt(lost / norm) * (1 + 1e-6));
  codebook.lengths[j] = length;
  if (!(length <= codebook.longest)) codebook.longest = length;
  if (!(ratio <= codebook.ratio)) codebook.ratio = ratio;
  const float size = static_cast<float>(penalty < 0 ? (norm - penalty) / 2 : (norm + penalty) / 2);
  if (size < kInfinity && size > codebook.offset) codebook.offset = size;
}

}  // namespace

int64_t bytes_memory(int64_t size, int64_t dim) {
  return panels_of(size) * kPanel * (quads_of(dim) * 4 + 16) + dim * 4;
}

int64_t bytes_scratch(int64_t dim) {
  return static_cast<int64_t>(sizeof(Scratch)) + kBlockRows * (row_bytes(dim) + dim * 4);
}

void pack_bytes(Codebook& codebook, void* memory) {
  const int64_t size = codebook.size, dim = codebook.dim, padded = panels_of(size) * kPanel;
  codebook.in_bytes = dim >= 16 && dim <= 16384 && size >= 16;
  if (!codebook.in_bytes) return;
  codebook.bytes = static_cast<int8_t*>(memory);
  codebook.steps = reinterpret_cast<float*>(codebook.bytes + padded * quads_of(dim) * 4);
  codebook.offsets = codebook.steps + padded;
  codebook.lengths = codebook.offsets + padded;
  codebook.starts = reinterpret_cast<int32_t*>(codebook.lengths + padded);
  codebook.mean = reinterpret_cast<float*>(codebook.starts + padded);
  for (int64_t d = 0; d < dim; ++d) codebook.mean[d] = 0;
  for (int64_t j = 0; j < size; ++j)
    for (int64_t d = 0; d < dim; ++d) codebook.mean[d] += codebook.codewords[j * dim + d];
  for (int64_t d = 0; d < dim; ++d) {
    codebook.mean[d] /= static_cast<float>(size);                   // any vector near them serves
    codebook.in_bytes &= codebook.mean[d] - codebook.mean[d] == 0;  // no NaN, no infinity
  }
  if (!codebook.in_bytes) return;
  __builtin_memset(codebook.bytes, 0, static_cast<size_t>(padded * quads_of(dim) * 4));
  codebook.longest = codebook.offset = 0;
  codebook.ratio = 0x1p-8f;
  for (int64_t j = 0; j < size; ++j) pack_codeword(codebook, j);
  for (int64_t j = size; j < padded; ++j) {
    codebook.starts[j] = 0, codebook.steps[j] = codebook.lengths[j] = 0;
    codebook.offsets[j] = kInfinity;
  }
  codebook.in_bytes = codebook.longest < kInfinity;  // false for a NaN, too
}

Rows nearest_in_bytes(const Codebook& codebook, const Rows& rows, int32_t* codes, int32_t* left,
                      void* memory) {
  Scratch* scratch = static_cast<Scratch*>(memory);
  float* hard = reinterpret_cast<float*>(scratch + 1);
  uint8_t* q = reinterpret_cast<uint8_t*>(hard + kBlockRows * codebook.dim);
  for (int64_t i = 0; i < rows.count; i += 16) quantise(codebook, rows, i, q, scratch);
  for (int64_t i = 0; i < rows.count; ++i)
    scratch->best[i] = _mm512_set1_ps(-kInfinity), scratch->found[i] = 0;
  scratch->pairs = 0;
  const int32_t most = most_candidates(codebook.size);
  for (int64_t begin = 0; begin < codebook.size; begin += kChunk) {
    const int64_t end = begin + kChunk < codebook.size ? begin + kChunk : codebook.size;
    score_chunk(codebook, begin, end, q, rows.count, scratch);
    collect(begin, end, rows.count, most, scratch);
    if (begin > 0) sift(rows.count, most, scratch);
  }
  settle(codebook, rows, codes, scratch);
  int64_t hard_rows = 0;
  for (int64_t i = 0; i < rows.count; ++i) {
    if (codes[i] >= 0 && scratch->found[i] <= most) continue;
    __builtin_memcpy(hard + hard_rows * codebook.dim, rows.first + i * rows.stride,
                     static_cast<size_t>(codebook.dim) * 4);
    left[hard_rows++] = static_cast<int32_t>(i);
  }
  return Rows{hard, codebook.dim, hard_rows};
}

#endif

}  // namespace LIVREC_ISA
}  // namespace livrec
