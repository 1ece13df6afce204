"""Codewords to start from."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..ops.residual_kmeans import residual_kmeans_details
from ._sampling import generator
from ._shard import Shard

_INIT_ROWS, _INIT_ROWS_PER_CODEWORD = 32_768, 32
_CHUNK = 16_384  # rows, where distances are computed
_BLOCK = 256  # codewords that are drawn between two passes over the rows
_TRIES = 16  # draws refused in a row that call for a pass


def initial_codebook(
    shard: Shard, level: int, size: int, init: str, seed: int, backend: str
) -> Tensor:
    """Choose `size` rows of positive weight, on every rank the same: at random, or by k-means++.

    k-means++ draws from at most max(32,768, 32 size) rows, a uniform sample of the others, on the
    first rank.
    """
    random = generator(seed, level)
    most = size if init == "random" else max(_INIT_ROWS, _INIT_ROWS_PER_CODEWORD * size)
    if init != "random" and shard.candidates <= most:
        places = np.arange(shard.candidates)
    else:
        places = random.choice(shard.candidates, most, replace=False, shuffle=init == "random")
    rows, weights = shard.take(places)
    if init == "random":
        return rows
    chosen = torch.zeros(size, dtype=torch.int64, device=rows.device)
    if shard.ranks.rank == 0:
        chosen += plus_plus(rows, weights.cpu().numpy(), size, random, backend).to(rows.device)
    return rows[shard.ranks.from_first(chosen)]


def plus_plus(
    rows: Tensor, weights: np.ndarray, size: int, random: np.random.Generator, backend: str = "auto"
) -> Tensor:
    """Draw `size` rows, each with probability in proportion to w d^2, d to the nearest row so far.

    Where every row has been drawn already, or its equal, the draw is in proportion to w.

    Distances to all rows are brought up to date for a block of drawn rows at a time. Between, they
    bound the true ones from above: a row is drawn by the bound, and kept with probability
    w d^2 / bound. That leaves the distribution what it was.
    """
    drawn = _Drawn(rows, size, backend)
    drawn.add(_draw(weights.cumsum(), random))
    bound = weights * drawn.catch_up()
    bound[drawn.numbers[0]] = 0
    heap, refused = bound.cumsum(), 0
    exact: dict[int, float] = {}  # of rows drawn or refused, which passes only approach
    while drawn.count < size and heap[-1] > 0:
        at = _draw(heap, random)
        exact[at] = min(bound[at], weights[at] * drawn.distance(at, bound[at] / weights[at]))
        if random.random() * bound[at] < exact[at]:
            drawn.add(at)
            exact[at], refused = 0.0, 0
        else:
            refused += 1
        if drawn.behind >= max(1, min(_BLOCK, drawn.count // 4)) or refused == _TRIES:
            np.minimum(bound, weights * drawn.catch_up(), out=bound)
            bound[list(exact)] = np.minimum(bound[list(exact)], list(exact.values()))
            heap, refused = bound.cumsum(), 0
            exact.clear()
    for _ in range(size - drawn.count):
        drawn.add(_draw(weights.cumsum(), random))
    return drawn.numbers


def _draw(heap: np.ndarray, random: np.random.Generator) -> int:
    last = np.searchsorted(heap, heap[-1])  # what comes after it has no weight
    return int(min(np.searchsorted(heap, random.random() * heap[-1], side="right"), last))


class _Drawn:
    """The rows drawn so far, and the distances of others to them; few at a time, so in NumPy."""

    def __init__(self, rows: Tensor, size: int, backend: str):
        self.count, self.behind = 0, 0
        self.numbers = torch.empty(size, dtype=torch.int64)
        self._rows, self._backend = rows, backend
        self._book = rows.new_empty((size, rows.shape[1]), device="cpu").numpy()

    def add(self, at: int) -> None:
        self.numbers[self.count] = at
        self._book[self.count] = self._rows[at].cpu().numpy()
        self.count, self.behind = self.count + 1, self.behind + 1

    def distance(self, at: int, bound: float) -> float:
        """Return the squared distance of a row to the nearest drawn row: exactly 0 for its equal.

        Only rows drawn since `bound` was found count, but where that is as small as what rounding
        can make of 0.
        """
        row = self._rows[at].cpu().numpy()
        first = self.count - self.behind
        if bound < 2**-10 * row.dot(row):
            first = 0
        if first == self.count:
            return np.inf
        difference = self._book[first : self.count] - row
        return float(np.einsum("nd,nd->n", difference, difference).min())

    def catch_up(self) -> np.ndarray:
        """Return the squared distances of all rows to the nearest drawn since the last call."""
        if not self.behind:
            return np.full(len(self._rows), np.inf)
        new, self.behind = self._book[self.count - self.behind : self.count], 0
        book = torch.from_numpy(new).to(self._rows.device)
        norms = [
            residual_kmeans_details(part, [book], backend=self._backend).residual_norms[:, 0]
            for part in self._rows.split(_CHUNK)
        ]
        return torch.cat(norms).double().square().cpu().numpy()
