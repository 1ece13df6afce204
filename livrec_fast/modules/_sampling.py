"""Uniform samples: of rows that are at hand, and of rows that pass by."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._rows import largest, open_rows

_AT_ONCE = 2**20  # random numbers


def generator(seed: int, *stream: int) -> np.random.Generator:
    """Return the random numbers of a seed and a purpose."""
    return np.random.default_rng((seed % 2**64, *stream))


class Reservoir:
    """Vitter's algorithm R: after any number of rows a uniform sample of `size` of them.

    Row t is given one random number, so what is kept does not depend on how rows are batched.
    """

    def __init__(self, size: int, seed: int):
        self.size, self.seen = size, 0
        self._random = generator(seed, 2**32)  # no level has this number
        self.kept = np.empty(0, np.int64)  # the row in each place

    def admit(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Let `count` more rows pass; return the places taken, and by which of them."""
        row = np.arange(self.seen, self.seen + count)
        place = np.where(
            row < self.size, row, (self._random.random(count) * (row + 1)).astype(np.int64)
        )
        by = np.flatnonzero(place < self.size)
        places, last = np.unique(place[by][::-1], return_index=True)  # a later row displaces
        by = by[::-1][last]
        grown = min(self.size, self.seen + count)
        self.kept = np.concatenate([self.kept, np.empty(grown - len(self.kept), np.int64)])
        self.kept[places] = row[by]
        self.seen += count
        return places, by


def sample_of(total: int, size: int, seed: int) -> np.ndarray:
    """Return which of `total` rows a reservoir would keep, ascending."""
    reservoir = Reservoir(size, seed)
    for start in range(0, total, _AT_ONCE):
        reservoir.admit(min(_AT_ONCE, total - start))
    return np.sort(reservoir.kept)


def sample_stream(batches: Iterable[Any], size: int, seed: int) -> Tensor:
    """Return the rows that a reservoir keeps of a stream of batches [m, D], in their order.

    Workspace: the rows kept, twice at the end. Raises ValueError naming a row that is not finite by
    its number in the stream.
    """
    reservoir, kept = Reservoir(size, seed), None
    for number, batch in enumerate(batches):
        width: int | str = "D" if kept is None else kept.shape[1]
        rows = open_rows(batch, width, f"x: batch {number}")
        refuse(largest(rows), reservoir.seen)
        if kept is None:
            kept = torch.empty(size, rows.dim, dtype=rows.dtype, device=rows.device)
        if (rows.dtype, rows.device) != (kept.dtype, kept.device):
            raise ValueError(f"x: batch {number}: dtype and device must be those of batch 0")
        places, by = reservoir.admit(rows.count)
        kept[torch.from_numpy(places).to(kept.device)] = rows.take(torch.from_numpy(by))
    if kept is None:
        raise ValueError("x: at least one batch is needed, got none")
    return kept[torch.from_numpy(reservoir.kept.argsort()).to(kept.device)]


def refuse(found: tuple[float, int], start: int) -> None:
    """Raise where `largest` has found a bad row; `start` is the number of its first row."""
    size, row = found
    if row >= 0:
        fault = "is too large" if np.isfinite(size) else "is not finite"
        limit = "; squared distances may overflow" if np.isfinite(size) else ""
        raise ValueError(f"x: row {start + row} {fault}{limit}")
