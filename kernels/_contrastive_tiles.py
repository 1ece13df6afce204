"""Tiles of logits of the contrastive loss: what its two passes share.

A block of one side, queries or keys, meets the other side tile by tile; the same code serves rows
and columns, with the roles swapped. Logits are in base 2: s_ij log2(e) = p_ij scale + bias_j, where
the bias is -log_q_j log2(e), and -inf for what is not there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_ROWS = 128  # of a block; sides are filled up to a multiple of it
WHOLE = 256  # columns that a tile holds at once
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
Tile = tuple[int, int, int, int]  # own rows, other rows, warps and stages


@triton.jit
def inverse_of(temperature):
    """Return 1 / T in float64."""
    return 1.0 / tl.load(temperature).to(tl.float64)


@triton.jit
def expm1(x):
    """Return exp(x) - 1 with all its digits, in float64, for x <= 0."""
    grown = tl.exp(x)
    less = grown - 1.0
    plain = (less == -1.0) | (grown == 1.0)
    exact = less * (x / tl.log(tl.where(plain, 2.0, grown)))
    return tl.where(grown == 1.0, x, tl.where(less == -1.0, -1.0, exact))


@triton.jit
def scales_of(temperature):
    """Return two parts of log2(e) / T, the second small and positive: products may be -inf."""
    exact = inverse_of(temperature) * LOG2_E
    most = (exact * (1.0 - 2.0**-23)).to(tl.float32)
    return most, (exact - most.to(tl.float64)).to(tl.float32)


@triton.jit
def logits_of(products, scale, rest, shift, bias):
    """Return products times both parts of the scale + shift + bias.

    What is large cancels before anything is rounded.
    """
    return tl.fma(products, scale, shift) + tl.fma(products, rest, bias)


@triton.jit
def units_at(units, first, ROWS: tl.constexpr, STRIDE: tl.constexpr, COLUMNS: tl.constexpr, FROM=0):
    """Return rows of units [., STRIDE] from `first` on, COLUMNS of them from FROM on."""
    rows, dims = tl.arange(0, ROWS), FROM + tl.arange(0, COLUMNS)
    own = units + tl.cast(first, tl.int64) * STRIDE  # 64 bits wide; within a tile 32 suffice
    at = own + (rows * STRIDE)[:, None] + dims[None, :]
    if STRIDE % COLUMNS == 0:
        tile = tl.load(at)
    else:
        tile = tl.load(at, mask=(dims < STRIDE)[None, :], other=0.0)
    return tile


@triton.jit
def products_of(
    tile, own, own_first, others, first, ROWS: tl.constexpr, OTHERS: tl.constexpr,
    STRIDE: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Return the products of a block's units with those of a tile of others.

    tile: the block's units where PART is all of a row; else they are read again, part by part.
    """
    if PART == STRIDE:
        total = tl.dot(
            tile,
            tl.trans(units_at(others, first, OTHERS, STRIDE, STRIDE)),
            input_precision="tf32x3",
        )
    else:
        total = tl.zeros((ROWS, OTHERS), tl.float32)
        for part in range(0, STRIDE, PART):  # unrolled, all parts would wait in registers
            a = units_at(own, own_first, ROWS, STRIDE, PART, part)
            b = units_at(others, first, OTHERS, STRIDE, PART, part)
            total = tl.dot(a, tl.trans(b), total, input_precision="tf32x3")
    return total


@triton.jit
def equal_ids(ids, own, others, COUNT, EVERY: tl.constexpr):
    """Return where ids [COUNT] of own and other rows are equal; EVERY: none lies beyond COUNT."""
    mine = tl.load(ids + own, mask=own < COUNT, other=0)
    theirs = tl.load(ids + others, mask=others < COUNT, other=0)
    same = mine[:, None] == theirs[None, :]
    if not EVERY:
        same &= (own < COUNT)[:, None] & (others < COUNT)[None, :]
    return same


