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
from ._contrastive_losses import finish
from ._contrastive_pairs import Pairs, find_pairs, words_of
from ._contrastive_tiles import (
    SIZES,
    Side,
    Tile,
    configs_of,
    is_new,
    logits_of,
    masks_of,
    products_of,
    scales_of,
    splits_of,
    tile_of,
    units_at,
)
from ._contrastive_units import norms_of


@triton.jit(do_not_specialize=SIZES)
def _sum_terms(
    own, others, other_bias, temperature, peaks, sums, pulls, rivals, counts, query_ids, key_ids,
    group_ids, pairs, strip, rows, words, query_count, key_count, group_count, own_count,
    others_count, splits, EVERY_QUERY: tl.constexpr, EVERY_KEY: tl.constexpr,
    EVERY_GROUP: tl.constexpr, ROWS: tl.constexpr, OTHERS: tl.constexpr, STRIDE: tl.constexpr,
    PART: tl.constexpr,
):  # fmt: skip
    """Sum the exponentials of a block's logits with a run of the other side, but for the own pairs.

    peaks, sums [splits, own]: the greatest logit, and the sum less it, in base 2. With groups also
    pulls, the sum of positives' logits, and rivals, the greatest logit of negatives. counts: how
    many negatives there are, where that is asked.
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
    negatives = tl.zeros((ROWS,), tl.int32)
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
        if counts is not None:
            negatives += tl.sum((score != float("-inf")).to(tl.int32), 1)
    row = own_first + tl.arange(0, ROWS)
    at = tl.cast(split, tl.int64) * own_count + row
    tl.store(peaks + at, peak, mask=row < own_count)
    tl.store(sums + at, total, mask=row < own_count)
    if group_ids is not None:
        tl.store(pulls + at, pull, mask=row < own_count)
        tl.store(rivals + at, rival, mask=row < own_count)
    if counts is not None:
        tl.store(counts + at, negatives.to(tl.float32), mask=row < own_count)


_TILES: dict[
    tuple[int, bool, bool], dict[int, Tile]
] = {  # by bytes of a number, chip, groups or counts
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
    stride: int, dtype: torch.dtype, new: bool, more: bool
) -> tuple[dict[str, int], dict[str, int]]:
    """Return the tile and launch options; more: registers have groups, or counts, to hold."""
    return tile_of(stride, dtype, _TILES[dtype.itemsize, new, more])


def _sums(
    own: Side, others: Side, own_count: int, pairs: Pairs, call: Call, counted: bool
) -> tuple[list[Tensor | None], int]:
    """Return what `_sum_terms` leaves, and in how many runs."""
    device, groups = own.units.device, call.group_ids is not None
    wanted = [True, True, groups, groups, counted]
    more = groups or counted
    tile, options = _plan(own.units.shape[1], own.units.dtype, is_new(own.units), more)
    splits, kept = 0, list[Tensor | None]()
    for first, last, bits in pairs.strips(own_count):
        if not kept:
            splits = splits_of(last, others.count, tile["ROWS"])
            shape = (sum(wanted), splits, own_count)
            held = iter(torch.empty(shape, dtype=torch.float32, device=device))
            kept = [next(held) if want else None for want in wanted]
        masks = replace(call.masks, pairs=bits, strip=first)
        given = masks.arguments(own_count, others.count)
        _sum_terms[(triton.cdiv(last - first, tile["ROWS"]) * splits,)](
            own.units, others.units, others.bias, call.temperature, *kept,
            own_count=own_count, others_count=others.count, splits=splits, **given, **tile,
            **options,
        )  # fmt: skip
    return kept, splits


def in_batch_contrastive(*, keep_pairs: bool, **given: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return what torch's operator `livrec::in_batch_contrastive` does, but for unlike lse's.

    The host is not asked. Where groups leave a row no negative, its lse is inf, as it is where an
    unsampled positive has none.
    """
    call = Call(**given)
    query, batch, threshold = call.query, len(call.query), call.false_negative_threshold
    keeps = keep_pairs and threshold is not None
    shape = (batch, words_of(len(call.pair_rows))) if keeps else (0, 0)
    bits = query.new_empty(shape, dtype=torch.int64)
    if not batch:
        wide = query.new_empty((call.kept_sums, 0), dtype=torch.float64)
        return query.new_empty(0, dtype=torch.float32), wide, bits
    with torch.cuda.device_of(query):
        if keeps and threshold is not None:
            find_pairs(call.pair_rows, norms_of(call.pair_rows), threshold, 0, batch, bits)
        pairs = Pairs(call.pair_rows, threshold, bits if keeps else None)
        queries, keys = call.sides()
        of_rows, splits = _sums(queries, keys, batch, pairs, call, call.unsampled)
        of_columns, column_splits = of_rows, splits
        if call.symmetric:
            of_columns, column_splits = _sums(keys, queries, batch, pairs, call, False)
        sums = of_rows, splits, of_columns, column_splits
        return *finish(queries, keys, call, *sums), bits


def compile_configs() -> Iterator[tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """Yield launches as those above compile: kernel, argument types, constants, options.

    A type ending in ":16" is known to be divisible by 16. "matrix": tensor cores are meant.
    """
    names = ("peaks", "sums", "pulls", "rivals", "counts", "other_bias")
    floats = dict.fromkeys(names, "*fp32:16")
    for dtype, stride, new, types, constants in configs_of():
        groups = "group_ids" not in constants
        tile, options = _plan(stride, dtype, new, groups)
        options |= {"matrix": True, "oldest": 90 if new else 80, "newest": 90 if new else 80}
        for none in ("counts", "group_ids") if groups else ("counts",):
            yield _sum_terms, {**types, **floats}, {**constants, **tile, none: None}, options
