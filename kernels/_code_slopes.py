"""What gradients of code attention are made of, per candidate: the first sweep over histories.

With p = exp(logit - peak) and D' = <grad, v> - <grad, out>, it adds up p, p D', p k and p D' k over
a history's items. From these follow the softmax's sum and the mean of D, with which the gradient of
the query needs no second sweep. <grad, out> is nearly that mean: sums of D' lose nothing to a part
that all items have in common.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._code_rows import Pieces, as_argument, configs_of, tile_of
from ._code_tiles import add_product, decode, finite, logits, piece_at, product, read


@triton.jit(do_not_specialize=["B", "C", "T"])
def _add_up(
    grad, out, q, key_0, key_1, key_2, key_3, key_4, key_5, key_6, key_7, value_0, value_1, value_2,
    value_3, value_4, value_5, value_6, value_7, rows, bias, bounds, starts, owners, peaks, sums,
    excesses, parts, slopes, B, C, T, scale,
    HEADS: tl.constexpr, FIELDS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BIAS_HEADS: tl.constexpr, SIZE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Add up a piece of a history for a block of candidates.

    peaks, sums, excesses [pieces, HEADS, C]: the greatest logit, the sum of exponentials less it,
    and of those times D - <grad, out>. parts, slopes [pieces, HEADS, C, D]: of keys times both.
    """
    keys = (key_0, key_1, key_2, key_3, key_4, key_5, key_6, key_7)
    values = (value_0, value_1, value_2, value_3, value_4, value_5, value_6, value_7)
    program, blocks = tl.program_id(0), tl.cdiv(C, BLOCK_C)
    head = program % HEADS
    candidates = program // HEADS % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    piece = (program // HEADS // blocks).to(tl.int64)
    owner, begin, end = piece_at(bounds, starts, owners, piece, B, SIZE)
    user = owner * C * HEADS
    flow = read(grad + user * DV, candidates, C, head, HEADS, DV, BLOCK_V)
    result = read(out + user * DV, candidates, C, head, HEADS, DV, BLOCK_V)
    base = tl.sum(flow.to(tl.float32) * result.to(tl.float32), 1)
    peak = tl.full((BLOCK_C,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_C,), tl.float32)
    excess = tl.zeros((BLOCK_C,), tl.float32)
    part = tl.zeros((BLOCK_C, BLOCK_D), tl.float32)
    slope = tl.zeros((BLOCK_C, BLOCK_D), tl.float32)
    for first in range(begin, end, BLOCK_T):
        items = first + tl.arange(0, BLOCK_T)
        there = items < end
        again = tl.minimum(first, 0)  # 0; else they stay in registers, and leave no room
        flow = read(grad + user * DV + again, candidates, C, head, HEADS, DV, BLOCK_V)
        v = decode(values, rows, items, there, head, T, HEADS, FIELDS, DV, BLOCK_V)
        above = product(flow, tl.trans(v)) - base[:, None]
        queries = read(q + user * D + again, candidates, C, head, HEADS, D, BLOCK_D)
        k = decode(keys, rows, items, there, head, T, HEADS, FIELDS, D, BLOCK_D)
        products = product(queries, tl.trans(k))
        score = logits(products, bias, items, there, head, scale, BIAS_HEADS, 1)
        top = tl.maximum(peak, tl.max(score, 1))
        shift = finite(top)
        terms = tl.exp(score - shift[:, None])
        old = tl.exp(peak - shift)
        above *= terms
        total = total * old + tl.sum(terms, 1)
        excess = excess * old + tl.sum(above, 1)
        part = add_product(part * old[:, None], terms, k)
        slope = add_product(slope * old[:, None], above, k)
        peak = top
    at = (piece * HEADS + head) * C + candidates
    there = candidates < C
    tl.store(peaks + at, peak, mask=there)
    tl.store(sums + at, total, mask=there)
    tl.store(excesses + at, excess, mask=there)
    dims = tl.arange(0, BLOCK_D)
    inside = there[:, None] & (dims < D)[None, :]
    tl.store(parts + at[:, None] * D + dims[None, :], part, mask=inside)
    tl.store(slopes + at[:, None] * D + dims[None, :], slope, mask=inside)


