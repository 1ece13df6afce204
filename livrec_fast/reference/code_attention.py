"""Attention over histories that are stored as codes, as the formula has it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from operator import mul
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ._formula import wide_dtype
from ._oracle import Oracle, randn, random_offsets
from .pack_codes import pack_codes
from .prefix_ngram import groups_of
from .prefix_ngram_keys import prefix_ngram_keys
from .target_attention import draw_bias, target_attention


def code_attention(
    q: Tensor,
    codes: Tensor,
    key_tables: Sequence[Tensor],
    value_tables: Sequence[Tensor],
    offsets: Tensor,
    bias: Tensor | None,
    scale: float,
    levels: Sequence[int],
    groups: Sequence[int],
    hashing: str,
    packed: bool,
) -> tuple[Tensor, Tensor]:
    """Find the rows that the codes name, decode the keys and values, then attend to them."""
    sizes = [len(table) for table in key_tables]
    rows = prefix_ngram_keys(codes, levels, sizes, hashing, groups, packed)
    k, v = decode(rows, key_tables), decode(rows, value_tables)
    return target_attention(q, k, v, offsets, bias, scale)


def decode(rows: Tensor, tables: Sequence[Tensor]) -> Tensor:
    """x_t = sum_f tables[f][rows[t, f]]; a row of -1 adds nothing. Summed wide, rounded once."""
    return (
        torch.stack([look_up(table, row) for table, row in zip(tables, rows.T, strict=True)])
        .sum(0)
        .to(tables[0].dtype)
    )


def look_up(table: Tensor, row: Tensor) -> Tensor:
    """Return table[row] in the wide dtype, where -1 is a row of zeros put after the last."""
    rows = table.flatten(1).to(wide_dtype(table.dtype))
    rows = functional.pad(rows, (0, 0, 0, 1))
    # an embedding, as the gradient of rows[row] is not the same on every run
    return functional.embedding(row.long() % len(rows), rows).unflatten(1, table.shape[1:])


def draw_codes(
    generator: torch.Generator, T: int, sizes: Sequence[int], unknown: bool = True
) -> Tensor:
    """Draw codes int16 [T, F] below `sizes`, one in eight of them -1 unless all are to be known."""
    columns = [torch.randint(size, (T,), generator=generator) for size in sizes]
    codes = torch.stack(columns, 1)
    absent = torch.randint(8, codes.shape, generator=generator) == 0
    return codes.masked_fill(absent & unknown, -1).to(torch.int16)


def draw_fields(
    generator: torch.Generator, T: int, *, F: int, N: int, rows: int, kind: int, hash: int,
    pack: int, odd: int,
) -> tuple[dict[str, Any], list[int]]:  # fmt: skip
    """Draw codes and what they mean, as keywords, and the rows of their tables.

    Level f has N - 3 f codes, or one at least. kind: 0, a table per level, without levels given;
    1, with levels, and at most `rows` rows; 2, prefixes of one code; 3, half of the fields by
    themselves, the rest prefixes of one code. odd: 3 makes all rows of codes alike.
    """
    levels = [max(1, N - 3 * field) for field in range(F)]
    packed = bool(pack and kind)
    codes = draw_codes(generator, T, levels, unknown=not packed)
    if odd == 3:
        codes = codes[:1].repeat(T, 1)
    if packed:
        codes = pack_codes(codes, levels)
    groups = {2: [F], 3: [1] * (F // 2) + [F - F // 2]}.get(kind, [1] * F)
    keys = [count for part in groups_of(levels, groups) for count in accumulate(levels[part], mul)]
    fields = {
        "codes": codes,
        "levels": levels if kind else None,
        "prefix": kind == 2,
        "groups": groups if kind == 3 else None,
        "hashing": ("modulo", "murmur3", "order_preserving")[hash],
        "packed": packed,
    }
    return fields, [min(rows, count) for count in keys] if kind else levels


def odd_bias(
    generator: torch.Generator, dtype: torch.dtype, offsets: Tensor, H: int, kind: int, odd: int
) -> Tensor | None:
    """Draw a bias; odd: 1 takes out the longest history, 2 lets each one's first row dominate."""
    bias = draw_bias(generator, dtype, int(offsets[-1]), H, kind)
    lengths = offsets.diff()
    if bias is not None and len(lengths):
        longest = int(lengths.argmax())
        if odd == 1:
            bias[offsets[longest] : offsets[longest + 1]] = -torch.inf
        if odd == 2:
            bias[offsets[:-1][lengths > 0]] = 30
    return bias


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
    rows: int = 2**31,
    kind: int = 0,
    hash: int = 0,
    pack: int = 0,
    odd: int = 0,
) -> dict[str, Any]:
    """Draw histories of at most L rows of F codes, and a table of keys and of values for each."""
    offsets = random_offsets(generator, B, L)
    T = int(offsets[-1])
    named = {"F": F, "N": N, "rows": rows, "kind": kind, "hash": hash, "pack": pack, "odd": odd}
    fields, sizes = draw_fields(generator, T, **named)
    return {
        "q": randn(generator, dtype, B, C, H, d),
        "key_tables": [randn(generator, dtype, size, H, d) for size in sizes],
        "value_tables": [randn(generator, dtype, size, H, dv) for size in sizes],
        "offsets": offsets,
        "bias": odd_bias(generator, dtype, offsets, H, bias, odd),
        "scale": (F * d) ** -0.5,
        "return_lse": True,
        **fields,
    }


