"""Rows of the tables: what each stage changes, takes over and shares."""

from dataclasses import replace

import pytest
import torch
from fluid_batches import MODEL, TRAIN, HandMade

from livrec_fast.systems.fluid import checkpoints
from livrec_fast.systems.fluid.fusion import FUSIONS
from livrec_fast.systems.fluid.recipes import BASE, ROWS, TEST
from livrec_fast.systems.fluid.tables import TABLES, rows_of
from livrec_fast.systems.fluid.training import Settings, new_trainer, stage_key, train_row

SETTINGS = Settings(MODEL, TRAIN)


def end_of(folder, row, depth, settings=SETTINGS):
    """Return the file with a stage's model."""
    key = stage_key(HandMade(), ROWS[row], depth, settings, 0)
    return folder / f"{key}.model.safetensors"


def model_of(path):
    return checkpoints.part(checkpoints.read(path)[0], "model.")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stages")
    traces = {r: train_row(HandMade(), ROWS[r], SETTINGS, 0, folder) for r in ("base", "FLUID")}
    return folder, traces


@pytest.mark.parametrize("row", ROWS)
def test_all_rows_see_all_periods_once_and_in_order(row):
    periods = [period for stage in ROWS[row].stages for period in stage.periods]
    assert periods == list(range(TEST + 1))


def test_every_row_of_the_tables_has_a_recipe():
    assert set(rows_of(list(TABLES.values()))) == set(ROWS)
    for table in TABLES.values():
        assert {name for o in table.orders for name in (o.left, o.right)} <= set(table.rows)


def test_a_stage_changes_one_thing_of_the_item():
    stages = ROWS["FLUID"].stages
    parts = [
        {n for n in ("id", "slice", "room") if getattr(FUSIONS[s.fusion], f"reads_{n}")}
        for s in stages
    ]
    parts[2] -= {"id"}  # phased out at the end of stage 2
    changes = [len(a ^ b) for a, b in zip(parts, parts[1:], strict=False)]
    assert changes == [1, 1, 1, 0] and parts[0] == {"id"} and parts[-1] == {"slice", "room"}


def test_the_base_is_trained_once_for_all_rows_that_start_from_it(trained):
    folder, _ = trained
    data = HandMade()
    keys = {stage_key(data, row, 1, SETTINGS, 0) for row in ROWS.values() if BASE in row.stages}
    assert len(keys) == 1
    assert stage_key(data, ROWS["naive joint"], 1, SETTINGS, 0) not in keys
    schemes = [stage_key(data, ROWS[row], 2, SETTINGS, 0) for row in ("FLUID", "level-wise")]
    assert schemes[0] != schemes[1]
    assert stage_key(data, ROWS["shared"], 3, SETTINGS, 0) == stage_key(
        data, ROWS["FLUID"], 3, SETTINGS, 0
    )
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    train_row(data, ROWS["+slice"], SETTINGS, 0, folder)
    for path in folder.iterdir():
        assert before.get(path.name, path.stat().st_mtime_ns) == path.stat().st_mtime_ns
    assert len(list(folder.iterdir())) == len(before) + 1  # the scores of the row's last stage


def test_stage_1_goes_on_from_the_base_and_adds_the_slice(trained):
    folder, _ = trained
    base = model_of(end_of(folder, "FLUID", 1))
    trainer = new_trainer(HandMade(), ROWS["FLUID"], 2, SETTINGS, 0, end_of(folder, "FLUID", 1))
    state = trainer.model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in base.items())
    fresh = {name for name in state if name not in base}
    parts = ("codes.", ".slice", ".match")
    assert fresh and all(any(part in name for part in parts) for name in fresh)
    adam = trainer.optimizers.adam.state[trainer.model.user.project.weight]
    assert adam["step"] == HandMade().count and adam["exp_avg"].any()


def test_stage_2_fades_the_id_out_linearly_and_leaves_it_out():
    data = HandMade(steps=8)
    trainer = new_trainer(data, ROWS["FLUID"], 3, SETTINGS, 0, None)
    batch = data.batch(2, 0)
    scales = [trainer._id_scale(at, batch) for at in range(8)]
    assert scales[:6] == pytest.approx([5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0]) and scales[6:] == [
        0,
        0,
    ]
    settings = Settings(MODEL, replace(TRAIN, fade="dropout"))
    dropping = new_trainer(data, ROWS["FLUID"], 3, settings, 0, None)
    masks = [dropping._id_scale(at, batch) for at in range(8)]
    assert all(mask.shape == batch.author.shape for mask in masks)
    assert set(torch.stack(masks).flatten().tolist()) == {0.0, 1.0} and not masks[6].any()
    assert torch.equal(masks[1], dropping._id_scale(1, batch))


def test_stage_3_starts_the_room_from_the_slice_in_the_ids_slot(trained):
    folder, _ = trained
    row = ROWS["FLUID"]
    trainer = new_trainer(HandMade(), row, 4, SETTINGS, 0, end_of(folder, "FLUID", 3))
    codes = trainer.model.codes
    for room, own in zip(codes.tables["room"].tables, codes.tables["slice"].tables, strict=True):
        assert torch.equal(room, own) and room.data_ptr() != own.data_ptr()
    before = model_of(end_of(folder, "FLUID", 3))
    name = "backbone.boost.0.up.weights.item"
    assert torch.equal(trainer.model.state_dict()[name], before[name])
    assert not any("room_id" in name for name in trainer.model.state_dict())
    after = model_of(end_of(folder, "FLUID", 4))
    tables = [after[f"codes.tables.{kind}.tables.0"] for kind in ("slice", "room")]
    assert not torch.equal(*tables)  # and then learns by itself


def test_scores_are_noted_before_a_batch_is_learned_from(trained):
    _, traces = trained
    for row, path in traces.items():
        trace, facts = checkpoints.read(path)
        assert trace["logits"].shape == (3 * 6, 4, 3) and facts["row"] == row
    assert "id_norm" in checkpoints.read(traces["base"])[0]
    assert "id_norm" not in checkpoints.read(traces["FLUID"])[0]


def test_without_streaming_the_test_period_teaches_nothing(tmp_path):
    frozen = Settings(MODEL, replace(TRAIN, stream=False))
    data, row = HandMade(), ROWS["FLUID"]
    train_row(data, row, frozen, 0, tmp_path)
    before = model_of(end_of(tmp_path, "FLUID", 4, frozen))
    after = model_of(end_of(tmp_path, "FLUID", 5, frozen))
    batch = data.batch
    data.batch = lambda period, step: batch(period + (period == TEST), step)  # others are tested
    train_row(data, row, frozen, 0, tmp_path / "others")
    others = model_of(end_of(tmp_path / "others", "FLUID", 5, frozen))
    assert all(torch.equal(after[name], others[name]) for name in after)
    assert any(not torch.equal(after[name], before[name]) for name in after)
