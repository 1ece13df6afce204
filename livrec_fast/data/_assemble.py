"""From columns as they come, in any order and with any ids, to a log; what cannot be is named."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from .._arrays import BadFile
from ..logs.log import KINDS, LIVE, UNKNOWN, VIDEO, Array, LiveLog

Columns = Mapping[str, Array]
_NAMES = ("events", "slices", "rooms")


def assemble(
    events: Columns,
    slices: Columns,
    rooms: Columns | None = None,
    *,
    names: tuple[str, str, str] = _NAMES,
) -> LiveLog:
    """Sort, number and check.

    Args:
        events: user, room, author, ts_ms, kind (index into `KINDS`), value and, if known, pos_ms.
        slices: room, slice, t0_ms, t1_ms, embedding [S, D] and, if there are videos, domain.
        rooms: room, author, start_ms, end_ms (-1 is unknown) and, if there are videos, domain.
        names: of the three, for messages.

    Returns:
        The log; of the slices, those of rooms that `events` or `rooms` have.

    Raises:
        BadFile: a value that cannot be, by table, column and row.
    """
    _check_events(events, names[0])
    _check_slices(slices, names[1])
    if rooms is not None:
        _check_rooms(rooms, names[2])
    room_id, number, author_id, owner, author = _owners(events, rooms, names)
    known, kept = _sorted_slices(slices, room_id, names[1])
    domain = _domains(rooms, room_id, known, slices, kept, names)
    order = np.argsort(events["ts_ms"], kind="stable")
    user_id, user = np.unique(events["user"], return_inverse=True)
    room, ts = number[: len(order)][order], np.asarray(events["ts_ms"][order], np.int64)
    pos = events["pos_ms"][order].astype(np.int64) if "pos_ms" in events else None
    start, end = _times(rooms, room_id, room, ts, pos)
    return LiveLog(
        user=user[order],
        room=room,
        author=author[: len(order)][order],
        ts=ts,
        kind=events["kind"][order].astype(np.uint8),
        value=events["value"][order].astype(np.float32),
        pos=ts - start[room] if pos is None else pos,
        slice_room=known,
        slice_index=slices["slice"][kept].astype(np.int32),
        slice_t0=slices["t0_ms"][kept].astype(np.int64),
        slice_t1=slices["t1_ms"][kept].astype(np.int64),
        slice_domain=domain[known],
        slice_embedding=np.ascontiguousarray(slices["embedding"][kept]),
        room_author=owner,
        room_domain=domain,
        room_start=start,
        room_end=end,
        user_id=user_id.astype(np.int64),
        room_id=room_id.astype(np.int64),
        author_id=author_id.astype(np.int64),
    )


def _owners(
    events: Columns, rooms: Columns | None, names: tuple[str, str, str]
) -> tuple[Array, Array, Array, Array, Array]:
    """Number rooms and authors: ids and numbers by event of each, and each room's author."""
    named, owners = events["room"], events["author"]
    if rooms is not None:
        named, owners = np.append(named, rooms["room"]), np.append(owners, rooms["author"])
    room_id, first, number = np.unique(named, return_index=True, return_inverse=True)
    author_id, author = np.unique(owners, return_inverse=True)
    other = author != author[first][number]
    if other.any():
        at, count = int(other.argmax()), len(events["room"])
        table, row = (names[0], at) if at < count else (names[2], at - count)
        said = f"{owners[at]}, but {owners[first[number[at]]]} before, for room {named[at]}"
        raise BadFile(f"{table}: column 'author', row {row}: {said}")
    return room_id, number, author_id, author[first], author


def refuse(table: str, column: str, bad: Array, why: str, values: Array | None = None) -> None:
    """Raise BadFile for the first row that is bad, if any is."""
    if bad.any():
        row = int(bad.argmax())
        value = "" if values is None else f"{values[row]} "
        raise BadFile(f"{table}: column {column!r}, row {row}: {value}{why}")


def _check_events(events: Columns, name: str) -> None:
    kind, value, ts = events["kind"], events["value"], events["ts_ms"]
    refuse(name, "kind", (kind < 0) | (kind >= len(KINDS)), f"is outside [0, {len(KINDS)})", kind)
    refuse(name, "value", ~np.isfinite(value), "is not a number", value)
    refuse(name, "ts_ms", ts < 0, "is before 1970", ts)


