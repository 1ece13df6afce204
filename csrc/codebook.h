// The nearest codeword of a row: what residual k-means, its fit and its details share.
//
// ||r - c||^2 is least where  s = r.c - ||c||^2 / 2  is greatest, so the greatest s is sought: one
// multiply-add per element, and ||r||^2 is never formed. A penalty p of a codeword takes p / 2 from
// its s. Ties go to the lowest code.
//
// Two ways to the same codes:
//
// In float32. Codewords lie repacked in panels of kPanel, [panel][d][codeword], so that the inner
// loop reads them in order; a tile of rows meets a panel in registers. Sums run over d = 0, 1, ...,
// D-1 for every row, whatever the block or the thread: codes depend on neither.
//
// In bytes, where the processor multiplies bytes four times as fast (AVX-512 VNNI). Rows and
// codewords, both less the codebook's mean m, are rounded to bytes: r - m = a q + dr,
// c - m = b k + dc. Then s and a b q.k - h (h: ||c - m||^2 / 2 and the penalty) differ, but for
// what is common to all codewords, by at most
//
//   E = ||dr|| ||c - m|| + ||a q|| ||dc||  +  the rounding of float32,
//
// where ||dr|| and ||dc|| are the norms of the roundings that were really made. A codeword whose
// score plus E stays below another's score less its E cannot be the nearest; the few others are
// settled in float32. So codes obey the rule of float32 (see residual_kmeans_encode's docstring),
// whatever the data: bad data only leave more to settle, and rows that leave too much take the
// first way.
#pragma once

#include <cstdint>

#include "isa.h"

namespace livrec {

struct Codebook {
  const float* codewords;  // [size, dim], contiguous
  const float* penalty;    // [size], finite or +inf, or null
  int64_t size, dim;

  // Filled by codebook_pack, in memory that it is given.
  float* panels;      // [panels, dim, kPanel]
  float* half_norms;  // [panels * kPanel]: ||c||^2 / 2 and penalty / 2; +inf past size
  bool in_bytes;      // whether what follows is there
  float* mean;        // [dim]
  int8_t* bytes;      // [panels, quads, kPanel, 4]: k, quads of dims filled up with 0
  int32_t* starts;    // [panels * kPanel]: -128 sum k, as rows come as q + 128
  float* steps;       // [panels * kPanel]: b
  float* offsets;     // [panels * kPanel]: h; +inf past size
  float* lengths;     // [panels * kPanel]: ||c - m||
  float longest;      // the greatest ||c - m||
  float ratio;        // the greatest ||dc|| / ||c - m||
  float offset;       // the greatest finite h
};

// Rows that are searched together: at most kBlockRows of them.
constexpr int64_t kBlockRows = 48;

enum class Float : int { f32, f16, bf16 };

struct Rows {
  const float* first;  // unit stride along dim
  int64_t stride;      // elements from row to row
  int64_t count;
};

// Bytes of memory for a codebook, and filling it; `memory` is aligned to 64 bytes.
LIVREC_DECLARE_VNNI(int64_t, codebook_bytes, (int64_t size, int64_t dim))
LIVREC_DECLARE_VNNI(void, codebook_pack, (Codebook & codebook, void* memory))

// Bytes of scratch for a search, aligned to 64 bytes.
LIVREC_DECLARE_VNNI(int64_t, codebook_scratch, (int64_t dim))

// The nearest codewords of a block of rows. Returns the first row that has none (a NaN, an
// infinity, or products past float32's range; its code is 0), or -1.
LIVREC_DECLARE_VNNI(int64_t, codebook_nearest,
                    (const Codebook& codebook, const Rows& rows, int32_t* codes, void* scratch))

// The nearest codeword as codebook_nearest finds it, the nearest of the others, and how much larger
// the second's squared distance is; where there is but one codeword, code 0 and +inf. Returns as
// codebook_nearest.
LIVREC_DECLARE_VNNI(int64_t, codebook_two_nearest,
                    (const Codebook& codebook, const Rows& rows, int32_t* codes, int32_t* second,
                     float* gaps, void* scratch))

}  // namespace livrec
