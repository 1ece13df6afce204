"""Requests and batches: numba against NumPy, and both against what is counted by hand."""

import sys
from dataclasses import fields, replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from log_by_hand import random_log

from livrec_fast.data import world
from livrec_fast.logs import _counters, _sweep
from livrec_fast.logs import requests as made
from livrec_fast.logs.batches import GAPS, Feed, batches
from livrec_fast.logs.log import KINDS, LIVE, UNKNOWN, slice_at

WINDOW = 400


def same(one, two):
    for field in fields(one):
        a, b = getattr(one, field.name), getattr(two, field.name)
        assert a.dtype == b.dtype and a.shape == b.shape, field.name
        np.testing.assert_array_equal(a, b, field.name)


@pytest.fixture(scope="module")
def small():
    return world.make(3, quick=True, live_events=4000).log


@pytest.fixture(scope="module")
def requests(small):
    return made.make(small, seed=1, backend="numpy")


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    events=st.integers(0, 150),
    candidates=st.integers(1, 6),
    popular=st.sampled_from([0.0, 0.5, 1.0]),
    window=st.sampled_from([1, 40, WINDOW, 10**6]),
)
def test_numba_and_numpy_make_the_same(seed, events, candidates, popular, window):
    pytest.importorskip("numba")
    log = random_log(seed, events)
    options = {"candidates": candidates, "popular": popular, "window_ms": window, "seed": seed}
    same(made.make(log, backend="numba", **options), made.make(log, backend="numpy", **options))


def test_numba_and_numpy_make_the_same_of_a_world(small, requests):
    pytest.importorskip("numba")
    assert len(requests) > 1000
    same(made.make(small, seed=1, backend="numba"), requests)


def entered(log, window):
    """The live events of a user without another one in the room in the window before."""
    live = log.room_domain[log.room] == LIVE
    for e in np.flatnonzero(live):
        alike = live[:e] & (log.user[:e] == log.user[e]) & (log.room[:e] == log.room[e])
        if not (log.ts[:e][alike] >= log.ts[e] - window).any():
            yield e


def on_air(log, entries, t, window):
    """The live rooms on air at t: by the table, or as somebody entered shortly before."""
    timed = (log.room_end != UNKNOWN) & (log.room_start <= t) & (t <= log.room_end)
    recent = [log.room[e] for e in entries if t - window <= log.ts[e] < t]
    return {r for r in range(log.rooms) if timed[r] and log.room_domain[r] == LIVE} | {
        r for r in recent if log.room_end[r] == UNKNOWN
    }


@pytest.mark.parametrize("seed", range(4))
def test_against_what_is_counted_by_hand(seed):
    log, window = random_log(seed, 120), WINDOW
    log = replace(log, value=np.where(log.value < 0.4, 0, log.value))  # not always told
    found = made.make(log, candidates=4, window_ms=window, long_s=0.1, seed=seed)
    entries = list(entered(log, window))
    expected = [e for e in entries if log.room[e] in on_air(log, entries, log.ts[e], window)]
    np.testing.assert_array_equal(found.event, expected)
    assert len(found) > 10 and 0 < found.mask[:, 0, 2].mean() < 1
    for n, e in enumerate(found.event):
        user, t, own = log.user[e], log.ts[e], log.room[e]
        mine, before = log.user == user, log.ts < t
        near = mine & ~before & (log.ts <= t + window)
        rooms, drawn = found.room[n], found.room[n, 1:][found.room[n, 1:] != own]
        assert rooms[0] == own and found.history_end[n] == (mine & before).sum()
        assert len(set(drawn)) == len(drawn) and set(drawn) <= on_air(log, entries, t, window)
        assert not set(drawn) & set(log.room[mine & before & (log.ts >= t - window)])
        for c, room in enumerate(rooms):
            author, clicks = log.room_author[room], near & (log.room == own) & (log.kind == 0)
            pair = mine & before & (log.author == author)
            counts = (
                before & (log.room == room),
                before & (log.author == author),
                mine & before,
                pair,
            )
            wanted = np.log1p([count.sum() for count in counts])
            np.testing.assert_allclose(found.dense[n, c, :4], wanted, rtol=1e-6)
            age = max(t - log.room_start[room], 0) / 1000
            np.testing.assert_allclose(found.age_s[n, c], age, rtol=1e-6)
            if c and room != own:
                assert found.mask[n, c, 0] == (room not in log.room[near])
            if c:
                assert not found.labels[n, c].any() and not found.mask[n, c, 1:].any()
        here = near & (log.room == own)
        stay = max((log.ts[here] - t).max(), log.value[clicks].max(initial=0) * 1000)
        liked = (log.kind[here] == KINDS.index("like")).any()
        np.testing.assert_array_equal(found.labels[n, 0], [1, liked, stay >= 100])
        np.testing.assert_array_equal(found.mask[n, 0], [True, True, log.value[clicks].any()])
        fills = found.room[n, 1:] == own
        assert not found.mask[n, 1:][fills].any()
        free = on_air(log, entries, t, window) - set(
            log.room[mine & before & (log.ts >= t - window)]
        )
        assert fills.sum() == max(0, 3 - len(free - {own}))


