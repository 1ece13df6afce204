"""The gradients of code attention in Triton: two sweeps over histories, then sums per table row.

The first sweep adds up, for each candidate, what its gradient is made of: exponentials, those times
D - <grad, out>, where D = <grad, v>, and both times keys. The second knows from these the weights
and the gradients of logits, and writes each item's gradients of key and value, summed over the
candidates. They are then added up per row of each table in the order of a stable sort, in pieces of
one size: the same sums on every chip.

Floors. Both sweeps gather as many rows as the attention itself, and multiply twice as much (four
products of tiles each, where the attention has two). The items' gradients, 4 (d + dv) bytes per
item and head, are written once and read once for each field: with few candidates these bytes are
what the gradient waits for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._code_rows import (
    as_argument,
    as_arguments,
    configs_of,
    cut,
    heads_of,
    rows_of,
    tile_of,
)  # fmt: skip
from ._code_slopes import differentiate_queries, plan
from ._code_tiles import add_product, decode, logits, piece_at, product, read
from ._runs import add_runs


@triton.jit(do_not_specialize=["B", "C", "T"])
def _sweep_items(
    grad, q, key_0, key_1, key_2, key_3, key_4, key_5, key_6, key_7, value_0, value_1, value_2,
    value_3, value_4, value_5, value_6, value_7, rows, bias, bounds, starts, owners, tops, inverses,
    means, grad_keys, grad_values, grad_bias, B, C, T, scale,
    HEADS: tl.constexpr, FIELDS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BIAS_HEADS: tl.constexpr, SIZE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Write the gradients of a piece's keys, values and bias: the sums over all candidates."""
    keys = (key_0, key_1, key_2, key_3, key_4, key_5, key_6, key_7)
    values = (value_0, value_1, value_2, value_3, value_4, value_5, value_6, value_7)
    head = tl.program_id(0) % HEADS
    piece = (tl.program_id(0) // HEADS).to(tl.int64)
    owner, begin, end = piece_at(bounds, starts, owners, piece, B, SIZE)
    user = owner * C * HEADS
    key_dims, value_dims = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    for first in range(begin, end, BLOCK_T):
        items = first + tl.arange(0, BLOCK_T)
        there = items < end
        k = decode(keys, rows, items, there, head, T, HEADS, FIELDS, D, BLOCK_D)
        v = decode(values, rows, items, there, head, T, HEADS, FIELDS, DV, BLOCK_V)
        into_k = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
        into_v = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
        into_bias = tl.zeros((BLOCK_T,), tl.float32)
        for block in range(0, C, BLOCK_C):
            candidates = block + tl.arange(0, BLOCK_C)
            at = (owner * HEADS + head) * C + candidates
            top = tl.load(tops + at, mask=candidates < C, other=float("inf"))
            inverse = tl.load(inverses + at, mask=candidates < C, other=0.0)
            mean = tl.load(means + at, mask=candidates < C, other=0.0)
            queries = read(q + user * D, candidates, C, head, HEADS, D, BLOCK_D)
            flow = read(grad + user * DV, candidates, C, head, HEADS, DV, BLOCK_V)
            products = product(k, tl.trans(queries))
            score = logits(products, bias, items, there, head, scale, BIAS_HEADS, 0)
            weight = tl.exp(score - top[None, :]) * inverse[None, :]
            into_v = add_product(into_v, weight, flow)
            slope = weight * (product(v, tl.trans(flow)) - mean[None, :])
            into_k = add_product(into_k, slope, queries)
            into_bias += tl.sum(slope, 1)
        at = items * HEADS + head
        inside = there[:, None] & (key_dims < D)[None, :]
        tl.store(grad_keys + at[:, None] * D + key_dims[None, :], into_k * scale, mask=inside)
        inside = there[:, None] & (value_dims < DV)[None, :]
        tl.store(grad_values + at[:, None] * DV + value_dims[None, :], into_v, mask=inside)
        if BIAS_HEADS > 0:
            tl.store(grad_bias + at, into_bias, mask=there)


def _plan(C: int, d: int, dv: int, dtype: torch.dtype) -> tuple[dict[str, int], dict[str, int]]:
    if dtype == torch.bfloat16:
        return tile_of(C, d, dv, {64: (64, 32), 128: (32, 32), 256: (16, 16)})
    return tile_of(C, d, dv, {64: (32, 32), 128: (16, 16), 256: (16, 16)})


def _differentiate(
    grad: Tensor, grad_lse: Tensor | None, q: Tensor, tables: Sequence[Tensor | None],
    fields: int, rows: Tensor, offsets: Tensor, bias: Tensor | None, scale: float, out: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of q, and of every item's key, value and bias [T, H]."""
    (B, C, H, d), dv, T = q.shape, out.shape[3], rows.shape[1]
    first, _ = plan(C, d, dv, q.dtype)
    pieces = cut(offsets, T, H * triton.cdiv(C, first["BLOCK_C"]))
    shapes = {"HEADS": H, "FIELDS": fields, "D": d, "DV": dv}
    shapes |= {"BIAS_HEADS": heads_of(bias), "SIZE": pieces.size}
    bias = None if bias is None else bias.contiguous()
    where = (rows, bias, pieces.bounds, pieces.starts, pieces.owners)
    grad, q = as_argument(grad), as_argument(q)
    grad_q, found = differentiate_queries(
        grad, grad_lse, q, out, tables, where, pieces, scale, shapes
    )
    tile, options = _plan(C, d, dv, q.dtype)
    widths = (H, d), (H, dv), (H if bias is not None else 0,)
    into_k, into_v, into_bias = (
        torch.empty((T, *width), dtype=torch.float32, device=q.device) for width in widths
    )
    _sweep_items[(pieces.count * H,)](
        grad, q, *tables, *where, *found, into_k, into_v, into_bias, B, C, T, scale, **shapes,
        **tile, **options,
    )  # fmt: skip
    return grad_q, into_k, into_v, into_bias


def _add_rows(row: Tensor, gradients: Sequence[Tensor]) -> list[Tensor]:
    """Return the rows of a table that items read, ascending, and the sums of their gradients."""
    known = (row >= 0).nonzero()[:, 0]
    if not len(known):
        return [known, *(gradient.new_empty((0, *gradient.shape[1:])) for gradient in gradients)]
    found, order = row[known].sort(stable=True)
    found, counts = torch.unique_consecutive(found, return_counts=True)
    order = known[order]
    sums = [add_runs(gradient.flatten(1), order, counts) for gradient in gradients]
    shaped = [total.view(-1, *one.shape[1:]) for total, one in zip(sums, gradients, strict=True)]
    return [found.long(), *shaped]


def code_attention_gradient(
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    codes: Tensor,
    key_tables: Sequence[Tensor],
    value_tables: Sequence[Tensor],
    offsets: Tensor,
    bias: Tensor | None,
    scale: float,
    levels: Sequence[int],
    groups: Sequence[int],
    hashing: str,
    packed: bool,
    out: Tensor,
    lse: Tensor,
) -> list[Tensor]:
    """Return what torch's operator `livrec::code_attention_gradient` does.

    The host waits for the numbers of rows, which it must know to return them. The softmax is
    computed again, as its rounded results would not let gradients of logits add up to 0.
    """
    with torch.cuda.device_of(q):
        rows = rows_of(codes, key_tables, levels, groups, hashing, packed)
        if len(codes) and q.numel():
            tables = [*as_arguments(key_tables), *as_arguments(value_tables)]
            grad_q, *items, into_bias = _differentiate(
                grad, grad_lse, q, tables, len(rows), rows, offsets, bias, scale, out
            )
        else:
            shapes = (key_tables[0].shape[1:], value_tables[0].shape[1:], q.shape[2:3])
            grad_q = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
            *items, into_bias = (
                torch.zeros((len(codes), *s), dtype=torch.float32, device=q.device) for s in shapes
            )
        if bias is None:
            into_bias = grad.new_empty(0, dtype=torch.float32)
        elif bias.dim() == 1:
            into_bias = into_bias.sum(1)
        sums = [one for row in rows for one in _add_rows(row, items)]
    return [grad_q, into_bias, *sums]


def compile_configs() -> Iterator[tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """Yield launches as those above compile: kernel, argument types, constants, options.

    A type ending in ":16" is known to be divisible by 16. "matrix": tensor cores are meant.
    """
    names = ("tops", "inverses", "means", "grad_keys", "grad_values", "grad_bias")
    own = dict.fromkeys(names, "*fp32:16")
    for types, constants, options in configs_of(_plan):
        yield _sweep_items, {**types, **own}, constants, options
