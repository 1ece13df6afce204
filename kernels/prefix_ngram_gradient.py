"""The gradients of prefix n-gram tables in Triton: one sort for all levels of a group."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._prefix import Level, describe, extend, table_row


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


@triton.jit(do_not_specialize=["runs", "D"])
def _add_pieces(
    values, value_row, value_column, order, owners, offsets, starts, pieces, run_of, out, runs, D,
    RUN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Add up a run of rows, or where `pieces` counts its pieces, RUN of its rows.

    order: the row at each place, or None for the place itself. owners: the row that has an item's
    value, or None. offsets: of the histories, where the value is divided by their lengths.
    """
    piece = tl.program_id(0).to(tl.int64)
    dims = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    if pieces is None:
        begin = tl.load(starts + piece)
        end = tl.load(starts + piece + 1)
    else:
        run = tl.load(run_of + piece)
        there = run < runs  # the grid has room for more pieces than there may be
        begin = tl.load(starts + run)
        begin += (piece - tl.load(pieces + run)) * RUN
        end = tl.load(starts + run + 1, mask=there, other=0)
        end = tl.minimum(begin + RUN, end)
    total = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for first in range(begin, end, BLOCK_M):
        row = first + tl.arange(0, BLOCK_M)
        inside = row < end
        if order is not None:
            row = tl.load(order + row, mask=inside, other=0)
        if owners is not None:
            row = tl.load(owners + row, mask=inside, other=0)
        at = row[:, None] * value_row + dims[None, :] * value_column
        value = tl.load(values + at, mask=inside[:, None] & (dims < D)[None, :], other=0.0)
        value = value.to(tl.float32)
        if offsets is not None:
            length = tl.load(offsets + row + 1, mask=inside, other=1)
            length -= tl.load(offsets + row, mask=inside, other=0)
            length = tl.maximum(length, 1).to(tl.float32)
            value = tl.div_rn(value, tl.broadcast_to(length[:, None], value.shape))
        total += value
    tl.store(out + piece * D + dims, tl.sum(total, 0), mask=dims < D)


_KEYS_TILE = {"BLOCK_M": 256}


def _plan(dim: int) -> tuple[dict[str, int], dict[str, int]]:
    """Return the tile and the launch options for D."""
    width = min(128, max(16, triton.next_power_of_2(dim)))
    return {"RUN": 256, "BLOCK_M": min(32, 1024 // width), "BLOCK_D": width}, {"num_warps": 1}


def _add_runs(
    values: Tensor,
    order: Tensor,
    counts: Tensor,
    owners: Tensor | None = None,
    offsets: Tensor | None = None,
) -> Tensor:
    """Return the sums of the rows that lie `counts` by `counts` in `order`: float32 [runs, D].

    A long run is cut into pieces, and their sums are added up likewise: always the same ones.
    """
    runs, dim = len(counts), values.shape[1]
    tile, options = _plan(dim)
    run, columns = tile["RUN"], triton.cdiv(dim, tile["BLOCK_D"])
    total, longest = len(order), int(counts.max())
    starts = _from_zero(counts)
    places: Tensor | None = order
    while True:
        pieces, run_of, programs = None, None, runs
        if longest > run:
            programs = runs + total // run
            pieces = _from_zero((starts.diff() + (run - 1)) // run)
            every = torch.arange(programs, device=values.device)
            run_of = torch.searchsorted(pieces[1:], every, right=True)
        out = torch.empty((programs, dim), dtype=torch.float32, device=values.device)
        _add_pieces[(programs, columns)](
            values, *values.stride(), places, owners, offsets, starts, pieces, run_of, out,
            runs, dim, **tile, **options,
        )  # fmt: skip
        if pieces is None:
            return out
        values, places, owners, offsets, starts = out, None, None, None, pieces
        total, longest = programs, triton.cdiv(longest, run)


def _from_zero(counts: Tensor) -> Tensor:
    """Return where the runs of these lengths begin, and where the last one ends."""
    starts = counts.new_zeros(len(counts) + 1)
    torch.cumsum(counts, 0, out=starts[1:])
    return starts


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
    sums = _add_runs(part, members, counts, owners, offsets)
    if levels[at].rows >= levels[at].keys:
        return [found.long(), sums]
    rows, order = _rows(found, levels, at, hashing).sort(stable=True)
    rows, counts = torch.unique_consecutive(rows, return_counts=True)
    return [rows, _add_runs(sums, order, counts)]


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
        **dict.fromkeys(("code_row", "D"), "i32"),
        **dict.fromkeys(("M", "count", "runs"), "i64"),
        **dict.fromkeys(("order", "owners", "offsets", "starts"), "*i64:16"),
        **dict.fromkeys(("pieces", "run_of", "rows"), "*i64:16"),
        **{"depths": "*i8:16", "out": "*fp32:16", "value_row": "i32:16"},
    }
    for codes, keys, packed in (("*i16:16", "*i32:16", False), ("*u8:16", "*i64:16", True)):
        given = {**types, "codes": codes, "keys": keys}
        constants = {"code_column": 1, "LEVELS": levels, "FROM": 0, "TO": 3, "PACKED": packed}
        yield _deepest_keys, given, {**constants, **_KEYS_TILE}, plain
        for hashing in ("modulo", "murmur3", "order_preserving"):
            yield _hash, given, {"LEVELS": levels, "AT": 2, "HASHING": hashing, **_KEYS_TILE}, plain
    none = {"owners": None, "offsets": None}
    whole = {"pieces": None, "run_of": None}
    for dim in (16, 64, 256):
        tile, options = _plan(dim)
        for values in ("*fp32:16", "*bf16:16"):
            for given in ({}, none, {**none, **whole}, {**none, **whole, "order": None}):
                constants = {**tile, **given, "value_column": 1}
                yield _add_pieces, {**types, "values": values}, constants, {**options, **plain}
    strided = {**types, "values": "*fp16", "value_row": "i64", "value_column": "i64"}
    tile, options = _plan(100)
    yield _add_pieces, strided, tile, {**options, **plain}
