"""How well residual k-means codes stand for rows."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ._lloyd import chunks, total


@dataclass(frozen=True)
class Quality:
    """How well codes stand for the rows they were made of.

    error: per level, the mean over rows of |r_l|^2, where r_l is what levels 1 .. l leave of a row.
    relative_error: that divided by the mean of |x - mean(x)|^2; 0 where error is 0.
    usage: per level, the share of the codewords that some row uses.
    entropy: per level, of the distribution of codes, in bits; log2(N_l) where all are as frequent.
    unique_rate: distinct codes, all levels together, per row.
    collisions: rows that share their code, all levels together, with another row.
    """

    rows: int
    error: list[float]
    relative_error: list[float]
    usage: list[float]
    entropy: list[float]
    unique_rate: float
    collisions: int


def measure(x: Tensor, codes: Tensor, codebooks: list[Tensor]) -> Quality:
    """Measure codes [M, L] of rows [M, D], in float64 and row chunks."""
    count, codes = len(x), codes.long()
    variance, *error = _errors(x, codes, [book.double() for book in codebooks])
    shares = [
        codes[:, level].bincount(minlength=len(book)).double() / count
        for level, book in enumerate(codebooks)
    ]
    groups = codes.unique(dim=0, return_counts=True)[1]
    return Quality(
        rows=count,
        error=error,
        relative_error=[_ratio(value, variance) for value in error],
        usage=[float((share > 0).double().mean()) for share in shares],
        entropy=[float(torch.special.entr(share).sum()) / math.log(2) for share in shares],
        unique_rate=len(groups) / count,
        collisions=int(groups[groups > 1].sum()),
    )


def _errors(x: Tensor, codes: Tensor, codebooks: list[Tensor]) -> list[float]:
    """Return the mean squared distance to the mean row, then to the codes' sum level by level."""
    count, depth = len(x), len(codebooks)
    mean = torch.stack([x[rows].double().sum(0) for rows in chunks(count)]).sum(0) / count
    squares = x.new_empty((1 + depth, count), dtype=torch.float64)
    for rows in chunks(count):
        block = x[rows].double()
        squares[0, rows] = (block - mean).square().sum(1)
        for level, book in enumerate(codebooks):
            block = block - book[codes[rows, level]]
            squares[1 + level, rows] = block.square().sum(1)
    return [total(row) / count for row in squares]


def _ratio(error: float, variance: float) -> float:
    if error == 0:
        return 0.0
    return error / variance if variance > 0 else math.inf
