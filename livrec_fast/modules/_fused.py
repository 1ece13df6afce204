"""A lookup whose backward pass updates the tables."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from ._lookup import Lookup
from ._row_optimizers import next_step


class Learner(Protocol):
    """What owns tables and can update them."""

    tables: Any
    optimizer: Any
    updates: Any

    def apply_gradients(self, found: list[tuple[Tensor, Tensor]]) -> None:
        """Update its tables, given for each the rows and the sums of their gradients."""


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, codes: Tensor, offsets: Tensor | None, packed: bool,
        lookup: Lookup, learners: list[Learner], tables: list[Tensor],
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(codes, offsets)
        learning = all(table.requires_grad for table in tables)
        tables = [table.detach() for table in tables]
        ctx.rest = packed, lookup, learners, tables, learning
        return lookup.embed(codes, tables, offsets, packed)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
        codes, offsets = ctx.saved_tensors
        packed, lookup, learners, tables, learning = ctx.rest
        if learning and _in_one_pass(grad, codes, offsets, packed, lookup, learners, tables):
            return (None,) * 7
        found = lookup.gradient(grad, codes, tables, offsets, packed)
        for learner in learners:
            own, found = found[: len(learner.tables)], found[len(learner.tables) :]
            learner.apply_gradients(own)
        return (None,) * 7


def _in_one_pass(
    grad: Tensor, codes: Tensor, offsets: Tensor | None, packed: bool, lookup: Lookup,
    learners: list[Learner], tables: list[Tensor],
) -> bool:  # fmt: skip
    """Update all tables in one pass over grad, where one op can; return whether it could."""
    optimizer = learners[0].optimizer
    alike = all(learner.optimizer == optimizer for learner in learners)
    if not (alike and lookup.updates_in_one_pass(grad, codes, tables)):
        return False
    states: list[Tensor | None] = []
    seeds: list[int] = []
    for learner in learners:
        own = next_step(learner)
        states, seeds = states + own[0], seeds + own[1]
    kept = [state for state in states if state is not None]  # SGD has none
    lookup.update(grad, codes, tables, offsets, packed, kept, seeds, **optimizer.step())
    for learner in learners:
        learner.updates.add_(1)
    return True


def fused_lookup(
    codes: Tensor, offsets: Tensor | None, packed: bool, lookup: Lookup, learners: list[Learner],
    tables: list[Tensor],
) -> Tensor:  # fmt: skip
    """Look codes up; the backward pass updates the learners' tables, which get no gradients.

    tables: those of all learners; a list of parameters takes long to go through.
    """
    # autograd runs the backward pass of what depends on something that wants a gradient
    anchor = torch.zeros((), device=codes.device, requires_grad=True)
    return _Fused.apply(anchor, codes, offsets, packed, lookup, learners, tables)


# what torch.compiler.disable sets, which imports the compiler when a module is loaded
fused_lookup._torchdynamo_disable = True  # type: ignore[attr-defined]
