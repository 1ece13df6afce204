"""KuaiLive-M3: live rooms and short videos of the same users, with vectors of their segments.

Read to the schema published with the set. What it leaves open is settled so that nothing is known
too early, and can be changed:

- a segment of a live room lasts until the next one begins, the last one until the room's end;
  where that is not known, the last one is left out, as it would have no end, and where a room's
  start is not known, all of its segments are, as they would have no place in its stream;
- whole numbers below 10^11 are seconds, others milliseconds; times written as text are UTC, or
  `zone_hours` ahead of it;
- gifts have no time of their own, and photos' likes neither: they are left out.

A photo becomes a room of domain `VIDEO` with the id -1 - photo_id, a play of it an event. That the
vectors of live segments and of photos share a space is not said; `photos=False` leaves these out.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from .._arrays import BadFile
from ..logs.log import KINDS, LIVE, UNKNOWN, VIDEO, Array, LiveLog
from ._assemble import assemble, refuse
from .live_log import Table

INTERACTIONS, ROOMS, SEGMENTS = "live_interaction.csv", "live_room_meta.parquet", "live_emb_128_ts"
PLAYS, PHOTOS, VECTORS = "photo_play.parquet", "photo_meta.parquet", "photo_emb_128.parquet"
_MOMENTS = (  # file, room, time, kind
    ("live_like.csv", "live_id", "like_timestamp", "like"),
    ("live_comment.csv", "live_stream_id", "comment_ts", "comment"),
    ("live_share.csv", "live_id", "share_timestamp", "share"),
)
_SECONDS = 10**11  # whole numbers below are seconds: in milliseconds they would be of 1973
_EVENT = ("user", "room", "ts_ms", "kind", "value")


def recognises(folder: str | os.PathLike[str]) -> bool:
    """Tell whether a folder looks like KuaiLive-M3."""
    return (Path(folder) / INTERACTIONS).is_file()


def read(
    folder: str | os.PathLike[str],
    *,
    photos: bool = True,
    since_ms: int = 0,
    until_ms: int = 2**62,
    zone_hours: float = 0.0,
) -> LiveLog:
    """Read both domains.

    Args:
        folder: with live_interaction.csv, live_room_meta.parquet and live_emb_128_ts; where they
            are there, also live_like.csv, live_comment.csv, live_share.csv, photo_play.parquet,
            photo_meta.parquet and photo_emb_128.parquet.
        photos: read the short videos, too.
        since_ms: rooms that end before, and events before, are left out.
        until_ms: rooms that start then or later, and events then or later, are left out.
        zone_hours: how far times written as text are ahead of UTC.

    Returns:
        The log; vectors are held as float16, 256 bytes a segment.

    Raises:
        BadFile: names the file, column, row and value that cannot be.
    """
    reader = _Reader(Path(folder), since_ms, until_ms, round(zone_hours * 3_600_000))
    rooms = reader.rooms()
    events = [reader.interactions(rooms), *reader.moments(rooms)]
    slices = [reader.segments(rooms)]
    if photos and (reader.folder / PHOTOS).exists():
        films = reader.photos()
        if (reader.folder / PLAYS).exists():
            events.append(reader.plays(films))
        if (reader.folder / VECTORS).exists():
            slices.append(reader.vectors(films))
        rooms = _joined([rooms, films])
    names = tuple(f"{reader.folder}: {name}" for name in ("events", "slices", "rooms"))
    return assemble(_joined(events), _joined(slices), rooms, names=names)  # type: ignore[arg-type]


class _Reader:
    def __init__(self, folder: Path, since: int, until: int, ahead: int):
        self.folder, self.since, self.until, self.ahead = folder, since, until, ahead

    def rooms(self) -> dict[str, Array]:
        table = Table(self.folder / ROOMS)
        start = self.times(table, "start_timestamp", UNKNOWN)
        end = self.times(table, "end_timestamp", UNKNOWN)
        refuse(str(table.path), "end_timestamp", (end != UNKNOWN) & (end < start), "before start")
        kept = (start < self.until) & ((end >= self.since) | (end == UNKNOWN))
        columns = {"room": table.integers("live_id"), "author": table.integers("author_id")}
        columns |= {"start_ms": start, "end_ms": end, "domain": np.full(len(start), LIVE)}
        order = np.argsort(columns["room"], kind="stable")
        return {name: column[order][kept[order]] for name, column in columns.items()}

    def interactions(self, rooms: dict[str, Array]) -> dict[str, Array]:
        begin, end = "live_play_start_timestamp", "live_play_end_timestamp"
        table = Table(self.folder / INTERACTIONS, ("user_id", "live_id", begin, end))
        ts = self.times(table, begin)
        watched = np.maximum(self.times(table, end, 0) - ts, 0) / 1000
        return self.events(table, "live_id", ts, "click", watched, rooms)

    def moments(self, rooms: dict[str, Array]) -> list[dict[str, Array]]:
        found = []
        for name, room, time, kind in _MOMENTS:
            if (self.folder / name).exists():
                table = Table(self.folder / name, ("user_id", room, time, "content"))
                ts = self.times(table, time)
                value = np.ones(len(ts))
                if kind == "comment" and "content" in table.columns:
                    value = _lengths(table.column("content"))
                found.append(self.events(table, room, ts, kind, value, rooms))
        return found

    def plays(self, films: dict[str, Array]) -> dict[str, Array]:
        table = Table(self.folder / PLAYS)
        ts = self.times(table, "enter_timestamp")
        watched = np.maximum(self.times(table, "leave_timestamp", 0) - ts, 0) / 1000
        return self.events(table, "photo_id", ts, "play", watched, films)

    def events(
        self, table: Table, room: str, ts: Array, kind: str, value: Array, rooms: dict[str, Array]
    ) -> dict[str, Array]:
        """Return the events within the times asked for, in rooms that are known."""
        ids = table.integers(room)
        if kind == "play":
            ids = -1 - ids
        at, known = _find(rooms["room"], ids)
        kept = known & (ts >= self.since) & (ts < self.until)
        kinds = np.full(len(ts), KINDS.index(kind))
        columns = (table.integers("user_id"), ids, ts, kinds, value)
        found = {name: column[kept] for name, column in zip(_EVENT, columns, strict=True)}
        return found | {"author": rooms["author"][at[kept]]}

    def segments(self, rooms: dict[str, Array]) -> dict[str, Array]:
        """Read the segments, a file at a time."""
        whole = self.folder / SEGMENTS
        files = sorted(whole.glob("**/*.parquet")) if whole.is_dir() else [whole]
        if not files:
            raise BadFile(f"{whole}: no parquet files")
        rows, times, vectors = [], [], []
        for path in files:
            table = Table(path)
            at, known = _find(rooms["room"], _numbers(table, "live_stream_id"))
            known[known] = rooms["start_ms"][at[known]] != UNKNOWN
            rows.append(at[known])
            times.append(self.times(table, "timestamp")[known])
            vectors.append(table.vectors("feature_128")[known].astype(np.float16))
        row, ts = np.concatenate(rows), np.concatenate(times)
        start, end = rooms["start_ms"][row], rooms["end_ms"][row]
        outside = (ts < start - 60_000) | ((end != UNKNOWN) & (ts > end + 60_000))
        if len(outside) and outside.mean() > 0.5:
            raise BadFile(
                f"{whole}: {outside.mean():.0%} of the segments lie outside their rooms' times;"
                " zone_hours tells how far times written as text are ahead of UTC"
            )
        order = np.lexsort((ts, row))
        row, t0 = row[order], np.maximum(ts - start, 0)[order]
        last = np.append(row[1:] != row[:-1], True)[: len(row)]
        t1 = np.where(last, np.maximum((end - start)[order], t0), np.append(t0[1:], 0)[: len(t0)])
        kept = ~(last & (end[order] == UNKNOWN))
        return {
            "room": rooms["room"][row[kept]],
            "slice": (np.arange(len(row)) - np.searchsorted(row, row))[kept],
            "t0_ms": t0[kept],
            "t1_ms": t1[kept],
            "domain": np.full(int(kept.sum()), LIVE),
            "embedding": np.concatenate(vectors)[order[kept]],
        }

    def photos(self) -> dict[str, Array]:
        table = Table(self.folder / PHOTOS)
        ids, author = -1 - table.integers("photo_id"), table.integers("author_id")
        order = np.argsort(ids, kind="stable")
        columns = {"room": ids[order], "author": author[order]}
        columns |= {name: np.full(len(ids), UNKNOWN) for name in ("start_ms", "end_ms")}
        return columns | {"domain": np.full(len(ids), VIDEO)}

    def vectors(self, films: dict[str, Array]) -> dict[str, Array]:
        table = Table(self.folder / VECTORS)
        ids = -1 - table.integers("photo_id")
        known = _find(films["room"], ids)[1]
        still = np.zeros(int(known.sum()), np.int64)
        columns = {"room": ids[known], "slice": still, "t0_ms": still, "t1_ms": still}
        columns |= {"domain": np.full(len(still), VIDEO)}
        return columns | {"embedding": table.vectors("feature")[known].astype(np.float16)}

    def times(self, table: Table, name: str, unknown: int | None = None) -> Array:
        """Return times of the wall clock in milliseconds."""
        import pyarrow as pa

        column = table.column(name)
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            try:
                column = column.cast(pa.timestamp("ms"))
            except pa.ArrowException as error:
                raise BadFile(f"{table.path}: column {name!r}: {error}") from error
        if pa.types.is_timestamp(column.type):
            if unknown is None:
                table.refuse_nulls(name, column)
            ahead = self.ahead if column.type.tz is None else 0
            whole = column.cast(pa.timestamp("ms"), safe=False).cast(pa.int64())
            there = column.is_valid().to_numpy(zero_copy_only=False)
            filled = whole.fill_null(0).to_numpy(zero_copy_only=False)
            return np.where(there, filled - ahead, unknown or 0)
        found = table.integers(name, unknown)
        return np.where((found > 0) & (found < _SECONDS), found * 1000, found)


def _find(sorted_ids: Array, ids: Array) -> tuple[Array, Array]:
    """Return where each id stands, and whether it does."""
    if not len(sorted_ids):
        return np.zeros(len(ids), np.int64), np.zeros(len(ids), bool)
    at = np.minimum(np.searchsorted(sorted_ids, ids), len(sorted_ids) - 1)
    return at, sorted_ids[at] == ids


def _numbers(table: Table, name: str) -> Array:
    """Return ids that may be written as text."""
    import pyarrow as pa

    column = table.column(name)
    if pa.types.is_integer(column.type):
        return table.integers(name)
    table.refuse_nulls(name, column)
    try:
        return np.asarray(column.cast(pa.int64()).to_numpy(zero_copy_only=False))
    except pa.ArrowException as error:
        raise BadFile(f"{table.path}: column {name!r}: {error}") from error


def _lengths(texts: Any) -> Array:
    import pyarrow as pa
    import pyarrow.compute as pc

    counted = pc.utf8_length(texts.cast(pa.string())).fill_null(0)
    return np.asarray(counted.to_numpy(zero_copy_only=False))


def _joined(parts: list[dict[str, Array]]) -> dict[str, Array]:
    widths = {part["embedding"].shape[1] for part in parts if "embedding" in part}
    if len(widths) > 1:
        raise BadFile(f"vectors of live segments and photos differ in length: {sorted(widths)}")
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
