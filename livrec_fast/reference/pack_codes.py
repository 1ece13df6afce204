"""Codes packed into bits, as the layout has it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ._oracle import Oracle
from .residual_kmeans import code_dtype


def bit_widths(levels: Sequence[int]) -> list[int]:
    """Return ceil(log2 N_l) for every level: the bits that its codes take; none where N_l is 1."""
    return [(size - 1).bit_length() for size in levels]


def packed_bytes(levels: Sequence[int]) -> int:
    """Return ceil(bits / 8): the bytes of one packed row."""
    return -(-sum(bit_widths(levels)) // 8)


def pack_codes(codes: Tensor, levels: Sequence[int]) -> Tensor:
    """Bit j of level l is bit i = w_1 + ... + w_(l-1) + j of the row: bit i % 8 of byte i // 8.

    One bit at a time, so that a row may be longer than any integer.
    """
    bits = codes.new_zeros((len(codes), 8 * packed_bytes(levels)), dtype=torch.uint8)
    widths = bit_widths(levels)
    starts = accumulate(widths, initial=0)
    for code, width, start in zip(codes.long().T, widths, starts, strict=False):
        for j in range(width):
            bits[:, start + j] = code >> j & 1
    place = 2 ** torch.arange(8, dtype=torch.uint8, device=codes.device)
    return (bits.view(len(codes), packed_bytes(levels), 8) * place).sum(2, dtype=torch.uint8)


def unpack_codes(packed: Tensor, levels: Sequence[int]) -> Tensor:
    """Code l is the sum over j of 2^j * bit w_1 + ... + w_(l-1) + j of the row."""
    codes = []
    start = 0
    for width in bit_widths(levels):
        code = packed.new_zeros(len(packed), dtype=torch.int64)
        for j in range(width):
            byte, place = divmod(start + j, 8)
            code |= (packed[:, byte].long() >> place & 1) << j
        codes.append(code)
        start += width
    return torch.stack(codes, 1).to(code_dtype(max(levels)))


def _levels(N: int, L: int) -> list[int]:
    return [max(1, N - 37 * level) for level in range(L)]


def make_inputs(
    generator: torch.Generator, dtype: torch.dtype, *, M: int, L: int, N: int
) -> dict[str, Any]:
    """Draw codes for levels that shrink from N, so that widths differ; `dtype` plays no part."""
    levels = _levels(N, L)
    columns = [torch.randint(size, (M,), generator=generator) for size in levels]
    return {"codes": torch.stack(columns, 1).to(torch.int32), "levels": levels}


def make_unpack_inputs(
    generator: torch.Generator, dtype: torch.dtype, *, M: int, L: int, N: int
) -> dict[str, Any]:
    """Draw codes as for packing, and pack them."""
    inputs = make_inputs(generator, dtype, M=M, L=L, N=N)
    return {"packed": pack_codes(**inputs), "levels": inputs["levels"]}


_SIZES = {"M": (0, 70), "L": (1, 6), "N": (1, 70_000)}
_CASES = {
    "typical": {"M": 300, "L": 4, "N": 200},
    "no rows": {"M": 0, "L": 2, "N": 64},
    "one of each": {"M": 1, "L": 1, "N": 1},
    "one level": {"M": 30, "L": 1, "N": 2},
    "more than 64 bits": {"M": 40, "L": 16, "N": 65_536},
}
ORACLES = {
    "pack_codes": Oracle(pack_codes, make_inputs, _SIZES, _CASES, dtypes=(torch.float32,)),
    "unpack_codes": Oracle(
        unpack_codes, make_unpack_inputs, _SIZES, _CASES, dtypes=(torch.float32,)
    ),
}
