"""Residual k-means encode in Triton: one launch takes a block of rows through all levels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Scores are products of tensor cores in three TF32 passes (big x big, big x small, small x big),
# which err by 2^-20 of a product at most; plain TF32 errs by 2^-10 and would change codes, and
# "ieee" runs on the scalar units, at a third of the speed.
_PRECISION = tl.constexpr("tf32x3")
_ROWS = 64  # rows per block, as wgmma wants them


@triton.jit(do_not_specialize=["level", "start", "size"])
def _pack(
    book, book_row, book_column, codebooks, half_norms, starts, level, start, size, D, WIDTH,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Append a codebook to `codebooks` in float32, rows filled up with zeros to WIDTH."""
    codeword = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    there = codeword < size
    to = codebooks + (start + codeword).to(tl.int64)[:, None] * WIDTH
    norm = tl.zeros((BLOCK_N,), tl.float32)
    for d in range(0, WIDTH, BLOCK_D):
        dims = d + tl.arange(0, BLOCK_D)
        at = codeword.to(tl.int64)[:, None] * book_row + dims.to(tl.int64)[None, :] * book_column
        value = tl.load(book + at, mask=there[:, None] & (dims < D)[None, :], other=0.0)
        value = value.to(tl.float32)
        tl.store(to + dims[None, :], value, mask=there[:, None])
        norm += tl.sum(value * value, 1)
    tl.store(half_norms + start + codeword, norm / 2, mask=there)
    if tl.program_id(0) == 0:
        tl.store(starts + level, start)
        tl.store(starts + level + 1, start + size)


@triton.jit
def _contend(score, first, best, code):
    """Let a tile of scores contend: only a greater one wins, the lowest code of those that tie.

    A NaN wins nowhere, nor does -inf, the score of lanes past the codebook: codes stay in range.
    """
    lanes = tl.arange(0, score.shape[1])[None, :]
    top = tl.max(score, 1)
    lane = tl.min(tl.where(score == top[:, None], lanes, score.shape[1]), 1)
    wins = top > best
    return tl.where(wins, top, best), tl.where(wins, first + lane, code)


