"""Code attention in Triton: tiles of keys and values are added up from the rows that codes name.

Every tile of items gathers the F rows of its keys from the tables, which the L2 cache holds while
they are small, adds them up in registers, meets all candidates of a block on tensor cores, and
does the same with its values: no key and no value is ever written to memory. A history is cut into
pieces that run side by side; their softmaxes are put together in the pieces' order.

Floors. From memory: the codes once, and per head 4 F bytes of row numbers and the bias of each
item; the tables once, if they fit in L2. Out of L2: F (d + dv) numbers per item and head, for each
block of up to 64 candidates. Products: 2 (d + dv) operations per candidate, head and item, three
times as many TF32 ones for float32; candidates are filled up to 16, so that few of them cost as
much as 16. Gathering outweighs the products until there are hundreds of candidates.
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
from ._code_tiles import decode, finite, logits, piece_at, product, read


@triton.jit(do_not_specialize=["B", "C", "T"])
def _attend(
    q, key_0, key_1, key_2, key_3, key_4, key_5, key_6, key_7, value_0, value_1, value_2, value_3,
    value_4, value_5, value_6, value_7, rows, bias, bounds, starts, owners, peaks, sums, parts,
    B, C, T, scale,
    HEADS: tl.constexpr, FIELDS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BIAS_HEADS: tl.constexpr, SIZE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Attend from a block of candidates to a piece of their history.

    peaks, sums, parts: the greatest logit, the sum of exponentials less it, and that of values
    times those, [pieces, HEADS, C] and [pieces, HEADS, C, DV].
    """
    keys = (key_0, key_1, key_2, key_3, key_4, key_5, key_6, key_7)
    values = (value_0, value_1, value_2, value_3, value_4, value_5, value_6, value_7)
    program, blocks = tl.program_id(0), tl.cdiv(C, BLOCK_C)
    head = program % HEADS
    candidates = program // HEADS % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    piece = (program // HEADS // blocks).to(tl.int64)
    owner, begin, end = piece_at(bounds, starts, owners, piece, B, SIZE)
    queries = read(q + owner * C * (HEADS * D), candidates, C, head, HEADS, D, BLOCK_D)
    peak = tl.full((BLOCK_C,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_C,), tl.float32)
    out = tl.zeros((BLOCK_C, BLOCK_V), tl.float32)
    for first in range(begin, end, BLOCK_T):
        items = first + tl.arange(0, BLOCK_T)
        there = items < end
        k = decode(keys, rows, items, there, head, T, HEADS, FIELDS, D, BLOCK_D)
        products = product(queries, tl.trans(k))
        score = logits(products, bias, items, there, head, scale, BIAS_HEADS, 1)
        top = tl.maximum(peak, tl.max(score, 1))
        shift = finite(top)
        terms = tl.exp(score - shift[:, None])
        old = tl.exp(peak - shift)
        total = total * old + tl.sum(terms, 1)
        v = decode(values, rows, items, there, head, T, HEADS, FIELDS, DV, BLOCK_V)
        out = out * old[:, None] + product(terms.to(v.dtype), v)
        peak = top
    at = (piece * HEADS + head) * C + candidates
    there = candidates < C
    tl.store(peaks + at, peak, mask=there)
    tl.store(sums + at, total, mask=there)
    dims = tl.arange(0, BLOCK_V)
    inside = there[:, None] & (dims < DV)[None, :]
    tl.store(parts + at[:, None] * DV + dims[None, :], out, mask=inside)


