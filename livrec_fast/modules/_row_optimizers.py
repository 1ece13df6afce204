"""Optimisers that update the rows of a table as soon as their gradients are known."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from .._dispatch import OPS
from ._huge_pages import empty_rows


@dataclass(frozen=True)
class RowOptimizer:
    """What a row optimiser must say: its rule of `row_update`, and the state that a table needs."""

    rule: ClassVar[str]
    lr: float
    seed: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        for name in ("lr", "eps"):
            value = getattr(self, name, 1.0)
            if not 0 < value < math.inf:
                raise ValueError(f"{name}: must be positive and finite, got {value}")

    def state_shape(self, table: Tensor) -> tuple[int, ...] | None:
        """Return the shape of the state that a table needs, or None."""
        return None

    def new_state(self, table: Tensor) -> Tensor | None:
        """Return the state of a table that has not been updated yet, zeros, or None."""
        shape = self.state_shape(table)
        wide = torch.float64 if table.dtype == torch.float64 else torch.float32
        return None if shape is None else empty_rows(shape, wide, table.device).zero_()

    def step(self) -> dict[str, Any]:
        """Return what `row_update` and `prefix_ngram_update` take of the optimiser."""
        eps = {"eps": self.eps} if hasattr(self, "eps") else {}
        return {"rule": self.rule, "lr": self.lr, **eps}

    def draw_seed(self, draw: int) -> int:
        """Return the seed of the draw-th roundings of float16 and bfloat16 rows."""
        return (self.seed * 1_000_003 + draw) % 2**63


@dataclass(frozen=True)
class RowSGD(RowOptimizer):
    """w -= lr g for the rows looked up, as torch.optim.SGD without momentum.

    lr: the learning rate. seed: of the rounding of float16 and bfloat16 tables, as for
    `RowAdagrad`.

    Example:
        >>> PrefixNgramEmbedding((64, 64), 32, optimizer=RowSGD(0.1))
    """

    rule = "sgd"


@dataclass(frozen=True)
class RowAdagrad(RowOptimizer):
    """s += g^2, w -= lr g / (sqrt(s) + eps) for the rows looked up, as torch.optim.Adagrad.

    s is kept per element, float32 [H, d] (float64 for float64 tables). g is the gradient summed
    over all items of the lookup that read the row.

    Args:
        lr: the learning rate.
        eps: keeps the divisor from 0.
        seed: of the rounding of float16 and bfloat16 tables: up or down at random, so that its mean
            is the exact value and small steps are not lost; the same draws for the same seed,
            number of updates so far and device.

    Source: Duchi et al., "Adaptive subgradient methods" (2011).

    Example:
        >>> PrefixNgramEmbedding((64, 64), 32, optimizer=RowAdagrad(0.05))
    """

    eps: float = 1e-10
    rule = "adagrad"

    def state_shape(self, table: Tensor) -> tuple[int, ...]:
        """Return [H, d]."""
        return tuple(table.shape)


@dataclass(frozen=True)
class RowwiseAdagrad(RowOptimizer):
    """s += mean(g^2) over the row, w -= lr g / (sqrt(s) + eps): Adagrad with a number per row.

    s is float32 [H] (float64 for float64 tables). As FBGEMM's EXACT_ROWWISE_ADAGRAD.

    Args:
        lr: the learning rate.
        eps: keeps the divisor from 0.
        seed: as for `RowAdagrad`.

    Source: Mudigere et al., "Software-hardware co-design for fast and scalable training of deep
    learning recommendation models" (2022).

    Example:
        >>> PrefixNgramEmbedding((64, 64), 32, optimizer=RowwiseAdagrad(0.05))
    """

    eps: float = 1e-8
    rule = "rowwise_adagrad"

    def state_shape(self, table: Tensor) -> tuple[int, ...]:
        """Return [H]."""
        return (len(table),)


def backend_of_rows(backend: str) -> str:
    """Return the backend for `row_update` of what runs by another op's: "auto" if it has none."""
    names = {known.name for known in OPS["row_update"].backends}
    return backend if backend in names else "auto"


def next_step(module: Any) -> tuple[list[Tensor | None], list[int]]:
    """Return the state of each of a module's tables, and the seeds of its next roundings."""
    levels = range(len(module.tables))
    first = int(module.updates) * len(levels)
    seeds = [module.optimizer.draw_seed(first + level) for level in levels]
    return [getattr(module, f"state_{level}") for level in levels], seeds


OPTIMIZERS = {kind.__name__: kind for kind in (RowSGD, RowAdagrad, RowwiseAdagrad)}
