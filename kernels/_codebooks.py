"""Codebooks as the kernels read them: packed, in float32 and in bfloat16 parts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._scores import split


@triton.jit(do_not_specialize=["level", "start", "size"])
def _pack(
    book, book_row, book_column, penalty, codebooks, parts, half_norms, starts,
    level, start, size, total, D, WIDTH, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Append a codebook to `codebooks`, and its split to `parts`, filled up with zeros.

    A codeword that is only room costs infinitely much, as one that a penalty bars.
    """
    codeword = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    there = codeword < size
    to = (start + codeword).to(tl.int64)[:, None] * WIDTH
    part = total.to(tl.int64) * WIDTH
    norm = tl.zeros((BLOCK_N,), tl.float32)
    for d in range(0, WIDTH, BLOCK_D):
        dims = d + tl.arange(0, BLOCK_D)
        at = codeword.to(tl.int64)[:, None] * book_row + dims.to(tl.int64)[None, :] * book_column
        value = tl.load(book + at, mask=there[:, None] & (dims < D)[None, :], other=0.0)
        value = value.to(tl.float32)
        high, low, lowest = split(value)
        tl.store(codebooks + to + dims[None, :], value)
        tl.store(parts + to + dims[None, :], high)
        tl.store(parts + part + to + dims[None, :], low)
        tl.store(parts + 2 * part + to + dims[None, :], lowest)
        norm += tl.sum(value * value, 1)
    if penalty is not None:
        norm += tl.load(penalty + codeword, mask=there, other=0.0)
    tl.store(half_norms + start + codeword, tl.where(there, norm / 2, float("inf")))
    if tl.program_id(0) == 0:
        tl.store(starts + level, start)
        tl.store(starts + level + 1, start + BLOCK_N * tl.num_programs(0))


@triton.jit(do_not_specialize=["M", "LEVELS"])
def _decode(
    codes, codebooks, starts, out, M, D, WIDTH, LEVELS,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sum the codewords of each row, first level first."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    for d in range(0, WIDTH, BLOCK_D):
        dims = d + tl.arange(0, BLOCK_D)
        total = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        for level in range(LEVELS):
            code = tl.load(codes + rows * LEVELS + level, mask=rows < M, other=0).to(tl.int64)
            at = (tl.load(starts + level) + code)[:, None] * WIDTH + dims[None, :]
            total += tl.load(codebooks + at)
        inside = (rows < M)[:, None] & (dims < D)[None, :]
        tl.store(out + rows[:, None] * D + dims[None, :], total, mask=inside)


_PACK_TILE = {"BLOCK_N": 64, "BLOCK_D": 16}
_DECODE_TILE = {"BLOCK_M": 32, "BLOCK_D": 16}


class Books:
    """Codebooks as the kernels read them: after one another, in float32 and in parts."""

    def __init__(
        self, codebooks: Sequence[Tensor], width: int, room: int, penalty: Tensor | None = None
    ):
        self.width = width
        rooms = [-(-len(book) // room) * room for book in codebooks]
        self.total = sum(rooms)
        device = codebooks[0].device
        self.whole = torch.empty((self.total, width), dtype=torch.float32, device=device)
        self.parts = torch.empty((3, self.total, width), dtype=torch.bfloat16, device=device)
        self.half_norms = torch.empty(self.total, dtype=torch.float32, device=device)
        self.starts = torch.empty(len(rooms) + 1, dtype=torch.int32, device=device)
        for level, book in enumerate(codebooks):
            _pack[(rooms[level] // _PACK_TILE["BLOCK_N"],)](
                book, *book.stride(), penalty, self.whole, self.parts, self.half_norms, self.starts,
                level, sum(rooms[:level]), len(book), self.total, book.shape[1], width,
                **_PACK_TILE,
            )  # fmt: skip

    def decode(self, codes: Tensor, out: Tensor) -> None:
        """Write the sums [M, D] of the codewords that codes [M, L] stand for."""
        _decode[(triton.cdiv(len(codes), _DECODE_TILE["BLOCK_M"]),)](
            codes, self.whole, self.starts, out, *out.shape, self.width, codes.shape[1],
            **_DECODE_TILE,
        )  # fmt: skip


def compile_configs() -> Iterator[tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """Yield what the launches above compile: kernel, argument types, constants, options.

    A type ending in ":16" is known to be divisible by 16. "matrix": tensor cores are meant.
    """
    types = {
        **dict.fromkeys(("book", "codebooks", "half_norms", "out", "penalty"), "*fp32:16"),
        **dict.fromkeys(("book_row", "D", "WIDTH", "total"), "i32:16"),
        **dict.fromkeys(("LEVELS", "level", "start", "size"), "i32"),
        **{"parts": "*bf16:16", "starts": "*i32:16", "codes": "*u8:16", "M": "i64"},
    }
    for given in ({}, {"penalty": None}):
        yield _pack, types, {**_PACK_TILE, "book_column": 1, **given}, {"matrix": False}
    strided = {"book": "*bf16", "book_row": "i64", "book_column": "i64", "D": "i32"}
    yield _pack, {**types, **strided}, {**_PACK_TILE, "penalty": None}, {"matrix": False}
    yield _decode, types, _DECODE_TILE, {"matrix": False}