@triton.jit(do_not_specialize=["C"])
def _combine(
    peaks, sums, parts, starts, out, lse, C, HEADS: tl.constexpr, DV: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Put the pieces of a history together, in their order."""
    program, blocks = tl.program_id(0), tl.cdiv(C, BLOCK_C)
    head = program % HEADS
    candidates = program // HEADS % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    user = (program // HEADS // blocks).to(tl.int64)
    there, dims = candidates < C, tl.arange(0, BLOCK_V)
    inside = there[:, None] & (dims < DV)[None, :]
    peak = tl.full((BLOCK_C,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_C,), tl.float32)
    result = tl.zeros((BLOCK_C, BLOCK_V), tl.float32)
    for piece in range(tl.load(starts + user), tl.load(starts + user + 1)):
        at = (piece * HEADS + head) * C + candidates
        own = tl.load(peaks + at, mask=there, other=float("-inf"))
        part = tl.load(parts + at[:, None] * DV + dims[None, :], mask=inside, other=0.0)
        top = tl.maximum(peak, own)
        shift = finite(top)
        old, new = tl.exp(peak - shift), tl.exp(own - shift)
        total = total * old + tl.load(sums + at, mask=there, other=0.0) * new
        result = result * old[:, None] + part * new[:, None]
        peak = top
    alive = total > 0  # else the history is empty, or masked
    divisor = tl.where(alive, total, 1.0)
    to = (user * C + candidates) * HEADS + head
    tl.store(lse + to, tl.where(alive, peak + tl.log(divisor), float("-inf")), mask=there)
    result = (result / divisor[:, None]).to(out.dtype.element_ty)
    tl.store(out + to[:, None] * DV + dims[None, :], result, mask=inside)


_COMBINE_OPTIONS = {"num_warps": 8}


def _plan(C: int, d: int, dv: int, dtype: torch.dtype) -> tuple[dict[str, int], dict[str, int]]:
    if dtype == torch.float32:
        return tile_of(C, d, dv, {64: (32, 32), 128: (16, 16)})
    return tile_of(C, d, dv, {64: (64, 64), 128: (64, 32), 256: (16, 16)})


def code_attention(
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
) -> tuple[Tensor, Tensor]:
    """Return what torch's operator `livrec::code_attention` does.

    A code out of range counts as unknown, and offsets are kept to the codes there are: the host is
    not asked. What is not contiguous is copied, but for the codes.
    """
    B, C, H, d = q.shape
    T, dv, device = len(codes), value_tables[0].shape[2], q.device
    out, lse = q.new_empty((B, C, H, dv)), q.new_empty((B, C, H), dtype=torch.float32)
    if not out.numel():
        return out, lse
    tile, options = _plan(C, d, dv, q.dtype)
    programs = H * triton.cdiv(C, tile["BLOCK_C"])
    with torch.cuda.device_of(q):
        rows = rows_of(codes, key_tables, levels, groups, hashing, packed)
        pieces = cut(offsets, T, programs)
        peaks, sums = torch.empty((2, pieces.count, H, C), dtype=torch.float32, device=device)
        parts = torch.empty((pieces.count, H, C, dv), dtype=torch.float32, device=device)
        _attend[(pieces.count * programs,)](
            as_argument(q), *as_arguments(key_tables), *as_arguments(value_tables), rows,
            None if bias is None else bias.contiguous(), pieces.bounds, pieces.starts,
            pieces.owners, peaks, sums, parts, B, C, T, scale, HEADS=H, FIELDS=len(key_tables),
            D=d, DV=dv, BIAS_HEADS=heads_of(bias), SIZE=pieces.size, **tile, **options,
        )  # fmt: skip
        tile = {name: tile[name] for name in ("BLOCK_C", "BLOCK_V")}
        _combine[(B * programs,)](
            peaks, sums, parts, pieces.starts, out, lse, C, H, dv, **tile, **_COMBINE_OPTIONS
        )
    return out, lse


def compile_configs() -> Iterator[tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """Yield launches as those above compile: kernel, argument types, constants, options.

    A type ending in ":16" is known to be divisible by 16. "matrix": tensor cores are meant.
    """
    partial = dict.fromkeys(("peaks", "sums", "parts", "lse"), "*fp32:16")
    for at, (types, constants, options) in enumerate(configs_of(_plan)):
        yield _attend, {**types, **partial}, constants, options
        if at % 5 == 0:  # rows of each type, the widest last
            yield _combine, {**types, **partial}, constants, {"matrix": False, **_COMBINE_OPTIONS}
