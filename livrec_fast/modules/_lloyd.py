"""Lloyd's iterations of one level, the same to the bit however the rows are divided.

`kmeans_step` adds up exactly, so that neither threads nor chunks nor ranks show in a codeword.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ._shard import Assigned, Shard

_WAY = 0.25  # from a codeword to its row that errs most, where an empty cluster goes


@dataclass(frozen=True)
class LevelFit:
    """How the fit of one level went.

    inertia: sum of w |x - C[code]|^2 at each assignment; the last is that of the final codebook.
    reseeded: how many empty clusters each update moved.
    heaviest: the greatest weight of a cluster at each update, of which the codewords became means.
    """

    inertia: list[float] = field(default_factory=list)
    reseeded: list[int] = field(default_factory=list)
    heaviest: list[float] = field(default_factory=list)

    def settled(self, tolerance: float) -> bool:
        """Tell whether the last update moved no empty cluster and lowered the inertia little."""
        now = self.inertia[-1]
        if now == 0 or not self.reseeded or self.reseeded[-1]:
            return now == 0
        return self.inertia[-2] - now <= tolerance * self.inertia[-2]

    def steady(self, tolerance: float) -> bool:
        """Tell whether it is settled and the inertia, which prices may raise, has not risen."""
        rise = self.inertia[-1] - self.inertia[-2] if len(self.inertia) > 1 else 0
        return self.settled(tolerance) and rise <= tolerance * self.inertia[-1]


def lloyd(
    shard: Shard,
    book: Tensor,
    quanta: Tensor,
    *,
    iterations: int,
    tolerance: float,
    step: Callable[[], None] = lambda: None,
) -> tuple[Tensor, Assigned, LevelFit]:
    """Improve `book`; return it with its assignment and the course of the fit.

    An update moves each codeword to the mean of its rows, and codewords without rows towards the
    rows that err most; neither can raise the inertia. Stops after `iterations` updates, or when
    settled.
    """
    course = LevelFit()
    while True:
        found = shard.assign(book, quanta)
        course.inertia.append(float(found.inertia))
        step()
        if len(course.reseeded) == iterations or course.settled(tolerance):
            return book, found, course
        book = update(shard, book, found, course)


def update(shard: Shard, book: Tensor, found: Assigned, course: LevelFit) -> Tensor:
    """Return the means of the clusters, empty ones re-seeded, and note what was done."""
    filled = found.mass > 0
    means = found.sums / torch.where(filled, found.mass, 1.0)[:, None]
    book = torch.where(filled[:, None], means.to(book.dtype), book)
    empty = (~filled).nonzero()[:, 0]
    moved = 0
    if len(empty):
        seeds = _seeds(shard, book, found, len(empty))
        moved = len(seeds)
        book[empty[:moved]] = seeds
    course.reseeded.append(moved)
    course.heaviest.append(float(found.mass.amax()))
    return book


def _seeds(shard: Shard, book: Tensor, found: Assigned, most: int) -> Tensor:
    """Return points on the way from codewords to those of their rows that err most.

    At the row itself a codeword would win nothing else, where dimensions are many: a far row is far
    from all others. Nearby it takes the rows on that side, and leaves the other codeword the rest.
    """
    number, code = _worst(shard, found, most)
    start = book[code].double()
    return (start + _WAY * (shard.rows_of(number).double() - start)).to(book.dtype)


def _worst(shard: Shard, found: Assigned, most: int) -> tuple[Tensor, Tensor]:
    """Return number and code of the rows of greatest w |x - C[code]|^2 > 0, the first of equals."""
    error = found.error.double()
    value = error if shard.weights is None else shard.weights.double() * error
    if len(value) > most:
        least = value.topk(most).values[-1]
        row = (value >= least).nonzero()[:, 0]  # in order, with all that equal the least
    else:
        row = torch.arange(len(value), device=value.device)
    row = row[value[row].sort(descending=True, stable=True).indices[:most]]
    mine = torch.stack([value[row], (row + shard.start).double(), found.codes[row].double()], 1)
    value, number, code = shard.ranks.gather(mine).T
    ranked = value.sort(descending=True, stable=True)
    chosen = ranked.indices[ranked.values > 0][:most]  # a row on its codeword is no seed
    return number[chosen].long(), code[chosen].long()
