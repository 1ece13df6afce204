"""The ranker of FLUID: each fusion and backbone learns, and reaches what it should, only that."""

from dataclasses import replace

import pytest
import torch
from fluid_batches import MODEL, SIZES, TRAIN, HandMade, make_batch

from livrec_fast.systems.fluid.fusion import FUSIONS
from livrec_fast.systems.fluid.heads import task_loss
from livrec_fast.systems.fluid.optimizers import Optimizers
from livrec_fast.systems.fluid.ranker import Ranker


def make(fusion="late", train=TRAIN, seed=0, **changes):
    torch.manual_seed(seed)
    return Ranker(fusion, replace(MODEL, **changes), SIZES, train)


def tables_of(model):
    """Return all tables by what they are of."""
    found = {"user": model.user.table.tables, "author": model.author.table.tables}
    if hasattr(model, "room_id"):
        found["id"] = model.room_id.table.tables
    if hasattr(model, "codes"):
        found |= {name: table.tables for name, table in model.codes.tables.items()}
    return {name: [t.detach().clone() for t in tables] for name, tables in found.items()}


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_step_reaches_the_tables_that_the_fusion_reads_and_all_layers(fusion):
    model, batch = make(fusion), make_batch()
    before = tables_of(model)
    output = model(batch)
    assert output.logits.shape == (6, 4, 3) and output.logits.isfinite().all()
    model.loss(output, batch).backward()
    spec = FUSIONS[fusion]
    wanted = {"id": spec.reads_id, "slice": spec.reads_slice, "room": spec.reads_room}
    assert set(before) == {"user", "author", *(name for name, read in wanted.items() if read)}
    after = tables_of(model)
    for name, tables in before.items():
        moved = [not torch.equal(a, b) for a, b in zip(tables, after[name], strict=True)]
        assert all(moved), name
    for name, parameter in model.rest().items():
        assert parameter.grad is not None and parameter.grad.any(), name
    assert all(table.grad is not None for table in model.sparse_tables().values())


@pytest.mark.parametrize("fusion", FUSIONS)
def test_only_rows_of_the_batch_move(fusion):
    model, batch = make(fusion), make_batch()
    before = tables_of(model)
    model.loss(model(batch), batch).backward()
    after = tables_of(model)
    read = {"user": batch.user, "author": batch.author, "id": batch.room}
    for name in set(read) & set(before):
        moved = (before[name][0] != after[name][0]).any(1).nonzero()[:, 0]
        assert set(moved.tolist()) <= set(read[name].flatten().tolist()), name
    if "slice" in before:
        moved = (before["slice"][0] != after["slice"][0]).any(1).nonzero()[:, 0]
        assert set(moved.tolist()) <= set(batch.slice_codes[..., 0].flatten().tolist())


@pytest.mark.parametrize("boost", ["swiglu", "moe"])
@pytest.mark.parametrize("mixing", ["rsa", "tmhsa"])
def test_each_backbone_learns(mixing, boost):
    model, data = make("late", mixing=mixing, boost=boost), HandMade()
    optimizers, batch = Optimizers(model, replace(TRAIN, rate=1e-2)), data.batch(0, 0)
    losses = []
    for _ in range(60):
        optimizers.zero()
        loss = model.loss(model(batch), batch)
        loss.backward()
        optimizers.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("fusion", ["replace", "concat", "learnable gate", "feature gate", "fluid"])
def test_codes_tell_what_clicks_depend_on(fusion):
    model, data = make(fusion), HandMade(requests=12)
    optimizers = Optimizers(model, replace(TRAIN, rate=1e-2))
    for step in range(80):
        batch = data.batch(0, step)
        optimizers.zero()
        model.loss(model(batch), batch).backward()
        optimizers.step()
    unseen = data.batch(9, 0)
    score = model(unseen).logits[..., 0].detach()
    positive = unseen.labels[..., 0] > 0
    assert score[positive].mean() > score[~positive].mean() + 1


@pytest.mark.parametrize("scheme", ["prefix", "levelwise"])
@pytest.mark.parametrize("fusion", ["late", "em3", "fluid"])
def test_fast_ops_and_references_agree(fusion, scheme):
    fast, slow = (make(fusion, scheme=scheme, backend=name) for name in ("auto", "reference"))
    for step in range(3):
        batch, losses = make_batch(step), []
        for model in (fast, slow):
            optimizers = Optimizers(model, TRAIN)
            loss = model.loss(model(batch), batch)
            loss.backward()
            optimizers.step()
            losses.append(float(loss.detach()))
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for name, tensor in fast.state_dict().items():
        torch.testing.assert_close(tensor, slow.state_dict()[name], rtol=1e-3, atol=1e-4, msg=name)


def test_a_shared_table_serves_slice_and_room():
    model = make("fluid", shared=True)
    assert list(model.codes.tables) == ["slice"] and list(model.codes.project) == ["slice", "room"]
    codes = make_batch().slice_codes
    model.codes.project["room"].load_state_dict(model.codes.project["slice"].state_dict())
    made = model.codes(codes, codes)
    torch.testing.assert_close(made["slice"], made["room"])


