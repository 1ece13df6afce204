"""Prefix n-gram lookup in Triton: one launch makes keys, hashes them and gathers all levels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._prefix import Level, describe, extend, table_row

MOST_LEVELS = 8  # that a launch takes: each table is an argument


@triton.jit
def _gather(
    table, scales, key, known, d, LEVELS: tl.constexpr, AT: tl.constexpr, HASHING: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Return BLOCK_D columns from d on of the rows of a table, float32 where they have scales."""
    row = table_row(key, LEVELS, AT, HASHING)
    dims = d + tl.arange(0, BLOCK_D)
    at = row[:, None] * LEVELS[AT].row_stride
    at += dims.to(tl.int64)[None, :] * LEVELS[AT].column_stride
    mask = known[:, None] & (dims < LEVELS[AT].dim)[None, :]
    value = tl.load(table + at, mask=mask, other=0)
    if scales is not None:
        scale = tl.load(scales + row, mask=known, other=0.0)
        value = value.to(tl.float32) * scale[:, None]
    return value


@triton.jit
def _copy(
    table, scales, key, known, there, to, LEVELS: tl.constexpr, AT: tl.constexpr,
    HASHING: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write the rows of a table to the rows that begin at `to`."""
    for d in range(0, LEVELS[AT].dim, BLOCK_D):
        value = _gather(table, scales, key, known, d, LEVELS, AT, HASHING, BLOCK_D)
        dims = d + tl.arange(0, BLOCK_D)
        inside = there[:, None] & (dims < LEVELS[AT].dim)[None, :]
        tl.store(to[:, None] + dims[None, :], value, mask=inside)


@triton.jit(do_not_specialize=["M"])
def _lookup_items(
    codes, code_row, code_column, table_0, table_1, table_2, table_3, table_4, table_5, table_6,
    table_7, scales_0, scales_1, scales_2, scales_3, scales_4, scales_5, scales_6, scales_7, out, M,
    LEVELS: tl.constexpr, WIDTH: tl.constexpr, SUM: tl.constexpr, HASHING: tl.constexpr,
    PACKED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Look up a block of rows at every level."""
    tables = (table_0, table_1, table_2, table_3, table_4, table_5, table_6, table_7)
    scales = (scales_0, scales_1, scales_2, scales_3, scales_4, scales_5, scales_6, scales_7)
    items = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    there = items < M
    own = codes + items * code_row
    key = tl.zeros((BLOCK_M,), tl.int64)
    known = there
    if SUM:
        BLOCK_D: tl.constexpr = BLOCKS[0]
        for d in range(0, WIDTH, BLOCK_D):
            total = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
            for at in tl.static_range(len(LEVELS)):
                key, known = extend(key, known, own, code_column, there, LEVELS, at, PACKED)
                total += _gather(
                    tables[at], scales[at], key, known, d, LEVELS, at, HASHING, BLOCK_D
                ).to(tl.float32)
            dims = d + tl.arange(0, BLOCK_D)
            inside = there[:, None] & (dims < WIDTH)[None, :]
            tl.store(out + items[:, None] * WIDTH + dims[None, :], total, mask=inside)
    else:
        for at in tl.static_range(len(LEVELS)):
            key, known = extend(key, known, own, code_column, there, LEVELS, at, PACKED)
            to = out + items * WIDTH + LEVELS[at].start
            _copy(tables[at], scales[at], key, known, there, to, LEVELS, at, HASHING, BLOCKS[at])


@triton.jit
def _add_up(
    codes, code_row, code_column, tables, scales, out, M, offsets, LEVELS: tl.constexpr,
    WIDTH: tl.constexpr, PART: tl.constexpr, SUM: tl.constexpr, MEAN: tl.constexpr,
    HASHING: tl.constexpr, PACKED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write a history's sums, or means, of level PART, or of all: one order for every chip."""
    history = tl.program_id(0).to(tl.int64)
    begin = tl.minimum(tl.maximum(tl.load(offsets + history), 0), M)
    end = tl.minimum(tl.maximum(tl.load(offsets + history + 1), begin), M)
    divisor = tl.maximum(end - begin, 1).to(tl.float32)
    for d in range(0, LEVELS[PART].dim, BLOCK_D):
        total = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        for first in range(begin, end, BLOCK_M):
            items = first + tl.arange(0, BLOCK_M)
            there = items < end
            key = tl.zeros((BLOCK_M,), tl.int64)
            known = there
            for at in tl.static_range(len(LEVELS) if SUM else PART + 1):
                own = codes + items * code_row
                key, known = extend(key, known, own, code_column, there, LEVELS, at, PACKED)
                if SUM or at == PART:
                    total += _gather(
                        tables[at], scales[at], key, known, d, LEVELS, at, HASHING, BLOCK_D
                    ).to(tl.float32)
        result = tl.sum(total, 0)
        if MEAN:
            result = tl.div_rn(result, divisor)
        dims = d + tl.arange(0, BLOCK_D)
        to = out + history * WIDTH + LEVELS[PART].start + dims
        tl.store(to, result, mask=dims < LEVELS[PART].dim)


@triton.jit(do_not_specialize=["M"])
def _lookup_histories(
    codes, code_row, code_column, table_0, table_1, table_2, table_3, table_4, table_5, table_6,
    table_7, scales_0, scales_1, scales_2, scales_3, scales_4, scales_5, scales_6, scales_7, out, M,
    offsets, LEVELS: tl.constexpr, WIDTH: tl.constexpr, SUM: tl.constexpr, MEAN: tl.constexpr,
    HASHING: tl.constexpr, PACKED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Look up and add up a history at one level, or at all if they are summed."""
    tables = (table_0, table_1, table_2, table_3, table_4, table_5, table_6, table_7)
    scales = (scales_0, scales_1, scales_2, scales_3, scales_4, scales_5, scales_6, scales_7)
    for part in tl.static_range(1 if SUM else len(LEVELS)):
        if tl.program_id(1) == part:
            _add_up(
                codes, code_row, code_column, tables, scales, out, M, offsets,
                LEVELS, WIDTH, part, SUM, MEAN, HASHING, PACKED, BLOCK_M, BLOCKS[part],
            )  # fmt: skip


def _plan(levels: Sequence[Level], pooled: bool) -> tuple[dict[str, Any], dict[str, int]]:
    """Return the tile and the launch options: about 32 values of a row block per thread."""
    blocks = tuple(min(128, max(16, triton.next_power_of_2(level.dim))) for level in levels)
    most = 16 if pooled else 128
    tile = {"BLOCK_M": min(most, 4096 // max(blocks)), "BLOCKS": blocks}
    return tile, {"num_warps": 4}


def prefix_ngram_lookup(
    codes: Tensor,
    tables: Sequence[Tensor],
    sizes: Sequence[int],
    mode: str,
    offsets: Tensor | None,
    pool: str | None,
    hashing: str,
    groups: Sequence[int],
    packed: bool,
    scales: Sequence[Tensor],
) -> Tensor:
    """Return what torch's operator `livrec::prefix_ngram_lookup` does.

    It is compiled once for each set of levels and shapes of tables. A code out of range counts as
    unknown, and offsets are kept to the codes there are: the host is not asked.
    """
    rows, dims = zip(*(table.shape for table in tables), strict=True)
    levels = describe(sizes, groups, rows, dims, mode == "sum", [t.stride() for t in tables])
    width = dims[0] if mode == "sum" else sum(dims)
    count = len(codes) if offsets is None else len(offsets) - 1
    out = codes.new_empty((count, width), dtype=torch.float32 if scales else tables[0].dtype)
    if not count:
        return out
    none = [None] * MOST_LEVELS
    given = (*tables, *none[len(tables) :], *(s.contiguous() for s in scales), *none[len(scales) :])
    given = (codes, *codes.stride(), *given, out, len(codes))
    flags = {"SUM": mode == "sum", "HASHING": hashing, "PACKED": packed}
    tile, options = _plan(levels, offsets is not None)
    with torch.cuda.device_of(codes):
        if offsets is None:
            _lookup_items[(triton.cdiv(count, tile["BLOCK_M"]),)](
                *given, levels, width, **flags, **tile, **options
            )
        else:
            _lookup_histories[(count, 1 if mode == "sum" else len(tables))](
                *given, offsets.contiguous(), levels, width, MEAN=pool == "mean",
                **flags, **tile, **options,
            )  # fmt: skip
    return out


def _config(
    kernel: Any, table: str, levels: Sequence[Level], hashing: str, **flags: bool
) -> tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]:
    scaled = table.startswith("*i8")
    types = {"codes": "*i16:16", "code_row": "i32", "M": "i64", "offsets": "*i64:16"}
    types["out"] = "*fp32:16" if scaled else table
    constants: dict[str, Any] = {"code_column": 1, "MEAN": True, "HASHING": hashing, **flags}
    for at in range(MOST_LEVELS):
        for name, kind in {"table": table, "scales": "*fp32:16"}.items():
            if at < len(levels) and (name == "table" or scaled):
                types[f"{name}_{at}"] = kind
            else:
                constants[f"{name}_{at}"] = None
    if flags["PACKED"]:
        types["codes"] = "*u8:16"
    width = levels[0].dim if flags["SUM"] else sum(level.dim for level in levels)
    tile, options = _plan(levels, kernel is _lookup_histories)
    constants |= {"LEVELS": tuple(levels), "WIDTH": width, **tile}
    return kernel, types, constants, {**options, "matrix": False}


def compile_configs() -> Iterator[tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """Yield launches as those above compile: kernel, argument types, constants, options.

    A type ending in ":16" is known to be divisible by 16. "matrix": tensor cores are meant.
    """
    sizes, rows = (300, 256, 256), (300, 50_000, 1_000_000)
    for kernel in (_lookup_items, _lookup_histories):
        for hashing in ("modulo", "murmur3", "order_preserving"):
            for table, dims in (("*fp32:16", (32, 64, 256)), ("*bf16:16", (64, 64, 64))):
                alike, strides = len(set(dims)) == 1, [(dim, 1) for dim in dims]
                for summed in {alike, alike and hashing != "modulo"}:
                    levels = describe(sizes, (3,), rows, dims, summed, strides)
                    yield _config(kernel, table, levels, hashing, SUM=summed, PACKED=False)
        levels = describe(sizes, (1, 2), rows, (20, 20, 20), True, [(20, 1)] * 3)
        yield _config(kernel, "*i8:16", levels, "murmur3", SUM=True, PACKED=True)
        levels = describe((2**7,) * 8, (8,), (128,) * 8, (1000,) * 8, False, [(1, 128)] * 8)
        yield _config(kernel, "*fp16", levels, "modulo", SUM=False, PACKED=False)
