"""False negatives by the cosine of their queries, as bits.

Every pair of blocks is multiplied with the earlier block on the left, whichever of the two is asked
for: a pair's cosine then has the same bits for both of its rows, and in both passes. Vectors are
multiplied as they are, 16 bits exactly, and divided by their lengths after.

Where bits are not kept, or too many, they are found anew for a strip of rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._code_rows import DTYPES, with_dtypes
from ._contrastive_tiles import MOST_ROWS
from ._contrastive_units import norms_of

MOST_BITS = 2**28  # 32 MiB of a strip
_TILE = {"BLOCK": 64}
_OPTIONS = {"num_warps": 8, "num_stages": 2}


@triton.jit
def _vectors_at(x, first, count, start, D: tl.constexpr, BLOCK: tl.constexpr, PART: tl.constexpr):
    """Return a block's columns from `start` on."""
    rows, dims = first + tl.arange(0, BLOCK), start + tl.arange(0, PART)
    inside = (rows < count)[:, None] & (dims < D)[None, :]
    at = x + rows.to(tl.int64)[:, None] * D + dims[None, :]
    return tl.load(at, mask=inside, other=0.0)


@triton.jit
def _lengths_at(norms, first, count, BLOCK: tl.constexpr):
    """Return what cosines are divided by, for each row of a block."""
    rows = first + tl.arange(0, BLOCK)
    length = tl.load(norms + rows, mask=rows < count, other=1.0)
    return tl.where(length == 0, 1e-12, length)


@triton.jit
def _write_bits(pairs, similar, row, column, first, last, count, words, BLOCK: tl.constexpr):
    """Write the bits of a block of rows that lies within the strip from `first` to `last`."""
    rows, columns = row + tl.arange(0, BLOCK), tl.arange(0, BLOCK)
    similar &= (column + columns < count)[None, :]
    word = tl.sum(similar.to(tl.int64) << columns.to(tl.int64)[None, :], 1)
    at = pairs + (rows - first).to(tl.int64) * words + column // BLOCK
    tl.store(at, word, mask=(rows >= first) & (rows < last))


@triton.jit(do_not_specialize=["count", "first", "last", "words", "threshold"])
def _find_pairs(
    x, norms, pairs, count, first, last, words, threshold, D: tl.constexpr, BLOCK: tl.constexpr,
    PART: tl.constexpr,
):  # fmt: skip
    """Find which rows of x [count, D] resemble those of the strip, one block with one block.

    pairs [last - first, words]; `first` is a multiple of the block.
    """
    row = first + tl.program_id(0) // words * BLOCK
    column = tl.program_id(0) % words * BLOCK
    # The other way round is another program's, if it is in the strip: one of the two does both.
    if (column >= row) | (column < first):
        low, high = tl.minimum(row, column), tl.maximum(row, column)
        total = tl.zeros((BLOCK, BLOCK), tl.float32)
        for start in range(0, D, PART):
            a = _vectors_at(x, low, count, start, D, BLOCK, PART)
            b = _vectors_at(x, high, count, start, D, BLOCK, PART)
            total = tl.dot(a, tl.trans(b), total, input_precision="tf32x3")
        total = tl.div_rn(total, _lengths_at(norms, low, count, BLOCK)[:, None])
        total = tl.div_rn(total, _lengths_at(norms, high, count, BLOCK)[None, :])
        similar = total > threshold
        turned = tl.trans(similar.to(tl.int8)) != 0
        if row == column:
            similar = similar | turned
            turned = similar
        _write_bits(pairs, similar, low, high, first, last, count, words, BLOCK)
        _write_bits(pairs, turned, high, low, first, last, count, words, BLOCK)


def _part(dim: int, dtype: torch.dtype) -> int:
    most = 32 if dtype == torch.float32 else 64  # float32 meets tensor cores from registers
    return min(most, max(16, triton.next_power_of_2(dim)))


def words_of(count: int) -> int:
    """Return how many words hold a row's bits."""
    return triton.cdiv(count, _TILE["BLOCK"])


def find_pairs(
    x: Tensor, norms: Tensor, threshold: float, first: int, last: int, out: Tensor | None = None
) -> Tensor:
    """Return bits of the rows from `first` on, before `last`: int64 [last - first, words]."""
    words = words_of(len(x))
    if out is None:
        out = torch.empty((last - first, words), dtype=torch.int64, device=x.device)
    if out.numel():
        _find_pairs[(triton.cdiv(last - first, _TILE["BLOCK"]) * words,)](
            x, norms, out, len(x), first, last, words, threshold, x.shape[1],
            PART=_part(x.shape[1], x.dtype), **_TILE, **_OPTIONS,
        )  # fmt: skip
    return out


class Pairs:
    """Where the bits of false negatives come from: kept ones, or vectors to find them from."""

    def __init__(self, vectors: Tensor | None, threshold: float | None, kept: Tensor | None):
        """Take vectors [B, P] or [B + E, P]; kept: int64 [B, words], or None."""
        self.vectors, self.threshold, self.kept = vectors, threshold, kept
        self.norms = None
        if threshold is not None and kept is None:
            self.norms = norms_of(vectors)

    def strips(self, rows: int) -> Iterator[tuple[int, int, Tensor | None]]:
        """Yield the first and the last of some rows, and their bits as int32, or None for none.

        Strips cover all of `rows`, which may be more than there are bits of.
        """
        if self.vectors is None or self.threshold is None:
            yield 0, rows, None
            return
        count = len(self.vectors)
        if self.kept is not None and min(rows, count) <= len(self.kept):
            yield 0, rows, self.kept.view(torch.int32)
            return
        norms = norms_of(self.vectors) if self.norms is None else self.norms
        at_once = max(MOST_ROWS, MOST_BITS // max(count, 1) // MOST_ROWS * MOST_ROWS)
        for first in range(0, rows, at_once):
            last = min(first + at_once, rows)
            bits = find_pairs(
                self.vectors, norms, self.threshold, first, max(first, min(last, count))
            )
            yield first, last, bits.view(torch.int32)


def compile_configs() -> Iterator[tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """Yield launches as those above compile: kernel, argument types, constants, options.

    A type ending in ":16" is known to be divisible by 16. "matrix": tensor cores are meant.
    """
    types = {**dict.fromkeys(("count", "first", "last", "words"), "i32"), "threshold": "fp32"}
    types |= {"norms": "*fp32:16", "pairs": "*i64:16"}
    for dtype, dim in with_dtypes((10, 64, 100, 256)):
        constants = {**_TILE, "D": dim, "PART": _part(dim, dtype)}
        yield _find_pairs, {**types, "x": DTYPES[dtype]}, constants, {**_OPTIONS, "matrix": True}