def test_a_room_without_slices_has_a_token_of_its_own():
    model, batch = make("replace"), make_batch()
    with torch.no_grad():
        model.codes.unknown["slice"].fill_(3.0)
    made = model.codes(batch.slice_codes, batch.room_codes)["slice"]
    assert (made[1, 0] == 3).all() and (made[0, 0] != 3).all()


def test_scale_zero_takes_the_id_out():
    model, batch = make("late"), make_batch()
    other = make_batch()
    other.room = (batch.room + 7) % SIZES.rooms
    for scale in (0.0, torch.zeros(6, 4)):
        assert torch.equal(model(batch, scale).logits, model(other, scale).logits)
    assert not torch.equal(model(batch).logits, model(other).logits)


def test_gates_weigh_the_id_by_what_they_are_of():
    learnable, feature = make("learnable gate"), make("feature gate")
    batch, busier = make_batch(), make_batch()
    busier.dense = batch.dense.clone()
    busier.dense[..., MODEL.groups[0]] += 2
    for model, moves in ((learnable, False), (feature, True)):
        gate, other = model(batch).gate, model(busier).gate
        assert gate.shape == (6, 4) and ((gate > 0) & (gate < 1)).all()
        assert torch.equal(gate, other) != moves
    assert make("late")(batch).gate is None


def test_unknown_labels_have_no_part_in_the_loss():
    logits = torch.tensor([[[0.3, -1.0]], [[2.0, 0.5]]], requires_grad=True)
    labels, mask = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]), torch.ones(2, 1, 2, dtype=bool)
    mask[1, 0, 1] = False
    loss = task_loss(logits, labels, mask)
    each = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    torch.testing.assert_close(loss, (each[:, :, 0].sum() + each[0, 0, 1]) / 2)
    loss.backward()
    assert logits.grad[1, 0, 1] == 0
    assert float(task_loss(logits, labels, torch.zeros_like(mask)).detach()) == 0


def test_a_label_weighs_the_same_in_a_task_with_few():
    logits, mask = torch.zeros(5, 2, 2, requires_grad=True), torch.ones(5, 2, 2, dtype=torch.bool)
    mask[1:, :, 1] = False
    task_loss(logits, torch.ones_like(logits), mask).backward()
    assert torch.equal(logits.grad != 0, mask)
    torch.testing.assert_close(logits.grad[mask], torch.full((12,), -0.05))


def test_the_match_tells_how_much_of_the_history_is_like_the_candidate():
    torch.manual_seed(0)
    books = [torch.randn(4, 6) * scale for scale in (1.0, 0.3, 0.1)]
    model, batch = Ranker("late", MODEL, SIZES, TRAIN, books), make_batch()
    layer, heard = model.history, []
    layer.matched.register_forward_hook(lambda module, given, made: heard.append(given[0]))
    layer(batch)
    attention, scale = layer.attention, (6**0.5 / MODEL.likeness) ** 0.25
    for level, book in enumerate(books):
        torch.testing.assert_close(attention.table(f"code_{level}"), scale * book)
    items = attention.embed(
        batch.history_codes, authors=batch.history_author, gaps=batch.history_gap
    )
    for row in range(6):
        mine = items[batch.offsets[row] : batch.offsets[row + 1]]
        for at in range(4):
            author = batch.author[row, at : at + 1]
            x = attention.embed(batch.slice_codes[row, at][None], authors=author)
            wanted = (scale**2 * (mine @ x[0]) / 6**0.5).exp().mean().log()
            wanted = torch.where(torch.tensor(len(mine) > 0), wanted, 0)
            torch.testing.assert_close(heard[0][row, at, 0], wanted, rtol=1e-4, atol=1e-4)
    assert heard[0].std() > 0.1


def test_without_match_the_history_is_not_asked_for_codes():
    batch, other = make_batch(), make_batch()
    other.slice_codes = (other.slice_codes + 1) % 4
    for match in (True, False):
        layer = make("concat", match=match).history
        found, changed = layer(batch)["history"], layer(other)["history"]
        assert torch.equal(found, changed) != match
        assert ("match" in layer.slots) == match


def test_heads_do_not_hear_a_new_slot_at_first():
    before, after = make("id"), make("late", seed=1)
    fresh = after.take_over(before.state_dict())
    weights = after.heads.join.weights
    new = {name for name in weights if f"heads.join.weights.{name}" in fresh}
    assert new == {"slice", "match"}
    assert all(bool(weight.any()) != (name in new) for name, weight in weights.items())


def test_experts_are_chosen_and_balanced():
    even, uneven = (make("late", boost="moe", seed=seed).backbone.boost[0] for seed in (0, 0))
    x = torch.randn(50, len(even.router.slots), MODEL.width)
    boosted, loss = even(x)
    assert boosted.shape == x.shape and loss > 0
    with torch.no_grad():
        for weight in uneven.router.weights.values():
            weight[:, 1:] = 0
            weight[:, 0] = 0.5
    assert uneven(x.abs())[1] > even(x.abs())[1]


def test_settings_are_checked():
    with pytest.raises(ValueError, match="mixing"):
        replace(MODEL, mixing="sum")
    with pytest.raises(ValueError, match="active"):
        replace(MODEL, active=3)
    with pytest.raises(ValueError, match="periods"):
        replace(TRAIN, periods=(0.5, 0.5))
    with pytest.raises(ValueError, match="fade_share"):
        replace(TRAIN, fade_share=0.0)