SIZES = {
    "B": (0, 5), "C": (0, 5), "L": (0, 40), "F": (1, 4), "N": (1, 40), "H": (1, 3), "d": (1, 20),
    "dv": (1, 20), "bias": (0, 2), "rows": (1, 100), "kind": (0, 3), "hash": (0, 2),
    "pack": (0, 1), "odd": (0, 3),
}  # fmt: skip
_PLAIN = {"rows": 50, "kind": 0, "hash": 0, "pack": 0, "odd": 0}
_ONE = dict.fromkeys(("B", "C", "L", "F", "N", "H", "d", "dv"), 1) | {"bias": 0}
_TYPICAL = {"B": 6, "C": 4, "L": 50, "F": 3, "N": 31, "H": 2, "d": 16, "dv": 24, "bias": 2}
_TYPICAL = {**_TYPICAL, **_PLAIN}
CASES = {
    "typical": _TYPICAL,
    "no users": _TYPICAL | {"B": 0},
    "no candidates": _TYPICAL | {"C": 0},
    "empty histories": _TYPICAL | {"L": 0},
    "one of each": _ONE | _PLAIN | {"rows": 1},
    "long": _TYPICAL | {"B": 2, "L": 1500, "H": 1, "bias": 1},
    "wide codes": _TYPICAL | {"N": 600, "bias": 0},
    "mostly absent rows": _TYPICAL | {"F": 2, "N": 5000, "H": 1, "d": 4, "dv": 4},
    "hashed fields": _TYPICAL | {"kind": 1, "rows": 26, "hash": 1},
    "prefixes": _TYPICAL | {"kind": 2, "N": 8, "rows": 45},
    "mixed groups": _TYPICAL | {"kind": 3, "F": 5, "N": 16, "rows": 50, "hash": 2, "bias": 1},
    "packed": _TYPICAL | {"kind": 3, "N": 9, "pack": 1},
    "a history masked": _TYPICAL | {"odd": 1},
    "a history masked, bias of all heads": _TYPICAL | {"odd": 1, "bias": 1},
    "one row dominates": _TYPICAL | {"odd": 2},
    "all rows alike": _TYPICAL | {"odd": 3, "kind": 2},
}
ORACLES = {"code_attention": Oracle(code_attention, make_inputs, SIZES, CASES)}
