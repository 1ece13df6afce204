"""The format of a user's own logs: what is read is what was meant, and errors name the culprit."""

import os
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from log_by_hand import random_log

from livrec_fast._arrays import BadFile
from livrec_fast.data import comment_streams, live_log
from livrec_fast.logs import requests as made
from livrec_fast.logs.log import KINDS, LIVE, UNKNOWN, VIDEO, histories, slice_at

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

EVENTS = {
    "user": [7, 5, 7, 9],
    "room": [30, 10, 10, 30],
    "author": [2, 1, 1, 2],
    "ts_ms": [9000, 4000, 6000, 9500],
    "kind": ["click", "click", "gift", "like"],
    "value": [12.0, 0.0, 5.5, 1.0],
}
SLICES = {
    "room": [30, 10, 10, 99],
    "slice": [4, 1, 0, 0],
    "t0_ms": [0, 1000, 0, 0],
    "t1_ms": [500, 2000, 1000, 10],
    "embedding": [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]],
}
ROOMS = {
    "room": [30, 10, 20],
    "author": [2, 1, 2],
    "start_ms": [8000, None, 1],
    "end_ms": [9900, None, 2],
}


def folder_of(path, events=None, slices=None, rooms=None):
    """Write the three files; what is given replaces columns, a column of None goes."""
    given = {"events": (EVENTS, events), "slices": (SLICES, slices)}
    if rooms is not None:
        given["rooms"] = (ROOMS, rooms)
    for name, (columns, changes) in given.items():
        columns = {k: v for k, v in {**columns, **(changes or {})}.items() if v is not None}
        pq.write_table(pa.table(columns), path / f"{name}.parquet")
    return path


def test_events_are_sorted_and_everything_is_numbered(tmp_path):
    log = live_log.read(folder_of(tmp_path, rooms={}))
    assert log.user_id.tolist() == [5, 7, 9] and log.room_id.tolist() == [10, 20, 30]
    assert log.author_id.tolist() == [1, 2]
    assert log.user.tolist() == [0, 1, 1, 2] and log.room.tolist() == [0, 0, 2, 2]
    assert log.author.tolist() == [0, 0, 1, 1] and log.room_author.tolist() == [0, 1, 1]
    assert log.ts.tolist() == [4000, 6000, 9000, 9500]
    assert [KINDS[k] for k in log.kind] == ["click", "gift", "click", "like"]
    assert log.value.tolist() == [0.0, 5.5, 12.0, 1.0]
    assert log.room_start.tolist() == [4000, 1, 8000]  # room 10's is its first event's
    assert log.room_end.tolist() == [UNKNOWN, 2, 9900]
    assert log.pos.tolist() == [0, 2000, 1000, 1500]
    assert log.slice_room.tolist() == [0, 0, 2]  # nobody has room 99
    assert log.slice_index.tolist() == [0, 1, 4]
    assert log.slice_embedding.tolist() == [[5, 6], [3, 4], [1, 2]]
    past = histories(log)
    assert past.offsets.tolist() == [0, 1, 3, 4] and past.event.tolist() == [0, 1, 2, 3]


def test_without_rooms_and_with_positions(tmp_path):
    log = live_log.read(folder_of(tmp_path, {"pos_ms": [700, 100, 300, 400]}))
    assert log.pos.tolist() == [100, 300, 700, 400]
    # the start is told by the first event alone: later ones were not known then
    assert log.room_start.tolist() == [3900, 8300] and log.room_end.tolist() == [UNKNOWN] * 2
    assert (log.room_domain == LIVE).all() and log.slice_embedding.dtype == np.float32


def test_videos(tmp_path):
    domains = {"domain": [1, 0, 0, 0], "t1_ms": [0, 2000, 1000, 10]}
    log = live_log.read(folder_of(tmp_path, slices=domains))
    assert log.room_domain.tolist() == [LIVE, VIDEO] and log.slice_domain.tolist() == [0, 0, 1]
    log = live_log.read(folder_of(tmp_path, rooms={"domain": [1, 0, 0]}))
    assert log.room_domain.tolist() == [LIVE, LIVE, VIDEO]
    assert made.entries(log, 100).tolist() == [0, 1]


def test_a_slice_counts_from_its_end(tmp_path):
    log = live_log.read(folder_of(tmp_path, rooms={}))
    at = np.array([[-5, 999, 1000], [1999, 2000, 10**12]])
    assert slice_at(log, 0 * at, at).tolist() == [[-1, -1, 0], [0, 1, 1]]
    assert slice_at(log, np.array([1, 2, 2]), np.array([9**9, 499, 500])).tolist() == [-1, -1, 2]


@pytest.mark.parametrize("seed", range(3))
def test_slice_at_against_a_search_by_hand(seed):
    log = random_log(seed, 50)
    rng = np.random.default_rng(seed)
    room, at = rng.integers(0, log.rooms, 300), rng.integers(-50, 1200, 300)
    wanted = [
        max(np.flatnonzero((log.slice_room == r) & (log.slice_t1 <= max(p, -1))), default=-1)
        for r, p in zip(room, at, strict=True)
    ]
    np.testing.assert_array_equal(slice_at(log, room, at), wanted)
    assert len(set(wanted)) > 10


def test_what_is_written_is_read(tmp_path):
    log = random_log(4, 300)
    live_log.write(log, tmp_path / "log")
    read = live_log.read(tmp_path / "log")
    for field in fields(log):
        one, two = getattr(log, field.name), getattr(read, field.name)
        assert one.dtype == two.dtype, field.name
        np.testing.assert_array_equal(one, two, field.name)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log"]
    with pytest.raises(FileExistsError, match="there already"):
        live_log.write(log, tmp_path / "log")


