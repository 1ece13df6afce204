"""Which rows codes name, and how histories are cut into pieces: what starts code attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._prefix import Level, describe, extend, table_row

MOST_FIELDS = 8  # that a launch takes: each table is an argument
MOST_BYTES = 512  # of a row's keys, or values, of a head
DTYPES = {torch.float32: "*fp32:16", torch.bfloat16: "*bf16:16", torch.float16: "*fp16:16"}
_TILE = {"BLOCK_M": 128}
_Shape = TypeVar("_Shape")


@triton.jit(do_not_specialize=["M"])
def _write_rows(
    codes, code_row, code_column, rows, M, LEVELS: tl.constexpr, HASHING: tl.constexpr,
    PACKED: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Write the row that each field names, -1 for none: [fields, M]."""
    items = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    there = items < M
    own = codes + items * code_row
    key = tl.zeros((BLOCK_M,), tl.int64)
    known = there
    for at in tl.static_range(len(LEVELS)):
        key, known = extend(key, known, own, code_column, there, LEVELS, at, PACKED)
        row = tl.where(known, table_row(key, LEVELS, at, HASHING), -1)
        tl.store(rows + at * M + items, row.to(rows.dtype.element_ty), mask=there)


def _describe(
    sizes: Sequence[int], groups: Sequence[int], rows: Sequence[int]
) -> tuple[Level, ...]:
    return describe(sizes, groups, rows, (1,) * len(rows), True)


def rows_of(
    codes: Tensor, tables: Sequence[Tensor], sizes: Sequence[int], groups: Sequence[int],
    hashing: str, packed: bool,
) -> Tensor:  # fmt: skip
    """Return the row of its table that each field of a code names, -1 for none: [fields, M].

    A code out of range counts as unknown. int32 wherever tables are as small.
    """
    counts = [len(table) for table in tables]
    dtype = torch.int32 if max(counts) <= 2**31 else torch.int64
    rows = torch.empty((len(counts), len(codes)), dtype=dtype, device=codes.device)
    if len(codes):
        _write_rows[(triton.cdiv(len(codes), _TILE["BLOCK_M"]),)](
            codes, *codes.stride(), rows, len(codes), _describe(sizes, groups, counts), hashing,
            packed, **_TILE,
        )  # fmt: skip
    return rows


@dataclass(frozen=True)
class Pieces:
    """Histories cut into pieces of at most `size` items, known to the host by their bound alone.

    bounds: where histories begin and end, within the items there are. starts: the first piece of
    each history. owners: the history of each of `count` pieces, B for those beyond all.
    """

    bounds: Tensor
    starts: Tensor
    owners: Tensor
    count: int
    size: int


