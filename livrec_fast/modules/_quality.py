"""How well residual k-means codes stand for rows."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.residual_kmeans import residual_kmeans_details
from ._rows import Rows

_CHUNK = 16_384  # rows


@dataclass(frozen=True)
class Quality:
    """How well codes stand for the rows they were made of.

    error: per level, the mean over rows of |r_l|^2, where r_l is what levels 1 .. l leave of a row.
    relative_error: that divided by the mean of |x - mean(x)|^2; 0 where error is 0.
    usage: per level, the share of the codewords that some row uses.
    entropy: per level, of the distribution of codes, in bits; log2(N_l) where all are as frequent.
    heaviest: per level, the rows of the most frequent codeword, over M / N_l: 1 where all are as
        frequent. It is what `balance` bounds in the fit, here of the nearest codewords.
    unique_rate: distinct codes, all levels together, per row.
    collisions: rows that share their code, all levels together, with another row.
    """

    rows: int
    error: list[float]
    relative_error: list[float]
    usage: list[float]
    entropy: list[float]
    heaviest: list[float]
    unique_rate: float
    collisions: int


def measure(rows: Rows, codebooks: list[Tensor], backend: str) -> Quality:
    """Read the rows twice, in chunks: for their mean, and for their codes and errors.

    Workspace: a key of eight bytes per row, and what sorting them takes.
    """
    depth, mean = len(codebooks), _mean(rows)
    squares = torch.zeros(1 + depth, dtype=torch.float64, device=rows.device)
    used = [squares.new_zeros(len(book), dtype=torch.int64) for book in codebooks]
    keys = _Keys([len(book) for book in codebooks], rows)
    for part, block in rows.chunks(_CHUNK):
        found = residual_kmeans_details(block, codebooks, backend=backend)
        squares[0] += (block.double() - mean).square().sum(1).sum()
        squares[1:] += found.residual_norms.double().square().sum(0)
        for level, book in enumerate(codebooks):
            used[level] += found.codes[:, level].int().bincount(minlength=len(book))
        keys.put(part, found.codes)
    variance, *error = (squares / rows.count).tolist()
    shares = [count.double() / rows.count for count in used]
    groups = keys.groups()
    return Quality(
        rows=rows.count,
        error=error,
        relative_error=[_ratio(value, variance) for value in error],
        usage=[float((share > 0).double().mean()) for share in shares],
        entropy=[float(torch.special.entr(share).sum()) / math.log(2) for share in shares],
        heaviest=[float(share.amax()) * len(share) for share in shares],
        unique_rate=len(groups) / rows.count,
        collisions=int(groups[groups > 1].sum()),
    )


def _mean(rows: Rows) -> Tensor:
    total = torch.zeros(rows.dim, dtype=torch.float64, device=rows.device)
    for _, block in rows.chunks(_CHUNK):
        total += block.double().sum(0)
    return total / rows.count


class _Keys:
    """Codes as one number per row, as long as 63 bits hold them, and else as several."""

    def __init__(self, sizes: list[int], rows: Rows):
        self._columns: list[list[tuple[int, int]]] = [[]]  # level and size, by number
        product = 1
        for level, size in enumerate(sizes):
            if product * size >= 2**63:
                self._columns.append([])
                product = 1
            self._columns[-1].append((level, size))
            product *= size
        shape = (len(self._columns), rows.count)
        self._keys = torch.zeros(shape, dtype=torch.int64, device=rows.device)

    def put(self, part: slice, codes: Tensor) -> None:
        for keys, column in zip(self._keys, self._columns, strict=True):
            for level, size in column:
                keys[part] = keys[part] * size + codes[:, level]

    def groups(self) -> Tensor:
        """Return how many rows have each code that occurs."""
        if len(self._keys) == 1:
            return self._keys[0].unique(return_counts=True)[1]
        return self._keys.unique(dim=1, return_counts=True)[1]


def _ratio(error: float, variance: float) -> float:
    if error == 0:
        return 0.0
    return error / variance if variance > 0 else math.inf
