"""Samples in order of time: histories that end strictly before what is to be predicted.

A block is up to C consecutive ratings of one user, who is scored on all of them at once. Its
history is every rating of that user with a time strictly before the block's first, so that ratings
of the same second never inform each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ...data.movielens import Ratings

POSITIVE = 4.0  # stars from which a rating counts as positive


@dataclass(frozen=True)
class Blocks:
    """Positions in the sorted ratings, int64 [blocks].

    The history is [begin, end), the candidates are [first, last).
    """

    begin: np.ndarray
    end: np.ndarray
    first: np.ndarray
    last: np.ndarray

    def __len__(self) -> int:
        return len(self.first)

    def take(self, rows: np.ndarray) -> Blocks:
        """Return some of the blocks."""
        return Blocks(self.begin[rows], self.end[rows], self.first[rows], self.last[rows])


@dataclass(frozen=True)
class Split:
    """The ratings before and from `time` on, as blocks."""

    time: int
    train: Blocks
    test: Blocks


@dataclass(frozen=True)
class Batch:
    """Users with their histories and the candidates that share them.

    history: int64 [T] items, stars: int64 [T] 0 to 4, offsets: int64 [B + 1]. candidates: int64 [B,
    C];
    valid: bool [B, C]; labels: float32 [B, C], 1 where the rating is positive.
    """

    history: Tensor
    stars: Tensor
    offsets: Tensor
    candidates: Tensor
    valid: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device."""
        return replace(self, **{name: value.to(device) for name, value in vars(self).items()})


def chronological_split(ratings: Ratings, share: float, candidates: int) -> Split:
    """Split all ratings at one moment: the first `share` of them train, the rest test."""
    time = int(np.quantile(ratings.time, share))
    bounds = np.searchsorted(ratings.user, np.arange(ratings.users + 1))
    tested = np.concatenate([[0], np.cumsum(ratings.time >= time)])
    middle = bounds[1:] - (tested[bounds[1:]] - tested[bounds[:-1]])
    runs = _start_of_equal_times(ratings)
    train = _blocks(bounds[:-1], bounds[:-1], middle, runs, candidates)
    test = _blocks(bounds[:-1], middle, bounds[1:], runs, candidates)
    return Split(time, train, test)


def _start_of_equal_times(ratings: Ratings) -> np.ndarray:
    """Return, per rating, the first rating of the same user in the same second."""
    changes = (np.diff(ratings.user, prepend=-1) != 0) | (np.diff(ratings.time, prepend=-1) != 0)
    return np.maximum.accumulate(np.where(changes, np.arange(len(changes)), 0))


def _blocks(
    begin: np.ndarray, first: np.ndarray, last: np.ndarray, runs: np.ndarray, size: int
) -> Blocks:
    """Cut each user's [first, last) into blocks of `size`, the last one shorter."""
    count = -(-(last - first) // size)
    user = np.repeat(np.arange(len(first)), count)
    within = np.arange(len(user)) - np.repeat(np.cumsum(count) - count, count)
    start = first[user] + size * within
    return Blocks(begin[user], runs[start], start, np.minimum(start + size, last[user]))


def make_batch(ratings: Ratings, blocks: Blocks, size: int) -> Batch:
    """Gather the histories and the candidates of some blocks."""
    lengths = blocks.end - blocks.begin
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    events = np.arange(offsets[-1]) + np.repeat(blocks.begin - offsets[:-1], lengths)
    slots = blocks.first[:, None] + np.arange(size)
    valid = slots < blocks.last[:, None]
    slots = np.where(valid, slots, blocks.first[:, None])
    return Batch(
        history=torch.from_numpy(ratings.item[events]),
        stars=torch.from_numpy(ratings.rating[events].astype(np.int64) - 1),
        offsets=torch.from_numpy(offsets),
        candidates=torch.from_numpy(ratings.item[slots]),
        valid=torch.from_numpy(valid),
        labels=torch.from_numpy((ratings.rating[slots] >= POSITIVE).astype(np.float32)),
    )


def training_batches(
    ratings: Ratings, blocks: Blocks, size: int, *, users: int, steps: int, seed: int
) -> Iterator[Batch]:
    """Draw `steps` batches of blocks, without repeats until all have been seen."""
    rng = np.random.default_rng(seed)
    users = min(users, len(blocks))
    order = np.empty(0, dtype=np.int64)
    for _ in range(steps):
        if len(order) < users:
            order = np.concatenate([order, rng.permutation(len(blocks))])
        rows, order = order[:users], order[users:]
        yield make_batch(ratings, blocks.take(rows), size)


def first_blocks(blocks: Blocks) -> Blocks:
    """Return each user's first block."""
    return blocks.take(np.unique(blocks.begin, return_index=True)[1])


def with_history(blocks: Blocks) -> Blocks:
    """Return the blocks whose history is not empty."""
    return blocks.take(np.flatnonzero(blocks.end > blocks.begin))
