"""Residual k-means encode in Triton: one launch takes a block of rows through all levels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._codebooks import Books
from ._scores import add_products, contend, split


@triton.jit
def _tell(at, inside, best, code, next_best, next_code, codes, second, gap):
    """Write a level's codes and, where asked for, the second codes and their gaps."""
    tl.store(codes + at, code.to(codes.dtype.element_ty), mask=inside)
    if second is not None:
        tl.store(second + at, next_code.to(second.dtype.element_ty), mask=inside)
        tl.store(gap + at, 2 * (best - next_best), mask=inside)


@triton.jit(do_not_specialize=["M", "LEVELS"])
def _encode_in_registers(
    x, x_row, x_column, codebooks, parts, half_norms, starts, codes, errors, second, gap,
    M, D, total, LEVELS, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr,
    PRODUCTS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Keep a block's residuals in registers from the first level to the last."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, WIDTH)
    lanes = tl.arange(0, BLOCK_N)
    inside = (rows < M)[:, None] & (dims < D)[None, :]
    at = rows[:, None] * x_row + dims.to(tl.int64)[None, :] * x_column
    residual = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    part = total.to(tl.int64) * WIDTH
    for level in range(LEVELS):
        start = tl.load(starts + level)
        size = tl.load(starts + level + 1) - start
        book = start.to(tl.int64) * WIDTH
        high, low, lowest = split(residual)
        best = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        code = tl.zeros((BLOCK_M,), tl.int32)
        next_best, next_code = best, code
        for first in range(0, size, BLOCK_N):
            tile = parts + book + (first + lanes)[None, :] * WIDTH + dims[:, None]
            score = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            score = add_products(score, high, low, lowest, tile, part, PRODUCTS, EXACT)
            score -= tl.load(half_norms + start + first + lanes)[None, :]
            best, code, next_best, next_code = contend(
                score, first, best, code, next_best, next_code, second is not None
            )
        to = rows * LEVELS + level
        _tell(to, rows < M, best, code, next_best, next_code, codes, second, gap)
        wanted = (rows < M)[:, None] & (level + 1 < LEVELS if errors is None else True)
        at = book + code.to(tl.int64)[:, None] * WIDTH + dims[None, :]
        residual -= tl.load(codebooks + at, mask=wanted, other=0.0)
        if errors is not None:
            tl.store(errors + to, tl.sum(residual * residual, 1), mask=rows < M)


@triton.jit(do_not_specialize=["M", "LEVELS", "BLOCKS"])
def _encode_in_scratch(
    x, x_row, x_column, codebooks, parts, half_norms, starts, codes, errors, second, gap,
    M, D, total, LEVELS, scratch, scratch_parts, BLOCKS, WIDTH,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """For rows too long for registers: a program keeps a block's residuals in its own scratch."""
    lanes = tl.arange(0, BLOCK_N)
    block_rows = tl.arange(0, BLOCK_M)
    own = (tl.program_id(0).to(tl.int64) * BLOCK_M + block_rows)[:, None] * WIDTH
    residuals, highs = scratch + own, scratch_parts + own
    lows = highs + tl.num_programs(0).to(tl.int64) * BLOCK_M * WIDTH
    per_block = tl.full((BLOCK_M,), BLOCK_M, tl.int64)
    part = total.to(tl.int64) * WIDTH
    for block in range(tl.program_id(0), BLOCKS, tl.num_programs(0)):
        rows = block * per_block + block_rows
        for d in range(0, WIDTH, BLOCK_D):
            dims = d + tl.arange(0, BLOCK_D)
            inside = (rows < M)[:, None] & (dims < D)[None, :]
            at = rows[:, None] * x_row + dims.to(tl.int64)[None, :] * x_column
            value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
            _keep(value, residuals + dims[None, :], highs + dims[None, :], lows + dims[None, :])
        for level in range(LEVELS):
            tl.debug_barrier()  # a warp is about to read what others wrote
            start = tl.load(starts + level)
            size = tl.load(starts + level + 1) - start
            book = start.to(tl.int64) * WIDTH
            best = tl.full((BLOCK_M,), float("-inf"), tl.float32)
            code = tl.zeros((BLOCK_M,), tl.int32)
            next_best, next_code = best, code
            for first in range(0, size, BLOCK_N):
                score = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
                for d in range(0, WIDTH, BLOCK_D):
                    dims = d + tl.arange(0, BLOCK_D)
                    high = tl.load(highs + dims[None, :])
                    low = high if EXACT else tl.load(lows + dims[None, :])
                    tile = parts + book + (first + lanes)[None, :] * WIDTH + dims[:, None]
                    score = add_products(score, high, low, low, tile, part, 3, EXACT)
                score -= tl.load(half_norms + start + first + lanes)[None, :]
                best, code, next_best, next_code = contend(
                    score, first, best, code, next_best, next_code, second is not None
                )
            to = rows * LEVELS + level
            _tell(to, rows < M, best, code, next_best, next_code, codes, second, gap)
            tl.debug_barrier()  # every warp has read the residuals that now change
            error = tl.zeros((BLOCK_M,), tl.float32)
            for d in range(0, WIDTH, BLOCK_D):
                dims = d + tl.arange(0, BLOCK_D)
                at = book + code.to(tl.int64)[:, None] * WIDTH + dims[None, :]
                value = tl.load(residuals + dims[None, :]) - tl.load(codebooks + at)
                error += tl.sum(value * value, 1)
                _keep(value, residuals + dims[None, :], highs + dims[None, :], lows + dims[None, :])
            if errors is not None:
                tl.store(errors + to, error, mask=rows < M)
        tl.debug_barrier()  # every warp is done with the residuals that the next block overwrites


@triton.jit
def _keep(value, residuals, highs, lows):
    """Write residuals to a program's scratch, whole and in parts."""
    high, low, _ = split(value)
    tl.store(residuals, value)
    tl.store(highs, high)
    tl.store(lows, low)


def _plan(dim: int, most: int, hopper: bool) -> tuple[Any, int, dict[str, int], dict[str, int]]:
    """Return for D and the largest N: the kernel, the width of a packed codeword, tile, options.

    Short rows take more products of parts, where fewer would break the op's rule.
    A block of 64 rows leaves room for a second on the multiprocessor, whose products go on while
    the first chooses; twice the rows halve the reading of codebooks, which large ones wait for.
    """
    if dim <= (128 if hopper else 32):  # beyond, residuals and their parts do not fit in registers
        width = max(16, triton.next_power_of_2(dim))
        rows = 64 if most <= 128 else 128
        products = {128: 3, 64: 4}.get(width, 6)
        tile = {"BLOCK_M": rows, "BLOCK_N": 64, "WIDTH": width, "PRODUCTS": products}
        return _encode_in_registers, width, tile, {"num_warps": rows // 16, "num_stages": 2}
    tile = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_D": 32}
    options = {"num_warps": 8, "num_stages": 4, "maxnreg": 255}
    return _encode_in_scratch, -(-dim // 32) * 32, tile, options


def _run(
    x: Tensor,
    codebooks: Sequence[Tensor],
    codes: Tensor,
    errors: Tensor | None = None,
    second: Tensor | None = None,
    gap: Tensor | None = None,
    penalty: Tensor | None = None,
) -> Books:
    """Fill codes, and what else is not None; return the packed codebooks."""
    rows, dim = x.shape
    kernel, width, tile, options = _plan(dim, max(map(len, codebooks)), _is_hopper(x.device))
    books = Books(codebooks, width, tile["BLOCK_N"], penalty)
    exact = x.dtype == torch.bfloat16 and len(codebooks) == 1
    given = (x, *x.stride(), books.whole, books.parts, books.half_norms, books.starts)
    wanted = (codes, errors, second, gap, rows, dim, books.total, len(codebooks))
    blocks = triton.cdiv(rows, tile["BLOCK_M"])
    if kernel is _encode_in_registers:
        kernel[(blocks,)](*given, *wanted, EXACT=exact, **tile, **options)
    else:
        programs = min(blocks, _multiprocessors(x.device))
        shape = (programs, tile["BLOCK_M"], width)
        scratch = torch.empty(shape, dtype=torch.float32, device=x.device)
        parts = torch.empty((2, *shape), dtype=torch.bfloat16, device=x.device)
        kernel[(programs,)](
            *given, *wanted, scratch, parts, blocks, width, EXACT=exact, **tile, **options
        )
    return books


def _code_dtype(codebooks: Sequence[Tensor]) -> torch.dtype:
    most = max(map(len, codebooks))
    return torch.uint8 if most <= 256 else torch.int16 if most <= 32768 else torch.int32


def residual_kmeans_encode(x: Tensor, codebooks: Sequence[Tensor]) -> Tensor:
    """Return codes [M, L]; the contract is that of `livrec_fast.residual_kmeans_encode`."""
    codes = x.new_empty((len(x), len(codebooks)), dtype=_code_dtype(codebooks))
    if len(x):
        with torch.cuda.device_of(x):
            _run(x, codebooks, codes)
    return codes


def residual_kmeans_details(
    x: Tensor, codebooks: Sequence[Tensor], reconstruction: bool, second: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return what torch's operator `livrec::residual_kmeans_details` does."""
    shape, dtype = (len(x), len(codebooks)), _code_dtype(codebooks)
    codes, norms = x.new_empty(shape, dtype=dtype), x.new_empty(shape, dtype=torch.float32)
    total = x.new_empty(x.shape if reconstruction else (0,), dtype=torch.float32)
    other = x.new_empty(shape if second else (0,), dtype=dtype)
    gap = x.new_empty(shape if second else (0,), dtype=torch.float32)
    if len(x):
        with torch.cuda.device_of(x):
            books = _run(
                x, codebooks, codes, norms, other if second else None, gap if second else None
            )
            norms.sqrt_()
            if reconstruction:
                books.decode(codes, total)
    return codes, norms, total, other, gap


def assign(x: Tensor, codebook: Tensor, penalty: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the code [M] with the least |x - c|^2 + penalty, and float32 |x - c|^2 [M]."""
    codes = x.new_empty(len(x), dtype=_code_dtype([codebook]))
    errors = x.new_empty(len(x), dtype=torch.float32)
    if len(x):
        with torch.cuda.device_of(x):
            penalty = None if penalty is None else penalty.contiguous()
            _run(x, [codebook], codes, errors, penalty=penalty)
    return codes, errors


def _multiprocessors(device: torch.device) -> int:
    """Return how many multiprocessors `device` has; 1 for the CPU of Triton's interpreter."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def _is_hopper(device: torch.device) -> bool:
    """Tell whether `device` multiplies straight from shared memory, which spares registers."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] >= 9


def compile_configs() -> Iterator[tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """Yield what the launches above compile: kernel, argument types, constants, options.

    A type ending in ":16" is known to be divisible by 16. "matrix": tensor cores are meant;
    "oldest": the oldest chip that the configuration is for.
    """
    common = {
        **dict.fromkeys(("codebooks", "half_norms", "scratch", "errors", "gap"), "*fp32:16"),
        **dict.fromkeys(("parts", "scratch_parts"), "*bf16:16"),
        **dict.fromkeys(("x_row", "D", "WIDTH", "total"), "i32:16"),
        **dict.fromkeys(("LEVELS", "BLOCKS"), "i32"),
        **{"starts": "*i32:16", "M": "i64"},
    }
    contiguous = {"x_column": 1}
    least = {"errors": None, "second": None, "gap": None, "EXACT": False}
    shapes = [(16, 64), (32, 256), (64, 64), (64, 256), (128, 64), (128, 256), (256, 512)]
    for dim, most in shapes:
        kernel, _, tile, options = _plan(dim, most, True)
        options = {**options, "matrix": True, "oldest": 90 if 32 < dim <= 128 else 80}
        for x, code in (("*fp32:16", "*u8:16"), ("*bf16:16", "*i16:16")):
            types = {**common, "x": x, "codes": code, "second": code}
            assigned = {"second": None, "gap": None, "EXACT": x == "*bf16:16"}  # for kmeans_step
            for asked in (least, assigned, {"EXACT": False}) if x == "*fp32:16" else (assigned,):
                yield kernel, types, {**tile, **contiguous, **asked}, options
    for dim in (64, 256):  # nothing known of the rows
        kernel, _, tile, options = _plan(dim, 64, True)
        old = {"oldest": 90 if dim <= 128 else 80}
        strided = {"x": "*fp16", "x_row": "i64", "x_column": "i64", "D": "i32", "codes": "*i32:16"}
        yield kernel, {**common, **strided}, {**tile, **least}, {**options, "matrix": True, **old}
