"""KuaiLive-M3, on small files made in its published schema."""

import numpy as np
import pytest

from livrec_fast._arrays import BadFile
from livrec_fast.data import kuailive
from livrec_fast.logs import requests as made
from livrec_fast.logs.log import KINDS, LIVE, UNKNOWN, VIDEO, slice_at

pa = pytest.importorskip("pyarrow")
csv = pytest.importorskip("pyarrow.csv")
pq = pytest.importorskip("pyarrow.parquet")

T = 1_746_000_000_000  # about May 2025, ms


def moment(ms):
    return pa.array(ms, pa.timestamp("ms"))


def tables():
    """All files that are read, with the columns that the schema has beside those that are."""
    plays = {
        "user_id": [1, 2, 1, 3],
        "author_id": [50, 50, 60, 60],
        "live_id": [500, 500, 600, 600],
        "live_play_start_timestamp": moment([T + 1000, T + 2500, T + 60_000, T + 99_000]),
        "live_play_end_timestamp": moment([T + 9000, T + 2000, T + 61_500, None]),
        "p_date": ["20250430"] * 4,
        "is_auto_play": [0, 1, 0, 0],
        "play_duration": [8, 0, 1, 5],
        "send_gift_cnt": [0, 0, 2, 0],
    }
    rooms = {
        "live_id": [600, 500, 700],
        "author_id": [60, 50, 50],
        "live_name": ["b", "a", "c"],
        "start_timestamp": moment([T + 50_000, T, T + 500_000]),
        "end_timestamp": moment([T + 100_000, T + 40_000, T + 600_000]),
        "live_duration": [50, 40, 100],
    }
    likes = {"user_id": [1, 1], "live_id": [500, 999], "like_timestamp": moment([T + 4000, T])}
    comments = {
        "live_stream_id": [600],
        "user_id": [1],
        "author_id": [60],
        "content": ["hello"],
        "comment_ts": [T + 60_500],
    }
    shares = {
        "user_id": [2],
        "live_id": [500],
        "author_id": [50],
        "share_timestamp": moment([T + 2600]),
        "is_share_success": [1],
    }
    photos = {"photo_id": [7, 8], "author_id": [50, 70], "duration": [10, 20]}
    played = {
        "user_id": [1, 2],
        "photo_id": [8, 7],
        "author_id": [70, 50],
        "enter_timestamp": moment([T + 10, T + 20]),
        "leave_timestamp": moment([T + 4010, T + 6020]),
        "is_complete_play": [0, 1],
    }
    vectors = {"photo_id": [8, 7], "feature": [[8.0] * 128, [7.0] * 128]}
    return {
        "live_interaction.csv": plays,
        "live_room_meta.parquet": rooms,
        "live_like.csv": likes,
        "live_comment.csv": comments,
        "live_share.csv": shares,
        "photo_meta.parquet": photos,
        "photo_play.parquet": played,
        "photo_emb_128.parquet": vectors,
        "live_emb_128_ts/part-0.parquet": segments(["500", "600", "500"], [20, 50, 0]),
        "live_emb_128_ts/part-1.parquet": segments(["500", "600", "999"], [10, 80, 3]),
    }


def segments(rooms, seconds):
    return {
        "live_stream_id": rooms,
        "segment_id": [f"{room}_{s}" for room, s in zip(rooms, seconds, strict=True)],
        "feature_128": [[float(s)] * 128 for s in seconds],
        "timestamp": [T + 1000 * s for s in seconds],
    }


def write(folder, changes=None, without=()):
    for name, columns in tables().items():
        columns = {**columns, **(changes or {}).get(name, {})}
        path = folder / name
        path.parent.mkdir(exist_ok=True, parents=True)
        if name not in without:
            save = csv.write_csv if path.suffix == ".csv" else pq.write_table
            save(pa.table(columns), path)
    return folder


def told(log):
    return [
        (int(log.user_id[u]), int(log.room_id[r]), KINDS[k], int(t - T), float(v), int(p))
        for u, r, k, t, v, p in zip(
            log.user, log.room, log.kind, log.ts, log.value, log.pos, strict=True
        )
    ]


