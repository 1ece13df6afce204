"""Heads for several tasks, and their loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .backbone import PerToken
from .config import ModelConfig


class TaskHeads(nn.Module):
    """One tower per task over a layer that all share, which sees all tokens side by side."""

    def __init__(self, slots: Sequence[str], tasks: int, config: ModelConfig):
        super().__init__()
        width = 2 * config.width
        self.join = PerToken(slots, config.width, width, fan=config.width * len(slots))
        self.bias = nn.Parameter(torch.zeros(width))
        self.towers = nn.Linear(width, tasks * config.tower)
        self.last = nn.Parameter(torch.randn(tasks, config.tower) * config.tower**-0.5)
        self.prior = nn.Parameter(torch.full((tasks,), -2.0))  # positives are few

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits [R, K] of tokens [R, T, D]."""
        joined = x.flatten(1) @ self.join.stacked().flatten(0, 1)
        towers = F.gelu(self.towers(F.gelu(joined + self.bias))).unflatten(1, self.last.shape)
        return (towers * self.last).sum(2) + self.prior


def task_loss(
    logits: Tensor, labels: Tensor, mask: Tensor, counted: Tensor | None = None
) -> Tensor:
    """Return the cross-entropy of the known labels, summed over tasks, per candidate; all [..., K].

    Every label weighs the same: a task whose labels are known of a few candidates only, as those of
    who enters, does not drown the others in its noise. counted: the mask that tells the number of
    candidates, where `mask` is a part of that one.
    """
    known = mask.to(logits.dtype)
    losses = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    rows = (mask if counted is None else counted).any(-1).sum().clamp(min=1)
    return (losses * known).sum() / rows