def test_in_a_log_that_never_tells_how_long_the_events_do():
    log = random_log(1, 120)
    silent = replace(log, value=np.where(log.kind == KINDS.index("click"), 0, log.value))
    found = made.make(silent, window_ms=WINDOW, long_s=0.1)
    assert found.mask[:, 0, 2].all() and 0 < found.labels[:, 0, 2].mean() < 1


def test_positions_and_slices(small, requests):
    q = requests
    np.testing.assert_array_equal(q.position, q.ts[:, None] - small.room_start[q.room])
    there = q.slice >= 0
    assert 0.8 < there.mean() < 1
    np.testing.assert_array_equal(small.slice_room[q.slice[there]], q.room[there])
    assert (small.slice_t1[q.slice[there]] <= q.position[there]).all()
    after = np.minimum(q.slice + 1, len(small.slice_room) - 1)
    other = small.slice_room[after] != q.room
    assert (other | (small.slice_t1[after] > q.position))[there].all()
    assert small.slice_t1[np.searchsorted(small.slice_room, q.room[~there])].min() > 0


def test_rooms_without_an_end_take_the_position_of_the_latest_entry():
    log = random_log(5, 150, timed=0.0)
    entries = np.array(list(entered(log, WINDOW)))
    found = made.make(log, candidates=4, window_ms=WINDOW)
    checked = 0
    for n, (t, rooms) in enumerate(zip(found.ts, found.room, strict=True)):
        assert found.position[n, 0] == log.pos[found.event[n]]
        for c in range(1, 4):
            if rooms[c] != rooms[0]:
                latest = entries[(log.room[entries] == rooms[c]) & (log.ts[entries] < t)][-1]
                assert found.position[n, c] == log.pos[latest]
                checked += 1
    assert checked > 20


@pytest.mark.parametrize("popular", [0.0, 1.0])
def test_draws_are_even_over_rooms_or_over_entries(popular):
    log = random_log(8, 3000, users=60, rooms=20, span=20_000)
    entries = np.array(list(entered(log, WINDOW)))
    q = made.make(log, popular=popular, candidates=2, window_ms=WINDOW)
    expected, variance, drawn = np.zeros((3, log.rooms))
    for event, rooms in zip(q.event, q.room, strict=True):
        t, mine = log.ts[event], log.user == log.user[event]
        recent = log.room[entries[(log.ts[entries] >= t - WINDOW) & (log.ts[entries] < t)]]
        weight = np.zeros(log.rooms)
        weight[list(on_air(log, entries, t, WINDOW))] = 1
        weight[log.room[mine & (log.ts < t) & (log.ts >= t - WINDOW)]] = 0
        weight[rooms[0]] = 0
        by_entries = weight * np.bincount(recent, minlength=log.rooms)
        weight = by_entries if popular and by_entries.any() else weight
        if weight.any():
            share = weight / weight.sum()
            expected, variance = expected + share, variance + share * (1 - share)
            drawn[rooms[1]] += 1
    assert drawn.sum() > 1000 and (drawn > 20).sum() > 10
    assert (np.abs(drawn - expected) <= 4 * np.sqrt(variance) + 3).all()


def test_another_seed_draws_others_of_the_same_requests(small, requests):
    other = made.make(small, seed=2, backend="numpy")
    np.testing.assert_array_equal(other.event, requests.event)
    assert (other.room[:, 1:] != requests.room[:, 1:]).mean() > 0.5


def test_split_is_by_time_and_says_what_is_new(small):
    train, test = made.split(small, 0.75)
    assert abs(len(train) / (len(train) + len(test)) - 0.75) < 0.01
    moment = test.ts[0]
    assert train.ts.max() < moment
    first = np.full(small.rooms, 2**62)
    np.minimum.at(first, small.room, small.ts)
    quiet = first == 2**62
    first[quiet] = small.room_start[quiet]
    for part in (train, test):
        np.testing.assert_array_equal(part.new_room, first[part.room] >= moment)
    assert not train.new_room[:, 0].any() and 0.2 < test.new_room.mean() < 1


