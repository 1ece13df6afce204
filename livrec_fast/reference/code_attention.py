"""Attention over histories that are stored as codes, as the formula has it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ._formula import wide_dtype
from ._oracle import Oracle, randn, random_offsets
from .target_attention import draw_bias, target_attention


def code_attention(
    q: Tensor,
    codes: Tensor,
    key_tables: Sequence[Tensor],
    value_tables: Sequence[Tensor],
    offsets: Tensor,
    bias: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Decode the keys and values, then attend to them."""
    k, v = decode(codes, key_tables), decode(codes, value_tables)
    return target_attention(q, k, v, offsets, bias, scale)


def decode(codes: Tensor, tables: Sequence[Tensor]) -> Tensor:
    """x_t = sum_f tables[f][codes[t, f]]; a code of -1 adds nothing. Summed wide, rounded once."""
    return (
        torch.stack([look_up(t, c) for t, c in zip(tables, codes.T, strict=True)])
        .sum(0)
        .to(tables[0].dtype)
    )


def look_up(table: Tensor, code: Tensor) -> Tensor:
    """Return table[code] in the wide dtype, where -1 is a row of zeros put after the last."""
    rows = table.flatten(1).to(wide_dtype(table.dtype))
    rows = functional.pad(rows, (0, 0, 0, 1))
    # an embedding, as the gradient of rows[code] is not the same on every run
    return functional.embedding(code.long() % len(rows), rows).unflatten(1, table.shape[1:])


def draw_codes(generator: torch.Generator, T: int, sizes: Sequence[int]) -> Tensor:
    """Draw codes int16 [T, F] below `sizes`, one in eight of them -1."""
    columns = [torch.randint(size, (T,), generator=generator) for size in sizes]
    codes = torch.stack(columns, 1)
    unknown = torch.randint(8, codes.shape, generator=generator) == 0
    return codes.masked_fill(unknown, -1).to(torch.int16)


def make_inputs(
    generator: torch.Generator,
    dtype: torch.dtype,
    *,
    B: int,
    C: int,
    L: int,
    F: int,
    N: int,
    H: int,
    d: int,
    dv: int,
    bias: int,
) -> dict[str, Any]:
    """Draw histories of at most L rows of F codes; table f has N - 3 f rows, or one at least."""
    offsets = random_offsets(generator, B, L)
    T = int(offsets[-1])
    sizes = [max(1, N - 3 * field) for field in range(F)]
    return {
        "q": randn(generator, dtype, B, C, H, d),
        "codes": draw_codes(generator, T, sizes),
        "key_tables": [randn(generator, dtype, size, H, d) for size in sizes],
        "value_tables": [randn(generator, dtype, size, H, dv) for size in sizes],
        "offsets": offsets,
        "bias": draw_bias(generator, dtype, T, H, bias),
        "scale": (F * d) ** -0.5,
        "return_lse": True,
    }


_SIZES = {
    "B": (0, 5), "C": (0, 5), "L": (0, 40), "F": (1, 4), "N": (1, 40), "H": (1, 3), "d": (1, 20),
    "dv": (1, 20), "bias": (0, 2),
}  # fmt: skip
_ONE = dict.fromkeys(("B", "C", "L", "F", "N", "H", "d", "dv"), 1) | {"bias": 0}
_TYPICAL = {"B": 6, "C": 4, "L": 50, "F": 3, "N": 31, "H": 2, "d": 16, "dv": 24, "bias": 2}
_CASES = {
    "typical": _TYPICAL,
    "no users": _TYPICAL | {"B": 0},
    "no candidates": _TYPICAL | {"C": 0},
    "empty histories": _TYPICAL | {"L": 0},
    "one of each": _ONE,
    "long": _TYPICAL | {"B": 2, "L": 1500, "H": 1, "bias": 1},
    "wide codes": _TYPICAL | {"N": 600, "bias": 0},
}
ORACLES = {"code_attention": Oracle(code_attention, make_inputs, _SIZES, _CASES)}
