"""Units of the contrastive loss, and the gradients of what they are made of.

Units are vectors of length 1 (or as given), rounded to the dtype of products, in rows filled up
with zeros; those of invalid rows are zeros.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._contrastive_tiles import KINDS, LOG2_E, Side, inverse_of, padded, stride_of

SMALL = {"ROWS": 8, "COLUMNS": 128}
SMALL_OPTIONS = {"num_warps": 4}


@triton.jit
def _rows_of(x, row, count, start, D: tl.constexpr, COLUMNS: tl.constexpr):
    """Return columns of rows of x [., D] from `start` on, in float32."""
    dims = start + tl.arange(0, COLUMNS)
    inside = (row < count)[:, None] & (dims < D)[None, :]
    own = x + row.to(tl.int64)[:, None] * D + dims[None, :]
    return tl.load(own, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _counted(row, valid, count):
    """Return which rows are there and valid."""
    there = row < count
    if valid is not None:
        there &= tl.load(valid + row, mask=there, other=0) != 0
    return there


@triton.jit(do_not_specialize=["count", "total", "biased"])
def _write_units(
    x, valid, log_q, units, bias, norms, count, total, biased, NORMALIZE: tl.constexpr,
    D: tl.constexpr, STRIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write units and biases of `total` rows, of which `count` are there; norms of these."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = _counted(row, valid, count)
    divisor = tl.full((ROWS,), 1.0, tl.float32)
    if NORMALIZE:
        square = tl.zeros((ROWS,), tl.float32)
        for start in range(0, D, COLUMNS):
            part = _rows_of(x, row, count, start, D, COLUMNS)
            square += tl.sum(part * part, 1)
        length = tl.sqrt_rn(square)
        tl.store(norms + row, tl.where(length < 1e-12, 0.0, length), mask=row < count)
        divisor = tl.where(length < 1e-12, 1e-12, length)
    if units is not None:
        for start in range(0, STRIDE, COLUMNS):
            part = tl.div_rn(_rows_of(x, row, count, start, D, COLUMNS), divisor[:, None])
            part = tl.where(there[:, None], part, 0.0)
            dims = start + tl.arange(0, COLUMNS)
            at = units + row.to(tl.int64)[:, None] * STRIDE + dims[None, :]
            tl.store(
                at,
                part.to(units.dtype.element_ty),
                mask=(row < total)[:, None] & (dims < STRIDE)[None, :],
            )
        less = tl.zeros((ROWS,), tl.float32)
        if log_q is not None:
            less = tl.load(log_q + row, mask=there & (row < biased), other=0.0)
            less = (0.0 - less.to(tl.float64) * LOG2_E).to(tl.float32)
        tl.store(bias + row, tl.where(there, less, float("-inf")), mask=row < total)


@triton.jit(do_not_specialize=["count", "splits", "total"])
def _finish(
    x, valid, norms, partner, diagonal, parts, temperature, gain, out, count, splits, total,
    D: tl.constexpr, STRIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Add up what programs left of the gradient of units, and write that of x.

    parts [splits, total, STRIDE]. partner, diagonal: the units of own positives, and their weights.
    gain: what all weights were multiplied by.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = _counted(row, valid, count)
    scale = inverse_of(temperature)
    if gain is not None:
        scale /= tl.load(gain).to(tl.float64)
    weight = tl.zeros((ROWS,), tl.float64)
    if partner is not None:
        weight = tl.load(diagonal + row, mask=there, other=0.0)
    divisor = tl.full((ROWS,), 1.0, tl.float32)
    length = tl.zeros((ROWS,), tl.float32)
    if norms is not None:
        length = tl.load(norms + row, mask=there, other=0.0)
        divisor = tl.where(length == 0, 1e-12, length)
    along = tl.zeros((ROWS,), tl.float32)
    for twice in tl.static_range(0 if norms is not None else 1, 2):
        for start in range(0, STRIDE, COLUMNS):
            dims = start + tl.arange(0, COLUMNS)
            inside = there[:, None] & (dims < STRIDE)[None, :]
            at = row.to(tl.int64)[:, None] * STRIDE + dims[None, :]
            flow = tl.zeros((ROWS, COLUMNS), tl.float64)
            for split in range(0, splits):
                from_split = parts + tl.cast(split, tl.int64) * total * STRIDE
                flow += tl.load(from_split + at, mask=inside, other=0.0).to(tl.float64)
            if partner is not None:
                theirs = tl.load(partner + at, mask=inside, other=0.0).to(tl.float64)
                flow += weight[:, None] * theirs
            flow *= scale
            narrow = flow.to(tl.float32)
            unit = _rows_of(x, row, count, start, D, COLUMNS) / divisor[:, None]
            if twice == 0:
                along += tl.sum(tl.where(inside, unit * narrow, 0.0), 1)
            else:
                if norms is not None:
                    across = narrow - tl.where(length == 0, 0.0, along)[:, None] * unit
                    narrow = across / divisor[:, None]
                narrow = tl.where(there[:, None], narrow, 0.0).to(out.dtype.element_ty)
                to = out + row.to(tl.int64)[:, None] * D + dims[None, :]
                tl.store(to, narrow, mask=(row < count)[:, None] & (dims < D)[None, :])


def small() -> dict[str, int]:
    """Return the tile of what is done row by row."""
    return {**SMALL, "ROWS": 128} if triton.knobs.runtime.interpret else SMALL


def norms_of(x: Tensor) -> Tensor:
    """Return the length of each row [count], 0 for less than 1e-12."""
    norms = torch.empty(len(x), dtype=torch.float32, device=x.device)
    _write_units[(triton.cdiv(len(x), small()["ROWS"]),)](
        x, None, None, None, None, norms, len(x), 0, 0, True, x.shape[1], stride_of(x.shape[1]),
        **small(), **SMALL_OPTIONS,
    )  # fmt: skip
    return norms


def side_of(
    parts: list[Tensor], valid: Tensor | None, log_q: Tensor | None, normalize: bool,
    dtype: torch.dtype,
) -> Side:  # fmt: skip
    """Return the units of one tensor after the other; `valid` is of the first alone."""
    count, dim = sum(map(len, parts)), parts[0].shape[1]
    rows, stride = padded(count), stride_of(dim)
    units = torch.empty((rows, stride), dtype=dtype, device=parts[0].device)
    bias, norms = torch.empty((2, rows), dtype=torch.float32, device=units.device)
    first = 0
    for at, part in enumerate(parts):
        last = at + 1 == len(parts)
        total = rows - first if last else len(part)
        given = None if log_q is None or first >= len(log_q) else log_q[first:]
        if total:
            _write_units[(triton.cdiv(total, small()["ROWS"]),)](
                part, valid if at == 0 else None, given, units[first:], bias[first:],
                norms[first:], len(part), total, 0 if given is None else len(given), normalize, dim,
                stride, **small(), **SMALL_OPTIONS,
            )  # fmt: skip
        first += len(part)
    return Side(units, bias, norms if normalize else None, count)


def differentiate(
    x: Tensor, first: int, valid: Tensor | None, side: Side, partner: Tensor | None,
    diagonal: Tensor | None, parts: Tensor, temperature: Tensor, gain: Tensor | None,
) -> Tensor:  # fmt: skip
    """Return the gradient of x, whose units are those of `side` from `first` on."""
    out = torch.empty_like(x)
    if len(x):
        norms = None if side.norms is None else side.norms[first:]
        _finish[(triton.cdiv(len(x), small()["ROWS"]),)](
            x, valid, norms, partner, diagonal, parts[0, first:], temperature, gain, out, len(x),
            len(parts), parts.shape[1], x.shape[1], side.units.shape[1], **small(),
            **SMALL_OPTIONS,
        )  # fmt: skip
    return out


def compile_configs() -> Iterator[tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """Yield launches as those above compile: kernel, argument types, constants, options.

    A type ending in ":16" is known to be divisible by 16. "matrix": tensor cores are meant.
    """
    types = {**dict.fromkeys(("count", "total", "biased", "splits"), "i32"), "valid": "*i1"}
    floats = ("bias", "norms", "log_q", "parts", "temperature", "gain")
    types |= {**dict.fromkeys(floats, "*fp32"), "diagonal": "*fp64"}
    options = {**SMALL_OPTIONS, "matrix": False}
    none = {"valid": None, "log_q": None, "norms": None, "gain": None}
    for kind, dim in zip(KINDS.values(), (16, 100, 768), strict=True):  # rows are widened
        own = types | dict.fromkeys(("x", "units", "partner", "out"), kind)
        shape = {**SMALL, "D": dim, "STRIDE": stride_of(dim), "NORMALIZE": True}
        yield _write_units, own, shape, options
        yield _write_units, own, {**shape, "units": None, "bias": None, "log_q": None}, options
        yield _write_units, own, {**shape, **none, "NORMALIZE": False}, options
        yield _finish, own, shape, options
        yield _finish, own, {**shape, **none, "partner": None, "diagonal": None}, options
