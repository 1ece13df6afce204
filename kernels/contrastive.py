"""The contrastive loss in Triton: logits tile by tile on tensor cores, none of them stored.

A block of queries meets all keys in tiles, and keeps the greatest logit and the sum of exponentials
less it; where the loss is symmetric, a block of keys likewise meets all queries. Few blocks are cut
into runs of keys for programs of their own, put together in order. The own positive is left out of
tiles and added at the end, in float64, so that small losses keep their digits.

Floors. Products: 2 B (B + E) D operations, and 2 B^2 D more where it is symmetric; three times as
many TF32 ones for float32. False negatives: B^2 D more, once for both passes where bits are kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._code_tiles import finite
from ._contrastive_call import Call
from ._contrastive_pairs import Pairs, find_pairs, words_of
from ._contrastive_tiles import (
    LN_2,
    SIZES,
    Side,
    Tile,
    configs_of,
    inverse_of,
    is_new,
    logits_of,
    masks_of,
    own_products,
    products_of,
    scales_of,
    splits_of,
    tile_of,
    units_at,
)
from ._contrastive_units import SMALL, SMALL_OPTIONS, norms_of, small


@triton.jit(do_not_specialize=SIZES)
def _sum_terms(
    own, others, other_bias, temperature, peaks, sums, pulls, rivals, query_ids, key_ids, group_ids,
    pairs, strip, rows, words, query_count, key_count, group_count, own_count, others_count, splits,
    EVERY_QUERY: tl.constexpr, EVERY_KEY: tl.constexpr, EVERY_GROUP: tl.constexpr,
    ROWS: tl.constexpr, OTHERS: tl.constexpr, STRIDE: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Sum the exponentials of a block's logits with a run of the other side, but for the own pairs.

    peaks, sums [splits, own]: the greatest logit, and the sum less it, in base 2. With groups also
    pulls, the sum of positives' logits, and rivals, the greatest logit of negatives.
    """
    split = tl.program_id(0) % splits
    own_first = strip + tl.program_id(0) // splits * ROWS
    scale, rest = scales_of(temperature)
    tiles = tl.cdiv(others_count, OTHERS)
    low, high = tiles * split // splits * OTHERS, tiles * (split + 1) // splits * OTHERS
    tile = units_at(own, own_first, ROWS, STRIDE, PART)
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    pull = tl.zeros((ROWS,), tl.float32)
    rival = tl.full((ROWS,), float("-inf"), tl.float32)
    for first in range(low, high, OTHERS):
        products = products_of(tile, own, own_first, others, first, ROWS, OTHERS, STRIDE, PART)
        bias = tl.load(other_bias + first + tl.arange(0, OTHERS))[None, :]
        hidden, positive = masks_of(
            query_ids, key_ids, group_ids, pairs, strip, own_first, first, words, rows,
            query_count, key_count, group_count, ROWS, OTHERS, EVERY_QUERY, EVERY_KEY, EVERY_GROUP,
        )  # fmt: skip
        products = tl.where(hidden, float("-inf"), products)
        score = tl.fma(products, scale, bias)
        top = tl.maximum(peak, tl.max(score, 1))
        shift = finite(top)
        terms = tl.exp2(logits_of(products, scale, rest, 0.0 - shift[:, None], bias))
        total = total * tl.exp2(peak - shift) + tl.sum(terms, 1)
        peak = top
        if group_ids is not None:
            rival = tl.maximum(rival, tl.max(tl.where(positive, float("-inf"), score), 1))
            there = bias != float("-inf")
            pull += tl.sum(tl.where(positive & there, score, 0.0), 1)
    row = own_first + tl.arange(0, ROWS)
    at = tl.cast(split, tl.int64) * own_count + row
    tl.store(peaks + at, peak, mask=row < own_count)
    tl.store(sums + at, total, mask=row < own_count)
    if group_ids is not None:
        tl.store(pulls + at, pull, mask=row < own_count)
        tl.store(rivals + at, rival, mask=row < own_count)


@triton.jit
def _softplus(x):
    """Return log(1 + exp(x)) with all its digits, in float64."""
    small = tl.exp(-tl.abs(x))
    more = 1.0 + small
    rounded = tl.where(more == 1.0, 1.0, more - 1.0)  # what is left of `small`
    return tl.where(x > 0, x, 0.0) + tl.where(more == 1.0, small, tl.log(more) * (small / rounded))


