"""Prefix n-gram embedding, as the formula has it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ._oracle import Oracle, randn, random_offsets


def prefix_keys(codes: Tensor, levels: Sequence[int]) -> Tensor:
    """key_1 = c_1, key_l = key_(l-1) * N_l + c_l: int64 [M, L], -1 from an unknown code on.

    Two rows have the same key at level l just where their first l codes are the same.
    """
    known = torch.ones(len(codes), dtype=torch.bool, device=codes.device)
    key = torch.zeros(len(codes), dtype=torch.int64, device=codes.device)
    keys = []
    for code, size in zip(codes.long().T, levels, strict=True):
        known = known & (code >= 0)
        key = torch.where(known, key * size + code, -1)
        keys.append(key)
    return torch.stack(keys, 1)


def prefix_ngram_lookup(
    codes: Tensor,
    tables: Sequence[Tensor],
    levels: Sequence[int],
    mode: str = "concat",
    offsets: Tensor | None = None,
    pool: str | None = None,
    hashing: str = "modulo",
) -> Tensor:
    """E_1[key_1 mod H_1] || ... || E_L[key_L mod H_L], or their sum; then pooled per history.

    Sums of float16 and bfloat16 are taken in float32 and rounded once.
    """
    dtype = tables[0].dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    parts = []
    for key, table in zip(prefix_keys(codes, levels).T, tables, strict=True):
        # each distinct row once: its gradient, too, is then summed wide and rounded once
        rows, place = torch.unique(key.clamp(min=0) % len(table), return_inverse=True)
        part = F.embedding(place, F.embedding(rows, table).to(wide))
        parts.append(torch.where(key[:, None] >= 0, part, 0))
    out = torch.cat(parts, 1) if mode == "concat" else torch.stack(parts).sum(0)
    if offsets is not None:
        out = torch.segment_reduce(out, "sum", offsets=offsets, axis=0, unsafe=True, initial=0)
        if pool == "mean":
            out = out / offsets.diff().clamp(min=1)[:, None]
    return out.to(dtype)


def make_inputs(
    generator: torch.Generator,
    dtype: torch.dtype,
    *,
    B: int,
    T: int,
    L: int,
    N: int,
    d: int,
    H: int,
    summed: int,
    pool: int,
) -> dict[str, Any]:
    """Draw B histories of at most T items, a code in twelve unknown, and tables of <= H rows."""
    offsets = random_offsets(generator, B, T)
    shape = (int(offsets[-1]), L)
    levels = [N + level for level in range(L)]
    codes = torch.randint(2**31 - 1, shape, generator=generator) % torch.tensor(levels)
    unknown = torch.randint(12, shape, generator=generator) == 0
    dims = [d if summed else d + level for level in range(L)]
    rows = [min(H, int(torch.tensor(levels[: level + 1]).prod())) for level in range(L)]
    return {
        "codes": codes.masked_fill(unknown, -1).to(torch.int16),
        "tables": [randn(generator, dtype, *shape) for shape in zip(rows, dims, strict=True)],
        "levels": levels,
        "mode": "sum" if summed else "concat",
        "offsets": offsets if pool else None,
        "pool": (None, "sum", "mean")[pool],
    }


_SIZES = {
    "B": (1, 12), "T": (0, 9), "L": (1, 4), "N": (1, 12), "d": (1, 20), "H": (1, 300),
    "summed": (0, 1), "pool": (0, 2),
}  # fmt: skip
_TYPICAL = {"B": 16, "T": 20, "L": 3, "N": 6, "d": 8, "H": 100, "summed": 0, "pool": 0}
_CASES = {
    "typical": _TYPICAL,
    "sum": {**_TYPICAL, "summed": 1},
    "pooled sum": {**_TYPICAL, "pool": 1},
    "sum, pooled mean": {**_TYPICAL, "summed": 1, "pool": 2},
    "no items": {**_TYPICAL, "T": 0},
    "empty histories": {**_TYPICAL, "T": 0, "pool": 2},
    "no histories": {**_TYPICAL, "B": 0, "T": 0, "pool": 1},
    "one of each": {"B": 1, "T": 1, "L": 1, "N": 1, "d": 1, "H": 1, "summed": 0, "pool": 0},
}
ORACLES = {"prefix_ngram_lookup": Oracle(prefix_ngram_lookup, make_inputs, _SIZES, _CASES)}
