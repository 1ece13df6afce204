"""The gradients of prefix n-gram tables in Triton: one sort for all levels of a group."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._prefix import Level, describe, extend, table_row
from ._runs import add_runs


@triton.jit(do_not_specialize=["M"])
def _deepest_keys(
    codes, code_row, code_column, keys, depths, M, LEVELS: tl.constexpr, FROM: tl.constexpr,
    TO: tl.constexpr, PACKED: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Write a group's deepest keys, zeros for unknown codes, and how many levels are known."""
    items = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    there = items < M
    own = codes + items * code_row
    key = tl.zeros((BLOCK_M,), tl.int64)
    known = there
    depth = tl.zeros((BLOCK_M,), tl.int32)
    for at in tl.static_range(FROM, TO):
        key, known = extend(key, known, own, code_column, there, LEVELS, at, PACKED)
        depth += known.to(tl.int32)
    tl.store(keys + items, key.to(keys.dtype.element_ty), mask=there)
    tl.store(depths + items, depth.to(tl.int8), mask=there)


@triton.jit(do_not_specialize=["count"])
def _hash(
    keys, rows, count, LEVELS: tl.constexpr, AT: tl.constexpr, HASHING: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    key = tl.load(keys + at, mask=at < count, other=0).to(tl.int64)
    tl.store(rows + at, table_row(key, LEVELS, AT, HASHING), mask=at < count)


_KEYS_TILE = {"BLOCK_M": 256}


def _rows(keys: Tensor, levels: tuple[Level, ...], at: int, hashing: str) -> Tensor:
    rows = torch.empty(len(keys), dtype=torch.int64, device=keys.device)
    grid = (triton.cdiv(len(keys), _KEYS_TILE["BLOCK_M"]),)
    _hash[grid](keys, rows, len(keys), levels, at, hashing, **_KEYS_TILE)
    return rows


def _add_level(
    part: Tensor, members: Tensor, keys: Tensor, levels: tuple[Level, ...], at: int, hashing: str,
    owners: Tensor | None, offsets: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    """Return the rows of a level and their sums, given its items in the order of their keys."""
    if not len(members):
        rows = torch.empty(0, dtype=torch.int64, device=part.device)
        return [rows, torch.empty((0, part.shape[1]), dtype=torch.float32, device=part.device)]
    found, counts = torch.unique_consecutive(keys, return_counts=True)
    sums = add_runs(part, members, counts, owners, offsets)
    if levels[at].rows >= levels[at].keys:
        return [found.long(), sums]
    rows, order = _rows(found, levels, at, hashing).sort(stable=True)
    rows, counts = torch.unique_consecutive(rows, return_counts=True)
    return [rows, add_runs(sums, order, counts)]


def _owners(offsets: Tensor, count: int) -> Tensor:
    """Return the history of each item; of items beyond all, the last."""
    items = torch.arange(count, device=offsets.device)
    return (torch.searchsorted(offsets, items, right=True) - 1).clamp_(0, len(offsets) - 2)


def _sort(
    codes: Tensor, levels: tuple[Level, ...], first: int, last: int, packed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a group's deepest keys in order, the item of each, and how many levels it knows."""
    count, device = len(codes), codes.device
    dtype = torch.int32 if levels[last - 1].keys <= 2**31 else torch.int64
    keys = torch.empty(count, dtype=dtype, device=device)
    depths = torch.empty(count, dtype=torch.int8, device=device)
    if count:
        _deepest_keys[(triton.cdiv(count, _KEYS_TILE["BLOCK_M"]),)](
            codes, *codes.stride(), keys, depths, count, levels, first, last, packed, **_KEYS_TILE
        )
    keys, order = keys.sort(stable=True)
    return keys, order, depths[order]


def prefix_ngram_gradient(
    grad: Tensor,
    codes: Tensor,
    sizes: Sequence[int],
    rows: Sequence[int],
    dims: Sequence[int],
    mode: str,
    offsets: Tensor | None,
    pool: str | None,
    hashing: str,
    groups: Sequence[int],
    packed: bool,
) -> list[Tensor]:
    """Return what torch's operator `livrec::prefix_ngram_gradient` does.

    The host waits for the numbers of rows, which it must know to return them. Keys are prefixes of
    deeper ones, so the order of a group's deepest keys is one of every level's.
    """
    levels = describe(sizes, groups, rows, dims, mode == "sum")
    codes = codes if len(grad) else codes[:0]
    owners = means = None
    out, first = list[Tensor](), 0
    with torch.cuda.device_of(grad):
        if offsets is not None and len(codes):
            offsets = offsets.contiguous()
            owners = _owners(offsets, len(codes))
            means = offsets if pool == "mean" else None
        for size in groups:
            last = first + size
            keys, order, depths = _sort(codes, levels, first, last, packed)
            for at in range(first, last):
                known = (depths > at - first).nonzero()[:, 0]
                part = grad[:, levels[at].start : levels[at].start + dims[at]]
                prefixes = keys[known] // (levels[last - 1].keys // levels[at].keys)
                items = order[known]
                out += _add_level(part, items, prefixes, levels, at, hashing, owners, means)
            first = last
    return out


def compile_configs() -> Iterator[tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """Yield launches as those above compile: kernel, argument types, constants, options.

    A type ending in ":16" is known to be divisible by 16. "matrix": tensor cores are meant.
    """
    plain = {"matrix": False}
    levels = describe((300, 256, 256), (3,), (300, 50_000, 1_000_000), (64,) * 3, False)
    types = {
        **{"code_row": "i32", "M": "i64", "count": "i64", "rows": "*i64:16", "depths": "*i8:16"},
    }
    for codes, keys, packed in (("*i16:16", "*i32:16", False), ("*u8:16", "*i64:16", True)):
        given = {**types, "codes": codes, "keys": keys}
        constants = {"code_column": 1, "LEVELS": levels, "FROM": 0, "TO": 3, "PACKED": packed}
        yield _deepest_keys, given, {**constants, **_KEYS_TILE}, plain
        for hashing in ("modulo", "murmur3", "order_preserving"):
            yield _hash, given, {"LEVELS": levels, "AT": 2, "HASHING": hashing, **_KEYS_TILE}, plain