@triton.jit
def _loss_of(
    own, peaks, sums, pulls, rivals, shares, row, there, count, splits, GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Put runs together: return losses and logsumexps, the latter inf where groups leave nothing.

    own: the logits of own pairs, in natural units.
    """
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    pull = tl.zeros((ROWS,), tl.float64)
    rival = tl.full((ROWS,), float("-inf"), tl.float32)
    for split in range(0, splits):
        at = tl.cast(split, tl.int64) * count + row
        peak_of = tl.load(peaks + at, mask=there, other=float("-inf"))
        top = tl.maximum(peak, peak_of)
        shift = finite(top)
        more = tl.load(sums + at, mask=there, other=0.0)
        total = total * tl.exp2(peak - shift) + more * tl.exp2(peak_of - shift)
        peak = top
        if GROUPS:
            pull += tl.load(pulls + at, mask=there, other=0.0).to(tl.float64) * LN_2
            rival = tl.maximum(rival, tl.load(rivals + at, mask=there, other=float("-inf")))
    dead = total == 0  # a NaN is not
    rest = peak.to(tl.float64) * LN_2 + tl.log(tl.where(dead, 1.0, total).to(tl.float64))
    above = tl.where(dead, 0.0, _softplus(rest - own))
    loss, lse = above, own + above
    if GROUPS:
        share = tl.load(shares + row, mask=there, other=1.0).to(tl.float64)
        none = (rival == float("-inf")) & (total == total)  # a NaN is one
        loss = tl.where(share == 1.0, above, lse - (own + pull) * share)
        loss = tl.where(none, 0.0, loss)
        lse = tl.where(none, float("inf"), lse)
    return loss, lse


@triton.jit(do_not_specialize=["count", "splits", "column_splits"])
def _finish_losses(
    queries, keys, bias, valid, temperature, shares, peaks, sums, pulls, rivals, column_shares,
    column_peaks, column_sums, column_pulls, column_rivals, losses, lse, count, splits,
    column_splits, SYMMETRIC: tl.constexpr, GROUPS: tl.constexpr, STRIDE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write losses [count] and logsumexps [1 or 2, count], those of columns after those of rows."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < count
    there = inside
    if valid is not None:
        there &= tl.load(valid + row, mask=there, other=0) != 0
    scaled = own_products(queries, keys, row, there, STRIDE, ROWS, COLUMNS)
    scaled *= inverse_of(temperature)
    own = scaled + tl.load(bias + row, mask=there, other=0.0).to(tl.float64) * LN_2
    loss, sum_of = _loss_of(
        own, peaks, sums, pulls, rivals, shares, row, there, count, splits, GROUPS, ROWS
    )
    tl.store(lse + row, tl.where(there, sum_of, 0.0), mask=inside)
    if SYMMETRIC:
        other, sum_of = _loss_of(
            scaled, column_peaks, column_sums, column_pulls, column_rivals, column_shares, row,
            there, count, column_splits, GROUPS, ROWS,
        )  # fmt: skip
        tl.store(lse + count + row, tl.where(there, sum_of, 0.0), mask=inside)
        loss = (loss + other) / 2
    tl.store(losses + row, tl.where(there, loss, 0.0).to(tl.float32), mask=inside)


_TILES: dict[tuple[int, bool, bool], dict[int, Tile]] = {  # by bytes of a number, chip, groups
    (4, False, False): {256: (64, 32, 4, 2)},
    (4, False, True): {256: (64, 32, 4, 2)},
    (4, True, False): {256: (128, 64, 8, 2)},
    (4, True, True): {256: (128, 32, 8, 2)},
    (2, False, False): {256: (64, 64, 4, 3)},
    (2, False, True): {256: (64, 32, 4, 3)},
    (2, True, False): {128: (128, 128, 8, 3), 256: (128, 64, 8, 3)},
    (2, True, True): {128: (128, 64, 8, 3), 256: (128, 32, 8, 3)},
}


def _plan(
    stride: int, dtype: torch.dtype, new: bool, groups: bool
) -> tuple[dict[str, int], dict[str, int]]:
    return tile_of(stride, dtype, _TILES[dtype.itemsize, new, groups])


def _sums(
    own: Side, others: Side, own_count: int, pairs: Pairs, call: Call
) -> tuple[list[Tensor | None], int]:
    """Return what `_sum_terms` leaves, and in how many runs."""
    device, groups = own.units.device, call.group_ids is not None
    tile, options = _plan(own.units.shape[1], own.units.dtype, is_new(own.units), groups)
    splits, kept = 0, []
    for first, last, bits in pairs.strips(own_count):
        if not kept:
            splits = splits_of(last, others.count, tile["ROWS"])
            shape = (4 if groups else 2, splits, own_count)
            kept = [*torch.empty(shape, dtype=torch.float32, device=device)]
        masks = replace(call.masks, pairs=bits, strip=first)
        given = masks.arguments(own_count, others.count)
        _sum_terms[(triton.cdiv(last - first, tile["ROWS"]) * splits,)](
            own.units, others.units, others.bias, call.temperature, *kept,
            *[None] * (4 - len(kept)), own_count=own_count, others_count=others.count,
            splits=splits, **given, **tile, **options,
        )  # fmt: skip
    return [*kept, *[None] * (4 - len(kept))], splits


def in_batch_contrastive(
    *, keep_pairs: bool, log_q_rule: str = "standard", **given: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what torch's operator `livrec::in_batch_contrastive` does, but for unlike lse's.

    The host is not asked. Where groups leave a row no negative, its lse is inf.
    """
    call = Call(**given)
    query, batch, threshold = call.query, len(call.query), call.false_negative_threshold
    losses = query.new_empty(batch, dtype=torch.float32)
    lse = query.new_empty((2 if call.symmetric else 1, batch), dtype=torch.float64)
    keeps = keep_pairs and threshold is not None
    shape = (batch, words_of(len(call.pair_rows))) if keeps else (0, 0)
    bits = query.new_empty(shape, dtype=torch.int64)
    if not batch:
        return losses, lse, bits
    with torch.cuda.device_of(query):
        if keeps and threshold is not None:
            find_pairs(call.pair_rows, norms_of(call.pair_rows), threshold, 0, batch, bits)
        pairs = Pairs(call.pair_rows, threshold, bits if keeps else None)
        queries, keys = call.sides()
        of_rows, splits = _sums(queries, keys, batch, pairs, call)
        of_columns, column_splits = of_rows, splits
        if call.symmetric:
            of_columns, column_splits = _sums(keys, queries, batch, pairs, call)
        shares, column_shares = call.shares
        _finish_losses[(triton.cdiv(batch, small()["ROWS"]),)](
            queries.units, keys.units, keys.bias, call.valid, call.temperature, shares, *of_rows,
            column_shares, *of_columns, losses, lse, batch, splits, column_splits, call.symmetric,
            call.group_ids is not None, queries.units.shape[1], **small(), **SMALL_OPTIONS,
        )  # fmt: skip
    return losses, lse, bits


def compile_configs() -> Iterator[tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """Yield launches as those above compile: kernel, argument types, constants, options.

    A type ending in ":16" is known to be divisible by 16. "matrix": tensor cores are meant.
    """
    sides = ("peaks", "sums", "pulls", "rivals", "shares")
    floats = dict.fromkeys((*sides, *(f"column_{name}" for name in sides)), "*fp32:16")
    floats |= {"valid": "*i1", "losses": "*fp32:16", "lse": "*fp64:16", "column_splits": "i32"}
    floats |= dict.fromkeys(("other_bias", "bias"), "*fp32:16")
    for dtype, stride, new, types, constants in configs_of():
        groups = "group_ids" not in constants
        tile, options = _plan(stride, dtype, new, groups)
        options |= {"matrix": True, "oldest": 90 if new else 80}
        yield _sum_terms, {**types, **floats}, {**constants, **tile}, options
        if not new:
            continue
        own = {**types, **floats, "queries": types["own"], "keys": types["own"]}
        shape = {"SYMMETRIC": True, "GROUPS": groups, "STRIDE": stride}
        yield _finish_losses, own, {**shape, **SMALL}, {**SMALL_OPTIONS, "matrix": False}
