"""The gradients of target attention in Triton: two sweeps over histories.

The first sweep adds up, for each candidate, what its gradient is made of (_target_slopes.py). The
second knows from these the weights and the gradients of logits, and writes each row's gradients of
key, value and bias once, summed over the candidates in their order.

Floors. From memory: keys and values twice, and their gradients once, 3 (d + dv) numbers per row
and head; with few candidates this is all that counts. Products: each sweep has four of tiles, where
the attention has two; those of float32 with a 16-bit tile count twice for bfloat16, and are three
TF32 ones for float16.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._code_rows import as_argument
from ._code_tiles import add_product
from ._target_shared import Shared, folded
from ._target_slopes import differentiate_queries
from ._target_slopes import plan as slope_plan
from ._target_tiles import (
    Pieces,
    Plan,
    Tiles,
    bias_argument,
    candidates_per_user,
    configs_of,
    cut,
    logits,
    piece_at,
    products_of,
    put_rows,
    rows_at,
    tile_of,
    weights_and_slopes,
)


@triton.jit(do_not_specialize=["B", "C", "size", "most"])
def _sweep_rows(
    grad, q, k, v, bias, bounds, q_bounds, starts, owners, tops, inverses, means, grad_k, grad_v,
    grad_bias, B, C, size, most, scale, HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    PER_HEAD: tl.constexpr, ACTIVATION: tl.constexpr, ONE: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, MIXED: tl.constexpr,
    BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Write the gradients of a piece's keys, values and bias: the sums over all candidates.

    ONE: candidates fill no more than a block, so that the loop over rows is the innermost, whose
    loads run ahead. Where there is no v, keys are the values, and grad_k that of both. MIXED: heads
    that biases are of, in turn; BLOCK_H holds them.
    """
    head = tl.program_id(0) % HEADS
    piece = (tl.program_id(0) // HEADS).to(tl.int64)
    begin, rows, start, count, _ = piece_at(
        bounds, q_bounds, starts, owners, piece, B, C, size, most
    )
    for first in range(0, rows, BLOCK_T):
        row, left = begin + first, rows - first
        k_tile = rows_at(k, row, left, head, BLOCK_T, HEADS, D, BLOCK_D)
        if v is None:
            values, v_tile = k, k_tile
        else:
            values = v
            v_tile = rows_at(v, row, left, head, BLOCK_T, HEADS, DV, BLOCK_V)
        into_k = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
        into_v = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
        if MIXED > 1:
            into_bias = tl.zeros((BLOCK_T, BLOCK_H), tl.float32)
        else:
            into_bias = tl.zeros((BLOCK_T,), tl.float32)
        for block in range(0, BLOCK_C if ONE else count, BLOCK_C):
            mine, many = start + block, count - block
            wanted = (tl.arange(0, BLOCK_C) < many)[None, :]
            queries = rows_at(q, mine, many, head, BLOCK_C, HEADS, D, BLOCK_D)
            flow = rows_at(grad, mine, many, head, BLOCK_C, HEADS, DV, BLOCK_V)
            products = products_of(
                k_tile, queries, k, row, left, q, mine, many, head, HEADS, D, BLOCK_D, 64
            )
            score, there = logits(
                products, bias, row, left, head, scale, HEADS, PER_HEAD, 0, mine, MIXED
            )
            above = products_of(
                v_tile, flow, values, row, left, grad, mine, many, head, HEADS, DV, BLOCK_V, 64
            )
            if ACTIVATION == "softmax":
                lanes = tl.arange(0, BLOCK_C)
                at = start * HEADS + head * count + block + lanes
                top = tl.load(tops + at, mask=lanes < many, other=float("inf"))
                inverse = tl.load(inverses + at, mask=lanes < many, other=0.0)
                mean = tl.load(means + at, mask=lanes < many, other=0.0)
                weight = tl.exp(score - top[None, :]) * inverse[None, :]
                slope = weight * (above - mean[None, :])
            else:
                weight, slope = weights_and_slopes(score, there, ACTIVATION)
                slope *= above
            weight = tl.where(wanted, weight, 0.0)
            slope = tl.where(wanted, slope, 0.0)
            if v is None:
                if grad_k is not None:
                    into_k = add_product(into_k, slope * scale, queries)
                    into_k = add_product(into_k, weight, flow)
            else:
                if grad_v is not None:
                    into_v = add_product(into_v, weight, flow)
                if grad_k is not None:
                    into_k = add_product(into_k, slope, queries)
            if grad_bias is not None:
                if MIXED > 1:
                    heads = (mine + tl.arange(0, BLOCK_C)) % MIXED
                    for own in range(0, MIXED):
                        of_head = tl.sum(tl.where((heads == own)[None, :], slope, 0.0), 1)
                        here = (tl.arange(0, BLOCK_H) == own)[None, :]
                        into_bias += tl.where(here, of_head[:, None], 0.0)
                else:
                    into_bias += tl.sum(slope, 1)
        if grad_k is not None:
            factor = scale
            if v is None:
                factor = 1.0
            put_rows(grad_k, into_k * factor, row, left, head, HEADS, D, BLOCK_D)
        if grad_v is not None:
            put_rows(grad_v, into_v, row, left, head, HEADS, DV, BLOCK_V)
        if grad_bias is not None:
            items = tl.arange(0, BLOCK_T)
            if MIXED > 1:
                put_rows(grad_bias, into_bias, row, left, 0, 1, MIXED, BLOCK_H)
            else:
                to = grad_bias + row * HEADS + head + items * HEADS
                tl.store(to, into_bias, mask=items < left)


_TILES: dict[torch.dtype, Tiles] = {
    torch.float32: {
        16: [(16, 32, 4, 2)],
        64: [(16, 32, 8, 2), (32, 32, 8, 2)],
        128: [(16, 32, 8, 2)],
        256: [(16, 16, 8, 2)],
    },
    torch.float16: {64: [(16, 64, 8, 2)], 128: [(16, 32, 8, 2)], 256: [(16, 16, 8, 2)]},
    torch.bfloat16: {
        64: [(16, 64, 8, 2), (32, 128, 8, 2)],
        128: [(16, 64, 8, 2), (32, 32, 8, 2)],
        256: [(16, 32, 8, 2)],
    },
}


_SHARED_TILES = {
    **_TILES,
    torch.bfloat16: {**_TILES[torch.bfloat16], 128: [(16, 64, 8, 2), (32, 64, 8, 2)]},
}


def _plan(C: int, d: int, dv: int, dtype: torch.dtype, shared: bool = False) -> Plan:
    return tile_of(C, d, dv, (_SHARED_TILES if shared else _TILES)[dtype])


def _differentiate(
    grad: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor | None,
    bias: Tensor | None, scale: float, out: Tensor, pieces: Pieces, shape: dict[str, Any],
    wanted: Sequence[bool],
) -> list[Tensor | None]:  # fmt: skip
    """Return the gradients of q, k, v and the bias [T, H], those of the latter that are wanted."""
    users, H, d, dv = len(pieces.bounds) - 1, q.shape[-2], q.shape[-1], out.shape[-1]
    found: Sequence[Tensor] = (q.new_empty(0),) * 3
    grad_q = None
    if wanted[0] or shape["ACTIVATION"] == "softmax":
        grad_q, found = differentiate_queries(
            grad, grad_lse, q, k, v, bias, scale, out, pieces, shape
        )
    into_k = torch.empty_like(k) if wanted[1] else None
    into_v = torch.empty_like(v) if v is not None and wanted[2] else None
    columns = H * shape["MIXED"]
    into_bias = k.new_empty((len(k), columns), dtype=torch.float32) if wanted[3] else None
    if any(wanted[1:]):
        C = candidates_per_user(q, users)
        tile, options = _plan(C, d, dv, q.dtype, v is None)
        _sweep_rows[(pieces.count * H,)](
            grad, q, k, v, bias, *pieces.arguments, *found, into_k, into_v, into_bias, users, C,
            pieces.size, pieces.most, scale, ONE=q.dim() == 4 and C <= tile["BLOCK_C"],
            BLOCK_H=heads_block(shape["MIXED"]), **shape, **tile, **options,
        )  # fmt: skip
    return [grad_q, into_k, into_v, into_bias]


def target_attention_gradient(
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    scale: float,
    activation: str,
    q_offsets: Tensor | None,
    out: Tensor,
    lse: Tensor,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Return those gradients of q, k, v and bias that `needs` asks for.

    needs: a word for each of the operator's tensors that are given, so bias' is the fifth. The
    softmax is computed again, as its rounded results would not let gradients of logits add up to 0.
    """
    wanted = [*needs[:3], bias is not None and needs[4]]
    options = (offsets, bias, scale, activation, q_offsets, out, wanted, 1)
    return _differentiate_all(grad, grad_lse, q, k, v, *options)


def shared_attention_gradient(
    grads: Sequence[Tensor | None], q: Tensor, x: Tensor, offsets: Tensor, bias: Tensor | None,
    scale: float, activation: str, q_offsets: Tensor | None, out: Tensor, needs: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    """Return those gradients of q, x and bias that `needs` asks for; bias' is the fourth.

    That of x is written once for all heads. grads: of out, lse and what is not differentiable.
    """
    one = Shared.of(q, x, bias, q_offsets)
    wanted = [*needs[:2], False, bias is not None and needs[3]]
    grad = torch.zeros_like(out) if grads[0] is None else grads[0]
    softmax = grads[1] is not None and activation == "softmax"
    grad_lse = grads[1].reshape(one.q.shape[:-1]) if softmax else None
    options = (offsets, bias, scale, activation, one.q_offsets, folded(out), wanted, one.mixed)
    found = _differentiate_all(folded(grad), grad_lse, one.q, one.k, None, *options)
    given = (t for t, want in zip((q, x, bias), (*wanted[:2], wanted[3]), strict=True) if want)
    return [one.view(like.shape) for one, like in zip(found, given, strict=True)]


def _differentiate_all(
    grad: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor | None, offsets: Tensor,
    bias: Tensor | None, scale: float, activation: str, q_offsets: Tensor | None, out: Tensor,
    wanted: Sequence[bool], mixed: int,
) -> list[Tensor]:  # fmt: skip
    """Return the wanted gradients of q, k, v and bias; without v, keys are the values."""
    B, H, d, dv = len(offsets) - 1, q.shape[-2], q.shape[-1], out.shape[-1]
    if not grad.numel() or not len(k) or not B:
        pairs = zip((q, k, v, bias), wanted, strict=True)
        return [
            torch.zeros_like(one).contiguous() for one, want in pairs if want and one is not None
        ]
    given, per_head = bias_argument(bias)
    shape = {"HEADS": H, "D": d, "DV": dv, "PER_HEAD": per_head and mixed == 1}
    shape |= {"ACTIVATION": activation, "MIXED": mixed}
    with torch.cuda.device_of(q):
        first, _ = slope_plan(candidates_per_user(q, B), d, dv, q.dtype)
        pieces = cut(q, offsets, q_offsets, len(k), first["BLOCK_C"])
        grad, q, k, out = map(as_argument, (grad, q, k, out))
        v = None if v is None else as_argument(v)
        found = _differentiate(grad, grad_lse, q, k, v, given, scale, out, pieces, shape, wanted)
        if bias is not None and found[3] is not None and bias.dim() == 1:
            found[3] = found[3].sum(1)
    return [one for one, want in zip(found, wanted, strict=True) if want and one is not None]


def heads_block(mixed: int) -> int:
    """Return how many columns hold the gradients of so many heads' biases."""
    return triton.next_power_of_2(mixed)


def compile_configs() -> Iterator[tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """Yield launches as those above compile: kernel, argument types, constants, options.

    A type ending in ":16" is known to be divisible by 16. "matrix": tensor cores are meant.
    """
    names = ("tops", "inverses", "means", "grad_bias")
    own = dict.fromkeys(names, "*fp32:16")
    for types, constants, options in configs_of(_plan, partial(_plan, shared=True)):
        bias = {} if "bias" not in constants else {"grad_bias": None}
        for one in (False, True):
            known = {**constants, **bias, "ONE": one, "BLOCK_H": heads_block(constants["MIXED"])}
            if "v" in constants:
                known["grad_v"] = None
            yield _sweep_rows, {**types, **own}, known, options
