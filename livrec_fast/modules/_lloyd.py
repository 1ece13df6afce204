"""k-means of one level: seeding and weighted Lloyd iterations, repeatable to the bit.

Rows are read in chunks, so that nothing of size rows x codewords is ever made, and sums are taken
in float64, in an order that depends neither on the number of threads nor on the run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from .._checks import check_same, check_tensor

_CHUNK = 2_048  # rows: their float64 copies stay in cache, and torch sums so few on one thread
_INIT_ROWS, _INIT_ROWS_PER_CODEWORD = 32_768, 32

Assign = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class LevelFit:
    """How the fit of one level went.

    inertia: sum of w |x - C[code]|^2 at each assignment; the last is that of the final codebook.
    reseeded: how many empty clusters each update moved.
    """

    inertia: list[float] = field(default_factory=list)
    reseeded: list[int] = field(default_factory=list)


class Clusters(NamedTuple):
    """What an update needs to know of an assignment, in float64: [N, D], [N] and [M]."""

    sums: Tensor
    mass: Tensor
    error: Tensor


def check_rows(x: Tensor, weights: Tensor | None, needed: int) -> None:
    """Check weights, and that there are rows enough to choose `needed` codewords from."""
    rows, what = len(x), "rows"
    if weights is not None:
        check_tensor("weights", weights, (rows,), (torch.float32, torch.float64))
        check_same("device", x=x, weights=weights)
        bad = (~(weights >= 0) | weights.isinf()).nonzero()
        if len(bad):
            at = int(bad[0])
            raise ValueError(
                f"weights: must be finite and not negative, got weights[{at}] = {weights[at]}"
            )
        rows, what = int((weights > 0).sum()), "rows of positive weight"
    if rows < needed:
        raise ValueError(
            f"x: at least {needed} {what} are needed, as many as the largest level has codewords, "
            f"got {rows}"
        )


def chunks(rows: int) -> Iterator[slice]:
    """Cut 0 .. rows - 1 into slices."""
    return (slice(start, start + _CHUNK) for start in range(0, rows, _CHUNK))


def subtract(residual: Tensor, codebook: Tensor, codes: Tensor) -> None:
    """Subtract each row's codeword from it, in place."""
    for rows in chunks(len(residual)):
        residual[rows] -= codebook[codes[rows]]


def gather_clusters(x: Tensor, weights: Tensor | None, codebook: Tensor, codes: Tensor) -> Clusters:
    """Add up the rows of each cluster, their weights, and each row's w |x - C[code]|^2."""
    wide = codebook.double()
    sums, mass = torch.zeros_like(wide), wide.new_zeros(len(wide))
    error = wide.new_empty(len(x))
    for rows in chunks(len(x)):
        code, order = codes[rows].sort(
            stable=True
        )  # adding sorted rows is quick, and in fixed order
        block, lengths = x[rows][order].double(), code.bincount(minlength=len(wide))
        weight = block.new_ones(len(block)) if weights is None else weights[rows][order].double()
        error[rows.start + order] = weight * (block - wide[code]).square().sum(1)
        weighted = block if weights is None else block * weight[:, None]
        sums += torch.segment_reduce(weighted, "sum", lengths=lengths)
        mass += torch.segment_reduce(weight, "sum", lengths=lengths)
    return Clusters(sums, mass, error)


def total(error: Tensor) -> float:
    """Add up a value per row."""
    return float(sum(error[rows].sum() for rows in chunks(len(error))))


def lloyd(
    x: Tensor,
    weights: Tensor | None,
    codebook: Tensor,
    assign: Assign,
    *,
    iterations: int,
    tolerance: float,
    step: Callable[[], None],
) -> tuple[Tensor, Tensor, LevelFit]:
    """Improve `codebook`; return it with its codes and the course of the fit.

    An update moves each codeword to the mean of its rows, and codewords without rows onto the rows
    that err most; neither can raise the inertia. Stops after `iterations` updates, or after one
    that moved no empty cluster and lowered the inertia by at most `tolerance` of itself.
    """
    course = LevelFit()
    while True:
        codes = assign(x, codebook)
        clusters = gather_clusters(x, weights, codebook, codes)
        course.inertia.append(total(clusters.error))
        step()
        if len(course.reseeded) == iterations or _settled(course, tolerance):
            return codebook, codes, course
        codebook, moved = _update(x, codebook, clusters)
        course.reseeded.append(moved)


def _settled(course: LevelFit, tolerance: float) -> bool:
    now = course.inertia[-1]
    if now == 0 or not course.reseeded or course.reseeded[-1]:
        return now == 0
    return course.inertia[-2] - now <= tolerance * course.inertia[-2]


def _update(x: Tensor, codebook: Tensor, clusters: Clusters) -> tuple[Tensor, int]:
    """Return the means of the clusters, empty ones re-seeded, and how many those were."""
    means = clusters.sums / clusters.mass.clamp_min(torch.finfo(torch.float64).tiny)[:, None]
    filled = clusters.mass > 0
    codebook = torch.where(filled[:, None], means.to(codebook.dtype), codebook)
    empty = (~filled).nonzero()[:, 0]
    if not len(empty):
        return codebook, 0
    worst = clusters.error.sort(descending=True, stable=True).indices[: len(empty)]
    worst = worst[clusters.error[worst] > 0]  # a row on its codeword is no seed for another
    codebook[empty[: len(worst)]] = x[worst]
    return codebook, len(worst)


def initial_codebook(
    x: Tensor, weights: Tensor | None, size: int, init: str, generator: torch.Generator
) -> Tensor:
    """Choose `size` rows of positive weight: at random, or by k-means++ on a CPU.

    k-means++ draws from at most max(32,768, 32 size) rows, a uniform sample of the others.
    """
    if weights is None:
        candidates = torch.arange(len(x))
    else:
        candidates = weights.cpu().nonzero()[:, 0]
    most = size if init == "random" else max(_INIT_ROWS, _INIT_ROWS_PER_CODEWORD * size)
    if init == "random" or len(candidates) > most:
        candidates = candidates[torch.randperm(len(candidates), generator=generator)[:most]]
    rows = x[candidates.to(x.device)]
    if init == "random":
        return rows
    sampled = torch.ones(len(rows)) if weights is None else weights.cpu()[candidates]
    return rows[plus_plus(rows.cpu(), sampled, size, generator).to(x.device)]


def plus_plus(rows: Tensor, weights: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Draw `size` rows, each with probability in proportion to w d^2, d to the nearest row so far.

    Where every row has been drawn already, or its equal, the draw is in proportion to w.
    """
    weights = weights.double()
    nearest = torch.ones_like(weights)
    draws = torch.rand(size, generator=generator, dtype=torch.float64)
    chosen = torch.empty(size, dtype=torch.int64)
    for pick, draw in enumerate(draws):
        heap = (weights * nearest).cumsum(0)
        if heap[-1] == 0:
            heap = weights.cumsum(0)
        at = torch.searchsorted(heap, draw * heap[-1], right=True).clamp_max(len(rows) - 1)
        chosen[pick] = at
        exact = "donot_use_mm_for_euclid_dist"  # the row itself is at 0 then, and never drawn again
        distance = torch.cdist(rows, rows[at, None], compute_mode=exact)[:, 0].double().square()
        nearest = distance if pick == 0 else torch.minimum(nearest, distance)
    return chosen
