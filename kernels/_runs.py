"""Sums of rows that lie in runs, in one order for every chip: what gradients of tables share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


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


def _plan(dim: int) -> tuple[dict[str, int], dict[str, Any]]:
    """Return the tile and the launch options for D."""
    width = min(128, max(16, triton.next_power_of_2(dim)))
    return {"RUN": 256, "BLOCK_M": min(32, 1024 // width), "BLOCK_D": width}, {"num_warps": 1}


def add_runs(
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


def compile_configs() -> Iterator[tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """Yield launches as those above compile: kernel, argument types, constants, options.

    A type ending in ":16" is known to be divisible by 16. "matrix": tensor cores are meant.
    """
    types = {
        **dict.fromkeys(("order", "owners", "offsets", "starts", "pieces", "run_of"), "*i64:16"),
        **{"D": "i32", "runs": "i64", "out": "*fp32:16", "value_row": "i32:16"},
    }
    none = {"owners": None, "offsets": None}
    whole = {"pieces": None, "run_of": None}
    for dim, values in ((16, "*fp32:16"), (64, "*bf16:16"), (256, "*fp32:16")):  # are widened
        tile, options = _plan(dim)
        options["matrix"] = False
        for given in ({}, none, {**none, **whole}, {**none, **whole, "order": None}):
            constants = {**tile, **given, "value_column": 1}
            yield _add_pieces, {**types, "values": values}, constants, options
    strided = {**types, "values": "*fp16", "value_row": "i64", "value_column": "i64"}
    tile, options = _plan(100)
    yield _add_pieces, strided, tile, {**options, "matrix": False}
