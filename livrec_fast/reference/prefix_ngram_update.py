"""One step of an optimiser on the prefix tables that a lookup read, as the formula has it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._oracle import Oracle
from .prefix_ngram import CASES, SIZES
from .prefix_ngram_gradient import make_gradient_inputs, prefix_ngram_gradient
from .row_update import RULES, row_update


def prefix_ngram_update(
    tables: Sequence[Tensor],
    states: Sequence[Tensor],
    grad: Tensor,
    codes: Tensor,
    levels: Sequence[int],
    mode: str,
    offsets: Tensor | None,
    pool: str | None,
    hashing: str,
    groups: Sequence[int],
    packed: bool,
    rule: str,
    lr: float,
    eps: float,
    seeds: Sequence[int],
) -> None:
    """`row_update` of each table, given the rows and sums of `prefix_ngram_gradient`."""
    rows, dims = [len(table) for table in tables], [table.shape[1] for table in tables]
    found = prefix_ngram_gradient(
        grad, codes, levels, rows, dims, mode, offsets, pool, hashing, groups, packed
    )
    for level, table in enumerate(tables):
        state = states[level] if states else None
        at, sums = found[2 * level : 2 * level + 2]
        row_update(table, state, at, sums, rule, lr, eps, seeds[level])


def make_update_inputs(
    generator: torch.Generator, dtype: torch.dtype, *, rule: int, **sizes: int
) -> dict[str, Any]:
    """Draw codes, a gradient of their lookup, and tables that have been trained for a while."""
    inputs = make_gradient_inputs(generator, dtype, **sizes)
    shapes = list(zip(inputs.pop("rows"), inputs.pop("dims"), strict=True))
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def draw_state(height: int, width: int) -> Tensor:
        shape = (height, width) if RULES[rule] == "adagrad" else (height,)
        return torch.rand(shape, generator=generator, dtype=wide)

    return {
        "tables": [torch.randn(shape, generator=generator).to(dtype) for shape in shapes],
        "states": [draw_state(*shape) for shape in shapes] if rule else None,
        "rule": RULES[rule],
        "lr": 0.1,
        "seeds": list(range(7, 7 + len(shapes))),
        **inputs,
    }


_SIZES = {**SIZES, "rule": (0, 2)}
_CASES = {
    **{name: {**sizes, "rule": 2} for name, sizes in CASES.items()},
    "sgd": {**CASES["typical"], "rule": 0},
    "sum, adagrad": {**CASES["sum"], "rule": 1},
    "packed, adagrad": {**CASES["packed"], "rule": 1},
    "few rows, several groups": {**CASES["two groups"], "H": 5, "rule": 1},
}
ORACLES = {"prefix_ngram_update": Oracle(prefix_ngram_update, make_update_inputs, _SIZES, _CASES)}
