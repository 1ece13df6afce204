"""The candidate's room id has no part in the ID-free model, and has one in the base."""

import pytest
import torch
from fluid_batches import MODEL, SIZES, TRAIN, HandMade, make_batch

from livrec_fast.systems.fluid.ranker import Ranker
from livrec_fast.systems.fluid.recipes import ROWS
from livrec_fast.systems.fluid.training import LEARN, Move, Settings, Trainer, new_trainer

ID_FREE = ("none", "replace", "faded", "fluid")
WITH_ID = ("id", "concat", "learnable gate", "feature gate", "em3", "late", "all")


def scores(model, batch):
    with torch.no_grad():
        return model(batch).logits


def permuted(batch_seed=3):
    """Return a batch, and the same with other rooms in it; all else they share."""
    batch, other = make_batch(batch_seed), make_batch(batch_seed)
    names = torch.randperm(SIZES.rooms, generator=torch.Generator().manual_seed(1))
    other.room = names[batch.room]
    assert not torch.equal(batch.room, other.room)
    return batch, other


def trained(fusion, permute=False):
    """Train a little; by `permute`, with other names of all rooms."""
    torch.manual_seed(0)
    model, data = Ranker(fusion, MODEL, SIZES, TRAIN), HandMade()
    stage = next(s for row in ROWS.values() for s in row.stages if s.fusion == fusion)
    trainer = Trainer(model, stage, TRAIN, data, 0)
    for step in range(3):
        if permute:
            data.batch = lambda period, at: permuted(at)[1]
        else:
            data.batch = lambda period, at: permuted(at)[0]
        trainer.step(Move(LEARN, 0, step))
    return model


@pytest.mark.parametrize("fusion", ID_FREE)
def test_other_room_ids_change_no_score_of_an_id_free_model(fusion):
    batch, other = permuted()
    model = trained(fusion)
    assert torch.equal(scores(model, batch), scores(model, other))
    assert torch.equal(scores(model, batch), scores(trained(fusion, permute=True), batch))


@pytest.mark.parametrize("fusion", WITH_ID)
def test_other_room_ids_change_the_scores_of_a_model_that_reads_them(fusion):
    batch, other = permuted()
    model = trained(fusion)
    assert not torch.equal(scores(model, batch), scores(model, other))


@pytest.mark.parametrize("fusion", ID_FREE)
def test_an_id_free_model_runs_without_room_ids_and_has_no_table_of_them(fusion):
    batch = make_batch()
    model = Ranker(fusion, MODEL, SIZES, TRAIN)
    wanted = scores(model, batch)
    del batch.room
    assert torch.equal(scores(model, batch), wanted)
    assert all(SIZES.rooms not in p.shape for name, p in model.named_parameters())


def test_the_last_stage_of_fluid_is_id_free():
    data, row = HandMade(), ROWS["FLUID"]
    for depth in (4, 5):
        trainer = new_trainer(data, row, depth, Settings(MODEL, TRAIN), 0, None)
        assert trainer.model.fusion.name in ID_FREE
        assert not hasattr(trainer.model, "room_id")
