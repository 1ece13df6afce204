"""The three ways to train that are timed are one and the same."""

from dataclasses import replace

import pytest
import torch
from fluid_batches import MODEL, SIZES, TRAIN, HandMade, make_batch
from torch import nn

from livrec_fast.systems.fluid import speed
from livrec_fast.systems.fluid.optimizers import Optimizers
from livrec_fast.systems.fluid.plain import PlainOptimizers, plain
from livrec_fast.systems.fluid.ranker import Ranker

ADAGRAD = replace(TRAIN, rule="adagrad")


@pytest.mark.parametrize("scheme", ["prefix", "levelwise"])
@pytest.mark.parametrize("fusion", ["id", "late", "fluid"])
def test_the_model_on_plain_pytorch_is_the_same_model(fusion, scheme):
    torch.manual_seed(0)
    ours = Ranker(fusion, replace(MODEL, scheme=scheme), SIZES, ADAGRAD)
    theirs = plain(ours)
    pairs = [(ours, Optimizers(ours, ADAGRAD)), (theirs, PlainOptimizers(theirs, ADAGRAD))]
    for step in range(4):
        batch, losses = make_batch(step), []
        for model, optimizers in pairs:
            optimizers.zero()
            loss = model.loss(model(batch), batch)
            loss.backward()
            optimizers.step()
            losses.append(float(loss.detach()))
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    table = theirs.author.table.bags[0].weight
    assert (table[-1] == 0).all()
    torch.testing.assert_close(table[:-1], ours.author.table.tables[0], rtol=1e-3, atol=1e-4)
    assert any(isinstance(module, nn.EmbeddingBag) for module in theirs.history.modules())


def test_steps_are_timed_in_turns_and_profiled():
    found = speed.compare(HandMade(), model=MODEL, train=TRAIN, seconds=0.1)
    assert set(found.seconds) == set(speed.NAMES) and found.worst < speed.TOLERANCE
    assert len({len(times) for times in found.seconds.values()}) == 1
    assert found.ratio("fast ops") == 1
    names = [name for name, _, _ in found.profile]
    assert "livrec::code_attention" in names and "matrix products" in names
    times, rows = speed.lines(found)
    assert len(times) == 4 and times[1][-1] == "1.00x" and len(rows) > 5


def test_batches_are_spread_over_all_that_is_trained_on():
    asked = []

    class Recorded(HandMade):
        def batch(self, period, step):
            asked.append((period, step))
            return super().batch(period, step)

    data = Recorded(steps=4)
    found = speed.compare(data, model=MODEL, train=TRAIN, seconds=0.01)
    assert asked == speed.spread(data, 8) and {period for period, _ in asked} == set(range(5))
    lengths = [HandMade.batch(data, *place).offsets.diff() for place in asked]
    assert found.events == torch.cat(lengths).tolist() and max(found.events) > 0


def test_places_are_the_middles_of_equal_parts():
    data = HandMade(steps=3)  # of each period, so 15 before the test
    assert speed.spread(data, 5) == [(period, 1) for period in range(5)]
    assert speed.spread(data, 1) == [(2, 1)]
    assert speed.spread(data, 99) == [(period, step) for period in range(5) for step in range(3)]


def test_losses_that_differ_are_no_comparison():
    losses = {name: [1.0, 1.0] for name in speed.NAMES}
    losses[speed.NAMES[1]][1] = 1.01
    with pytest.raises(AssertionError, match="losses"):
        speed._worst(losses)
