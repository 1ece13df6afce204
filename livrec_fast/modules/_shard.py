"""What a rank has of the rows of a fit, and how to ask for something of all of them."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .._checks import check_same, check_tensor
from .._dispatch import OPS
from ..ops.kmeans_step import kmeans_quanta, kmeans_step
from ._ranks import Ranks
from ._rows import Rows, largest
from ._sampling import refuse

_KERNEL_ROWS = 2**20  # per call; rows out of core come in fewer
_REFERENCE_ROWS, _REFERENCE_ELEMENTS = 65_536, 2**24  # it makes arrays of rows x codewords


class Assigned(NamedTuple):
    """Codes and squared distances of this rank's rows, and the sums over the rows of all ranks."""

    codes: Tensor
    error: Tensor
    sums: Tensor
    mass: Tensor
    inertia: Tensor


class Shard:
    """The consecutive rows of one rank.

    start, total: the number of the first row among those of all ranks, and how many these are.
    heaviest: the greatest weight of all ranks.
    """

    def __init__(self, rows: Rows, weights: Tensor | None, ranks: Ranks, backend: str = "auto"):
        self.rows, self.weights, self.ranks, self.backend = rows, weights, ranks, backend
        self._positive = None if weights is None else weights.nonzero()[:, 0]
        weighted = -1 if self._positive is None else len(self._positive)
        widths = (rows.dim, rows.dtype.itemsize, int(weights is not None))
        mine = torch.tensor([[rows.count, weighted, *widths]], device=rows.device)
        every = ranks.gather(mine).cpu()
        if len(every[:, 2:].unique(dim=0)) > 1:
            raise ValueError(
                f"x: D, dtype and whether there are weights must be the same on every rank, "
                f"got D = {every[:, 2].tolist()}, bytes per value {every[:, 3].tolist()}, "
                f"weighted {every[:, 4].tolist()}"
            )
        self.start, self.total = int(every[: ranks.rank, 0].sum()), int(every[:, 0].sum())
        column = 0 if weights is None else 1
        self._first = int(every[: ranks.rank, column].sum())
        self.candidates = int(every[:, column].sum())
        self.heaviest = 1.0
        if weights is not None:
            most = weights.amax() if len(weights) else weights.new_zeros(())
            self.heaviest = float(ranks.gather(most[None]).amax())

    def largest(self) -> float:
        """Return the greatest |x_id| of all ranks; raise ValueError for a row that is unusable."""
        size, row = largest(self.rows)
        mine = torch.tensor([[size, self.start + row if row >= 0 else -1.0]], dtype=torch.float64)
        every = self.ranks.gather(mine.to(self.rows.device)).cpu()
        for value, bad in every.tolist():
            refuse((value, int(bad)), 0)
        return float(every[:, 0].max())

    def quanta(self, largest: float) -> Tensor:
        """Return the quanta of `kmeans_step` for rows and codewords of |value| <= largest."""
        longest = self.rows.dim * largest**2
        quanta = kmeans_quanta(max(1, self.total), largest, longest, self.heaviest)
        return quanta.to(self.rows.device)

    def assign(self, book: Tensor, quanta: Tensor, penalty: Tensor | None = None) -> Assigned:
        """Find each row's codeword by `kmeans_step`, and add up over all ranks."""
        codes = torch.empty(self.rows.count, dtype=torch.int32, device=book.device)
        error = torch.empty(self.rows.count, dtype=book.dtype, device=book.device)
        sums, mass = torch.zeros_like(book, dtype=torch.float64), quanta.new_zeros(len(book))
        inertia = quanta.new_zeros(())
        for part, block in self.rows.chunks(self.most_at_once(book, penalty, quanta)):
            step = kmeans_step(
                block, book, weights=None if self.weights is None else self.weights[part],
                penalty=penalty, quanta=quanta, backend=self.backend,
            )  # fmt: skip
            codes[part], error[part] = step.codes, step.error
            sums, mass, inertia = sums + step.sums, mass + step.mass, inertia + step.inertia
        sums, mass, inertia = self.ranks.sum(sums, mass, inertia)
        return Assigned(codes, error, sums, mass, inertia)

    def most_at_once(self, book: Tensor, penalty: Tensor | None, quanta: Tensor) -> int:
        """Return how many rows a call of `kmeans_step` may have."""
        op = OPS["kmeans_step"]
        if op.choose((book[:0], book, None, penalty, quanta), self.backend) != "reference":
            return _KERNEL_ROWS
        return max(1, min(_REFERENCE_ROWS, _REFERENCE_ELEMENTS // max(book.shape)))

    def take(self, places: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return, on every rank, the rows in these places and their weights, float64.

        Places count the rows of positive weight of all ranks; `candidates` is their number.
        """
        count = self.rows.count if self._positive is None else len(self._positive)
        index, at = self._mine(places, self._first, count)
        if self._positive is not None:
            index = self._positive[index.to(self._positive.device)]
        weights = torch.zeros(len(places), dtype=torch.float64, device=self.rows.device)
        weights[at] = 1.0 if self.weights is None else self.weights[index].double()
        return self._everywhere(index, at, len(places)), self.ranks.merge(weights)

    def rows_of(self, numbers: Tensor) -> Tensor:
        """Return, on every rank, the rows of these numbers among those of all ranks."""
        index, at = self._mine(numbers.cpu().numpy(), self.start, self.rows.count)
        return self._everywhere(index, at, len(numbers))

    def _mine(self, places: np.ndarray, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Return which of this rank's `count` things are asked for, and where in the answer."""
        inside = (places >= first) & (places < first + count)
        at = torch.from_numpy(np.flatnonzero(inside))
        return torch.from_numpy(places[inside] - first), at.to(self.rows.device)

    def _everywhere(self, index: Tensor, at: Tensor, count: int) -> Tensor:
        rows = torch.zeros(count, self.rows.dim, dtype=self.rows.dtype, device=self.rows.device)
        rows[at] = self.rows.take(index)
        return self.ranks.merge(rows)


def check_weights(weights: Any, rows: Rows) -> Tensor | None:
    """Check the weights of rows; return them in the dtype of the codebooks."""
    if weights is None:
        return None
    if isinstance(weights, np.ndarray):
        weights = torch.from_numpy(weights)
    check_tensor("weights", weights, (rows.count,), (torch.float32, torch.float64))
    check_same("device", x=torch.empty(0, device=rows.device), weights=weights)
    weights = weights.to(rows.dtype).contiguous()
    bad = (~(weights >= 0) | weights.isinf()).nonzero()
    if len(bad):
        at = int(bad[0])
        raise ValueError(
            f"weights: must be finite and not negative, got weights[{at}] = {weights[at]}"
        )
    return weights


def check_enough(shard: Shard, needed: int) -> None:
    """Check that there are rows enough to choose `needed` codewords from."""
    what = "rows" if shard.weights is None else "rows of positive weight"
    if shard.candidates < needed:
        raise ValueError(
            f"x: at least {needed} {what} are needed, as many as the largest level has codewords, "
            f"got {shard.candidates}"
        )


def fair_share(mass: Tensor, balance: float) -> float:
    """Return the weight that a codeword may have: `balance` times an even share."""
    return balance * math.fsum(mass.tolist()) / len(mass)
