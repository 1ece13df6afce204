"""No request sees what happens at its time or later: all of that is changed, and nothing moves."""

from dataclasses import fields, replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from log_by_hand import random_log

from livrec_fast.logs import _sweep, batches, running_votes
from livrec_fast.logs import requests as made
from livrec_fast.logs.log import KINDS, LIVE, UNKNOWN, VIDEO, known_before

OUTCOME = ("labels", "mask", "new_room")  # what came of the request, and what the split says
LEVELS = (5, 3)
OPTIONS = {"candidates": 4, "window_ms": 400}


def past_and(log, event, rng):
    """Return the log with all changed that an event's time has not seen, but the event itself.

    The event becomes the first of its time. Whatever is not complete then is another slice, later;
    rooms that have not begun begin at other times, and those on air end at others.
    """
    t, before = log.ts[event], int(np.searchsorted(log.ts, log.ts[event]))
    more = int(rng.integers(0, 60))
    room = rng.integers(0, log.rooms, more)
    video = log.room_domain[room] == VIDEO
    kind = np.where(video, KINDS.index("play"), rng.integers(0, 3, more)).astype(np.uint8)
    later = {
        "user": rng.integers(0, log.users, more),
        "room": room,
        "author": log.room_author[room],
        "ts": np.sort(t + rng.integers(0, 200, more) * 5),
        "kind": kind,
        "value": rng.random(more).astype(np.float32),
        "pos": rng.integers(0, 3000, more),
    }
    kept = np.append(np.arange(before), event)
    events = {name: np.append(getattr(log, name)[kept], column) for name, column in later.items()}
    start, end = log.room_start.copy(), log.room_end.copy()
    timed, coming = end != UNKNOWN, start > t
    start[coming] = t + 1 + rng.integers(0, 900, coming.sum())
    open_end = timed & (end >= t)
    end[open_end] = np.maximum(t, start[open_end]) + rng.integers(0, 900, open_end.sum())
    reached = np.full(log.rooms, -1)
    np.maximum.at(reached, log.room[kept], log.pos[kept])
    reached = np.where(timed, t - log.room_start, reached)
    unseen = (log.slice_t1 > reached[log.slice_room]) & (log.slice_domain == LIVE)
    vectors, t1 = log.slice_embedding.copy(), log.slice_t1.copy()
    vectors[unseen] = rng.standard_normal(vectors[unseen].shape)
    t1[unseen] = (t1 + rng.integers(0, 90))[unseen]
    shown = {"slice_embedding": vectors, "slice_t1": t1}
    return replace(log, **events, **shown, room_start=start, room_end=end)


def codes_of(log):
    """Code each slice by itself, and let the rooms vote."""
    codes = np.abs(log.slice_embedding[:, : len(LEVELS)] * 3).astype(np.int16) % LEVELS
    voted = running_votes(log.slice_room, codes, LEVELS, backend="numpy")
    return SimpleNamespace(slice_codes=codes.astype(np.int16), room_codes=voted)


def seen(log, upto):
    """Return the numbers of the requests by their event, up to one, and all that is fed of them."""
    requests = made.make(log, backend="numpy", **OPTIONS)
    rows = np.flatnonzero((requests.ts < log.ts[upto]) | (requests.event == upto))
    feed = batches.Feed(requests, log, codes_of(log), 8, length=30)
    batch = feed.batch(rows)
    told = {f.name: getattr(batch, f.name).numpy() for f in fields(batch)}
    asked = requests.rows(rows)
    told |= {name: getattr(asked, name) for name in ("position", "slice", "history_end")}
    return asked.event, {name: a for name, a in told.items() if name not in OUTCOME}


