"""What was counted before a time: events of rooms, authors, users and pairs; ages of rooms."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np

from .log import KINDS, UNKNOWN, Array, LiveLog

_NEVER = np.iinfo(np.int64).max


def ages(log: LiveLog, room: Array, ts: Array) -> Array:
    """Return the seconds from the start of each room [N, C] to ts [N]; 0 where it is not known."""
    start = log.room_start[room]
    return np.where(start == UNKNOWN, 0, np.maximum(ts[:, None] - start, 0)) / 1000


def new_rooms(log: LiveLog, moment: int) -> Array:
    """Tell of each room whether its first event (without events: its start) is not before then."""
    first = np.where(log.room_start == UNKNOWN, _NEVER, log.room_start)
    first[log.room[::-1]] = log.ts[::-1]
    return np.asarray(first >= moment)


def timed_stay(log: LiveLog, user: Array, room: Array, ts: Array, window: int) -> Array:
    """Tell of each stay [N], from ts on, whether the log says how long it was.

    It does with a click of the user's in the room, from ts to ts + window, whose value is not 0. In
    a log where no click has one, all stays count as told: by the events that are there.
    """
    timed = (log.kind == KINDS.index("click")) & (log.value > 0)
    if not timed.any():
        return np.ones(len(ts), bool)
    pairs, pair = np.unique(log.user[timed] * log.rooms + log.room[timed], return_inverse=True)
    wanted = user * log.rooms + room
    at = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
    upto, before = (_before(pair, log.ts[timed], at, when) for when in (ts + window + 1, ts))
    return np.asarray((pairs[at] == wanted) & (upto > before))


def counters(log: LiveLog, user: Array, ts: Array, room: Array, fast: bool) -> Array:
    """Count the events strictly before ts [N] of each candidate [N, C].

    Returns int64 [N, C, 4]: of the room, of its author, of the user, of the user with the author.
    """
    counting = _compiled() if fast else None
    if counting is None:
        return _by_sorting(log, user, ts, room)
    counted = np.zeros((*room.shape, 4), np.int64)
    events = (log.user, log.room, log.author, log.ts)
    counting(*events, log.room_author, log.users, log.authors, user, ts, room, counted)
    return counted


def _by_sorting(log: LiveLog, user: Array, ts: Array, room: Array) -> Array:
    author = log.room_author[room]
    everywhere = np.broadcast_to(user[:, None], room.shape)
    when = np.broadcast_to(ts[:, None], room.shape)
    pairs, pair = np.unique(log.user * log.authors + log.author, return_inverse=True)
    wanted = everywhere * log.authors + author
    at = np.minimum(np.searchsorted(pairs, wanted), max(len(pairs) - 1, 0))
    met = pairs[at] == wanted if len(pairs) else np.zeros(room.shape, bool)
    columns = [
        _before(log.room, log.ts, room, when),
        _before(log.author, log.ts, author, when),
        _before(log.user, log.ts, everywhere, when),
        np.where(met, _before(pair, log.ts, at, when), 0),
    ]
    return np.stack(columns, 2)


def _before(ids: Array, times: Array, wanted: Array, when: Array) -> Array:
    """Count the events of `ids` at `times`, ascending, that are of `wanted` and before `when`."""
    if not len(ids):
        return np.zeros(wanted.shape, np.int64)
    moments, rank = np.unique(times, return_inverse=True)
    span = len(moments) + 1
    keys = np.sort(ids * span + rank)
    limit = np.searchsorted(moments, when)
    return np.searchsorted(keys, wanted * span + limit) - np.searchsorted(keys, wanted * span)


@cache
def _compiled() -> Callable[..., None] | None:
    try:
        import numba
    except ImportError:
        return None
    return numba.njit(nogil=True)(_in_time)


def _in_time(
    event_user: Array,
    event_room: Array,
    event_author: Array,
    event_ts: Array,
    room_author: Array,
    users: int,
    authors: int,
    user: Array,
    ts: Array,
    room: Array,
    counted: Array,
) -> None:
    """Fill `counted` in one pass through time, with a hash table of pairs; compiled by numba."""
    of_room = np.zeros(len(room_author), np.int64)
    of_author, of_user = np.zeros(authors, np.int64), np.zeros(users, np.int64)
    bits = 4
    while (1 << bits) < 2 * len(event_ts):
        bits += 1
    last = (1 << bits) - 1
    pair, of_pair = np.full(last + 1, -1, np.int64), np.zeros(last + 1, np.int32)
    seen = 0
    for i in range(len(ts)):
        while seen < len(event_ts) and event_ts[seen] < ts[i]:
            of_room[event_room[seen]] += 1
            of_author[event_author[seen]] += 1
            of_user[event_user[seen]] += 1
            key = event_user[seen] * authors + event_author[seen]
            slot = (key * -7046029254386353131 >> (64 - bits)) & last
            while pair[slot] >= 0 and pair[slot] != key:
                slot = (slot + 1) & last
            pair[slot] = key
            of_pair[slot] += 1
            seen += 1
        for c in range(room.shape[1]):
            author = room_author[room[i, c]]
            key = user[i] * authors + author
            slot = (key * -7046029254386353131 >> (64 - bits)) & last
            while pair[slot] >= 0 and pair[slot] != key:
                slot = (slot + 1) & last
            counted[i, c, 0] = of_room[room[i, c]]
            counted[i, c, 1] = of_author[author]
            counted[i, c, 2] = of_user[user[i]]
            counted[i, c, 3] = of_pair[slot] if pair[slot] == key else 0