@triton.jit
def kept_bits(pairs, own_row, rows, words, first, OTHERS: tl.constexpr):
    """Return the bits of false negatives of some rows of `pairs` [rows, words], from `first` on."""
    word = first // 32
    at = pairs + own_row.to(tl.int64) * words
    column = tl.arange(0, OTHERS)
    here = own_row < rows
    held = tl.load(at + word, mask=here & (word < words), other=0)[:, None]
    for more in tl.static_range(1, OTHERS // 32):
        later = tl.load(at + (word + more), mask=here & (word + more < words), other=0)
        held = tl.where((column >= more * 32)[None, :], later[:, None], held)
    return ((held >> ((first + column) % 32)[None, :]) & 1) != 0


@triton.jit
def masks_of(
    query_ids, key_ids, group_ids, pairs, strip, own_first, first, words, rows, query_count,
    key_count, group_count, ROWS: tl.constexpr, OTHERS: tl.constexpr, EVERY_QUERY: tl.constexpr,
    EVERY_KEY: tl.constexpr, EVERY_GROUP: tl.constexpr,
):  # fmt: skip
    """Return which pairs of a tile are hidden, and which are positives but for the own one.

    The own pair is among the hidden: it is added at the end, in more digits.
    """
    own = own_first + tl.arange(0, ROWS)
    others = first + tl.arange(0, OTHERS)
    diagonal = own[:, None] == others[None, :]
    hidden = diagonal
    if query_ids is not None:
        hidden |= equal_ids(query_ids, own, others, query_count, EVERY_QUERY)
    if key_ids is not None:
        hidden |= equal_ids(key_ids, own, others, key_count, EVERY_KEY)
    if pairs is not None:
        hidden |= kept_bits(pairs, own - strip, rows, words, first, OTHERS)
    positive = hidden
    if group_ids is not None:
        same = equal_ids(group_ids, own, others, group_count, EVERY_GROUP)
        hidden = (hidden & ~same) | diagonal
        positive = same & ~diagonal
    return hidden, positive


@triton.jit
def own_products(
    queries, keys, row, there, STRIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Return the products of queries with their own keys, in float64."""
    total = tl.zeros((ROWS,), tl.float64)
    for start in range(0, STRIDE, COLUMNS):
        dims = start + tl.arange(0, COLUMNS)
        inside = there[:, None] & (dims < STRIDE)[None, :]
        at = row.to(tl.int64)[:, None] * STRIDE + dims[None, :]
        a = tl.load(queries + at, mask=inside, other=0.0).to(tl.float64)
        total += tl.sum(a * tl.load(keys + at, mask=inside, other=0.0).to(tl.float64), 1)
    return total


@dataclass(frozen=True)
class Side:
    """Queries, or keys: units [padded, stride], and the bias of each [padded], in base 2.

    norms [count]: what units were divided by, 0 for less than 1e-12; None: they are as given.
    """

    units: Tensor
    bias: Tensor
    norms: Tensor | None
    count: int


@dataclass(frozen=True)
class Masks:
    """Ids by row, for as many rows as have one, and bits of false negatives for a strip of rows.

    pairs: int32 [rows, words] of the rows from `strip` on.
    """

    query_ids: Tensor | None = None
    key_ids: Tensor | None = None
    group_ids: Tensor | None = None
    pairs: Tensor | None = None
    strip: int = 0

    def arguments(self, own: int, others: int) -> dict[str, Any]:
        """Return the keyword arguments of a kernel for so many own and other rows."""
        pairs, found = self.pairs, {"pairs": self.pairs, "strip": self.strip}
        found["rows"], found["words"] = (0, 0) if pairs is None else pairs.shape
        for name in ("query", "key", "group"):
            ids = getattr(self, f"{name}_ids")
            count = 0 if ids is None else len(ids)
            found[f"{name}_ids"], found[f"{name}_count"] = ids, count
            found[f"EVERY_{name.upper()}"] = count >= max(own, others)
        return found


def padded(count: int) -> int:
    """Return how many rows a side of `count` has with those that fill its last block."""
    return triton.cdiv(count, MOST_ROWS) * MOST_ROWS


def stride_of(dim: int) -> int:
    """Return how many numbers a row of units takes."""
    return max(16, triton.next_power_of_2(dim)) if dim <= WHOLE else triton.cdiv(dim, 64) * 64


def splits_of(own: int, others: int, block: int) -> int:
    """Return into how many runs the other side is cut, each for programs of its own.

    Sizes alone decide on it, so that sums are the same on every chip.
    """
    return max(1, min(264 // triton.cdiv(own, block), triton.cdiv(others, MOST_ROWS), 16))


def is_new(tensor: Tensor) -> bool:
    """Say whether a tensor's chip multiplies by groups of warps, from memory that they share."""
    return tensor.is_cuda and torch.cuda.get_device_capability(tensor.device)[0] >= 9


def tile_of(
    stride: int, dtype: torch.dtype, tiles: dict[int, Tile]
) -> tuple[dict[str, int], dict[str, int]]:
    """Return a kernel's tile and launch options; tiles: by the widest row."""
    width = next((width for width in tiles if width >= stride), max(tiles))
    own, others, warps, stages = tiles[width]
    if triton.knobs.runtime.interpret:  # whose time goes by operations, however many numbers each
        others = 128
    whole = 64 if dtype == torch.float32 else WHOLE  # float32 meets tensor cores from registers
    tile = {"ROWS": own, "OTHERS": others, "STRIDE": stride}
    tile["PART"] = stride if stride <= whole else 64
    return tile, {"num_warps": warps, "num_stages": stages}


# Arguments whose values do not make another kernel.
SIZES = ["strip", "rows", "words", "own_count", "others_count", "splits"]
SIZES += ["query_count", "key_count", "group_count"]

KINDS = {torch.float32: "*fp32:16", torch.bfloat16: "*bf16:16", torch.float16: "*fp16:16"}
_DIMS = {torch.float32: (128, 768), torch.bfloat16: (64, 256, 768), torch.float16: (128,)}


def configs_of() -> Iterator[tuple[torch.dtype, int, bool, dict[str, str], dict[str, Any]]]:
    """Yield the dtype, stride, whether it is for new chips, types and constants of launches."""
    integers = ("count", "splits", "strip", "rows", "words", "query_count", "key_count")
    types = dict.fromkeys((*integers, "group_count", "others_count", "own_count"), "i32")
    types |= dict.fromkeys(("query_ids", "key_ids", "group_ids"), "*i64:16")
    types |= {"pairs": "*i32:16", "temperature": "*fp32"}
    every: dict[str, Any] = dict.fromkeys(("EVERY_QUERY", "EVERY_KEY", "EVERY_GROUP"), False)
    plain = dict.fromkeys(("query_ids", "key_ids", "group_ids", "pairs"))
    for dtype, kind in KINDS.items():
        own = types | dict.fromkeys(("own", "others"), kind)
        for dim, none in product(_DIMS[dtype], (plain, {})):
            yield dtype, stride_of(dim), True, own, {**none, **every}
            if dim >= 256:  # an old chip's tiles are the same for all
                yield dtype, stride_of(dim), False, own, {**none, **every}
