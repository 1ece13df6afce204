"""Target attention in Triton: a few candidates meet a history of any length on tensor cores.

The candidates of a user are the rows of a tile, filled up to 16, and a head's keys and values come
by in tiles, each read once for up to 128 candidates. A history is cut into pieces that run side by
side; what they leave is put together in the pieces' order.

Floors. From memory: keys and values, (d + dv) numbers per row and head, and the bias; with few
candidates this is all that counts. Products: 2 (d + dv) operations per candidate, head and row,
three times as many TF32 ones for float32. Pieces leave 4 (dv + 2) bytes per candidate and head.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._code_rows import as_argument
from ._code_tiles import finite
from ._target_shared import Shared
from ._target_tiles import (
    Plan,
    Tiles,
    bias_argument,
    candidates_of,
    candidates_per_user,
    configs_of,
    cut,
    few_of,
    logits,
    piece_at,
    products_of,
    rows_at,
    tile_of,
    weights,
)


@triton.jit(do_not_specialize=["B", "C", "size", "most", "lanes"])
def _attend(
    q, k, v, bias, bounds, q_bounds, starts, owners, peaks, sums, parts, B, C, size, most, lanes,
    scale, HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, PER_HEAD: tl.constexpr,
    ACTIVATION: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, MIXED: tl.constexpr,
):  # fmt: skip
    """Attend from blocks of candidates to a piece of their history.

    peaks, sums, parts: the greatest logit, the sum of exponentials less it, and that of values
    times those, or times activations: for each piece [HEADS, candidates] and [.., DV]. Where there
    is no v, keys are the values.
    """
    head = tl.program_id(0) % HEADS
    lane = tl.program_id(0) // HEADS % lanes
    piece = (tl.program_id(0) // HEADS // lanes).to(tl.int64)
    begin, rows, start, count, place = piece_at(
        bounds, q_bounds, starts, owners, piece, B, C, size, most
    )
    for block in range(lane * BLOCK_C, count, lanes * BLOCK_C):
        queries = rows_at(q, start + block, count - block, head, BLOCK_C, HEADS, D, BLOCK_D)
        peak = tl.full((BLOCK_C,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_C,), tl.float32)
        out = tl.zeros((BLOCK_C, BLOCK_V), tl.float32)
        for first in range(0, rows, BLOCK_T):
            k_tile = rows_at(k, begin + first, rows - first, head, BLOCK_T, HEADS, D, BLOCK_D)
            again = start + block + tl.minimum(first, 0)  # 0 more: or else kept in registers
            products = products_of(
                queries, k_tile, q, again, count - block, k, begin + first, rows - first, head,
                HEADS, D, BLOCK_D, 128,
            )  # fmt: skip
            score, there = logits(
                products, bias, begin + first, rows - first, head, scale, HEADS, PER_HEAD, 1,
                start + block, MIXED,
            )  # fmt: skip
            if ACTIVATION == "softmax":
                top = tl.maximum(peak, tl.max(score, 1))
                shift = finite(top)
                terms = tl.exp(score - shift[:, None])
                old = tl.exp(peak - shift)
                total = total * old + tl.sum(terms, 1)
                out = out * old[:, None]
                peak = top
            else:
                terms = weights(score, there, ACTIVATION)
            if v is None:
                v_tile = k_tile
            else:
                v_tile = rows_at(v, begin + first, rows - first, head, BLOCK_T, HEADS, DV, BLOCK_V)
            out = tl.dot(terms.to(v_tile.dtype), v_tile, out, input_precision="tf32x3")
        candidates = tl.arange(0, BLOCK_C)
        at = place * HEADS + head * count + block + candidates
        inside = candidates < count - block
        if ACTIVATION == "softmax":
            tl.store(peaks + at, peak, mask=inside)
            tl.store(sums + at, total, mask=inside)
        dims = tl.arange(0, BLOCK_V)
        inside = inside[:, None] & (dims < DV)[None, :]
        tl.store(parts + at[:, None] * DV + dims[None, :], out, mask=inside)


@triton.jit(do_not_specialize=["C", "most", "lanes"])
def _combine(
    peaks, sums, parts, starts, q_bounds, out, lse, C, most, lanes, HEADS: tl.constexpr,
    DV: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Put the pieces of a history together, in their order, candidate by candidate."""
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
    dims = tl.arange(0, BLOCK_V)
    for candidate in range(lane, count, lanes):
        peak = tl.full((), float("-inf"), tl.float32)
        total = tl.full((), 0.0, tl.float32)
        result = tl.zeros((BLOCK_V,), tl.float32)
        for first in range(0, pieces, BLOCK_P):
            own = first + tl.arange(0, BLOCK_P)
            at = (place + own.to(tl.int64) * count) * HEADS + head * count + candidate
            inside = (own < pieces)[:, None] & (dims < DV)[None, :]
            part = tl.load(parts + at[:, None] * DV + dims[None, :], mask=inside, other=0.0)
            if ACTIVATION == "softmax":
                tops = tl.load(peaks + at, mask=own < pieces, other=float("-inf"))
                terms = tl.load(sums + at, mask=own < pieces, other=0.0)
                top = tl.maximum(peak, tl.max(tops, 0))
                shift = finite(top)
                old, new = tl.exp(peak - shift), tl.exp(tops - shift)
                total = total * old + tl.sum(terms * new, 0)
                result = result * old + tl.sum(part * new[:, None], 0)
                peak = top
            else:
                result += tl.sum(part, 0)
        to = (start + candidate) * HEADS + head
        if ACTIVATION == "softmax":
            dead = total == 0  # the history is empty, or masked; a NaN is not
            divisor = tl.where(dead, 1.0, total)
            result = result / divisor
            tl.store(lse + to, tl.where(dead, float("-inf"), peak + tl.log(divisor)))
        tl.store(out + to * DV + dims, result.to(out.dtype.element_ty), mask=dims < DV)