LIVE_EVENTS = [
    (1, 500, "click", 1000, 8.0, 1000),
    (2, 500, "click", 2500, 0.0, 2500),  # it ends before it begins: how long is unknown
    (2, 500, "share", 2600, 1.0, 2600),
    (1, 500, "like", 4000, 1.0, 4000),  # that of room 999, which is not in the rooms, goes
    (1, 600, "click", 60_000, 1.5, 10_000),
    (1, 600, "comment", 60_500, 5.0, 10_500),
    (3, 600, "click", 99_000, 0.0, 49_000),
]


def test_both_domains(tmp_path):
    assert not kuailive.recognises(tmp_path)
    log = kuailive.read(write(tmp_path))
    assert kuailive.recognises(tmp_path)
    plays = [(1, -9, "play", 10, 4.0, 0), (2, -8, "play", 20, 6.0, 0)]
    assert told(log) == plays + LIVE_EVENTS
    assert log.room_id.tolist() == [-9, -8, 500, 600, 700]
    assert log.room_domain.tolist() == [VIDEO, VIDEO, LIVE, LIVE, LIVE]
    assert log.author_id[log.room_author].tolist() == [70, 50, 50, 60, 50]
    assert log.room_end.tolist() == [UNKNOWN, UNKNOWN, T + 40_000, T + 100_000, T + 600_000]
    assert log.slice_embedding.dtype == np.float16 and log.slice_embedding.shape == (7, 128)
    assert log.slice_embedding[:, 0].tolist() == [8, 7, 0, 10, 20, 50, 80]
    assert log.slice_t0.tolist() == [0, 0, 0, 10_000, 20_000, 0, 30_000]
    assert log.slice_t1.tolist() == [0, 0, 10_000, 20_000, 40_000, 30_000, 50_000]
    assert log.slice_domain.tolist() == [1, 1, 0, 0, 0, 0, 0]
    assert slice_at(log, log.room, log.pos)[:2].tolist() == [0, 1]  # a video is known at once


def test_requests_of_it(tmp_path):
    log = kuailive.read(write(tmp_path))
    asked = made.make(log, candidates=2)
    assert [int(log.room_id[r]) for r in asked.room[:, 0]] == [500, 500, 600, 600]
    np.testing.assert_array_equal(asked.labels[:, 0, 1], [1, 0, 0, 0])
    assert asked.history_end.tolist() == [1, 1, 3, 0]  # the video comes first in both histories


def test_live_alone_and_a_part_of_the_time(tmp_path):
    log = kuailive.read(write(tmp_path), photos=False)
    assert told(log) == LIVE_EVENTS and log.rooms == 3
    late = kuailive.read(tmp_path, since_ms=T + 45_000, until_ms=T + 99_000)
    assert told(late) == LIVE_EVENTS[4:6] and late.room_id.tolist() == [-9, -8, 600]
    names = [name for name in tables() if "photo" in name or name[:9] in ("live_like", "live_comm")]
    log = kuailive.read(write(tmp_path / "small", without=names))
    assert told(log) == [event for event in LIVE_EVENTS if event[2] in ("click", "share")]


def test_where_a_room_begins_or_ends_is_not_known(tmp_path):
    def slices(starts, ends):
        rooms = {"start_timestamp": moment(starts), "end_timestamp": moment(ends)}
        log = kuailive.read(write(tmp_path, {"live_room_meta.parquet": rooms}), photos=False)
        ids = log.room_id[log.slice_room].tolist()
        vectors = log.slice_embedding[:, 0].tolist()
        times = zip(log.slice_t0.tolist(), log.slice_t1.tolist(), strict=True)
        return list(zip(ids, vectors, times, strict=True))

    own = slices([T + 50_000, T, T + 500_000], [T + 100_000, T + 40_000, T + 600_000])
    of = {room: [row for row in own if row[0] == room] for room in (500, 600)}
    assert [len(rows) for rows in of.values()] == [3, 2]
    # the last segment of room 500 has no end: it would be known before it was shown
    open_end = slices([T + 50_000, T, T + 500_000], [T + 100_000, None, T + 600_000])
    assert open_end == of[500][:2] + of[600]
    nameless = slices([T + 50_000, None, T + 500_000], [T + 100_000, T + 40_000, T + 600_000])
    assert nameless == of[600]
    assert slices([None] * 3, [None] * 3) == []


