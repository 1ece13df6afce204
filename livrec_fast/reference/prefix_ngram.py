"""Prefix n-gram embedding, as the formula has it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from operator import mul
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ._hash import murmur3, shifted
from ._oracle import Oracle, randn, random_offsets
from .pack_codes import pack_codes, unpack_codes


def groups_of(levels: Sequence[int], groups: Sequence[int]) -> list[slice]:
    """Return the columns of each group of levels."""
    ends = list(accumulate(groups))
    assert ends[-1] == len(levels)
    return [slice(end - size, end) for end, size in zip(ends, groups, strict=True)]


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


def _remainder(a: Tensor, size: int) -> Tensor:
    """Return the remainder of a, read as unsigned, by size."""
    high, low = shifted(a, 1), a & 1
    return ((high % size) * 2 % size + low) % size if size < 2**62 else _wide_remainder(a, size)


def _wide_remainder(a: Tensor, size: int) -> Tensor:
    return torch.tensor([int(v) % 2**64 % size for v in a.tolist()], dtype=torch.int64)


def table_rows(key: Tensor, keys: int, rows: int, hashing: str) -> Tensor:
    """Return the row of each key among `keys`: the key where rows hold all, else its hash.

    order_preserving: floor(key * floor(rows * 2^64 / keys) / 2^64).
    """
    if rows >= keys:
        return key
    if hashing == "modulo":
        return key % rows
    if hashing == "murmur3":
        return _remainder(murmur3(key), rows)
    scale = (rows << 64) // keys
    a, b = (shifted(key, 32), key & 0xFFFFFFFF), (scale >> 32, scale & 0xFFFFFFFF)
    middle = a[0] * b[1] + shifted(a[1] * b[1], 32)
    rest = a[1] * b[0] + (middle & 0xFFFFFFFF)
    return a[0] * b[0] + shifted(middle, 32) + shifted(rest, 32)


def prefix_ngram_lookup(
    codes: Tensor,
    tables: Sequence[Tensor],
    levels: Sequence[int],
    mode: str = "concat",
    offsets: Tensor | None = None,
    pool: str | None = None,
    hashing: str = "modulo",
    groups: Sequence[int] | None = None,
    packed: bool = False,
    scales: Sequence[Tensor] = (),
) -> Tensor:
    """E_1[row of key_1] || ... || E_L[row of key_L], or their sum; then pooled per history.

    Sums of float16 and bfloat16 are taken in float32 and rounded once.
    """
    dtype = torch.float32 if tables[0].dtype == torch.int8 else tables[0].dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    codes = unpack_codes(codes, levels) if packed else codes
    parts = []
    for group in groups_of(levels, groups or [len(levels)]):
        keys = prefix_keys(codes[:, group], levels[group])
        counts = accumulate(levels[group], mul)
        for at, (key, count) in enumerate(zip(keys.T, counts, strict=True), group.start):
            row = table_rows(key.clamp(min=0), count, len(tables[at]), hashing)
            # each distinct row once: its gradient, too, is then summed wide and rounded once
            rows, place = torch.unique(row, return_inverse=True)
            chosen = F.embedding(rows, tables[at]).to(wide)
            if scales:
                chosen = chosen * scales[at][rows, None]
            part = F.embedding(place, chosen)
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
    hash: int,
    split: int,
    pack: int,
) -> dict[str, Any]:
    """Draw B histories of at most T items, a code in twelve unknown, and tables of <= H rows."""
    offsets = random_offsets(generator, B, T)
    shape = (int(offsets[-1]), L)
    levels = [N + level for level in range(L)]
    codes = torch.randint(2**31 - 1, shape, generator=generator) % torch.tensor(levels)
    unknown = torch.randint(12, shape, generator=generator) == 0
    dims = [d if summed else d + level for level in range(L)]
    groups = [1] * min(split, L - 1) + [L - min(split, L - 1)]
    keys = [count for part in groups_of(levels, groups) for count in accumulate(levels[part], mul)]
    rows = [min(H, count) for count in keys]
    codes = pack_codes(codes, levels) if pack else codes.masked_fill(unknown, -1).to(torch.int16)
    return {
        "codes": codes,
        "tables": [randn(generator, dtype, *shape) for shape in zip(rows, dims, strict=True)],
        "levels": levels,
        "mode": "sum" if summed else "concat",
        "offsets": offsets if pool else None,
        "pool": (None, "sum", "mean")[pool],
        "hashing": ("modulo", "murmur3", "order_preserving")[hash],
        "groups": groups,
        "packed": bool(pack),
    }


SIZES = {
    "B": (1, 12), "T": (0, 9), "L": (1, 4), "N": (1, 12), "d": (1, 20), "H": (1, 300),
    "summed": (0, 1), "pool": (0, 2), "hash": (0, 2), "split": (0, 3), "pack": (0, 1),
}  # fmt: skip
_PLAIN = {"summed": 0, "pool": 0, "hash": 0, "split": 0, "pack": 0}
_TYPICAL = {"B": 16, "T": 20, "L": 3, "N": 6, "d": 8, "H": 100, **_PLAIN}
CASES = {
    "typical": _TYPICAL,
    "sum": {**_TYPICAL, "summed": 1},
    "pooled sum": {**_TYPICAL, "pool": 1},
    "sum, pooled mean": {**_TYPICAL, "summed": 1, "pool": 2},
    "murmur3": {**_TYPICAL, "hash": 1},
    "order preserving, sum": {**_TYPICAL, "hash": 2, "summed": 1},
    "level by level": {**_TYPICAL, "split": 3},
    "two groups": {**_TYPICAL, "split": 1, "L": 4, "hash": 1},
    "packed": {**_TYPICAL, "pack": 1},
    "no items": {**_TYPICAL, "T": 0},
    "empty histories": {**_TYPICAL, "T": 0, "pool": 2},
    "no histories": {**_TYPICAL, "B": 0, "T": 0, "pool": 1},
    "one of each": {"B": 1, "T": 1, "L": 1, "N": 1, "d": 1, "H": 1, **_PLAIN},
}
ORACLES = {"prefix_ngram_lookup": Oracle(prefix_ngram_lookup, make_inputs, SIZES, CASES)}
