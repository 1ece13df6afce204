"""Labels are learned from when they are known, not when they are asked for."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from fluid_batches import MODEL, TRAIN, HandMade

from livrec_fast.systems.fluid.material import Material, Source
from livrec_fast.systems.fluid.recipes import ROWS, TEST, Stage
from livrec_fast.systems.fluid.training import Move, Settings, moves, new_trainer

SIZES = {"users": 50, "authors": 20, "rooms": 60, "videos": 80, "live_events": 1200, "days": 1.0}
SETTINGS, ROW = Settings(MODEL, TRAIN), ROWS["-ID"]
HALF_HOUR = 1_800_000


@pytest.fixture(scope="module")
def data():
    return Material(Source(sizes=tuple(SIZES.items()), candidates=4), SETTINGS, 0)


def scores(data):
    """Return the scores of the test period's batches, by the row's second stage alone."""
    trainer = new_trainer(data, ROW, 2, SETTINGS, 0, None)
    for move in trainer.plan:
        trainer.step(move)
    return trainer.trace["logits"]


def test_a_batch_waits_for_the_labels_of_its_last_request(data):
    assert np.array_equal(data.asked.label_ts, data.asked.ts + HALF_HOUR)
    for period in range(TEST + 1):
        for at in range(data.steps(period)):
            ts = data.batch(period, at).ts
            assert data.times(period, at) == (int(ts[0]), int(ts[-1]) + HALF_HOUR)


def test_everything_is_scored_and_learned_once_and_in_the_order_of_time(data):
    plan = moves(data, ROW.stages[1], stream=True)
    for learns, periods in ((True, (1, 2, 3, 4, TEST)), (False, (TEST,))):
        wanted = [Move(learns, p, at) for p in periods for at in range(data.steps(p))]
        assert [move for move in plan if move.learns == learns] == wanted
    late = 0
    for at, move in enumerate(plan):
        asked, _ = data.times(move.period, move.at)
        if not move.learns:
            known = [data.times(m.period, m.at)[1] < asked for m in plan if m.learns]
            before = [m for m in plan[:at] if m.learns]
            assert sum(known) == len(before) and all(known[: len(before)])
            late += Move(True, TEST, move.at - 1) not in before
    assert late > 1  # batches were scored before the one ahead of them was known
    frozen = moves(data, ROW.stages[1], stream=False)
    assert frozen == [move for move in plan if not (move.learns and move.period == TEST)]


def test_what_no_stage_before_the_test_period_can_know_is_left_out_there():
    stage, last = Stage("stage", "none", (3, 4)), HandMade(steps=4, wait=25)
    assert moves(last, stage, True) == [
        Move(True, period, at) for period in (3, 4) for at in range(4 if period == 3 else 2)
    ]
    last.steps = lambda period: 4 * (period != TEST)
    assert len(moves(last, stage, True)) == 8


@pytest.mark.parametrize("at", [0, 2])
def test_labels_change_no_score_before_they_are_known(data, at, monkeypatch):
    before, feed = scores(data), data._feed
    first, last = data._rows(TEST, at)
    labels = data.asked.labels.copy()
    labels[first:last] = 1 - labels[first:last]
    monkeypatch.setattr(feed, "requests", replace(data.asked, labels=labels))
    after = scores(data)
    same = [torch.equal(one, other) for one, other in zip(before, after, strict=True)]
    known = data.times(TEST, at)[1]
    wanted = [data.times(TEST, step)[0] <= known for step in range(data.steps(TEST))]
    assert same == wanted and sum(wanted) > at + 1 and not all(wanted)
