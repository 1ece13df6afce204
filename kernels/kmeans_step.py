"""The sums of one step of Lloyd's k-means in Triton, exact in whatever order they are added."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _round_to(quantum, value):
    """Round to a multiple of a power of two: beside 1.5 * 2^52 of them nothing finer has room.

    The compiler may contract a product with the addition: products of float32 are exact anyway.
    """
    coarse = 6755399441055744.0 * quantum
    return (value + coarse) - coarse


@triton.jit(do_not_specialize=["M"])
def _accumulate(
    x, x_row, x_column, errors, weights, order, sorted_codes, ends, quanta, sums, mass, inertia,
    M, D, RUN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Add up RUN rows in the order of their codes; what leaves is one atomic sum per code.

    Sums of whole quanta are exact in float64, so the order of the atomics does not show.
    """
    begin = tl.program_id(0).to(tl.int64) * RUN
    stop = tl.minimum(begin + RUN, M)
    dims = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    quantum = tl.load(quanta)
    loss = tl.zeros((BLOCK_M,), tl.float64)
    while begin < stop:
        code = tl.load(sorted_codes + begin).to(tl.int64)
        end = tl.minimum(tl.load(ends + code), stop)
        total = tl.zeros((BLOCK_M, BLOCK_D), tl.float64)
        weight_total = tl.zeros((BLOCK_M,), tl.float64)
        for first in range(begin, end, BLOCK_M):
            place = first + tl.arange(0, BLOCK_M)
            there = place < end
            row = tl.load(order + place, mask=there, other=0)
            at = row[:, None] * x_row + dims.to(tl.int64)[None, :] * x_column
            value = tl.load(x + at, mask=there[:, None] & (dims < D)[None, :], other=0.0)
            value = value.to(tl.float32).to(tl.float64)
            weight = there.to(tl.float64)
            if weights is not None:
                weight = tl.load(weights + row, mask=there, other=0.0).to(tl.float64)
            total += _round_to(quantum, weight[:, None] * value)
            if tl.program_id(1) == 0:
                weight_total += _round_to(tl.load(quanta + 1), weight)
                error = tl.load(errors + row, mask=there, other=0.0).to(tl.float64)
                loss += _round_to(tl.load(quanta + 2), weight * error)
        tl.atomic_add(sums + code * D + dims, tl.sum(total, 0), mask=dims < D, sem="relaxed")
        if tl.program_id(1) == 0:
            tl.atomic_add(mass + code, tl.sum(weight_total, 0), sem="relaxed")
        begin = end
    if tl.program_id(1) == 0:
        tl.atomic_add(inertia, tl.sum(loss, 0), sem="relaxed")


def _plan(dim: int) -> tuple[dict[str, int], dict[str, int]]:
    """Return the tile and the launch options for D."""
    width = min(128, max(16, triton.next_power_of_2(dim)))
    return {"RUN": 512, "BLOCK_M": min(64, 2048 // width), "BLOCK_D": width}, {"num_warps": 4}


def accumulate(
    x: Tensor, codes: Tensor, errors: Tensor, weights: Tensor | None, size: int, quanta: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return sums [size, D], mass [size] and inertia of rows with given codes and errors.

    codes: of the smallest type that holds them, which is the fastest to sort.
    """
    rows, dim = x.shape
    sums = x.new_zeros((size, dim), dtype=torch.float64)
    mass = x.new_zeros(size, dtype=torch.float64)
    inertia = x.new_zeros((), dtype=torch.float64)
    if rows:
        sorted_codes, order = codes.sort()
        every = torch.arange(size, dtype=torch.int32, device=x.device)
        ends = torch.searchsorted(sorted_codes.int(), every, right=True)
        tile, options = _plan(dim)
        weights = None if weights is None else weights.contiguous()
        grid = (triton.cdiv(rows, tile["RUN"]), triton.cdiv(dim, tile["BLOCK_D"]))
        with torch.cuda.device_of(x):
            _accumulate[grid](
                x, *x.stride(), errors, weights, order, sorted_codes, ends, quanta.contiguous(),
                sums, mass, inertia, rows, dim, **tile, **options,
            )  # fmt: skip
    return sums, mass, inertia


def compile_configs() -> Iterator[tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """Yield what the launch above compiles: kernel, argument types, constants, options.

    A type ending in ":16" is known to be divisible by 16. "matrix": tensor cores are meant.
    """
    common = {
        **dict.fromkeys(("errors", "weights"), "*fp32:16"),
        **dict.fromkeys(("order", "ends"), "*i64:16"),
        **dict.fromkeys(("quanta", "sums", "mass", "inertia"), "*fp64:16"),
        **dict.fromkeys(("x_row", "D"), "i32:16"),
        **{"sorted_codes": "*u8:16", "M": "i64"},
    }
    for dim, x in ((16, "*fp32:16"), (128, "*bf16:16"), (256, "*fp32:16")):  # x is widened
        tile, options = _plan(dim)
        options = {**options, "matrix": False}
        for given in ({}, {"weights": None}):
            yield _accumulate, {**common, "x": x}, {**tile, **given, "x_column": 1}, options
    strided = {"x": "*fp16", "x_row": "i64", "x_column": "i64", "D": "i32"}
    types = {**common, **strided, "sorted_codes": "*i16"}
    tile, options = _plan(64)
    yield _accumulate, types, tile, {**options, "matrix": False}