@pytest.mark.parametrize(
    "options, message",
    [
        ({"candidates": 0}, r"candidates: must be in \[1, 10000\], got 0"),
        ({"window_ms": 0}, "window_ms: must be at least 1, got 0"),
        ({"long_s": -1}, "long_s: must not be negative, got -1"),
        ({"popular": 1.5}, r"popular: must be in \[0, 1\], got 1.5"),
        ({"backend": "cuda"}, "backend"),
    ],
)
def test_bad_options(small, options, message):
    with pytest.raises(ValueError, match=message):
        made.make(small, **options)
    with pytest.raises(ValueError, match=r"share: must be in \(0, 1\), got 1"):
        made.split(small, 1)


def test_without_numba(small, requests, monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.delitem(sys.modules, "livrec_fast.logs._sweep_compiled", raising=False)
    for module, name in ((_sweep, "compiled"), (_counters, "_compiled")):
        monkeypatch.setattr(module, name, getattr(module, name).__wrapped__)  # not what is cached
    monkeypatch.setattr(made, "_FEW", 0)
    same(made.make(small, seed=1), requests)
    with pytest.raises(ImportError, match="pip install numba"):
        made.make(small, backend="numba")


def codes_of(log):
    drawn = np.random.default_rng(0).integers(0, 64, (2, len(log.slice_room), 4)).astype(np.int16)
    return SimpleNamespace(slice_codes=drawn[0], room_codes=drawn[1])


def test_batches_hold_what_the_log_says(small, requests):
    codes, length = codes_of(small), 20
    (batch, *_) = batches(requests, small, codes, 64, seed=3, epoch=1, length=length)
    rows = np.random.default_rng((3, 1)).permutation(len(requests))[:64]
    for name in ("user", "room", "dense", "age_s", "labels", "mask", "new_room", "ts"):
        np.testing.assert_array_equal(getattr(batch, name), getattr(requests, name)[rows])
    np.testing.assert_array_equal(batch.author, small.room_author[batch.room.numpy()])
    at = requests.slice[rows]
    for name in ("slice_codes", "room_codes"):
        wanted = np.where((at >= 0)[..., None], getattr(codes, name)[at], -1)
        np.testing.assert_array_equal(getattr(batch, name), wanted)
    event_slice = slice_at(small, small.room, small.pos)
    for n, (user, t) in enumerate(zip(batch.user.tolist(), batch.ts.tolist(), strict=True)):
        past = np.flatnonzero((small.user == user) & (small.ts < t))[-length:]
        here = slice(int(batch.offsets[n]), int(batch.offsets[n + 1]))
        np.testing.assert_array_equal(batch.history_author[here], small.author[past])
        np.testing.assert_array_equal(batch.history_kind[here], small.kind[past])
        known = event_slice[past] >= 0
        wanted = np.where(known[:, None], codes.slice_codes[event_slice[past]], -1)
        np.testing.assert_array_equal(batch.history_codes[here], wanted)
        gap = np.floor(np.log2(1 + (t - small.ts[past]) / 1000))
        np.testing.assert_array_equal(batch.history_gap[here], np.minimum(gap, GAPS - 1))
    assert batch.offsets[-1] > 500 and batch.history_codes.min() == -1


def test_a_batch_is_told_by_seed_epoch_and_step(small, requests):
    feed = Feed(requests, small, codes_of(small), 100, seed=5, length=10)
    whole, rest = list(feed.epoch(2)), list(feed.epoch(2, start=3))
    assert len(whole) == len(feed) and sum(map(len, whole)) == len(requests)
    for one, two in zip(whole[3:], rest, strict=True):
        assert all((getattr(one, f.name) == getattr(two, f.name)).all() for f in fields(one))
    assert (next(feed.epoch(1)).ts != whole[0].ts).any()
    in_time = Feed(requests, small, codes_of(small), 100, shuffle=False, length=0)
    ts = np.concatenate([batch.ts for batch in in_time.epoch()])
    np.testing.assert_array_equal(ts, requests.ts)


def test_bad_feeds(small, requests):
    codes = codes_of(small)
    with pytest.raises(ValueError, match="size: must be at least 1, got 0"):
        Feed(requests, small, codes, 0)
    with pytest.raises(ValueError, match="length: must not be negative, got -1"):
        Feed(requests, small, codes, 8, length=-1)
    short = SimpleNamespace(slice_codes=codes.slice_codes[:-1], room_codes=codes.room_codes)
    with pytest.raises(ValueError, match="codes: slice_codes must be of shape"):
        Feed(requests, small, short, 8)