@triton.jit(do_not_specialize=["M", "LEVELS"])
def _encode_in_registers(
    x, x_row, x_column, codebooks, half_norms, starts, codes, M, D, LEVELS,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Keep a block's residuals in registers from the first level to the last."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, WIDTH)
    lanes = tl.arange(0, BLOCK_N)
    inside = (rows < M)[:, None] & (dims < D)[None, :]
    at = rows[:, None] * x_row + dims.to(tl.int64)[None, :] * x_column
    residual = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    for level in range(LEVELS):
        start = tl.load(starts + level)
        size = tl.load(starts + level + 1) - start
        book = codebooks + start.to(tl.int64) * WIDTH
        best = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        code = tl.zeros((BLOCK_M,), tl.int32)
        for first in range(0, size, BLOCK_N):
            there = first + lanes < size
            norm = tl.load(half_norms + start + first + lanes, mask=there, other=float("inf"))
            tile_at = (first + lanes)[None, :] * WIDTH + dims[:, None]
            tile = tl.load(book + tile_at, mask=there[None, :], other=0.0)
            score = tl.dot(residual, tile, input_precision=_PRECISION) - norm[None, :]
            best, code = _contend(score, first, best, code)
        tl.store(codes + rows * LEVELS + level, code.to(codes.dtype.element_ty), mask=rows < M)
        residual -= tl.load(book + code[:, None] * WIDTH + dims[None, :])


@triton.jit(do_not_specialize=["M", "LEVELS", "BLOCKS"])
def _encode_in_scratch(
    x, x_row, x_column, codebooks, half_norms, starts, codes, scratch, M, D, LEVELS, BLOCKS, WIDTH,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """For rows too long for registers: a program keeps a block's residuals in its own scratch."""
    lanes = tl.arange(0, BLOCK_N)
    block_rows = tl.arange(0, BLOCK_M)
    residuals = scratch + tl.program_id(0).to(tl.int64) * BLOCK_M * WIDTH
    residuals += block_rows[:, None] * WIDTH
    per_block = tl.full((BLOCK_M,), BLOCK_M, tl.int64)
    for block in range(tl.program_id(0), BLOCKS, tl.num_programs(0)):
        rows = block * per_block + block_rows
        for d in range(0, WIDTH, BLOCK_D):
            dims = d + tl.arange(0, BLOCK_D)
            inside = (rows < M)[:, None] & (dims < D)[None, :]
            at = rows[:, None] * x_row + dims.to(tl.int64)[None, :] * x_column
            value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
            tl.store(residuals + dims[None, :], value)
        for level in range(LEVELS):
            tl.debug_barrier()  # a warp is about to read what others wrote
            start = tl.load(starts + level)
            size = tl.load(starts + level + 1) - start
            book = codebooks + start.to(tl.int64) * WIDTH
            best = tl.full((BLOCK_M,), float("-inf"), tl.float32)
            code = tl.zeros((BLOCK_M,), tl.int32)
            for first in range(0, size, BLOCK_N):
                there = first + lanes < size
                norm = tl.load(half_norms + start + first + lanes, mask=there, other=float("inf"))
                score = tl.zeros((BLOCK_M, BLOCK_N), tl.float32) - norm[None, :]
                for d in range(0, WIDTH, BLOCK_D):
                    dims = d + tl.arange(0, BLOCK_D)
                    residual = tl.load(residuals + dims[None, :])
                    tile_at = (first + lanes)[None, :] * WIDTH + dims[:, None]
                    tile = tl.load(book + tile_at, mask=there[None, :], other=0.0)
                    score = tl.dot(residual, tile, score, input_precision=_PRECISION)
                best, code = _contend(score, first, best, code)
            tl.store(codes + rows * LEVELS + level, code.to(codes.dtype.element_ty), mask=rows < M)
            tl.debug_barrier()  # every warp has read the residuals that now change
            for d in range(0, WIDTH, BLOCK_D):
                dims = d + tl.arange(0, BLOCK_D)
                codeword = tl.load(book + code[:, None] * WIDTH + dims[None, :])
                tl.store(residuals + dims[None, :], tl.load(residuals + dims[None, :]) - codeword)
        tl.debug_barrier()  # every warp is done with the residuals that the next block overwrites


def _plan(dim: int) -> tuple[Any, int, dict[str, int], dict[str, int]]:
    """Return for D: the kernel, the width of a packed codeword, the tile, and the launch options.

    Beyond D = 64 the residuals, split in two for TF32, no longer fit in registers.
    """
    if dim <= 64:
        width = max(16, triton.next_power_of_2(dim))
        tile = {"BLOCK_M": _ROWS, "BLOCK_N": 64 if width < 64 else 32, "WIDTH": width}
        return _encode_in_registers, width, tile, {"num_warps": 4, "num_stages": 3}
    tile = {"BLOCK_M": _ROWS, "BLOCK_N": 64, "BLOCK_D": 32}
    return _encode_in_scratch, -(-dim // 32) * 32, tile, {"num_warps": 4, "num_stages": 3}


_PACK_TILE = {"BLOCK_N": 32, "BLOCK_D": 16}


def residual_kmeans_encode(x: Tensor, codebooks: Sequence[Tensor]) -> Tensor:
    """Return codes [M, L]; the contract is that of `livrec_fast.residual_kmeans_encode`."""
    rows, dim = x.shape
    sizes = [len(book) for book in codebooks]
    most = max(sizes)
    dtype = torch.uint8 if most <= 256 else torch.int16 if most <= 32768 else torch.int32
    codes = torch.empty((rows, len(sizes)), dtype=dtype, device=x.device)
    if rows == 0:
        return codes
    kernel, width, tile, options = _plan(dim)
    packed = torch.empty((sum(sizes), width), dtype=torch.float32, device=x.device)
    half_norms = torch.empty(sum(sizes), dtype=torch.float32, device=x.device)
    starts = torch.empty(len(sizes) + 1, dtype=torch.int32, device=x.device)
    blocks = triton.cdiv(rows, _ROWS)
    with torch.cuda.device_of(x):
        for level, book in enumerate(codebooks):
            _pack[(triton.cdiv(sizes[level], _PACK_TILE["BLOCK_N"]),)](
                book, *book.stride(), packed, half_norms, starts,
                level, sum(sizes[:level]), sizes[level], dim, width, **_PACK_TILE,
            )  # fmt: skip
        given = (x, *x.stride(), packed, half_norms, starts, codes)
        if kernel is _encode_in_registers:
            kernel[(blocks,)](*given, rows, dim, len(sizes), **tile, **options)
        else:
            programs = min(blocks, 2 * _multiprocessors(x.device))
            scratch = torch.empty((programs, _ROWS, width), dtype=torch.float32, device=x.device)
            kernel[(programs,)](
                *given, scratch, rows, dim, len(sizes), blocks, width, **tile, **options
            )
    return codes


def _multiprocessors(device: torch.device) -> int:
    """Return how many multiprocessors `device` has; 1 for the CPU of Triton's interpreter."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def compile_configs() -> Iterator[tuple[Any, dict[str, str], dict[str, int], dict[str, Any]]]:
    """Yield what the launches above compile: kernel, argument types, constants, options.

    A type ending in ":16" is known to be divisible by 16. "matrix": tensor cores are meant.
    """
    common = {
        **dict.fromkeys(("codebooks", "half_norms", "scratch"), "*fp32:16"),
        **dict.fromkeys(("x_row", "book_row", "D", "WIDTH"), "i32:16"),
        **dict.fromkeys(("LEVELS", "BLOCKS", "level", "start", "size"), "i32"),
        **{"starts": "*i32:16", "M": "i64"},
    }
    contiguous = {"x_column": 1, "book_column": 1}
    for dim in (16, 32, 64, 128):
        kernel, _, tile, options = _plan(dim)
        for x, code in (("*fp32:16", "*u8:16"), ("*bf16:16", "*i16:16")):
            types = {**common, "x": x, "codes": code}
            yield kernel, types, {**tile, **contiguous}, {**options, "matrix": True}
    for dim in (64, 128):  # nothing known of the rows
        kernel, _, tile, options = _plan(dim)
        strided = {"x": "*fp16", "x_row": "i64", "x_column": "i64", "D": "i32", "codes": "*i32:16"}
        yield kernel, {**common, **strided}, tile, {**options, "matrix": True}
    yield _pack, {**common, "book": "*fp32:16"}, {**_PACK_TILE, **contiguous}, {"matrix": False}
