"""Batches of requests as tensors: what a ranker is handed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from .log import Array, LiveLog, histories, slice_at
from .requests import Requests

GAPS = 32  # buckets of the time between an event of the history and the request


class Codes(Protocol):
    """Codes of the slices of a log, and of their rooms as of each slice; int16 [S, L], -1: none."""

    @property
    def slice_codes(self) -> Array:
        """The code of each slice."""

    @property
    def room_codes(self) -> Array:
        """The code of the slice's room by the slices up to and with it."""


@dataclass(frozen=True)
class Batch:
    """N requests with C candidates each, and the users' histories, jagged.

    Attributes:
        user: int64 [N]. ts: int64 [N].
        room: int64 [N, C], and so is author.
        slice_codes: int16 [N, C, L] of the last complete slice, -1 where there is none.
        room_codes: int16 [N, C, L], the vote of the room's slices up to that one.
        dense: float32 [N, C, F]. age_s: float32 [N, C].
        offsets: int64 [N + 1]; a history goes from the oldest event to the latest.
        history_author: int64 [T].
        history_codes: int16 [T, L], of the last slice complete at the event.
        history_gap: uint8 [T], floor(log2(1 + seconds before the request)), below `GAPS`.
        history_kind: uint8 [T], `livrec_fast.logs.log.KINDS`.
        labels: float32 [N, C, K]. mask: bool [N, C, K]. new_room: bool [N, C].
    """

    user: Tensor
    room: Tensor
    author: Tensor
    slice_codes: Tensor
    room_codes: Tensor
    dense: Tensor
    age_s: Tensor
    offsets: Tensor
    history_author: Tensor
    history_codes: Tensor
    history_gap: Tensor
    history_kind: Tensor
    labels: Tensor
    mask: Tensor
    new_room: Tensor
    ts: Tensor

    def __len__(self) -> int:
        """Return N."""
        return len(self.user)


class Feed:
    """Batches of requests, epoch by epoch; (seed, epoch, step) alone say what a batch holds.

    Example:
        >>> feed = Feed(train, log, codes, 256, length=50)
        >>> for batch in feed.epoch(0, start=step):
        ...     ...
    """

    def __init__(
        self,
        requests: Requests,
        log: LiveLog,
        codes: Codes,
        size: int,
        *,
        seed: int = 0,
        length: int = 50,
        shuffle: bool = True,
    ):
        """Look up what all batches share: the codes of all events.

        Args:
            requests: of `log`.
            log: their log.
            codes: of the slices of `log`.
            size: of a batch; the last one may be smaller.
            seed: of the order.
            length: events of a history at most, the latest.
            shuffle: in a new order every epoch, else in the order of time.
        """
        if size < 1:
            raise ValueError(f"size: must be at least 1, got {size}")
        if length < 0:
            raise ValueError(f"length: must not be negative, got {length}")
        for name in ("slice_codes", "room_codes"):
            shape = getattr(codes, name).shape
            if len(shape) != 2 or shape[0] != len(log.slice_room):
                raise ValueError(
                    f"codes: {name} must be of shape [{len(log.slice_room)}, L], got {list(shape)}"
                )
        self.requests, self.log, self.codes, self.size = requests, log, codes, size
        self.seed, self.length, self.shuffle = seed, length, shuffle
        self._past = histories(log)
        event_codes = _looked_up(codes.slice_codes, slice_at(log, log.room, log.pos))
        self._codes = event_codes[self._past.event]  # by user, so that a history lies in one piece
        self._author = log.author[self._past.event]
        self._ts, self._kind = log.ts[self._past.event], log.kind[self._past.event]

    def __len__(self) -> int:
        """Return the number of batches of an epoch."""
        return -(-len(self.requests) // self.size)

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch from step `start` on."""
        order = np.arange(len(self.requests))
        if self.shuffle:
            order = np.random.default_rng((self.seed, epoch)).permutation(order)
        for step in range(start, len(self)):
            yield self.batch(order[step * self.size : (step + 1) * self.size])

    def batch(self, rows: Array) -> Batch:
        """Return the requests of these numbers."""
        asked = self.requests.rows(rows)
        offsets, past = self._histories(asked)
        waited = np.repeat(asked.ts, np.diff(offsets)) - self._ts[past]
        gap = np.minimum(np.log2(1 + waited / 1000).astype(np.uint8), GAPS - 1)
        columns = {
            "user": asked.user,
            "room": asked.room,
            "author": self.log.room_author[asked.room],
            "slice_codes": _looked_up(self.codes.slice_codes, asked.slice),
            "room_codes": _looked_up(self.codes.room_codes, asked.slice),
            "dense": asked.dense,
            "age_s": asked.age_s,
            "offsets": offsets,
            "history_author": self._author[past],
            "history_codes": self._codes[past],
            "history_gap": gap,
            "history_kind": self._kind[past],
            "labels": asked.labels,
            "mask": asked.mask,
            "new_room": asked.new_room,
            "ts": asked.ts,
        }
        return Batch(**{name: torch.from_numpy(column) for name, column in columns.items()})

    def _histories(self, asked: Requests) -> tuple[Array, Array]:
        """Return the offsets of the histories, and their events as numbers in `self._past`."""
        end = self._past.offsets[asked.user] + asked.history_end
        lengths = np.minimum(asked.history_end, self.length)
        offsets = np.zeros(len(asked) + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        return offsets, np.arange(offsets[-1]) + np.repeat(end - offsets[1:], lengths)


def batches(
    requests: Requests,
    log: LiveLog,
    codes: Codes,
    size: int,
    *,
    seed: int = 0,
    epoch: int = 0,
    start: int = 0,
    length: int = 50,
    shuffle: bool = True,
) -> Iterator[Batch]:
    """Yield the batches of one epoch; `Feed`, which see, for several over the same requests."""
    feed = Feed(requests, log, codes, size, seed=seed, length=length, shuffle=shuffle)
    return feed.epoch(epoch, start)


def _looked_up(codes: Array, rows: Array) -> Array:
    """Return codes[rows] as int16, -1 where a row is -1."""
    found = np.full((*rows.shape, codes.shape[1]), -1, np.int16)
    known = rows >= 0
    found[known] = codes[rows[known]]
    return found
