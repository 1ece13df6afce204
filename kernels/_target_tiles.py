"""Histories cut into pieces, and tiles of their rows: what the sweeps of target attention share.

A history is cut into pieces of one size, by sizes that the host knows alone. Where users differ in
their candidates, none is cut into more than a number of pieces that bounds what the pieces leave.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._code_rows import DTYPES, with_dtypes
from ._code_tiles import product

Plan = tuple[dict[str, int], dict[str, int]]  # a kernel's tile, and its launch options
Config = tuple[dict[str, str], dict[str, Any], dict[str, Any]]  # types, constants and options
Tiles = dict[int, list[tuple[int, int, int, int]]]


@triton.jit
def rows_at(
    values, first, count, head, ROWS: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, FROM=0,
):  # fmt: skip
    """Return a head's rows from `first` on, of which there are `count`, of values [., HEADS, D].

    Of BLOCK_D columns, those from FROM on.
    """
    rows, dims = tl.arange(0, ROWS), FROM + tl.arange(0, BLOCK_D)
    inside = (rows < count)[:, None] & (dims < D)[None, :]
    own = values + (first * (HEADS * D) + head * D)  # 64 bits wide; within a tile 32 suffice
    return tl.load(own + (rows * (HEADS * D))[:, None] + dims[None, :], mask=inside, other=0.0)


@triton.jit
def products_of(
    a_tile, b_tile, a, a_first, a_count, b, b_first, b_count, head, HEADS: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Return the products of two tiles that `rows_at` has read: of each row with each.

    Tensor cores want a float32 factor in registers, as two TF32 parts: rows wider than WHOLE are
    read again, 64 columns at a time.
    """
    if BLOCK_D <= WHOLE or a_tile.dtype != tl.float32:
        total = product(a_tile, tl.trans(b_tile))
    else:
        ROWS: tl.constexpr = a_tile.shape[0]
        ITEMS: tl.constexpr = b_tile.shape[0]
        total = tl.zeros((ROWS, ITEMS), tl.float32)
        for part in range(0, BLOCK_D, 64):  # unrolled, all parts would wait in registers
            a_part = rows_at(a, a_first, a_count, head, ROWS, HEADS, D, 64, part)
            b_part = rows_at(b, b_first, b_count, head, ITEMS, HEADS, D, 64, part)
            total = tl.dot(a_part, tl.trans(b_part), total, input_precision="tf32x3")
    return total


