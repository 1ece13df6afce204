"""The table rows of code prefixes, as the formula has them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from operator import mul
from typing import Any

import torch
from torch import Tensor

from ._oracle import Oracle
from .pack_codes import unpack_codes
from .prefix_ngram import CASES, SIZES, groups_of, make_inputs, prefix_keys, table_rows


def prefix_ngram_keys(
    codes: Tensor,
    levels: Sequence[int],
    rows: Sequence[int],
    hashing: str,
    groups: Sequence[int],
    packed: bool,
) -> Tensor:
    """h_l(key_l) of every level, or -1 from an unknown code on."""
    codes = unpack_codes(codes, levels) if packed else codes
    out = []
    for group in groups_of(levels, groups):
        keys = prefix_keys(codes[:, group], levels[group])
        counts = accumulate(levels[group], mul)
        for key, count, size in zip(keys.T, counts, rows[group], strict=True):
            row = table_rows(key.clamp(min=0), count, size, hashing)
            out.append(torch.where(key >= 0, row, -1))
    return torch.stack(out, 1)


def make_key_inputs(generator: torch.Generator, dtype: torch.dtype, **sizes: int) -> dict[str, Any]:
    """Draw codes, and the rows of their tables."""
    inputs = make_inputs(generator, dtype, **sizes)
    rows = [len(table) for table in inputs["tables"]]
    kept = ("codes", "levels", "hashing", "groups", "packed")
    return {"rows": rows, **{name: inputs[name] for name in kept}}


ORACLES = {"prefix_ngram_keys": Oracle(prefix_ngram_keys, make_key_inputs, SIZES, CASES)}
