"""Optimisers that update the rows of a table as soon as their gradients are known."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class RowOptimizer:
    """What a row optimiser must say: the state that a table needs, and the step of some rows."""

    lr: float
    seed: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        for name in ("lr", "eps"):
            value = getattr(self, name, 1.0)
            if not 0 < value < math.inf:
                raise ValueError(f"{name}: must be positive and finite, got {value}")

    def new_state(self, table: Tensor) -> Tensor | None:
        """Return the state of a table that has not been updated yet, or None."""
        return None

    def steps(self, sums: Tensor, rows: Tensor, state: Tensor | None) -> Tensor:
        """Return what rows move by, [n, d], against the sums of their gradients."""
        raise NotImplementedError

    @torch.no_grad()
    def update(
        self, table: Tensor, state: Tensor | None, rows: Tensor, sums: Tensor, draw: int
    ) -> None:
        """Move distinct rows; of float16 and bfloat16 with the draw-th of the seed's roundings."""
        steps = self.steps(sums, rows, state)
        moved = table[rows].to(sums.dtype).sub_(steps)
        if table.dtype in (torch.float16, torch.bfloat16):
            generator = torch.Generator(table.device).manual_seed(self.seed * 1_000_003 + draw)
            moved = round_at_random(moved, table.dtype, generator)
        table.index_copy_(0, rows, moved)


@dataclass(frozen=True)
class RowSGD(RowOptimizer):
    """w -= lr g for the rows looked up, as torch.optim.SGD without momentum.

    lr: the learning rate. seed: of the rounding of float16 and bfloat16 tables, as for
    `RowAdagrad`.

    Example:
        >>> PrefixNgramEmbedding((64, 64), 32, optimizer=RowSGD(0.1))
    """

    def steps(self, sums: Tensor, rows: Tensor, state: Tensor | None) -> Tensor:
        """Return lr g."""
        return sums * self.lr


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

    def new_state(self, table: Tensor) -> Tensor | None:
        """Return s = 0 for every element."""
        return torch.zeros(table.shape, dtype=_wide(table), device=table.device)

    def steps(self, sums: Tensor, rows: Tensor, state: Tensor | None) -> Tensor:
        """Return lr g / (sqrt(s) + eps), s being updated."""
        assert state is not None
        squares = state[rows].addcmul_(sums, sums)
        state.index_copy_(0, rows, squares)
        return (sums * self.lr).div_(squares.sqrt_().add_(self.eps))


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

    def new_state(self, table: Tensor) -> Tensor | None:
        """Return s = 0 for every row."""
        return torch.zeros(len(table), dtype=_wide(table), device=table.device)

    def steps(self, sums: Tensor, rows: Tensor, state: Tensor | None) -> Tensor:
        """Return lr g / (sqrt(s) + eps), s being updated."""
        assert state is not None
        squares = state[rows] + sums.square().mean(1)
        state.index_copy_(0, rows, squares)
        return (sums * self.lr).div_(squares.sqrt_().add_(self.eps)[:, None])


OPTIMIZERS = {kind.__name__: kind for kind in (RowSGD, RowAdagrad, RowwiseAdagrad)}


def _wide(table: Tensor) -> torch.dtype:
    return torch.float64 if table.dtype == torch.float64 else torch.float32


def round_at_random(x: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Round float32 to a neighbour in float16 or bfloat16; the nearer, the likelier: no bias."""
    drop = 16 if dtype == torch.bfloat16 else 13  # bits of float32 that dtype lacks
    noise = torch.randint(
        1 << drop, x.shape, dtype=torch.int32, device=x.device, generator=generator
    )
    # a float's bits grow with its magnitude: noise carries into the kept ones as often as is due
    out = (((x.view(torch.int32) + noise) >> drop) << drop).view(torch.float32)
    if dtype == torch.float16:  # below 2^-14 its numbers are 2^-24 apart
        units = x * 2.0**24
        low = units.floor()
        tiny = (low + (noise < (units - low) * (1 << drop))) * 2.0**-24
        out = torch.where(x.abs() < 2.0**-14, tiny, out)
    return torch.where(x.isfinite(), out, x).to(dtype)
