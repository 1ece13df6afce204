"""The draw of candidates in one pass through time; importing this needs numba."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from ._sweep import _CLICK, _LIKE, _LOW, _M1, _M2, _S27, _S30, _S31, _S32, _S40, _STEP, _TRIES
from .log import UNKNOWN


@numba.njit(nogil=True)
def mixed(x: Any) -> Any:
    x = x + _STEP
    x = (x ^ (x >> _S30)) * _M1
    x = (x ^ (x >> _S27)) * _M2
    return x ^ (x >> _S31)


@numba.njit(nogil=True)
def insert(air: Any, count: int, room: int) -> int:
    at = np.searchsorted(air[:count], room)
    for i in range(count, at, -1):
        air[i] = air[i - 1]
    air[at] = room
    return count + 1


@numba.njit(nogil=True)
def remove(air: Any, count: int, room: int) -> int:
    for i in range(np.searchsorted(air[:count], room), count - 1):
        air[i] = air[i + 1]
    return count - 1


@numba.njit(nogil=True)
def draw_one(
    key: Any, entries: Any, air: Any, on_air: Any, taken: Any, now: int, popular: float
) -> int:
    first = np.int64(0)
    for attempt in range(_TRIES):
        x = mixed(key + np.uint64(attempt) * _STEP)
        if attempt == 0:
            first = np.int64((x & _LOW) * np.uint64(len(air)) >> _S32)
        if len(entries) > 0 and np.float64(x >> _S40) * 2.0**-24 < popular:
            room = entries[np.int64((x & _LOW) * np.uint64(len(entries)) >> _S32)]
        else:
            room = air[np.int64((x & _LOW) * np.uint64(len(air)) >> _S32)]
        if on_air[room] and taken[room] != now:
            return room
    for i in range(len(air)):
        room = air[(first + i) % len(air)]
        if taken[room] != now:
            return room
    return -1


@numba.njit(nogil=True)
def in_time(log: Any, drawn: Any, keys: Any, window: int, popular: float) -> int:
    """Do what `_sweep._by_masks` does."""
    user, room, ts, kind, value, pos, offsets, order, place, start, end, opening, closing = log
    event, chosen, position, known, history_end, liked, stay_ms = drawn
    rooms, entries = len(start), len(event)
    entry = event.copy()
    entry_room = room[entry]
    air, count = np.empty(rooms, np.int64), 0
    on_air = np.zeros(rooms, np.bool_)
    latest = np.full(rooms, -1, np.int64)  # the room's latest entry
    taken = np.full(rooms, -1, np.int64)  # not to be drawn for the request of that number
    later = np.full(rooms, -1, np.int64)  # seen after the request of that number
    opened, closed, low, seen, made = 0, 0, 0, 0, 0
    for i in range(entries):
        e = entry[i]
        t = ts[e]
        while opened < len(opening) and start[opening[opened]] <= t:
            count = insert(air, count, opening[opened])
            on_air[opening[opened]] = True
            opened += 1
        while closed < len(closing) and end[closing[closed]] < t:
            gone = closing[closed]
            if on_air[gone]:
                count = remove(air, count, gone)
                on_air[gone] = False
            closed += 1
        while ts[entry[seen]] < t:
            entered = entry_room[seen]
            latest[entered] = seen
            if end[entered] == UNKNOWN and not on_air[entered]:
                count = insert(air, count, entered)
                on_air[entered] = True
            seen += 1
        while low < seen and ts[entry[low]] < t - window:
            gone = entry_room[low]
            if end[gone] == UNKNOWN and latest[gone] == low:
                count = remove(air, count, gone)
                on_air[gone] = False
            low += 1
        own = room[e]
        if not on_air[own]:
            continue
        begin, stop = offsets[user[e]], offsets[user[e] + 1]
        now = place[e]
        while now > begin and ts[order[now - 1]] == t:
            now -= 1
        k = now - 1
        while k >= begin and ts[order[k]] >= t - window:
            taken[room[order[k]]] = i
            k -= 1
        taken[own] = i
        like, stay, k = False, np.int64(0), now
        while k < stop and ts[order[k]] <= t + window:
            f = order[k]
            later[room[f]] = i
            if room[f] == own:
                like = like or kind[f] == _LIKE
                stay = max(stay, ts[f] - t)
                if kind[f] == _CLICK:
                    stay = max(stay, np.int64(1000 * np.float64(value[f])))
            k += 1
        event[made], history_end[made] = e, now - begin
        liked[made], stay_ms[made] = like, stay
        timed = end[own] != UNKNOWN and start[own] != UNKNOWN
        place_now = t - start[own] if timed else pos[e]
        for c in range(chosen.shape[1]):
            key = keys[i] + np.uint64(c * _TRIES) * _STEP
            found = own
            if c > 0:
                recent = entry_room[low:seen]
                found = draw_one(key, recent, air[:count], on_air, taken, i, popular)
            if found < 0 or found == own:
                chosen[made, c], position[made, c] = own, place_now
                known[made, c] = c == 0
                continue
            taken[found] = i
            chosen[made, c], known[made, c] = found, later[found] != i
            if end[found] != UNKNOWN:
                position[made, c] = t - start[found]
            else:
                position[made, c] = pos[entry[latest[found]]]
        made += 1
    return made