@triton.jit
def put_rows(
    values, tile, first, count, head, HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Store what `rows_at` would read."""
    rows, dims = tl.arange(0, tile.shape[0]), tl.arange(0, BLOCK_D)
    inside = (rows < count)[:, None] & (dims < D)[None, :]
    own = values + (first * (HEADS * D) + head * D)
    to = own + (rows * (HEADS * D))[:, None] + dims[None, :]
    tl.store(to, tile.to(values.dtype.element_ty), mask=inside)


@triton.jit
def candidates_of(user, q_bounds, C):
    """Return the first of a user's candidates among all, and how many there are."""
    if q_bounds is None:
        first, count = user * C, C
    else:
        first = tl.load(q_bounds + user)
        count = (tl.load(q_bounds + user + 1) - first).to(tl.int32)
    return first, count


@triton.jit
def piece_at(bounds, q_bounds, starts, owners, piece, B, C, size, most):
    """Return where a piece begins and how many rows it has, and its user's candidates.

    And where its results begin, one row for each of them; no candidates beyond all pieces.
    """
    owner = tl.load(owners + piece)
    there = owner < B
    owner = tl.minimum(owner, B - 1)
    low, high = tl.load(bounds + owner), tl.load(bounds + owner + 1)
    local = piece - tl.load(starts + owner)
    size = tl.maximum(size, tl.cdiv(high - low, most))
    begin = low + local * size
    rows = tl.minimum(high - begin, size).to(tl.int32)
    first, count = candidates_of(owner, q_bounds, C)
    count = tl.where(there, count, 0)
    if q_bounds is None:
        place = piece * C
    else:
        place = first * most + local * count
    return begin, tl.where(there, rows, 0), first, count, place


@triton.jit
def logits(
    products, bias, first, count, head, scale, HEADS: tl.constexpr, PER_HEAD: tl.constexpr,
    AXIS: tl.constexpr, mine=0, MIXED: tl.constexpr = 1,
):  # fmt: skip
    """Return scale * products + bias, and which rows are there and not taken out by their bias.

    AXIS: that of rows. Logits of rows beyond `count` are -inf. MIXED: candidates are of so many
    heads, in turn, from `mine` on; else all of `head`.
    """
    rows = tl.arange(0, products.shape[AXIS])
    there = rows < count
    score = products * scale
    if bias is not None and MIXED > 1:
        heads = (mine + tl.arange(0, products.shape[1 - AXIS])) % MIXED
        own = bias + first * MIXED + tl.expand_dims(rows * MIXED, 1 - AXIS)
        own += tl.expand_dims(heads, AXIS)
        added = tl.load(own, mask=tl.expand_dims(there, 1 - AXIS), other=float("-inf"))
        score += added
        seen = added != float("-inf")
    elif bias is not None:
        own = bias + (first * HEADS + head if PER_HEAD else first)
        added = tl.load(own + rows * (HEADS if PER_HEAD else 1), mask=there, other=float("-inf"))
        score += tl.expand_dims(added, 1 - AXIS)
        seen = tl.expand_dims(added != float("-inf"), 1 - AXIS)
    else:
        seen = tl.expand_dims(there, 1 - AXIS)
        score = tl.where(seen, score, float("-inf"))
    return score, seen


@triton.jit
def weights(score, there, ACTIVATION: tl.constexpr):
    """Return the activations of logits, element by element; 0 for rows that are not there."""
    if ACTIVATION == "silu":
        score *= tl.sigmoid(score)
    if ACTIVATION == "sigmoid":
        score = tl.sigmoid(score)
    return tl.where(there, score, 0.0)


@triton.jit
def weights_and_slopes(score, there, ACTIVATION: tl.constexpr):
    """Return the activations of logits and their derivatives."""
    slope = tl.full(score.shape, 1.0, tl.float32)
    if ACTIVATION == "silu":
        part = tl.sigmoid(score)
        slope = part * (1 + score * (1 - part))
        score *= part
    if ACTIVATION == "sigmoid":
        score = tl.sigmoid(score)
        slope = score * (1 - score)
    return tl.where(there, score, 0.0), tl.where(there, slope, 0.0)


@dataclass(frozen=True)
class Pieces:
    """Histories cut into pieces of `size` rows, or more where they would be more than `most`.

    bounds, q_bounds: where histories, and users' candidates, begin and end, within those there are.
    starts: the first piece of each history. owners: the history of each of `count` pieces, B for
    those beyond all. rows: of results, one for each candidate of each piece. lanes: the programs
    that share the blocks of candidates of a piece; each takes any number of them.
    """

    bounds: Tensor
    q_bounds: Tensor | None
    starts: Tensor
    owners: Tensor
    count: int
    size: int
    most: int
    rows: int
    lanes: int

    @property
    def arguments(self) -> tuple[Tensor | None, ...]:
        """The tensors, as the sweeps take them."""
        return self.bounds, self.q_bounds, self.starts, self.owners


def candidates_per_user(q: Tensor, users: int) -> int:
    """Return how many candidates a user has, on the average where q is jagged [Q, H, d]."""
    return q.shape[1] if q.dim() == 4 else triton.cdiv(len(q), max(users, 1))


def ascending(offsets: Tensor, end: int) -> Tensor:
    """Return offsets that ascend from 0 to `end`: those given, if they do."""
    bounds = offsets.clamp(0, end)
    bounds[0] = 0
    bounds[-1] = end
    return bounds.cummax(0).values


def cut(q: Tensor, offsets: Tensor, q_offsets: Tensor | None, T: int, block: int) -> Pieces:
    """Cut histories into pieces, each for users' candidates in blocks of `block`.

    Sizes alone decide on the cut, so that sums are the same on every chip.
    """
    users, C = len(offsets) - 1, candidates_per_user(q, len(offsets) - 1)
    lanes, heads = triton.cdiv(C, block), q.shape[-2]
    size = min(4096, max(256, triton.next_power_of_2(T * heads * lanes // 2048)))
    most = T + 1
    bounds = ascending(offsets, T)
    lengths = bounds.diff()
    sizes: Tensor | int = size
    q_bounds = None
    if q_offsets is not None:
        most = max(4, min(64, triton.next_power_of_2(4096 // (users * heads))))
        q_bounds = ascending(q_offsets, len(q))
        sizes = ((lengths + (most - 1)) // most).clamp(min=size)
    starts = torch.zeros_like(bounds)
    torch.cumsum((lengths + (sizes - 1)) // sizes, 0, out=starts[1:])
    count = users + T // size
    every = torch.arange(count, device=offsets.device)
    owners = torch.searchsorted(starts[1:], every, right=True)
    rows = count * C if q_offsets is None else len(q) * most
    return Pieces(bounds, q_bounds, starts, owners, count, size, most, rows, lanes)


def tile_of(C: int, d: int, dv: int, tiles: Tiles) -> Plan:
    """Return a kernel's tile and launch options for C candidates, d and dv.

    tiles: by the widest row, and the fewest candidates first, tiles that leave no register short:
    of candidates and rows, and the warps and stages that go with them.
    """
    widths = [max(16, triton.next_power_of_2(dim)) for dim in (d, dv)]
    able = next(tiles[width] for width in tiles if width >= max(widths))
    fitting = (tile for tile in able if tile[0] >= C)
    candidates, rows, warps, stages = next(fitting, able[-1])
    if triton.knobs.runtime.interpret:  # whose time goes by operations, however many numbers each
        rows = 128
    tile = {"BLOCK_C": candidates, "BLOCK_T": rows, "BLOCK_D": widths[0], "BLOCK_V": widths[1]}
    return tile, {"num_warps": warps, "num_stages": stages}


def bias_argument(bias: Tensor | None) -> tuple[Tensor | None, bool]:
    """Return a bias as kernels take it, and whether it has a column for each head."""
    return (None, False) if bias is None else (bias.contiguous(), bias.dim() == 2)


def configs_of(
    plan: Callable[[int, int, int, torch.dtype], Plan],
    shared: Callable[[int, int, int, torch.dtype], Plan] | None = None,
) -> Iterator[tuple[dict[str, str], dict[str, Any], dict[str, Any]]]:
    """Yield the types, constants and options of a sweep at shapes that try its tiles.

    shared: the plan where heads share rows, if it is another.
    """
    names = ("q", "k", "v", "grad", "out", "grad_q", "grad_k", "grad_v")
    shapes = [(1, 1, 16, 16, "softmax"), (64, 4, 64, 64, "softmax"), (4, 2, 100, 20, "none"),
              (16, 4, 64, 64, "silu"), (1024, 2, 128, 128, "softmax"),
              (16, 8, 128, 128, "sigmoid"), (1000, 1, 256, 256, "softmax")]  # fmt: skip
    for dtype, (C, H, d, dv, activation) in with_dtypes(shapes):
        types = dict.fromkeys(names, DTYPES[dtype])
        types |= dict.fromkeys(("bounds", "q_bounds", "starts", "owners"), "*i64:16")
        types |= {"bias": "*fp32:16", "scale": "fp32"}
        types |= dict.fromkeys(("B", "C", "size", "most", "lanes"), "i32")
        tile, options = plan(C, d, dv, dtype)
        constants = {**tile, "HEADS": H, "D": d, "DV": dv, "ACTIVATION": activation}
        constants |= {"PER_HEAD": True}
        if dtype == torch.bfloat16:
            constants |= {"PER_HEAD": False, "bias": None}
        if C != 1000:
            constants["q_bounds"] = None
        yield types, {**constants, "MIXED": 1}, {**options, "matrix": True}
        if d == dv:  # the same where heads share rows
            tile, options = (shared or plan)(C * H, d, d, dtype)
            alone = {**constants, **tile, "HEADS": 1, "v": None, "PER_HEAD": False}
            alone["MIXED"] = 1 if "bias" in constants else H
            yield types, alone, {**options, "matrix": True}


def few_of(configs: Sequence[Config]) -> Sequence[Config]:
    """Return those for kernels that add up pieces: rows of each type, the widest last."""
    return [config for config in configs if "v" not in config[1]][::3]