def hold(seed):
    """Change what comes at or after each of some requests, and look at these and all before."""
    log, rng = random_log(seed, 140), np.random.default_rng(seed)
    events = made.make(log, backend="numpy", **OPTIONS).event
    assert len(events) > 0  # thirty of a log's 140 events as a rule, but few by chance
    for event in rng.choice(events, min(4, len(events)), replace=False):
        others = past_and(log, event, rng)
        there = int(np.searchsorted(log.ts, log.ts[event]))
        assert others.ts[there] == log.ts[event] and others.user[there] == log.user[event]
        (one, wanted), (two, found) = seen(log, event), seen(others, there)
        np.testing.assert_array_equal(np.where(one == event, there, one), two)
        for name, column in wanted.items():
            np.testing.assert_array_equal(found[name], column, name)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_nothing_at_or_after_a_request_changes_what_it_sees(seed):
    hold(seed)


def _slice_to_come(patch):
    right = made.slice_at
    patch.setattr(made, "slice_at", lambda log, room, at: right(log, room, at + 200))


def _slice_to_come_in_the_history(patch):
    right = batches.slice_at
    patch.setattr(batches, "slice_at", lambda log, room, at: right(log, room, at + 400))


def _votes_of_the_whole_room(patch):
    right = running_votes

    def whole(rooms, codes, levels, **options):
        return right(rooms, codes, levels, **options)[np.searchsorted(rooms, rooms, "right") - 1]

    patch.setitem(codes_of.__globals__, "running_votes", whole)


def _counters_with_the_same_time(patch):
    right = made.counters
    patch.setattr(made, "counters", lambda log, user, ts, *rest: right(log, user, ts + 1, *rest))


def _history_with_the_same_time(patch):
    draw = _sweep.draw

    def late(log, past, *rest):
        drawn = draw(log, past, *rest)
        own = [np.searchsorted(log.ts[log.user == log.user[e]], log.ts[e] + 1) for e in drawn.event]
        return replace(drawn, history_end=np.array(own, np.int64))

    patch.setattr(_sweep, "draw", late)


def _negatives_by_the_whole_log(patch):
    draw = _sweep.draw

    def late(log, past, entry, options, *rest):
        return draw(log, past, entry, replace(options, seed=int(log.ts.sum())), *rest)

    patch.setattr(_sweep, "draw", late)


def _no_room_that_the_user_is_in_later(patch):
    draw = _sweep.draw

    def late(*args):
        drawn = draw(*args)
        other = np.where(drawn.known, drawn.room, drawn.room[:, :1])
        return replace(drawn, room=other)

    patch.setattr(_sweep, "draw", late)


LEAKS = [
    _slice_to_come,
    _slice_to_come_in_the_history,
    _votes_of_the_whole_room,
    _counters_with_the_same_time,
    _history_with_the_same_time,
    _negatives_by_the_whole_log,
    _no_room_that_the_user_is_in_later,
]


@pytest.mark.parametrize("leak", LEAKS, ids=lambda leak: leak.__name__.strip("_"))
def test_the_test_sees_a_leak(leak, monkeypatch):
    for seed in range(3):
        hold(seed)
    leak(monkeypatch)
    with pytest.raises(AssertionError):
        for seed in range(3):
            hold(seed)


def test_codebooks_are_fitted_on_what_was_complete():
    log = replace(
        random_log(2, 100, rooms=4),
        room_start=np.array([100, 700, UNKNOWN, 50]),
        slice_room=np.array([0, 0, 0, 1, 1, 2, 3]),
        slice_t1=np.array([200, 399, 400, 200, 300, 10, 0]),
    )
    # room 0's slices end at 300, 499 and 500, room 1's at 900 and 1000; the video is there from 50
    for t, wanted in (
        (50, [0, 0, 0, 0, 0, 0, 0]),
        (51, [0, 0, 0, 0, 0, 0, 1]),
        (500, [1, 1, 0, 0, 0, 0, 1]),
        (501, [1, 1, 1, 0, 0, 0, 1]),
        (1000, [1, 1, 1, 1, 0, 0, 1]),
        (9999, [1, 1, 1, 1, 1, 0, 1]),
    ):
        np.testing.assert_array_equal(known_before(log, t), np.array(wanted, bool), str(t))
