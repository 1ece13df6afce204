"""One step of an optimiser on rows of a table, as the formula has it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._hash import draw_bits
from ._oracle import Oracle, randn

RULES = ("sgd", "adagrad", "rowwise_adagrad")


def row_update(
    table: Tensor, state: Tensor | None, rows: Tensor, sums: Tensor, rule: str, lr: float,
    eps: float, seed: int,
) -> None:  # fmt: skip
    """w -= lr g, by "sgd"; by the Adagrads s += g^2 or its mean, w -= lr g / (sqrt(s) + eps)."""
    steps = sums * lr
    if state is not None:
        squares = sums.square() if rule == "adagrad" else sums.square().mean(1)
        squares = state[rows] + squares
        state.index_copy_(0, rows, squares)
        divisor = squares.sqrt() + eps
        steps = steps / (divisor if rule == "adagrad" else divisor[:, None])
    moved = table[rows].to(sums.dtype) - steps
    if table.dtype in (torch.float16, torch.bfloat16):
        bits = 16 if table.dtype == torch.bfloat16 else 13  # of float32 that the table's lacks
        moved = round_at_random(moved, table.dtype, draw_bits(seed, rows, table.shape[1], bits))
    table.index_copy_(0, rows, moved)


def round_at_random(x: Tensor, dtype: torch.dtype, noise: Tensor) -> Tensor:
    """Round float32 to a neighbour in float16 or bfloat16; the nearer, the likelier: no bias.

    noise: int64, as x, evenly distributed below 2^16 for bfloat16, 2^13 for float16.
    """
    drop = 16 if dtype == torch.bfloat16 else 13
    # a float's bits grow with its magnitude: noise carries into the kept ones as often as is due
    bits = x.view(torch.int32) + noise.to(torch.int32)
    out = ((bits >> drop) << drop).view(torch.float32)
    if dtype == torch.float16:  # below 2^-14 its numbers are 2^-24 apart
        units = x * 2.0**24
        low = units.floor()
        tiny = (low + (noise < (units - low) * (1 << drop))) * 2.0**-24
        out = torch.where(x.abs() < 2.0**-14, tiny, out)
    return torch.where(x.isfinite(), out, x).to(dtype)


def make_inputs(
    generator: torch.Generator, dtype: torch.dtype, *, H: int, d: int, M: int, rule: int
) -> dict[str, Any]:
    """Draw a table that has been trained for a while, and gradients of some of its rows."""
    rows = torch.randperm(H, generator=generator)[:M].sort()[0]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    shape = (None, (H, d), (H,))[rule]
    return {
        "table": randn(generator, dtype, H, d),
        "rows": rows,
        "sums": randn(generator, wide, len(rows), d),
        "rule": RULES[rule],
        "lr": 0.1,
        "state": None if shape is None else torch.rand(shape, generator=generator, dtype=wide),
        "seed": 7,
    }


_SIZES = {"H": (1, 300), "d": (1, 40), "M": (0, 200), "rule": (0, 2)}
_TYPICAL = {"H": 200, "d": 24, "M": 80, "rule": 2}
_CASES = {
    "typical": _TYPICAL,
    "sgd": {**_TYPICAL, "rule": 0},
    "adagrad": {**_TYPICAL, "rule": 1},
    "many rows": {"H": 5000, "d": 7, "M": 3000, "rule": 1},
    "no rows": {**_TYPICAL, "M": 0},
    "one of each": {"H": 1, "d": 1, "M": 1, "rule": 2},
}
ORACLES = {"row_update": Oracle(row_update, make_inputs, _SIZES, _CASES)}
