"""What gradients of target attention are made of, per candidate: the first sweep over histories.

With p = exp(logit - peak) and D' = <grad, v> - <grad, out>, it adds up p, p D', p k and p D' k over
a history's rows. From these follow the softmax's sum and the mean of D, with which the gradient of
the query needs no second sweep. <grad, out> is nearly that mean: sums of D' lose nothing to a part
that all rows have in common. Other activations w need the sum of w'(logit) D k alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._code_tiles import add_product, finite
from ._target_tiles import (
    Pieces,
    Plan,
    Tiles,
    candidates_of,
    candidates_per_user,
    configs_of,
    few_of,
    logits,
    piece_at,
    products_of,
    rows_at,
    tile_of,
    weights_and_slopes,
)


@triton.jit(do_not_specialize=["B", "C", "size", "most", "lanes"])
def _add_up(
    grad, out, q, k, v, bias, bounds, q_bounds, starts, owners, peaks, sums, excesses, parts,
    slopes, B, C, size, most, lanes, scale, HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    PER_HEAD: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, MIXED: tl.constexpr,
):  # fmt: skip
    """Add up a piece of a history for blocks of candidates.

    peaks, sums, excesses: the greatest logit, the sum of exponentials less it, and of those times
    D - <grad, out>: for each piece [HEADS, candidates]. parts, slopes [.., D]: of keys times both.
    Where there is no v, keys are the values.
    """
    head = tl.program_id(0) % HEADS
    lane = tl.program_id(0) // HEADS % lanes
    piece = (tl.program_id(0) // HEADS // lanes).to(tl.int64)
    begin, rows, start, count, place = piece_at(
        bounds, q_bounds, starts, owners, piece, B, C, size, most
    )
    for block in range(lane * BLOCK_C, count, lanes * BLOCK_C):
        mine, many = start + block, count - block
        base = tl.zeros((BLOCK_C,), tl.float32)
        if ACTIVATION == "softmax":
            flow = rows_at(grad, mine, many, head, BLOCK_C, HEADS, DV, BLOCK_V)
            result = rows_at(out, mine, many, head, BLOCK_C, HEADS, DV, BLOCK_V)
            base = tl.sum(flow.to(tl.float32) * result.to(tl.float32), 1)
        peak = tl.full((BLOCK_C,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_C,), tl.float32)
        excess = tl.zeros((BLOCK_C,), tl.float32)
        part = tl.zeros((BLOCK_C, BLOCK_D), tl.float32)
        slope = tl.zeros((BLOCK_C, BLOCK_D), tl.float32)
        for first in range(0, rows, BLOCK_T):
            # again: 0; else the candidates' rows stay in registers, and leave no room
            again, left = mine + tl.minimum(first, 0), rows - first
            flow = rows_at(grad, again, many, head, BLOCK_C, HEADS, DV, BLOCK_V)
            if v is None:
                values = k
            else:
                values = v
            v_tile = rows_at(values, begin + first, left, head, BLOCK_T, HEADS, DV, BLOCK_V)
            above = products_of(
                flow, v_tile, grad, again, many, values, begin + first, left, head, HEADS, DV,
                BLOCK_V, 64,
            )  # fmt: skip
            queries = rows_at(q, again, many, head, BLOCK_C, HEADS, D, BLOCK_D)
            if v is None:
                k_tile = v_tile
            else:
                k_tile = rows_at(k, begin + first, left, head, BLOCK_T, HEADS, D, BLOCK_D)
            products = products_of(
                queries, k_tile, q, again, many, k, begin + first, left, head, HEADS, D, BLOCK_D, 64
            )
            score, there = logits(
                products, bias, begin + first, left, head, scale, HEADS, PER_HEAD, 1, mine, MIXED
            )
            if ACTIVATION == "softmax":
                top = tl.maximum(peak, tl.max(score, 1))
                shift = finite(top)
                terms = tl.exp(score - shift[:, None])
                old = tl.exp(peak - shift)
                above = (above - base[:, None]) * terms
                total = total * old + tl.sum(terms, 1)
                excess = excess * old + tl.sum(above, 1)
                part = add_product(part * old[:, None], terms, k_tile)
                slope = slope * old[:, None]
                peak = top
            else:
                _, steepness = weights_and_slopes(score, there, ACTIVATION)
                above *= steepness
            slope = add_product(slope, above, k_tile)
        candidates, dims = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_D)
        at = place * HEADS + head * count + block + candidates
        tile = at[:, None] * D + dims[None, :]
        inside = (candidates < many)[:, None] & (dims < D)[None, :]
        if ACTIVATION == "softmax":
            tl.store(peaks + at, peak, mask=candidates < many)
            tl.store(sums + at, total, mask=candidates < many)
            tl.store(excesses + at, excess, mask=candidates < many)
            tl.store(parts + tile, part, mask=inside)
        tl.store(slopes + tile, slope, mask=inside)


@triton.jit(do_not_specialize=["C", "most", "lanes"])
def _finish(
    grad, out, grad_lse, peaks, sums, excesses, parts, slopes, starts, q_bounds, grad_q, tops,
    inverses, means, C, most, lanes, scale, HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    ACTIVATION: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Put the pieces of a history together, in their order; write what the second sweep needs.

    tops, inverses, means, for each user [HEADS, candidates]: P = exp(logit - top) * inverse and
    dS = P (D - mean); top is inf, and P thus 0, where the history is empty or masked.
    """
    head = tl.program_id(0) % HEADS
    lane = tl.program_id(0) // HEADS % lanes
    user = (tl.program_id(0) // HEADS // lanes).to(tl.int64)
    start, count = candidates_of(user, q_bounds, C)
    begin = tl.load(starts + user)
    pieces = (tl.load(starts + user + 1) - begin).to(tl.int32)
    if q_bounds is None:
        place = begin * C
    else:
        place = start * most
    dims, value_dims = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    for candidate in range(lane, count, lanes):
        peak = tl.full((), float("-inf"), tl.float32)
        total = tl.full((), 0.0, tl.float32)
        excess = tl.full((), 0.0, tl.float32)
        part = tl.zeros((BLOCK_D,), tl.float32)
        slope = tl.zeros((BLOCK_D,), tl.float32)
        for first in range(0, pieces, BLOCK_P):
            own = first + tl.arange(0, BLOCK_P)
            there = own < pieces
            at = (place + own.to(tl.int64) * count) * HEADS + head * count + candidate
            tile = at[:, None] * D + dims[None, :]
            inside = there[:, None] & (dims < D)[None, :]
            more = tl.load(slopes + tile, mask=inside, other=0.0)
            if ACTIVATION == "softmax":
                peak_of = tl.load(peaks + at, mask=there, other=float("-inf"))
                top = tl.maximum(peak, tl.max(peak_of, 0))
                shift = finite(top)
                old, new = tl.exp(peak - shift), tl.exp(peak_of - shift)
                total = total * old + tl.sum(tl.load(sums + at, mask=there, other=0.0) * new, 0)
                over = tl.load(excesses + at, mask=there, other=0.0)
                excess = excess * old + tl.sum(over * new, 0)
                keys = tl.load(parts + tile, mask=inside, other=0.0)
                part = part * old + tl.sum(keys * new[:, None], 0)
                slope = slope * old + tl.sum(more * new[:, None], 0)
                peak = top
            else:
                slope += tl.sum(more, 0)
        to = (start + candidate) * HEADS + head
        if ACTIVATION == "softmax":
            dead = total == 0  # a NaN is not
            inverse = tl.where(dead, 0.0, 1.0 / tl.where(dead, 1.0, total))
            less = excess * inverse
            if grad_lse is not None:
                less -= tl.load(grad_lse + to)
            less = tl.where(dead, 0.0, less)  # a gradient of lse = -inf may be infinite
            inside = value_dims < DV
            flow = tl.load(grad + to * DV + value_dims, mask=inside, other=0.0).to(tl.float32)
            result = tl.load(out + to * DV + value_dims, mask=inside, other=0.0).to(tl.float32)
            at = start * HEADS + head * count + candidate
            tl.store(tops + at, tl.where(dead, float("inf"), peak))
            tl.store(inverses + at, inverse)
            tl.store(means + at, tl.sum(flow * result, 0) + less)
            slope = (slope - less * part) * inverse
        value = (slope * scale).to(grad_q.dtype.element_ty)
        tl.store(grad_q + to * D + dims, value, mask=dims < D)


_FINISH = {"BLOCK_P": 16}
_FINISH_OPTIONS = {"num_warps": 4}


_TILES: dict[torch.dtype, Tiles] = {
    torch.float32: {256: [(16, 32, 8, 2)]},
    torch.float16: {64: [(16, 32, 8, 2)], 256: [(16, 16, 8, 2)]},
    torch.bfloat16: {
        64: [(16, 64, 8, 2), (64, 32, 8, 2)],
        128: [(16, 64, 8, 2), (32, 32, 8, 2)],
        256: [(16, 32, 8, 2)],
    },
}


def plan(C: int, d: int, dv: int, dtype: torch.dtype) -> Plan:
    """Return the tile and launch options of the sweep."""
    return tile_of(C, d, dv, _TILES[dtype])


def differentiate_queries(
    grad: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor | None,
    bias: Tensor | None, scale: float, out: Tensor, pieces: Pieces, shape: dict[str, Any],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the gradient of q, and tops, inverses and means [3, .] as `_finish` has them.

    All but `grad_lse` as kernels take them. shape: their constants but for tiles. For activations
    other than softmax, tops, inverses and means are empty.
    """
    users, H, d, dv = len(pieces.bounds) - 1, q.shape[-2], q.shape[-1], out.shape[-1]
    C, softmax = candidates_per_user(q, users), shape["ACTIVATION"] == "softmax"
    tile, options = plan(C, d, dv, q.dtype)
    empty = {"dtype": torch.float32, "device": q.device}
    found = torch.empty((3, q.numel() // d if softmax else 0), **empty)
    totals = torch.empty((3, pieces.rows * H if softmax else 0), **empty)
    parts = torch.empty(pieces.rows * H * d if softmax else 0, **empty)
    slopes = torch.empty(pieces.rows * H * d, **empty)
    grad_q = torch.empty_like(q)
    _add_up[(pieces.count * H * pieces.lanes,)](
        grad, out, q, k, v, bias, *pieces.arguments, *totals, parts, slopes, users, C, pieces.size,
        pieces.most, pieces.lanes, scale, **shape, **tile, **options,
    )  # fmt: skip
    shape = {name: shape[name] for name in ("HEADS", "D", "DV", "ACTIVATION")}
    tile = {name: tile[name] for name in ("BLOCK_D", "BLOCK_V")}
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    _finish[(users * H * C,)](
        grad, out, grad_lse, *totals, parts, slopes, pieces.starts, pieces.q_bounds, grad_q,
        *found, C, pieces.most, C, scale, **shape, **tile, **_FINISH, **_FINISH_OPTIONS,
    )  # fmt: skip
    return grad_q, found


def compile_configs() -> Iterator[tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """Yield launches as those above compile: kernel, argument types, constants, options.

    A type ending in ":16" is known to be divisible by 16. "matrix": tensor cores are meant.
    """
    names = ("peaks", "sums", "excesses", "parts", "slopes", "tops", "inverses", "means")
    partial = dict.fromkeys((*names, "grad_lse"), "*fp32:16")
    configs = list(configs_of(plan))
    for types, constants, options in configs:
        yield _add_up, {**types, **partial}, constants, options
    for types, constants, _ in few_of(configs):
        finish = {**constants, **_FINISH}
        yield _finish, {**types, **partial}, finish, {"matrix": False, **_FINISH_OPTIONS}
