"""Labels are learned from when they are known, not before; clicks are known at once."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from fluid_batches import MODEL, TRAIN, HandMade, make_batch

from livrec_fast.systems.fluid.heads import task_loss
from livrec_fast.systems.fluid.material import Material, Source
from livrec_fast.systems.fluid.ranker import Output
from livrec_fast.systems.fluid.recipes import ROWS, TEST, Stage
from livrec_fast.systems.fluid.training import (
    CLICKS,
    LEARN,
    REST,
    SCORE,
    Move,
    Settings,
    moves,
    new_trainer,
)

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
            ts = data.batch(period, at).ts.tolist()
            assert data.times(period, at) == (ts[0], ts[-1], ts[-1] + HALF_HOUR)


def test_moves_are_in_the_order_of_time_and_each_label_is_learned_once(data):
    plan, start = moves(data, ROW.stages[1], stream=True), data.times(TEST, 0)[0]
    every = [(p, at) for p in (1, 2, 3, 4, TEST) for at in range(data.steps(p))]
    known = [one for one in every if data.times(*one)[2] < start]
    late = [one for one in every if one not in known]
    wanted = {LEARN: known, CLICKS: late, REST: late, SCORE: [o for o in every if o[0] == TEST]}
    for what, batches in wanted.items():
        assert [(p, at) for w, p, at in plan if w == what] == batches
    assert any(period < TEST for period, _ in late) and len(late) < len(every) / 2
    for at, (what, period, step) in enumerate(plan):
        if what == SCORE:
            now = data.times(period, step)[0]
            for kind, batches, clock in ((LEARN, known, 1), (CLICKS, late, 1), (REST, late, 2)):
                due = [one for one in batches if data.times(*one)[clock] < now]
                assert [(p, s) for w, p, s in plan[:at] if w == kind] == due
    frozen = moves(data, ROW.stages[1], stream=False)
    assert frozen == [move for move in plan if move.period < TEST or move.what == SCORE]


def test_what_a_stage_before_the_test_period_cannot_know_is_left_out_there():
    stage, early = Stage("stage", "none", (3, 4)), HandMade(steps=4, wait=12)
    whole = [Move(LEARN, 3, at) for at in range(4)] + [Move(LEARN, 4, at) for at in range(2)]
    assert moves(early, stage, True) == [*whole, Move(CLICKS, 4, 2), Move(CLICKS, 4, 3)]
    early.steps = lambda period: 4 * (period != TEST)
    assert [move.what for move in moves(early, stage, True)] == [LEARN] * 8


def test_a_score_comes_before_clicks_of_its_own_time():
    data = HandMade(steps=2)
    data.times = lambda period, at: (7, 7, 12)
    kinds = [move.what for move in moves(data, Stage("stage", "none", (TEST,)), True)]
    assert kinds == [SCORE, SCORE, CLICKS, CLICKS, REST, REST]


def test_labels_change_no_score_before_they_are_known(data, monkeypatch):
    before, feed, at = scores(data), data._feed, 2
    first, last = data._rows(TEST, at)
    starts = np.array([data.times(TEST, step)[0] for step in range(data.steps(TEST))])
    labels, clicks = data.asked.labels.copy(), data.asked.labels.copy()
    mask = data.asked.mask.copy()
    labels[first:last, :, 1:] = 1 - labels[first:last, :, 1:]
    mask[first:last, 1:] = ~mask[first:last, 1:]  # who will be where
    clicks[first:last, :, 0] = 1 - clicks[first:last, :, 0]
    for changed, clock in (({"labels": labels, "mask": mask}, 2), ({"labels": clicks}, 1)):
        monkeypatch.setattr(feed, "requests", replace(data.asked, **changed))
        after = scores(data)
        same = [torch.equal(one, other) for one, other in zip(before, after, strict=True)]
        wanted = (starts <= data.times(TEST, at)[clock]).tolist()
        assert same == wanted and sum(wanted) > at and not all(wanted)


def test_both_parts_are_the_whole_where_nobody_comes_later():
    batch, trainer = make_batch(), new_trainer(HandMade(), ROW, 2, SETTINGS, 0, None)
    batch.room[:, 1] = batch.room[:, 0]  # fills up
    batch.room[:, 2:] = batch.room[:, :1] + torch.tensor([1, 2])
    batch.mask[:, 1:, 1:] = False
    batch.mask[..., 0] = torch.tensor([True, False, True, True])
    logits = torch.randn(batch.labels.shape, generator=torch.Generator().manual_seed(0))
    output = Output(logits, torch.tensor(0.25), None, None)
    whole, clicks, rest = (trainer._loss(output, batch, what) for what in (LEARN, CLICKS, REST))
    assert rest > 0
    torch.testing.assert_close(clicks + rest, whole)
    own = task_loss(logits[..., :1], batch.labels[..., :1], batch.mask[..., :1])
    torch.testing.assert_close(clicks, 0.25 + own)
    batch.mask[1, 3, 0] = False  # comes later, which the request does not tell
    torch.testing.assert_close(trainer._loss(output, batch, CLICKS), clicks)
