"""Scores of codewords on tensor cores, and the contest for the best: what kernels share.

Products are of bfloat16, which tensor cores multiply exactly and add in float32. A float32 is split
into the bfloat16 nearest to it, that nearest to the rest, and so on: two parts leave 2^-18 of it,
three 2^-27. Of their products those are added that are larger than what the split leaves. Three, of
two parts, err by 3 * 2^-18 |r||c| at most, which the op's rule for codes, 4 (D + 1) 2^-23, allows
from D = 32 on; with the fourth, low times low, whole numbers below 2^16 are exact. Six, of three
parts, err by less than float32 itself.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def split(value):
    """Split float32 into three bfloat16 that add up to it but for 2^-27 of it."""
    high = value.to(tl.bfloat16)
    rest = value - high.to(tl.float32)
    low = rest.to(tl.bfloat16)
    return high, low, (rest - low.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def add_products(
    score, high, low, lowest, tile, part, PRODUCTS: tl.constexpr, EXACT: tl.constexpr
):  # fmt: skip
    """Add rows times codewords, small products first. EXACT: `high` is all there is of the rows."""
    big = tl.load(tile)
    small = tl.load(tile + part)
    if PRODUCTS == 6:
        score = tl.dot(high, tl.load(tile + 2 * part), score)
        if not EXACT:
            score = tl.dot(lowest, big, score)
    if PRODUCTS >= 4 and not EXACT:
        score = tl.dot(low, small, score)
    score = tl.dot(high, small, score)
    if not EXACT:
        score = tl.dot(low, big, score)
    return tl.dot(high, big, score)


@triton.jit
def contend(score, first, best, code, next_best, next_code, SECOND: tl.constexpr):
    """Let a tile of scores contend: only a greater one wins, the lowest code of those that tie.

    A NaN wins nowhere, nor does -inf, the score of lanes past the codebook: codes stay in range.
    """
    lanes = tl.arange(0, score.shape[1])[None, :]
    top = tl.max(score, 1)
    lane = tl.min(tl.where(score == top[:, None], lanes, score.shape[1]), 1)
    wins = top > best
    if SECOND:  # the loser of the two firsts contends with the second of the winner's side
        score = tl.where(lanes == lane[:, None], float("-inf"), score)
        runner = tl.max(score, 1)
        at = tl.min(tl.where(score == runner[:, None], lanes, score.shape[1]), 1)
        old = tl.where(wins, best, next_best)
        old_code = tl.where(wins, code, next_code)
        new = tl.where(wins, runner, top)
        new_code = first + tl.where(wins, at, lane)
        next_best = tl.where(new > old, new, old)
        next_code = tl.where(new > old, new_code, old_code)
    return tl.where(wins, top, best), tl.where(wins, first + lane, code), next_best, next_code