def cut(offsets: Tensor, items: int, programs: int) -> Pieces:
    """Cut histories into pieces that are each read by `programs` programs.

    Sizes alone decide on the cut, so that sums are the same on every chip.
    """
    users = len(offsets) - 1
    size = min(4096, max(256, triton.next_power_of_2(items * programs // 2048)))
    bounds = offsets.clamp(0, items).cummax(0).values
    starts = torch.zeros_like(bounds)
    torch.cumsum((bounds.diff() + (size - 1)) // size, 0, out=starts[1:])
    count = users + items // size
    every = torch.arange(count, device=offsets.device)
    owners = torch.searchsorted(starts[1:], every, right=True)
    return Pieces(bounds, starts, owners, count, size)


def as_argument(tensor: Tensor) -> Tensor:
    """Return what kernels can read in 128 bits: contiguous, at a multiple of 16 bytes."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


def as_arguments(tables: Sequence[Tensor]) -> list[Tensor | None]:
    """Return tables that kernels can read, and None for the fields that there are not."""
    return [*map(as_argument, tables), *[None] * (MOST_FIELDS - len(tables))]


def tile_of(
    C: int, d: int, dv: int, most: dict[int, tuple[int, int]]
) -> tuple[dict[str, int], dict[str, int]]:
    """Return a kernel's tile and launch options for C, d and dv.

    most: by the widest row, how many candidates and items leave no register short, with 8 fields
    up to a width of 64, with 4 beyond.
    """
    widths = [max(16, triton.next_power_of_2(dim)) for dim in (d, dv)]
    candidates, items = next(most[width] for width in most if width >= max(widths))
    candidates = max(16, min(candidates, triton.next_power_of_2(C)))
    if triton.knobs.runtime.interpret:  # whose time goes by operations, however many numbers each
        items = 128
    tile = {"BLOCK_C": candidates, "BLOCK_T": items, "BLOCK_D": widths[0], "BLOCK_V": widths[1]}
    return tile, {"num_warps": 8, "num_stages": 1}


def argument_types(fields: int, table: str) -> tuple[dict[str, str], dict[str, None]]:
    """Return the types of what all sweeps take, and None for the tables that there are not."""
    names = [f"{kind}_{at}" for kind in ("key", "value") for at in range(MOST_FIELDS)]
    given = {name: int(name[-1]) < fields for name in names}
    types = {name: table for name, there in given.items() if there}
    types |= dict.fromkeys(("q", "grad", "out", "grad_q"), table)
    types |= dict.fromkeys(("bounds", "starts", "owners"), "*i64:16")
    types |= {"rows": "*i32:16", "bias": "*fp32:16", "scale": "fp32"}
    types |= dict.fromkeys(("B", "C", "T"), "i32")
    return types, {name: None for name, there in given.items() if not there}


def heads_of(bias: Tensor | None) -> int:
    """Return how many columns a bias has; 0 for none."""
    return 0 if bias is None else bias.shape[1] if bias.dim() == 2 else 1


def with_dtypes(shapes: Sequence[_Shape]) -> Iterator[tuple[torch.dtype, _Shape]]:
    """Yield each shape with float32 and with a 16-bit type, float16 and bfloat16 in turn.

    Kernels for those two differ in conversions, not in registers or memory.
    """
    for shape, half in zip(shapes, cycle((torch.float16, torch.bfloat16)), strict=False):
        yield from ((torch.float32, shape), (half, shape))


def configs_of(
    tile_for: Callable[[int, int, int, torch.dtype], tuple[dict[str, int], dict[str, int]]],
) -> Iterator[tuple[dict[str, str], dict[str, Any], dict[str, Any]]]:
    """Yield the types, constants and options of a sweep at shapes that try its tiles."""
    shapes = [(1, 1, 16, 16, 1), (64, 4, 64, 64, 3), (64, 4, 64, 64, 8), (4, 2, 100, 20, 3),
              (64, 2, 128, 128, 4), (1000, 1, 256, 256, 4)]  # fmt: skip
    for dtype, (C, H, d, dv, fields) in with_dtypes(shapes):
        if max(d, dv) * dtype.itemsize > MOST_BYTES:
            continue
        tile, options = tile_for(C, d, dv, dtype)
        types, none = argument_types(fields, DTYPES[dtype])
        constants = {**none, **tile, "HEADS": H, "FIELDS": fields, "D": d, "DV": dv}
        constants |= {"SIZE": 1024, "BIAS_HEADS": H}
        if dtype == torch.bfloat16:
            constants |= {"BIAS_HEADS": 0, "bias": None}
        yield types, constants, {**options, "matrix": True}


def compile_configs() -> Iterator[tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """Yield launches as those above compile: kernel, argument types, constants, options.

    A type ending in ":16" is known to be divisible by 16. "matrix": tensor cores are meant.
    """
    types = {"code_row": "i32", "M": "i64", "rows": "*i32:16"}
    sizes, counts = (1000, 24, 300, 256, 256), (1000, 24, 300, 50_000, 1_000_000)
    levels = _describe(sizes, (1, 1, 3), counts)
    for codes, packed in (("*i16:16", False), ("*u8:16", True)):
        for hashing in ("modulo", "murmur3", "order_preserving"):
            constants = {"code_column": 1, "LEVELS": levels, "HASHING": hashing, "PACKED": packed}
            yield _write_rows, {**types, "codes": codes}, {**constants, **_TILE}, {"matrix": False}
    constants = {"LEVELS": levels, "HASHING": "modulo", "PACKED": False}
    strided = {**types, "codes": "*i64", "code_column": "i64", "rows": "*i64:16"}
    yield _write_rows, strided, {**constants, **_TILE}, {"matrix": False}
