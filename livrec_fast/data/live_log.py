"""A user's own logs: a folder of two or three parquet files.

`events.parquet`, a row per event, in any order:

    user, room, author   integers, any ids; a room has one author
    ts_ms                integer, the wall clock, milliseconds since 1970
    kind                 text, one of `KINDS`, or its index
    value                number: seconds watched for "click" (entering a room) and "play" (playing a
                         short video), characters for "comment", the price for "gift", else 1;
                         0 is unknown
    pos_ms               optional integer, the position in the room's stream; without it, ts_ms less
                         the room's start

`slices.parquet`, a row per piece of content:

    room                 integer
    slice                integer, a number of your own
    t0_ms, t1_ms         integers, positions in the room's stream; what the slice shows is known
                         from t1_ms on
    domain               optional integer: 0 live (the default), 1 short video, which is a room, too
                         and has one slice, from 0 to 0
    embedding            list of D float16 or float32

`rooms.parquet`, optional, a row per room:

    room, author         integers
    start_ms, end_ms     integers, the wall clock, null where not known; without a start, it is the
                         first event's ts_ms less pos_ms
    domain               optional integer, as above

Further columns are passed over. Slices of rooms that neither `events` nor `rooms` have are left
out.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from .._arrays import BadFile, _arrow, _first_line
from ..logs.log import (
    KINDS,
    LIVE,
    UNKNOWN,
    VIDEO,
    Array,
    Histories,
    LiveLog,
    histories,
    known_before,
    slice_at,
)
from ._assemble import assemble

__all__ = [
    "KINDS",
    "LIVE",
    "UNKNOWN",
    "VIDEO",
    "Histories",
    "LiveLog",
    "histories",
    "known_before",
    "read",
    "slice_at",
    "write",
]
EVENTS, SLICES, ROOMS = "events.parquet", "slices.parquet", "rooms.parquet"


def read(folder: str | os.PathLike[str]) -> LiveLog:
    """Read a folder of logs; BadFile names the file, column, row and value that cannot be."""
    folder = Path(folder)
    table = Table(folder / EVENTS)
    events = {name: table.integers(name) for name in ("user", "room", "author", "ts_ms")}
    events |= {"kind": table.kinds("kind"), "value": table.numbers("value")}
    if "pos_ms" in table.columns:
        events["pos_ms"] = table.integers("pos_ms")
    table = Table(folder / SLICES)
    slices = {name: table.integers(name) for name in ("room", "slice", "t0_ms", "t1_ms")}
    slices["embedding"] = table.vectors("embedding")
    if "domain" in table.columns:
        slices["domain"] = table.integers("domain")
    rooms = None
    if (folder / ROOMS).exists():
        table = Table(folder / ROOMS)
        rooms = {name: table.integers(name) for name in ("room", "author")}
        rooms |= {name: table.integers(name, UNKNOWN) for name in ("start_ms", "end_ms")}
        if "domain" in table.columns:
            rooms["domain"] = table.integers("domain")
    names = (str(folder / EVENTS), str(folder / SLICES), str(folder / ROOMS))
    return assemble(events, slices, rooms, names=names)


def write(log: LiveLog, folder: str | os.PathLike[str]) -> None:
    """Write a log to a new folder, whole or not at all, with the ids that it came with.

    Raises: FileExistsError where there is something in the folder already.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder}: there already")
    pa, pq = _arrow(folder)
    beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        for name, columns in _tables(pa, log).items():
            pq.write_table(pa.table(columns), beside / name)
        beside.chmod(0o755)
        os.replace(beside, folder)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def _tables(pa: Any, log: LiveLog) -> dict[str, dict[str, Any]]:
    kinds = pa.DictionaryArray.from_arrays(pa.array(log.kind.astype(np.int8)), pa.array(KINDS))
    width = log.slice_embedding.shape[1]
    flat = pa.array(np.ascontiguousarray(log.slice_embedding).reshape(-1))
    events = {
        "user": log.user_id[log.user],
        "room": log.room_id[log.room],
        "author": log.author_id[log.author],
        "ts_ms": log.ts,
        "kind": kinds,
        "value": log.value,
        "pos_ms": log.pos,
    }
    slices = {
        "room": log.room_id[log.slice_room],
        "slice": log.slice_index,
        "t0_ms": log.slice_t0,
        "t1_ms": log.slice_t1,
        "domain": log.slice_domain,
        "embedding": pa.FixedSizeListArray.from_arrays(flat, width),
    }
    rooms = {
        "room": log.room_id,
        "author": log.author_id[log.room_author],
        "start_ms": pa.array(log.room_start, mask=log.room_start == UNKNOWN),
        "end_ms": pa.array(log.room_end, mask=log.room_end == UNKNOWN),
        "domain": log.room_domain,
    }
    return {EVENTS: events, SLICES: slices, ROOMS: rooms}


