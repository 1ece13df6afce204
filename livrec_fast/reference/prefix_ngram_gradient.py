"""The gradients of a prefix n-gram embedding, as the formula has it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from operator import mul
from typing import Any

import torch
from torch import Tensor

from ._oracle import Oracle, randn
from .pack_codes import unpack_codes
from .prefix_ngram import CASES, SIZES, groups_of, make_inputs, prefix_keys, table_rows


def prefix_ngram_gradient(
    grad: Tensor,
    codes: Tensor,
    levels: Sequence[int],
    rows: Sequence[int],
    dims: Sequence[int],
    mode: str,
    offsets: Tensor | None,
    pool: str | None,
    hashing: str,
    groups: Sequence[int],
    packed: bool,
) -> list[Tensor]:
    """Per level the table rows that were looked up, ascending, and the sums of their gradients."""
    wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
    grad = grad.to(wide)
    if offsets is not None:
        lengths = offsets.diff()
        grad = grad / lengths.clamp(min=1)[:, None] if pool == "mean" else grad
        grad = grad.repeat_interleave(lengths, 0)
    codes = unpack_codes(codes, levels) if packed else codes
    parts = [grad] * len(dims) if mode == "sum" else grad.split(list(dims), 1)
    out = []
    for group in groups_of(levels, groups):
        keys = prefix_keys(codes[:, group], levels[group])
        counts = accumulate(levels[group], mul)
        for at, (key, count) in enumerate(zip(keys.T, counts, strict=True), group.start):
            row = table_rows(key[key >= 0], count, rows[at], hashing)
            found, place = torch.unique(row, return_inverse=True)
            sums = grad.new_zeros((len(found), dims[at]))
            out += [found, sums.index_add(0, place, parts[at][key >= 0])]
    return out


def make_gradient_inputs(
    generator: torch.Generator, dtype: torch.dtype, **sizes: int
) -> dict[str, Any]:
    """Draw codes, and a gradient of their lookup."""
    inputs = make_inputs(generator, dtype, **sizes)
    tables = inputs.pop("tables")
    dims = [table.shape[1] for table in tables]
    count = len(inputs["codes"]) if inputs["offsets"] is None else len(inputs["offsets"]) - 1
    width = dims[0] if inputs["mode"] == "sum" else sum(dims)
    grad = randn(generator, dtype, count, width)
    return {"grad": grad, "rows": [len(table) for table in tables], "dims": dims, **inputs}


ORACLES = {
    "prefix_ngram_gradient": Oracle(prefix_ngram_gradient, make_gradient_inputs, SIZES, CASES)
}
