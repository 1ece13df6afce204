"""A log of live rooms in memory: events, content slices and rooms, with dense ids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

KINDS = ("click", "like", "comment", "gift", "share", "follow", "play")
LIVE, VIDEO = 0, 1
UNKNOWN = -1  # the start or the end of a room, in the milliseconds of the wall clock


@dataclass(frozen=True)
class LiveLog:
    """Events of users in rooms, what the rooms showed, and when they were on air.

    A short video is a room of domain `VIDEO` with one slice. Users, rooms and authors are numbered
    from 0; `user_id`, `room_id` and `author_id` hold the ids they came with.

    Attributes:
        user: int64 [E], and so are `room`, `author` and `ts` (wall clock, ms). Events are sorted by
            `ts`; those of one time stay in the order in which they came.
        kind: uint8 [E], index into `KINDS`. "click" enters a live room, "play" plays a video.
        value: float32 [E]: seconds watched for "click" and "play" (known only when the user leaves:
            a label, never a feature), characters for "comment", the price for "gift", else 1; 0 is
            unknown.
        pos: int64 [E], the position in the room's stream, ms.
        slice_room: int64 [S]; slices are sorted by room, then `slice_t0`.
        slice_index: int32 [S], the number that the slice came with.
        slice_t0: int64 [S], and `slice_t1`: positions in the room's stream, ms. What a slice shows
            is known from `slice_t1` on; within a room `slice_t1` never decreases. A video is
            known from its start: 0 and 0.
        slice_domain: uint8 [S], `LIVE` or `VIDEO`, the same for all slices of a room.
        slice_embedding: float16 or float32 [S, D].
        room_author: int64 [R]. room_domain: uint8 [R].
        room_start: int64 [R], wall clock, ms. room_end: int64 [R]; -1 where it is not known.
        user_id: int64 [users]. room_id: int64 [R]. author_id: int64 [authors].
    """

    user: Array
    room: Array
    author: Array
    ts: Array
    kind: Array
    value: Array
    pos: Array
    slice_room: Array
    slice_index: Array
    slice_t0: Array
    slice_t1: Array
    slice_domain: Array
    slice_embedding: Array
    room_author: Array
    room_domain: Array
    room_start: Array
    room_end: Array
    user_id: Array
    room_id: Array
    author_id: Array

    @property
    def users(self) -> int:
        """Return the number of users."""
        return len(self.user_id)

    @property
    def rooms(self) -> int:
        """Return the number of rooms, videos included."""
        return len(self.room_id)

    @property
    def authors(self) -> int:
        """Return the number of authors."""
        return len(self.author_id)


@dataclass(frozen=True)
class Histories:
    """The events of each user in the order of their times: `event[offsets[u] : offsets[u + 1]]`.

    offsets: int64 [users + 1]. event: int64 [E], rows of the log.
    """

    offsets: Array
    event: Array


def histories(log: LiveLog) -> Histories:
    """Sort the events by user; each user's stay in the order of the log."""
    offsets = np.zeros(log.users + 1, np.int64)
    np.cumsum(np.bincount(log.user, minlength=log.users), out=offsets[1:])
    return Histories(offsets, np.argsort(log.user, kind="stable"))


def slice_at(log: LiveLog, room: Array, position: Array) -> Array:
    """Return the last slice of each room that is complete at a position of its stream.

    Args:
        log: S slices.
        room: integers of any shape, in [0, rooms).
        position: ms, of the same shape.

    Returns:
        int64, of that shape: the last row s with slice_room[s] = room and slice_t1[s] <= position,
        -1 where there is none.
    """
    room, position = np.broadcast_arrays(np.asarray(room, np.int64), position)
    if not len(log.slice_room):
        return np.full(room.shape, -1)
    last = int(log.slice_t1.max())
    span = last + 2
    keys = log.slice_room * span + log.slice_t1 + 1
    wanted = room * span + np.clip(position, -1, last) + 1
    found = np.searchsorted(keys, wanted, "right") - 1
    return np.where((found >= 0) & (log.slice_room[found] == room), found, -1)


def known_before(log: LiveLog, ts: int) -> Array:
    """Tell of each slice, bool [S], whether it was complete before a time of the wall clock.

    It is where its room's start + `slice_t1` < ts: what a codebook may be fitted on if requests
    from `ts` on are to be foretold.
    """
    start = log.room_start[log.slice_room]
    return (start != UNKNOWN) & (start + log.slice_t1 < ts)