class Table:
    """The columns of a file or a folder of parquet, or of a `.csv`, with checks."""

    def __init__(self, path: Path, columns: tuple[str, ...] | None = None):
        """Open; the columns are read when they are asked for.

        columns: of a `.csv`, which is read at once, those that will be asked for.
        """
        pa, pq = _arrow(path)
        self.path, self._pa = path, pa
        if not path.exists():
            raise BadFile(f"{path}: no such file")
        try:
            if path.suffix == ".csv":
                from pyarrow import csv

                with csv.open_csv(path) as head:
                    self.columns: list[str] = head.schema.names
                chosen = [n for n in columns or self.columns if n in self.columns]
                convert = csv.ConvertOptions(include_columns=chosen)
                self._whole: Any = csv.read_csv(path, convert_options=convert)
            else:
                self._whole = None
                self.columns = pq.ParquetDataset(path).schema.names
        except (OSError, pa.ArrowException) as error:
            raise BadFile(f"{path}: not a readable table ({_first_line(error)})") from error

    def column(self, name: str) -> Any:
        """Return a column as an Arrow array."""
        if name not in self.columns:
            raise BadFile(f"{self.path}: no column {name!r}; there are {', '.join(self.columns)}")
        if self._whole is not None:
            column = self._whole[name]
        else:
            from pyarrow import parquet

            column = parquet.read_table(self.path, columns=[name])[name]
        column = column.combine_chunks()
        if self._pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        return column

    def integers(self, name: str, unknown: int | None = None) -> Array:
        """Return a column of integers as int64, with `unknown` for nulls if it may have any."""
        column = self.column(name)
        if unknown is not None and self._pa.types.is_null(column.type):
            return np.full(len(column), unknown, np.int64)
        if not self._pa.types.is_integer(column.type):
            raise BadFile(f"{self.path}: column {name!r} must hold integers, got {column.type}")
        if unknown is None:
            self.refuse_nulls(name, column)
        else:
            column = column.fill_null(unknown)
        if column.type == self._pa.uint64():
            raise BadFile(f"{self.path}: column {name!r} must fit in int64, got {column.type}")
        return np.asarray(column.to_numpy(zero_copy_only=False), np.int64)

    def numbers(self, name: str) -> Array:
        """Return a column of numbers as float32."""
        column = self.column(name)
        types = self._pa.types
        if not (types.is_integer(column.type) or types.is_floating(column.type)):
            raise BadFile(f"{self.path}: column {name!r} must hold numbers, got {column.type}")
        self.refuse_nulls(name, column)
        return np.asarray(column.to_numpy(zero_copy_only=False), np.float32)

    def kinds(self, name: str) -> Array:
        """Return a column of kinds of events as indices into `KINDS`."""
        column = self.column(name)
        if self._pa.types.is_integer(column.type):
            return self.integers(name)
        self.refuse_nulls(name, column)
        encoded = column.dictionary_encode()
        names = encoded.dictionary.to_pylist()
        index = np.array([KINDS.index(n) if n in KINDS else -1 for n in names], np.int64)
        found = index[encoded.indices.to_numpy()] if len(column) else index[:0]
        if (found < 0).any():
            row = int((found < 0).argmax())
            why = f"{column[row].as_py()!r} is none of {', '.join(KINDS)}"
            raise BadFile(f"{self.path}: column {name!r}, row {row}: {why}")
        return found

    def vectors(self, name: str) -> Array:
        """Return a column of equally long lists as a matrix, float16 or float32."""
        column, pa = self.column(name), self._pa
        kind = column.type
        lists = pa.types.is_list(kind) or pa.types.is_large_list(kind)
        if not (lists or pa.types.is_fixed_size_list(kind)):
            raise BadFile(f"{self.path}: column {name!r} must hold lists of numbers, got {kind}")
        self.refuse_nulls(name, column)
        flat = np.asarray(column.flatten().to_numpy(zero_copy_only=False))
        if flat.dtype.kind not in "fiu":
            raise BadFile(f"{self.path}: column {name!r} must hold lists of numbers, got {kind}")
        if lists:
            lengths = np.diff(column.offsets.to_numpy())
            if (lengths != lengths[:1]).any():
                row = int((lengths != lengths[0]).argmax())
                why = f"{lengths[row]} values, but {lengths[0]} in row 0"
                raise BadFile(f"{self.path}: column {name!r}, row {row}: {why}")
            width = int(lengths[0]) if len(lengths) else 0
        else:
            width = kind.list_size
        dtype = np.float16 if flat.dtype == np.float16 else np.float32
        return flat.astype(dtype, copy=False).reshape(len(column), width)

    def refuse_nulls(self, name: str, column: Any) -> None:
        """Raise BadFile where a value is missing."""
        if column.null_count:
            row = int(column.is_null().to_numpy(zero_copy_only=False).argmax())
            raise BadFile(f"{self.path}: column {name!r}, row {row}: has no value")