def test_a_log_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    def fail(table, path):
        if "slices" in str(path):
            raise OSError("disk full")

    monkeypatch.setattr(pq, "write_table", fail)
    with pytest.raises(OSError, match="disk full"):
        live_log.write(random_log(4, 30), tmp_path / "log")
    assert list(tmp_path.iterdir()) == []


BAD = [
    ("events", {"user": None}, "no column 'user'; there are room"),
    ("events", {"user": [1.5, 2, 3, 4]}, "column 'user' must hold integers, got double"),
    ("events", {"room": [30, None, 10, 30]}, "column 'room', row 1: has no value"),
    (
        "events",
        {"kind": ["click", "click", "hug", "like"]},
        "'kind', row 2: 'hug' is none of click",
    ),
    ("events", {"kind": [0, 0, 7, 1]}, r"'kind', row 2: 7 is outside \[0, 7\)"),
    ("events", {"value": [0, 0, np.inf, 0]}, "'value', row 2: inf is not a number"),
    ("events", {"ts_ms": [9000, -1, 6000, 9500]}, "'ts_ms', row 1: -1 is before 1970"),
    ("events", {"author": [2, 1, 3, 2]}, "'author', row 2: 3, but 1 before, for room 10"),
    ("slices", {"t0_ms": [0, -1, 0, 0]}, "'t0_ms', row 1: -1 is before the stream"),
    ("slices", {"t1_ms": [500, 900, 1000, 10]}, "'t1_ms', row 1: 900 is before t0_ms"),
    ("slices", {"t1_ms": [500, 2000, 2500, 10]}, "'t1_ms', row 1: 2000 is before that of row 2"),
    ("slices", {"slice": [4, 2**31, 0, 0]}, "'slice', row 1: 2147483648 does not fit in 32 bits"),
    ("slices", {"embedding": [[1.0], [2.0, 3.0], [1.0], [1.0]]}, "row 1: 2 values, but 1 in row 0"),
    ("slices", {"embedding": [[1.0], [2.0], [np.nan], [1.0]]}, "'embedding', row 2: has a value"),
    ("slices", {"embedding": [1.0, 2.0, 3.0, 4.0]}, "must hold lists of numbers, got double"),
    ("slices", {"embedding": [["a"]] * 4}, "must hold lists of numbers, got list"),
    ("slices", {"domain": [0, 2, 0, 0]}, "'domain', row 1: 2 is neither 0, live, nor 1, video"),
    ("slices", {"domain": [0, 1, 0, 0]}, "'domain', row 2: 0, another one elsewhere, for room 10"),
    ("rooms", {"room": [30, 10, 30]}, "'room', row 2: 30 is there twice"),
    ("rooms", {"end_ms": [7000, None, 2]}, "'end_ms', row 0: 7000 is before start_ms"),
    ("rooms", {"author": [2, 2, 2]}, "'author', row 1: 2, but 1 before, for room 10"),
]


@pytest.mark.parametrize("file, changes, message", BAD, ids=[m[:40] for *_, m in BAD])
def test_errors_name_file_column_row_and_value(tmp_path, file, changes, message):
    with pytest.raises(BadFile, match=message) as caught:
        live_log.read(folder_of(tmp_path, **{"rooms": {}, file: changes}))
    assert str(tmp_path / f"{file}.parquet") in str(caught.value)


def test_files_that_are_not_there_or_no_tables(tmp_path):
    with pytest.raises(BadFile, match="events.parquet: no such file"):
        live_log.read(tmp_path)
    folder_of(tmp_path)
    (tmp_path / "slices.parquet").write_bytes(b"PAR")
    with pytest.raises(BadFile, match="slices.parquet: not a readable table"):
        live_log.read(tmp_path)


def test_empty_tables(tmp_path):
    empty = {name: pa.array([], pa.int64()) for name in ("user", "room", "author", "ts_ms")}
    empty |= {"kind": pa.array([], pa.string()), "value": pa.array([], pa.float32())}
    log = live_log.read(folder_of(tmp_path, empty))
    assert log.users == log.rooms == len(log.ts) == len(log.slice_room) == 0
    assert len(made.make(log)) == 0 and all(len(part) == 0 for part in made.split(log))


@pytest.fixture(scope="module")
def streams():
    folder = Path(os.environ.get("LIVREC_TEST_DATA", ROOT.parent / "shared" / "data")) / "danmaku"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent; LIVREC_TEST_DATA names the folder of the data")
    assert comment_streams.recognises(folder)
    return comment_streams.read(folder, most=40_000)


def test_comment_streams(streams, tmp_path):
    assert not comment_streams.recognises(folder_of(tmp_path))
    assert len(streams.ts) == 40_000 and (np.diff(streams.ts) >= 0).all()
    assert {KINDS[k] for k in np.unique(streams.kind)} == {"comment", "like"}
    assert (streams.room_end == UNKNOWN).all() and streams.slice_embedding.shape[1] == 64
    assert streams.slice_embedding.dtype == np.float16
    train, test = made.split(streams, seed=1, candidates=4, backend="numpy")
    assert len(train) > 4 * len(test) - 10 > 1000
    assert (test.mask[..., 0].mean() > 0.8) and (test.slice >= 0).mean() > 0.8
    known = test.mask[:, 1:, 0]
    own = np.median(test.position[:, 0])  # negatives are as far into the stream as positives
    assert 0.7 < np.median(test.position[:, 1:][known]) / own < 1.4
    assert 0 < test.new_room.mean() < 1