def test_no_room_within_the_times_asked_for(tmp_path):
    write(tmp_path)
    log = kuailive.read(tmp_path, until_ms=1, photos=False)
    assert log.rooms == len(log.ts) == len(log.slice_room) == 0
    films = kuailive.read(tmp_path, until_ms=1)
    assert films.room_id.tolist() == [-9, -8] and len(films.ts) == 0


def test_times_in_seconds_text_or_another_zone(tmp_path):
    text = ["2025-04-30 16:00:01.000", "2025-04-30 16:00:02.500"]
    base = 1_746_028_800_000  # 2025-04-30 16:00 UTC
    change = {
        "live_interaction.csv": {
            "live_play_start_timestamp": [text[0], text[1], text[0], text[1]],
            "live_play_end_timestamp": [text[1], text[1], text[1], None],
        }
    }
    log = kuailive.read(write(tmp_path, change), photos=False)
    clicks = log.ts[log.kind == 0] - base
    assert sorted(clicks.tolist()) == [1000, 1000, 2500, 2500]
    for part in ("part-0", "part-1"):
        name = f"live_emb_128_ts/{part}.parquet"
        change[name] = {"timestamp": [t - 8 * 3_600_000 for t in tables()[name]["timestamp"]]}
    there = kuailive.read(write(tmp_path, change), photos=False, zone_hours=8)
    assert sorted((there.ts[there.kind == 0] - base + 8 * 3_600_000).tolist()) == sorted(clicks)
    change = {"live_comment.csv": {"comment_ts": [T // 1000 + 70]}}
    log = kuailive.read(write(tmp_path, change), photos=False)
    assert log.ts[log.kind == KINDS.index("comment")].tolist() == [T + 70_000]


BAD = [
    (
        {"live_interaction.csv": {"live_id": ["a", "b", "c", "d"]}},
        "live_interaction.csv: column 'live_id' must hold integers, got string",
    ),
    (
        {"live_emb_128_ts/part-0.parquet": {"live_stream_id": ["500", "x", "600"]}},
        "part-0.parquet: column 'live_stream_id'.*'x'",
    ),
    (
        {"live_emb_128_ts/part-0.parquet": {"feature_128": [[1.0], [2.0, 3.0], [4.0]]}},
        "part-0.parquet: column 'feature_128', row 1: 2 values, but 1 in row 0",
    ),
    ({"photo_emb_128.parquet": {"feature": [[1.0], [2.0]]}}, r"differ in length: \[1, 128\]"),
    (
        {"live_room_meta.parquet": {"end_timestamp": moment([T, T + 1, T + 600_000])}},
        "live_room_meta.parquet: column 'end_timestamp', row 0: before start",
    ),
    (
        {"live_like.csv": {"like_timestamp": ["today", "now"]}},
        "live_like.csv: column 'like_timestamp': Failed to parse string",
    ),
]


@pytest.mark.parametrize("change, message", BAD, ids=[m[:30] for _, m in BAD])
def test_errors_name_file_and_column(tmp_path, change, message):
    with pytest.raises(BadFile, match=message):
        kuailive.read(write(tmp_path, change))


def test_a_wrong_zone_is_told(tmp_path):
    write(tmp_path)
    with pytest.raises(BadFile, match="of the segments lie outside .* zone_hours"):
        kuailive.read(tmp_path, zone_hours=8)
    empty = write(tmp_path / "new", without=[name for name in tables() if "128_ts" in name])
    with pytest.raises(BadFile, match="live_emb_128_ts: no parquet files"):
        kuailive.read(empty)