def _check_slices(slices: Columns, name: str) -> None:
    number = slices["slice"]
    wide = (number < -(2**31)) | (number >= 2**31)
    refuse(name, "slice", wide, "does not fit in 32 bits", number)
    t0, t1, vectors = slices["t0_ms"], slices["t1_ms"], slices["embedding"]
    refuse(name, "t0_ms", t0 < 0, "is before the stream", t0)
    refuse(name, "t1_ms", t1 < t0, "is before t0_ms", t1)
    finite = np.asarray(np.isfinite(vectors).all(1))
    refuse(name, "embedding", ~finite, "has a value that is not a number")
    if "domain" in slices:
        _check_domain(slices["domain"], name)


def _check_rooms(rooms: Columns, name: str) -> None:
    room, start, end = rooms["room"], rooms["start_ms"], rooms["end_ms"]
    ids, first, number = np.unique(room, return_index=True, return_inverse=True)
    refuse(name, "room", first[number] != np.arange(len(room)), "is there twice", room)
    refuse(name, "start_ms", start < UNKNOWN, "is before 1970", start)
    refuse(name, "end_ms", (end != UNKNOWN) & (end < start), "is before start_ms", end)
    if "domain" in rooms:
        _check_domain(rooms["domain"], name)


def _check_domain(domain: Array, name: str) -> None:
    bad = ~np.isin(domain, (LIVE, VIDEO))
    refuse(name, "domain", bad, f"is neither {LIVE}, live, nor {VIDEO}, video", domain)


def _sorted_slices(slices: Columns, room_id: Array, name: str) -> tuple[Array, Array]:
    """Return the rooms of the slices that are kept, sorted, and their rows in the table."""
    at = np.minimum(np.searchsorted(room_id, slices["room"]), max(len(room_id) - 1, 0))
    kept = np.flatnonzero(room_id[at] == slices["room"]) if len(room_id) else at[:0]
    order = np.lexsort((slices["t1_ms"][kept], slices["t0_ms"][kept], at[kept]))
    kept = kept[order]
    room, t1 = at[kept], slices["t1_ms"][kept]
    late = np.flatnonzero((room[1:] == room[:-1]) & (t1[1:] < t1[:-1]))
    if len(late):
        row, before = kept[late[0] + 1], kept[late[0]]
        why = f"is before that of row {before}, which starts no later"
        raise BadFile(f"{name}: column 't1_ms', row {row}: {slices['t1_ms'][row]} {why}")
    return room.astype(np.int64), kept


def _domains(
    rooms: Columns | None,
    room_id: Array,
    slice_room: Array,
    slices: Columns,
    kept: Array,
    names: tuple[str, str, str],
) -> Array:
    domain = np.full(len(room_id), LIVE, np.uint8)
    if "domain" in slices:
        said = slices["domain"][kept].astype(np.uint8)
        domain[slice_room] = said
        _same_domain(said != domain[slice_room], kept, slices, names[1])
    if rooms is not None and "domain" in rooms:
        domain[np.searchsorted(room_id, rooms["room"])] = rooms["domain"]
        if "domain" in slices:
            _same_domain(said != domain[slice_room], kept, slices, names[1])
    return domain


def _same_domain(bad: Array, kept: Array, slices: Columns, name: str) -> None:
    if bad.any():
        row = int(kept[bad.argmax()])
        why = f"{slices['domain'][row]}, another one elsewhere, for room {slices['room'][row]}"
        raise BadFile(f"{name}: column 'domain', row {row}: {why}")


def _times(
    rooms: Columns | None, room_id: Array, room: Array, ts: Array, pos: Array | None
) -> tuple[Array, Array]:
    """Return starts and ends; a start that no table tells is told by the room's first event."""
    start, end = (np.full(len(room_id), UNKNOWN, np.int64) for _ in range(2))
    begun = np.maximum(ts if pos is None else ts - pos, 0)
    start[room[::-1]] = begun[::-1]
    if rooms is not None:
        at = np.searchsorted(room_id, rooms["room"])
        start[at] = np.where(rooms["start_ms"] == UNKNOWN, start[at], rooms["start_ms"])
        end[at] = rooms["end_ms"]
    return start, end
