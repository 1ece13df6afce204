"""Candidates of requests: rooms on air at the time, drawn by a hash of seed, user, time and room.

Two ways to the same numbers: `_by_masks`, which looks at all rooms for each request, and
`_sweep_compiled`, which keeps a sorted list of the rooms on air while it goes through the log.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from .log import KINDS, LIVE, UNKNOWN, Array, Histories, LiveLog

if TYPE_CHECKING:
    from .requests import Options

_TRIES = 16  # draws of a candidate before the rooms are gone through one by one
_CLICK, _LIKE = KINDS.index("click"), KINDS.index("like")
_STEP, _M1, _M2 = (
    np.uint64(c) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)
_S30, _S27, _S31, _S32, _S40 = (np.uint64(bits) for bits in (30, 27, 31, 32, 40))
_LOW = np.uint64(0xFFFFFFFF)


@dataclass(frozen=True)
class Drawn:
    """Requests, N of them: event [N], room and position [N, C], and what is known of each.

    known: bool [N, C], the user is not in that room within the window after. liked: bool [N].
    stay_ms: int64 [N], what of the window the user stayed. history_end: int64 [N].
    """

    event: Array
    room: Array
    position: Array
    known: Array
    history_end: Array
    liked: Array
    stay_ms: Array


def draw(
    log: LiveLog,
    past: Histories,
    entry: Array,
    options: Options,
    window: int,
    fast: Callable[..., int] | None,
) -> Drawn:
    """Draw the candidates of each entry that is a request."""
    candidates = int(options.candidates)
    drawn = Drawn(
        event=entry.copy(),
        room=np.zeros((len(entry), candidates), np.int64),
        position=np.zeros((len(entry), candidates), np.int64),
        known=np.zeros((len(entry), candidates), bool),
        history_end=np.zeros(len(entry), np.int64),
        liked=np.zeros(len(entry), bool),
        stay_ms=np.zeros(len(entry), np.int64),
    )
    key = hashed(np.uint64(int(options.seed) % 2**64) ^ log.user[entry].astype(np.uint64))
    key = hashed(key ^ log.ts[entry].astype(np.uint64))
    key = hashed(key ^ log.room[entry].astype(np.uint64))
    popular = float(options.popular)
    count = (fast or _by_masks)(_flat(log, past), _flat_drawn(drawn), key, window, popular)
    return Drawn(*(column[:count] for column in _flat_drawn(drawn)))


def hashed(x: Array) -> Array:
    """Return 64 mixed bits of each element: the finalizer of splitmix64."""
    x = x + _STEP
    x = (x ^ (x >> _S30)) * _M1
    x = (x ^ (x >> _S27)) * _M2
    return x ^ (x >> _S31)


def _flat(log: LiveLog, past: Histories) -> tuple[Array, ...]:
    place = np.empty(len(past.event), np.int64)
    place[past.event] = np.arange(len(place))
    live = log.room_domain == LIVE
    timed = np.flatnonzero(live & (log.room_end != UNKNOWN))
    opening = timed[np.argsort(log.room_start[timed], kind="stable")]
    closing = timed[np.argsort(log.room_end[timed], kind="stable")]
    events = (log.user, log.room, log.ts, log.kind, log.value, log.pos)
    return (
        *events,
        past.offsets,
        past.event,
        place,
        log.room_start,
        log.room_end,
        opening,
        closing,
    )


def _flat_drawn(drawn: Drawn) -> tuple[Array, ...]:
    return (
        drawn.event,
        drawn.room,
        drawn.position,
        drawn.known,
        drawn.history_end,
        drawn.liked,
        drawn.stay_ms,
    )


def _by_masks(
    log: tuple[Array, ...], drawn: tuple[Array, ...], keys: Array, window: int, popular: float
) -> int:
    """Fill `drawn`, request by request, and return how many there are; the reference."""
    user, room, ts, kind, value, pos, offsets, order, _, start, end, timed, _ = log
    entry = drawn[0].copy()
    entry_room, entry_ts = room[entry], ts[entry]
    candidates, count = drawn[1].shape[1], 0
    for key, e in zip(keys, entry, strict=True):
        t = int(ts[e])
        low, seen = np.searchsorted(entry_ts, [t - window, t])
        recent = entry_room[low:seen]
        on_air = np.zeros(len(start), bool)
        on_air[timed] = (start[timed] <= t) & (t <= end[timed])
        on_air[recent[end[recent] == UNKNOWN]] = True
        if not on_air[room[e]]:
            continue
        mine = order[offsets[user[e]] : offsets[user[e] + 1]]
        before = mine[ts[mine] < t]
        after = mine[(ts[mine] >= t) & (ts[mine] <= t + window)]
        free = on_air.copy()
        free[room[before[ts[before] >= t - window]]] = False
        free[room[e]] = False
        tries = hashed(key + np.arange(candidates * _TRIES, dtype=np.uint64) * _STEP)
        chosen = [room[e]]
        for tried in tries.reshape(candidates, _TRIES)[1:]:
            found = _draw_one(tried, recent, np.flatnonzero(on_air), free, popular)
            chosen.append(room[e] if found < 0 else found)
            free[chosen[-1]] = False
        picked = np.array(chosen)
        known = ~np.isin(picked, room[after])
        known[0] = True
        latest = [low + _latest(recent, r) if seen else 0 for r in picked]
        position = np.where(end[picked] != UNKNOWN, t - start[picked], pos[entry[latest]])
        own = pos[e] if end[room[e]] == UNKNOWN or start[room[e]] == UNKNOWN else t - start[room[e]]
        position[picked == room[e]] = own
        here = after[room[after] == room[e]]
        stay = max(int(ts[here].max()) - t, int(1000 * _watched(kind[here], value[here])))
        row = (e, picked, position, known, len(before), (kind[here] == _LIKE).any(), stay)
        for column, cell in zip(drawn, row, strict=True):
            column[count] = cell
        count += 1
    return count


def _watched(kind: Array, value: Array) -> float:
    return float(value[kind == _CLICK].max(initial=0))


def _latest(rooms: Array, room: int) -> int:
    """Return the last index at which `room` stands, or 0."""
    return int(np.flatnonzero(rooms == room).max(initial=0))


def _draw_one(tries: Array, recent: Array, air: Array, free: Array, popular: float) -> int:
    """Return the first room drawn that is free, else the next free one on air, else -1."""
    by_entry = ((tries >> _S40) * 2.0**-24 < popular) & (len(recent) > 0)
    at = (tries & _LOW) * np.where(by_entry, len(recent), len(air)).astype(np.uint64) >> _S32
    for entered, index in zip(by_entry, at, strict=True):
        room = recent[index] if entered else air[index]
        if free[room]:
            return int(room)
    first = int((tries[0] & _LOW) * np.uint64(len(air)) >> _S32)
    rest = np.roll(air, -first)
    return int(rest[free[rest].argmax()]) if free[rest].any() else -1


@cache
def compiled() -> Callable[..., int] | None:
    """Return the fast way, or None where numba is not installed."""
    try:
        from ._sweep_compiled import in_time
    except ImportError:
        return None
    fast: Callable[..., int] = in_time
    return fast
