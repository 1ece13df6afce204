"""The gradients of the contrastive loss in Triton: logits are computed again, tile by tile.

One sweep goes over blocks of queries, one over blocks of keys; each computes the weights of its
pairs, W_ij = g_i exp(s_ij - lse_i) + h_j exp(s'_ij - lse'_j), and adds up their products with the
other side's units, over all of it in one order. Own pairs and the normalisation come at the end.

Floors. Products: 8 B (B + E) D operations, one way or both; three times as many TF32 ones for
float32. Rows wider than 256 have their logits computed once for every 256 columns of gradients.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._contrastive_call import Call
from ._contrastive_pairs import Pairs
from ._contrastive_slopes import Direction, directions
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
from ._contrastive_units import differentiate


@triton.jit(do_not_specialize=SIZES)
def _sweep(
    own, others, own_bias, other_bias, own_shift, own_factor, own_portion, other_shift,
    other_factor, other_portion, temperature, parts, slopes, query_ids, key_ids, group_ids, pairs,
    strip, rows, words, query_count, key_count, group_count, own_count, others_count, splits,
    EVERY_QUERY: tl.constexpr, EVERY_KEY: tl.constexpr, EVERY_GROUP: tl.constexpr,
    ROWS: tl.constexpr, OTHERS: tl.constexpr, STRIDE: tl.constexpr, PART: tl.constexpr,
    WIDTH: tl.constexpr, HEAT: tl.constexpr,
):  # fmt: skip
    """Add up weighted units of a run of the other side for a block, WIDTH columns of them.

    own_*, other_* but for biases: of the softmax over the others of each own row, and of that over
    own rows of each other one; None where there is none. parts [splits, own, STRIDE]; slopes
    [splits, own]: sums of the latter's weights; with HEAT of all weights times their products.
    """
    CHUNKS: tl.constexpr = (STRIDE + WIDTH - 1) // WIDTH
    GROUPS: tl.constexpr = group_ids is not None
    column = tl.program_id(0) % CHUNKS * WIDTH
    split = tl.program_id(0) // CHUNKS % splits
    own_first = strip + tl.program_id(0) // CHUNKS // splits * ROWS
    scale, rest = scales_of(temperature)
    tiles = tl.cdiv(others_count, OTHERS)
    low, high = tiles * split // splits * OTHERS, tiles * (split + 1) // splits * OTHERS
    tile = units_at(own, own_first, ROWS, STRIDE, PART)
    row = own_first + tl.arange(0, ROWS)
    inside = row < own_count
    into = tl.zeros((ROWS, WIDTH), tl.float32)
    slope = tl.zeros((ROWS,), tl.float32)
    for first in range(low, high, OTHERS):
        products = products_of(tile, own, own_first, others, first, ROWS, OTHERS, STRIDE, PART)
        hidden, positive = masks_of(
            query_ids, key_ids, group_ids, pairs, strip, own_first, first, words, rows,
            query_count, key_count, group_count, ROWS, OTHERS, EVERY_QUERY, EVERY_KEY, EVERY_GROUP,
        )  # fmt: skip
        lane = first + tl.arange(0, OTHERS)
        bias = tl.load(other_bias + lane)[None, :]
        weight = tl.zeros((ROWS, OTHERS), tl.float32)
        if other_shift is not None:
            shift = tl.load(other_shift + lane)[None, :]
            mine = tl.load(own_bias + row)[:, None]
            weight = tl.exp2(logits_of(products, scale, rest, shift, mine))
            if GROUPS:
                portion = tl.load(other_portion + lane)[None, :]
                weight -= tl.where(positive & (mine != float("-inf")), portion, 0.0)
            weight *= tl.load(other_factor + lane)[None, :]
            weight = tl.where(hidden, 0.0, weight)
            if (slopes is not None) and not HEAT:
                slope += tl.sum(weight, 1)
        if own_shift is not None:
            shift = tl.load(own_shift + row, mask=inside, other=float("-inf"))[:, None]
            more = tl.exp2(logits_of(products, scale, rest, shift, bias))
            if GROUPS:
                portion = tl.load(own_portion + row, mask=inside, other=0.0)[:, None]
                more -= tl.where(positive & (bias != float("-inf")), portion, 0.0)
            more *= tl.load(own_factor + row, mask=inside, other=0.0)[:, None]
            weight += tl.where(hidden, 0.0, more)
        if HEAT:  # before weights are rounded; products of weight 0 may be infinite
            slope += tl.sum(tl.where(weight == 0, 0.0, weight * products), 1)
        values = units_at(others, first, OTHERS, STRIDE, WIDTH, column)
        into = tl.dot(weight.to(values.dtype), values, into, input_precision="tf32x3")
    dims = column + tl.arange(0, WIDTH)
    at = tl.cast(split, tl.int64) * own_count + row
    to = parts + at[:, None] * STRIDE + dims[None, :]
    tl.store(to, into, mask=inside[:, None] & (dims < STRIDE)[None, :])
    if slopes is not None:
        tl.store(slopes + at, slope, mask=inside & (column == 0))


_WIDTHS = {(4, False): 32, (4, True): 128, (2, False): 128, (2, True): 256}  # by bytes and chip
_TILES: dict[tuple[int, bool, bool], dict[int, Tile]] = {  # by bytes of a number, chip, groups
    (4, False, False): {256: (64, 16, 4, 2)},
    (4, False, True): {256: (64, 16, 4, 2)},
    (4, True, False): {64: (128, 32, 8, 2), 256: (64, 32, 8, 2)},
    (4, True, True): {64: (128, 32, 8, 2), 256: (64, 16, 8, 2)},
    (2, False, False): {256: (64, 32, 4, 2)},
    (2, False, True): {256: (64, 16, 8, 2)},
    (2, True, False): {128: (128, 64, 8, 3), 256: (128, 32, 8, 2)},
    (2, True, True): {128: (128, 32, 8, 3), 256: (64, 32, 8, 2)},
}


def _plan(
    stride: int, dtype: torch.dtype, new: bool, more: bool
) -> tuple[dict[str, int], dict[str, int]]:
    """Return the tile and launch options; more: registers have groups, or slopes, to hold."""
    tile, options = tile_of(stride, dtype, _TILES[dtype.itemsize, new, more])
    tile["WIDTH"] = min(triton.next_power_of_2(stride), _WIDTHS[dtype.itemsize, new])
    return tile, options


def _sums(
    own: Side, others: Side, along: Direction, across: Direction, pairs: Pairs, call: Call,
    slopes: bool, heat: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Return the sums of weighted units [splits, own, stride], and those of weights of `across`.

    along: the softmax over others; across: that over own rows. heat: sums are of all weights times
    their products.
    """
    stride = own.units.shape[1]
    more = slopes or call.group_ids is not None
    tile, options = _plan(stride, own.units.dtype, is_new(own.units), more)
    chunks = triton.cdiv(stride, tile["WIDTH"])
    parts, sums, splits = None, None, 0
    for first, last, bits in pairs.strips(own.count):
        if parts is None:
            splits = splits_of(last * chunks, others.count, tile["ROWS"])
            parts = torch.empty((splits, own.count, stride), device=own.units.device)
            sums = parts.new_empty(parts.shape[:2]) if slopes else None
        masks = replace(call.masks, pairs=bits, strip=first)
        given = masks.arguments(own.count, others.count)
        _sweep[(triton.cdiv(last - first, tile["ROWS"]) * splits * chunks,)](
            own.units, others.units, own.bias, others.bias, along.shift, along.factor,
            along.portion, across.shift, across.factor, across.portion, call.temperature, parts,
            sums, own_count=own.count, others_count=others.count, splits=splits, HEAT=heat,
            **given, **tile, **options,
        )  # fmt: skip
    assert parts is not None
    return parts, sums