_COMBINE = {"BLOCK_P": 16}
_COMBINE_OPTIONS = {"num_warps": 2}


_TILES: dict[int, Tiles] = {  # by the bytes of a number
    4: {
        16: [(16, 32, 8, 2)],
        64: [(16, 64, 8, 2), (32, 32, 8, 2)],
        128: [(16, 32, 8, 2)],
        256: [(16, 32, 8, 2)],
    },
    2: {
        64: [(16, 64, 8, 2), (64, 32, 8, 2), (128, 64, 8, 2)],
        128: [(16, 64, 8, 2), (64, 64, 8, 2), (128, 32, 8, 2)],
        256: [(16, 64, 8, 2), (64, 32, 8, 2)],
    },
}


def _plan(C: int, d: int, dv: int, dtype: torch.dtype, mixed: int = 1) -> Plan:
    most = C if mixed == 1 else min(C, 64)  # biases of each candidate's head take registers
    return tile_of(most, d, dv, _TILES[dtype.itemsize])


def _shared_plan(C: int, d: int, dv: int, dtype: torch.dtype) -> Plan:
    """Return the plan of `configs_of` where heads share rows: bfloat16 has no bias there."""
    return _plan(C, d, dv, dtype, 1 if dtype == torch.bfloat16 else 2)


def target_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    scale: float,
    activation: str,
    q_offsets: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return what torch's operator `livrec::target_attention` does.

    The host is not asked: offsets that do not ascend from 0 to the end are made to. What is not
    contiguous is copied.
    """
    return _attend_all(q, k, v, offsets, bias, scale, activation, q_offsets, 1)


def shared_attention(
    q: Tensor,
    x: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    scale: float,
    activation: str,
    q_offsets: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what torch's operator `livrec::shared_attention` does, rows read once for all heads.

    As above, the host is not asked. The gradient sums weights anew: what lse lost is not kept.
    """
    one = Shared.of(q, x, bias, q_offsets)
    options = (scale, activation, one.q_offsets, one.mixed)
    out, lse = _attend_all(one.q, one.k, None, offsets, bias, *options)
    lse = lse.view(q.shape[:-1] if activation == "softmax" else (0,))
    return out.view(q.shape), lse, torch.zeros_like(lse)


def _attend_all(
    q: Tensor, k: Tensor, v: Tensor | None, offsets: Tensor, bias: Tensor | None, scale: float,
    activation: str, q_offsets: Tensor | None, mixed: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attend; without v, keys are the values."""
    B, H, d, T = len(offsets) - 1, q.shape[-2], q.shape[-1], len(k)
    dv = (k if v is None else v).shape[2]
    out = q.new_empty((*q.shape[:-1], dv))
    softmax = activation == "softmax"
    lse = q.new_empty(q.shape[:-1] if softmax else (0,), dtype=torch.float32)
    if not out.numel() or not B:
        return out.zero_(), lse.fill_(-torch.inf)
    C = candidates_per_user(q, B)
    tile, options = _plan(C, d, dv, q.dtype, mixed)
    with torch.cuda.device_of(q):
        pieces = cut(q, offsets, q_offsets, T, tile["BLOCK_C"])
        left = (pieces.rows * H if softmax else 0, pieces.rows * H if softmax else 0)
        peaks, sums, parts = (
            torch.empty(many, dtype=torch.float32, device=q.device)
            for many in (*left, pieces.rows * H * dv)
        )
        given, per_head = bias_argument(bias)
        shape = {"HEADS": H, "DV": dv, "ACTIVATION": activation}
        _attend[(pieces.count * H * pieces.lanes,)](
            as_argument(q), as_argument(k), None if v is None else as_argument(v), given,
            *pieces.arguments, peaks, sums, parts, B, C, pieces.size, pieces.most, pieces.lanes,
            scale, D=d, PER_HEAD=per_head and mixed == 1, MIXED=mixed, **shape, **tile, **options,
        )  # fmt: skip
        _combine[(B * H * C,)](
            peaks, sums, parts, pieces.starts, pieces.q_bounds, out, lse, C, pieces.most, C,
            BLOCK_V=tile["BLOCK_V"], **shape, **_COMBINE, **_COMBINE_OPTIONS,
        )  # fmt: skip
    return out, lse


def compile_configs() -> Iterator[tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """Yield launches as those above compile: kernel, argument types, constants, options.

    A type ending in ":16" is known to be divisible by 16. "matrix": tensor cores are meant.
    """
    partial = dict.fromkeys(("peaks", "sums", "parts", "lse"), "*fp32:16")
    configs = list(configs_of(_plan, _shared_plan))
    for types, constants, options in configs:
        yield _attend, {**types, **partial}, constants, options
    for types, constants, _ in few_of(configs):
        combine = {**constants, **_COMBINE}
        yield _combine, {**types, **partial}, combine, {"matrix": False, **_COMBINE_OPTIONS}
