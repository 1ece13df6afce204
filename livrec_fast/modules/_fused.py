"""A lookup whose backward pass updates the tables."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from ._lookup import Lookup


class Learner(Protocol):
    """What owns tables and can update them."""

    tables: Any

    def apply_gradients(self, found: list[tuple[Tensor, Tensor]]) -> None:
        """Update its tables, given for each the rows and the sums of their gradients."""


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, codes: Tensor, offsets: Tensor | None, packed: bool,
        lookup: Lookup, learners: list[Learner],
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(codes, offsets)
        ctx.rest = packed, lookup, learners
        return lookup.embed(codes, _tables(learners), offsets, packed)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
        codes, offsets = ctx.saved_tensors
        packed, lookup, learners = ctx.rest
        found = lookup.gradient(grad, codes, _tables(learners), offsets, packed)
        for learner in learners:
            own, found = found[: len(learner.tables)], found[len(learner.tables) :]
            learner.apply_gradients(own)
        return (None,) * 6


def _tables(learners: list[Learner]) -> list[Tensor]:
    return [table.detach() for learner in learners for table in learner.tables]


def fused_lookup(
    codes: Tensor, offsets: Tensor | None, packed: bool, lookup: Lookup, learners: list[Learner]
) -> Tensor:
    """Look codes up; the backward pass updates the learners' tables, which get no gradients."""
    # autograd runs the backward pass of what depends on something that wants a gradient
    anchor = torch.zeros((), device=codes.device, requires_grad=True)
    return _Fused.apply(anchor, codes, offsets, packed, lookup, learners)


# what torch.compiler.disable sets, which imports the compiler when a module is loaded
fused_lookup._torchdynamo_disable = True  # type: ignore[attr-defined]