def _gain_of(grad: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Return what keeps weights within float16, of the greatest gradient of a loss; else None."""
    if dtype != torch.float16:
        return None
    most = grad.abs().amax()
    return 2.0**14 / torch.where(most > 0, most, 1.0)


def in_batch_contrastive_gradient(
    grad: Tensor | None, lse: Tensor, pairs: Tensor, *, wanted: Collection[str], keep_pairs: bool,
    **given: Any,
) -> dict[str, Tensor]:  # fmt: skip
    """Return the gradients of the operator's arguments that `wanted` names."""
    call = Call(**given)
    found = {name: torch.zeros_like(given[name]).contiguous() for name in wanted}
    if grad is None or not len(call.query) or not found:
        return found
    with torch.cuda.device_of(call.query):
        _differentiate(grad.contiguous(), lse, pairs if keep_pairs else None, call, found)
    return found


def _differentiate(
    grad: Tensor, lse: Tensor, bits: Tensor | None, call: Call, found: dict[str, Tensor]
) -> None:
    """Put the gradients that `found` names into it."""
    batch, temperature = len(call.query), call.temperature
    queries, keys = call.sides()
    pairs = Pairs(call.pair_rows, call.false_negative_threshold, bits)
    gain = _gain_of(grad, queries.units.dtype)
    rows, columns, own = directions(grad, lse, queries, keys, gain, call)
    diagonal, missed, heats = own
    if "query" in found or "temperature" in found:
        heat = "temperature" in found
        parts, sums = _sums(queries, keys, rows, columns, pairs, call, heat, heat)
        if "query" in found:
            found["query"] = differentiate(
                call.query, 0, call.valid, queries, keys.units, diagonal, parts, temperature, gain
            )
        if sums is not None:
            slope = heats.sum() + sums.sum(dtype=torch.float64) / temperature.double()
            slope = -slope / temperature.double() / (1.0 if gain is None else gain.double())
            found["temperature"] = slope.to(temperature.dtype)
    if not {"key", "extra_keys", "log_q"} & found.keys():
        return
    parts, sums = _sums(keys, queries, columns, rows, pairs, call, "log_q" in found)
    rest = parts, temperature, gain
    if "key" in found:
        found["key"] = differentiate(call.key, 0, call.valid, keys, queries.units, diagonal, *rest)
    if "extra_keys" in found and call.extra_keys is not None:
        found["extra_keys"] = differentiate(call.extra_keys, batch, None, keys, None, None, *rest)
    if sums is not None:
        slope = -sums.sum(0, dtype=torch.float64) / (1.0 if gain is None else gain)
        slope[:batch] += missed
        found["log_q"] = slope[: len(found["log_q"])].to(found["log_q"].dtype)


def compile_configs() -> Iterator[tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """Yield launches as those above compile: kernel, argument types, constants, options.

    A type ending in ":16" is known to be divisible by 16. "matrix": tensor cores are meant.
    """
    names = ("own_bias", "other_bias", "parts", "slopes")
    vectors = ("own_shift", "own_factor", "own_portion")
    across = tuple(name.replace("own", "other") for name in vectors)
    floats = dict.fromkeys((*names, *vectors, *across), "*fp32:16")
    for dtype, stride, new, types, constants in configs_of():
        groups = "group_ids" not in constants
        heated = [((), True)] if groups else [(across, True), ((), True)]
        for none, heat in [*heated, ((), False) if groups else ((*vectors, "slopes"), False)]:
            tile, options = _plan(stride, dtype, new, groups)
            known = {**constants, **dict.fromkeys(none), **tile, "HEAT": heat}
            options |= {"matrix": True, "oldest": 90 if new else 80, "newest": 90 if new else 80}
            yield _sweep, {**types, **floats}, known, options
