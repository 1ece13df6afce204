"""Time-synced comment streams: episodes with comments that are pinned to a position.

A folder of `events.parquet` (user, item, author, ts_ms, pos_ms, kind, value) and `slices.parquet`
(item, slice, t0_ms, t1_ms, embedding). An item, one episode, becomes a room, and an author is a
series. The ends of rooms are not known: episodes stay open, and people come at any time.

A slice counts as known to whoever is past its end. If its content was made from the comments, these
may have been written later: the log does not say when content was known, only where it is.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from ..logs.log import Array, LiveLog
from ._assemble import assemble
from .live_log import EVENTS, SLICES, Table


def recognises(folder: str | os.PathLike[str]) -> bool:
    """Tell whether a folder looks like comment streams."""
    path = Path(folder) / EVENTS
    return path.is_file() and "item" in Table(path).columns


def read(folder: str | os.PathLike[str], *, most: int | None = None) -> LiveLog:
    """Read a folder; with `most`, its earliest events only, as the file has them.

    BadFile names the file, column, row and value that cannot be.
    """
    folder = Path(folder)
    table = Table(folder / EVENTS)
    names = {"user": "user", "room": "item", "author": "author", "ts_ms": "ts_ms"}
    events = {name: table.integers(column) for name, column in names.items()}
    events |= {"pos_ms": table.integers("pos_ms"), "kind": table.kinds("kind")}
    events["value"] = table.numbers("value")
    if most is not None:
        chosen = np.argsort(events["ts_ms"], kind="stable")[:most]
        events = {name: column[chosen] for name, column in events.items()}
    table = Table(folder / SLICES)
    slices: dict[str, Array] = {"room": table.integers("item")}
    slices |= {name: table.integers(name) for name in ("slice", "t0_ms", "t1_ms")}
    slices["embedding"] = table.vectors("embedding")
    return assemble(events, slices, names=(str(folder / EVENTS), str(folder / SLICES), str(folder)))
