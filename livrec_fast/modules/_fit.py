"""A fit from the rows to the codebooks, level by level."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .._checks import FLOATS, check_finite, check_tensor
from ._balance import balanced_lloyd
from ._lloyd import LevelFit, lloyd
from ._progress import progress_bars
from ._ranks import Ranks
from ._rows import MemoryRows, open_rows
from ._sampling import sample_of, sample_stream
from ._seeding import initial_codebook
from ._shard import Shard, check_weights


@dataclass(frozen=True)
class Plan:
    """How to fit: the settings of ResidualKMeans. `init` may be codebooks, one per level."""

    levels: Sequence[int]
    iterations: int
    init: str | Sequence[Tensor]
    seed: int
    tolerance: float
    balance: float | None
    sample: int | None
    backend: str


class Fitted(NamedTuple):
    """What a fit leaves, per level: codebook, weight of each codeword's rows, and its course."""

    books: list[Tensor]
    counts: list[Tensor]
    history: list[LevelFit]


def open_shard(x: Any, weights: Any, group: Any, plan: Plan) -> Shard:
    """Check the rows of this rank and their weights, and draw the sample of the plan."""
    if not isinstance(x, Tensor | np.ndarray):
        if not isinstance(x, Iterable):
            kind = type(x).__name__
            raise TypeError(f"x: must be a tensor, an array or an iterable of batches, got {kind}")
        if plan.sample is None:
            raise ValueError("sample: must be given where x is an iterable of batches, got None")
        if weights is not None or group is not None:
            raise ValueError("weights, group: must be None where x is an iterable of batches")
        kept = sample_stream(x, plan.sample, plan.seed)
        return Shard(MemoryRows(kept, own=True), None, Ranks(), plan.backend)
    rows = open_rows(x)
    shard = Shard(rows, check_weights(weights, rows), Ranks(group), plan.backend)
    if plan.sample is None or plan.sample >= shard.total:
        return shard
    drawn = sample_of(shard.total, plan.sample, plan.seed) - shard.start
    mine = torch.from_numpy(drawn[(drawn >= 0) & (drawn < rows.count)])
    some = None if shard.weights is None else shard.weights[mine.to(rows.device)]
    return Shard(MemoryRows(rows.take(mine), own=True), some, shard.ranks, plan.backend)


def fit_levels(shard: Shard, plan: Plan, progress: bool) -> Fitted:
    """Fit every level on what the levels before it leave of the rows."""
    largest, fitted = shard.largest(), Fitted([], [], [])
    with progress_bars(progress, plan.levels, plan.iterations) as bars:
        for level, bar in enumerate(bars):
            book = first_codebook(shard, plan, level)
            quanta = shard.quanta(max(largest, float(book.abs().amax())))
            how: dict[str, Any] = {
                "iterations": plan.iterations, "tolerance": plan.tolerance, "step": bar.step
            }  # fmt: skip
            if plan.balance is None:
                book, found, course = lloyd(shard, book, quanta, **how)
            else:
                how["balance"] = plan.balance
                book, found, course = balanced_lloyd(shard, book, quanta, **how)
            bar.finish()
            fitted.books.append(book)
            fitted.counts.append(found.mass)
            fitted.history.append(course)
            if level + 1 < len(plan.levels):
                shard.rows.subtract(book, found.codes)
                largest += float(book.abs().amax())
    return fitted


def learn_levels(
    shard: Shard, plan: Plan, books: list[Tensor], counts: list[Tensor], decay: float
) -> Fitted:
    """Move codewords to the running means of their rows; start an empty codebook from these."""
    largest, fitted = shard.largest(), Fitted([], [], [])
    for level, (old, count) in enumerate(zip(books, counts, strict=True)):
        if old.shape[1] == 0:
            old = first_codebook(shard, plan, level)
        wide = old.to(shard.rows.dtype)
        quanta = shard.quanta(max(largest, float(wide.abs().amax())))
        found = shard.assign(wide, quanta)
        before = decay * count.to(wide.device)
        mass = before + found.mass
        sums = before[:, None] * old.double() + found.sums
        moved = (found.mass > 0)[:, None]
        book = torch.where(moved, (sums / mass.clamp_min(1e-300)[:, None]).to(old.dtype), old)
        fitted.books.append(book)
        fitted.counts.append(mass)
        if level + 1 < len(plan.levels):
            wide = book.to(shard.rows.dtype)
            shard.rows.subtract(wide, shard.assign(wide, quanta).codes)
            largest += float(wide.abs().amax())
    return fitted


def first_codebook(shard: Shard, plan: Plan, level: int) -> Tensor:
    """Return the codewords that a level starts from, in the dtype and on the device of the rows."""
    if isinstance(plan.init, str):
        size = plan.levels[level]
        return initial_codebook(shard, level, size, plan.init, plan.seed, plan.backend)
    name, given = f"init[{level}]", plan.init[level]
    check_tensor(name, given, (plan.levels[level], shard.rows.dim), FLOATS)
    check_finite(name, given)
    return shard.ranks.from_first(given.detach().to(shard.rows.device, shard.rows.dtype, copy=True))