@triton.jit(do_not_specialize=["C"])
def _finish(
    grad, out, grad_lse, peaks, sums, excesses, parts, slopes, starts, grad_q, tops, inverses,
    means, C, scale, HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Put the pieces of a history together, in their order; write what the second sweep needs.

    tops, inverses, means [B, HEADS, C]: P = exp(logit - top) * inverse and dS = P (D - mean); top
    is inf, and P thus 0, where the history is empty or masked.
    """
    program, blocks = tl.program_id(0), tl.cdiv(C, BLOCK_C)
    head = program % HEADS
    candidates = program // HEADS % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    user = (program // HEADS // blocks).to(tl.int64)
    there, dims = candidates < C, tl.arange(0, BLOCK_D)
    inside = there[:, None] & (dims < D)[None, :]
    peak = tl.full((BLOCK_C,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_C,), tl.float32)
    excess = tl.zeros((BLOCK_C,), tl.float32)
    part = tl.zeros((BLOCK_C, BLOCK_D), tl.float32)
    slope = tl.zeros((BLOCK_C, BLOCK_D), tl.float32)
    for piece in range(tl.load(starts + user), tl.load(starts + user + 1)):
        at = (piece * HEADS + head) * C + candidates
        own = tl.load(peaks + at, mask=there, other=float("-inf"))
        top = tl.maximum(peak, own)
        shift = finite(top)
        old, new = tl.exp(peak - shift), tl.exp(own - shift)
        total = total * old + tl.load(sums + at, mask=there, other=0.0) * new
        excess = excess * old + tl.load(excesses + at, mask=there, other=0.0) * new
        tile = at[:, None] * D + dims[None, :]
        part = part * old[:, None] + tl.load(parts + tile, mask=inside, other=0.0) * new[:, None]
        more = tl.load(slopes + tile, mask=inside, other=0.0)
        slope = slope * old[:, None] + more * new[:, None]
        peak = top
    alive = total > 0
    inverse = tl.where(alive, 1.0 / tl.where(alive, total, 1.0), 0.0)
    flow = read(grad + user * C * (HEADS * DV), candidates, C, head, HEADS, DV, BLOCK_V)
    result = read(out + user * C * (HEADS * DV), candidates, C, head, HEADS, DV, BLOCK_V)
    base = tl.sum(flow.to(tl.float32) * result.to(tl.float32), 1)
    less = excess * inverse
    to = (user * C + candidates) * HEADS + head
    if grad_lse is not None:
        less -= tl.load(grad_lse + to, mask=there, other=0.0)
    less = tl.where(alive, less, 0.0)  # a gradient of lse = -inf may be infinite
    at = (user * HEADS + head) * C + candidates
    tl.store(tops + at, tl.where(alive, peak, float("inf")), mask=there)
    tl.store(inverses + at, inverse, mask=there)
    tl.store(means + at, base + less, mask=there)
    value = (slope - less[:, None] * part) * (inverse * scale)[:, None]
    tl.store(
        grad_q + to[:, None] * D + dims[None, :], value.to(grad_q.dtype.element_ty), mask=inside
    )


_FINISH_OPTIONS = {"num_warps": 8}


def plan(C: int, d: int, dv: int, dtype: torch.dtype) -> tuple[dict[str, int], dict[str, int]]:
    """Return the tile and launch options of the sweep."""
    if dtype == torch.bfloat16:
        return tile_of(C, d, dv, {64: (64, 32), 128: (16, 64), 256: (16, 16)})
    return tile_of(C, d, dv, {64: (16, 32), 128: (16, 16), 256: (16, 16)})


def differentiate_queries(
    grad: Tensor, grad_lse: Tensor | None, q: Tensor, out: Tensor,
    tables: Sequence[Tensor | None], where: Sequence[Any], pieces: Pieces, scale: float,
    shapes: dict[str, int],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the gradient of q, and tops, inverses and means [3, B, H, C] as `_finish` has them.

    where: rows, bias and pieces as the kernels take them. shapes: their constants but for tiles.
    """
    (B, C, H, d), T, dv = q.shape, where[0].shape[1], out.shape[3]
    tile, options = plan(C, d, dv, q.dtype)
    programs = H * triton.cdiv(C, tile["BLOCK_C"])
    found = torch.empty((3, B, H, C), dtype=torch.float32, device=q.device)
    totals = torch.empty((3, pieces.count, H, C), dtype=torch.float32, device=q.device)
    sums = torch.empty((2, pieces.count, H, C, d), dtype=torch.float32, device=q.device)
    grad_q, out, parts = torch.empty_like(q), as_argument(out), (*totals, *sums)
    _add_up[(pieces.count * programs,)](
        grad, out, q, *tables, *where, *parts, B, C, T, scale, **shapes, **tile, **options
    )
    tile = {name: tile[name] for name in ("BLOCK_C", "BLOCK_D", "BLOCK_V")}
    _finish[(B * programs,)](
        grad, out, None if grad_lse is None else grad_lse.contiguous(), *parts, pieces.starts,
        grad_q, *found, C, scale, H, d, dv, **tile, **_FINISH_OPTIONS,
    )  # fmt: skip
    return grad_q, found


def compile_configs() -> Iterator[tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """Yield launches as those above compile: kernel, argument types, constants, options.

    A type ending in ":16" is known to be divisible by 16. "matrix": tensor cores are meant.
    """
    names = ("peaks", "sums", "excesses", "parts", "slopes", "tops", "inverses", "means")
    partial = dict.fromkeys((*names, "grad_lse"), "*fp32:16")
    for at, (types, constants, options) in enumerate(configs_of(plan)):
        yield _add_up, {**types, **partial}, constants, options
        if at % 5 == 0:  # rows of each type, the widest last
            yield _finish, {**types, **partial}, constants, {"matrix": False, **_FINISH_OPTIONS}
