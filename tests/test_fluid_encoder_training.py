"""Training the encoder: what each stage trains, that it learns, and that it resumes."""

import os
from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers", reason="FLUID's encoder is made of its models")

from fluid_pairs import Topics, drawn, small  # noqa: E402

from livrec_fast.systems.fluid import checkpoints  # noqa: E402
from livrec_fast.systems.fluid.encoder import Encoder  # noqa: E402
from livrec_fast.systems.fluid.encoder_training import (  # noqa: E402
    ALIGN,
    JOINT,
    EncoderTrainConfig,
    EncoderTrainer,
    Pairs,
    alike,
    recall,
    set_stage,
)

PARTS = {"vision", "projector", "language", "output"}
TRAIN = EncoderTrainConfig(
    align_steps=3, joint_steps=3, align_rate=0.02, joint_rate=0.005, warmup=1, save_every=2,
    threshold=0.95,
)  # fmt: skip


class Fixed:
    """One batch, again and again."""

    key = "fixed"

    def __init__(self, *pairs):
        self.pairs = Pairs(*pairs)

    def batch(self, step):
        """Return it."""
        return self.pairs


def trainer(train=TRAIN, feed=None, **vision):
    return EncoderTrainer(small(**vision), feed or Topics(), train)


def moved(before, encoder):
    """Return the parts of which any parameter changed, and those of which all did."""
    same = {n: torch.equal(t, before[n]) for n, t in encoder.state_dict().items()}
    parts = {part: [s for n, s in same.items() if n.split(".")[0] == part] for part in PARTS}
    return {p for p, s in parts.items() if not all(s)}, {p for p, s in parts.items() if not any(s)}


def state(encoder):
    return {name: tensor.clone() for name, tensor in encoder.state_dict().items()}


def test_stage_1_trains_the_projector_and_the_output_and_stage_2_everything():
    run = trainer()
    before, start = state(run.encoder), run.criterion.temperature.item()
    assert start == pytest.approx(0.05)
    run.run(until=3)
    assert moved(before, run.encoder) == ({"projector", "output"},) * 2
    wanted = {name for name, p in run.encoder.named_parameters() if p.requires_grad}
    assert {name.split(".")[0] for name in wanted} == {"projector", "output"}
    modes = {name: part.training for name, part in run.encoder.named_children()}
    assert modes == {"vision": False, "projector": True, "language": False, "output": True}
    assert run.criterion.temperature.item() != start
    between = state(run.encoder)
    run.run()
    assert moved(between, run.encoder)[0] == PARTS
    assert all(p.requires_grad for p in run.encoder.parameters())
    assert all(part.training for part in run.encoder.children())
    never = {n for n, t in run.encoder.state_dict().items() if torch.equal(t, between[n])}
    assert all("k_proj.bias" in name for name in never)  # moves all logits of a query alike


def test_a_single_stage_trains_everything_from_the_first_step():
    run = trainer(replace(TRAIN, align_steps=0))
    before = state(run.encoder)
    run.run(until=2)
    assert run.stage == JOINT and moved(before, run.encoder)[0] == PARTS


@pytest.mark.parametrize("stage, parts", [(ALIGN, {"projector", "output"}), (JOINT, PARTS)])
def test_gradients_reach_what_a_stage_trains(stage, parts):
    encoder = small()
    set_stage(encoder, stage)
    encoder(drawn([2, 1], [3, 4])).square().cumsum(1).sum().backward()
    found = {name.split(".")[0] for name, p in encoder.named_parameters() if p.grad is not None}
    assert found == parts


def test_rates_rise_in_each_stage_and_the_second_is_smaller():
    train = EncoderTrainConfig(
        align_steps=4, joint_steps=4, align_rate=1.0, joint_rate=0.1, warmup=1
    )
    rates = [train.rate(step) for step in range(train.steps)]
    assert rates == pytest.approx([0.5, 1, 1, 1, 0.05, 0.1, 0.1, 0.1])
    run = trainer(replace(TRAIN, align_steps=1))
    run.run(until=1)
    assert {group["lr"] for group in run.adam.param_groups} == {0.01}
    run.run(until=3)
    assert {group["lr"] for group in run.adam.param_groups} == {0.005}


@pytest.mark.parametrize("align", [15, 0])
def test_queries_learn_to_find_their_items(align):
    feed = Topics(topics=12)
    run = trainer(replace(TRAIN, align_steps=align, joint_steps=60 - align, warmup=5), feed)
    test = feed.batch(10_000)

    def found():
        return recall(run.encoder.encode(test.queries), run.encoder.encode(test.items), 1)

    before = found()
    run.run()
    losses = torch.stack(run.trace["loss"])
    assert losses[-5:].mean() < 0.4 * losses[:5].mean()
    assert before < 0.3 and found() > 0.6  # chance is 1 in 12
    assert torch.stack(run.trace["recall"])[-5:].mean() > 0.6


def test_the_loss_masks_pairs_whose_queries_are_alike_both_ways_and_equal_items():
    frames, texts = drawn([1] * 6, [2] * 6), drawn([0] * 6, [2] * 6, seed=5)
    texts.tokens[3], frames.tokens[5] = texts.tokens[0], frames.tokens[1]
    ids = torch.tensor([0, 1, 2, 3, 4, 1])
    for name in ("pixels", "pixel_mask", "grids"):
        getattr(frames, name)[5] = getattr(frames, name)[1]
    run = trainer(replace(TRAIN, threshold=0.8), Fixed(texts, frames, ids))
    with torch.no_grad():
        q, k = run.encoder(texts), run.encoder(frames)
    run.step()
    logits, near = q @ k.T / 0.05, q @ q.T > 0.8
    losses = []
    for i in range(6):
        kept = [j for j in range(6) if j == i or not (near[i, j] or ids[i] == ids[j])]
        losses.append(logits[i, kept].logsumexp(0) - logits[i, i])
    assert near[0, 3] and not near[1, 5] and 6 < near.sum() < 36
    torch.testing.assert_close(run.trace["loss"][0], torch.stack(losses).mean())
    share = (near.sum() - 6) / 30
    torch.testing.assert_close(run.trace["masked"][0], share)
    torch.testing.assert_close(alike(q, 0.8), share)


def test_a_batch_of_queries_all_alike_teaches_nothing_and_warns():
    texts = drawn([0] * 4, [2] * 4, tokens=torch.ones(4, 2, dtype=torch.int64))
    run = trainer(replace(TRAIN, decay=0.0), Fixed(texts, drawn([1] * 4, [2] * 4)))
    before = state(run.encoder)
    with pytest.warns(UserWarning, match="all negatives of the first batch are masked"):
        run.step()
    assert run.trace["loss"][0] == 0 and run.trace["masked"][0] == 1
    assert moved(before, run.encoder)[0] == set()
    trainer(replace(TRAIN, threshold=None), Fixed(*run.feed.pairs)).step()  # warns of nothing


@pytest.fixture(scope="module")
def whole():
    """Return a run that was never stopped, of a model with dropout."""
    run = trainer(attention_dropout=0.3)
    run.run()
    return run


@pytest.mark.parametrize("stop", [2, 3, 4, 5, 6])
def test_a_resumed_run_ends_with_the_bits_of_an_uninterrupted_one(whole, tmp_path, stop):
    path, other = tmp_path / "checkpoint", trainer(attention_dropout=0.3)
    other.run(path, until=stop)
    torch.manual_seed(stop)
    told, again = [], trainer(attention_dropout=0.3)
    again.encoder.load_state_dict(small(seed=7).state_dict())
    again.resume(path)
    assert again.done == stop and again.stage == other.stage
    again.run(path, told.append)
    assert sum(told) == 6 - stop
    for one in (other, again):
        one.run()
        for name, tensor in one.encoder.state_dict().items():
            assert torch.equal(tensor, whole.encoder.state_dict()[name]), name
        assert torch.equal(one.criterion.log_temperature, whole.criterion.log_temperature)
        for name, values in whole.trace.items():
            assert torch.equal(torch.stack(one.trace[name]), torch.stack(values)), name
    assert len(whole.trace["loss"]) == 6


def test_dropout_is_there_and_follows_from_the_seed(whole):
    for same, changes in ((True, {}), (False, {"seed": 1})):
        run = trainer(replace(TRAIN, **changes), attention_dropout=0.3)
        torch.manual_seed(99)
        run.run()
        equal = torch.equal(torch.stack(run.trace["loss"]), torch.stack(whole.trace["loss"]))
        assert equal == same


def test_checkpoints_are_whole_or_not_there_and_of_this_run_only(tmp_path, monkeypatch):
    path, run = tmp_path / "checkpoint", trainer()
    run.run(path, until=2)
    before = path.read_bytes()
    with monkeypatch.context() as broken:
        broken.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(OSError("no space")))
        with pytest.raises(OSError, match="no space"):
            run.run(path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1
    trainer(replace(TRAIN, save_every=9)).resume(path)
    feed = Topics()
    feed.key = "others"
    for other in (trainer(replace(TRAIN, align_rate=0.1)), trainer(feed=feed)):
        with pytest.raises(ValueError, match="is of other data, settings or models"):
            other.resume(path)
    run.encoder.save(tmp_path / "encoder")
    with pytest.raises(ValueError, match="is no checkpoint of the encoder's training"):
        run.resume(tmp_path / "encoder")
    with pytest.raises(ValueError, match=r"was not written by Encoder\.save"):
        Encoder.load(path)
    assert checkpoints.read(path)[1]["done"] == 2


def test_autocast_trains_about_the_same():
    runs = [trainer(replace(TRAIN, autocast=autocast)) for autocast in (False, True)]
    for run in runs:
        run.run(until=5)
    exact, low = (torch.stack(run.trace["loss"]) for run in runs)
    assert not torch.equal(exact, low)
    torch.testing.assert_close(low, exact, rtol=0.2, atol=0.2)
    assert {p.dtype for p in runs[1].encoder.parameters()} == {torch.float32}


def test_recall_counts_what_is_nearer_than_the_own_key():
    queries = torch.tensor([[1.0, 0], [0, 1], [1, 1], [1, 0]])
    keys = torch.tensor([[3.0, 1], [0, 2], [1, 0], [0, 1]])
    rank = []
    cosine = torch.nn.functional.cosine_similarity(queries[:, None], keys[None], dim=2)
    for i in range(4):
        rank.append(sum(bool(cosine[i, j] >= cosine[i, i]) for j in range(4) if j != i))
    for at in (1, 2, 3, 4):
        wanted = sum(r < at for r in rank) / 4
        assert recall(queries, keys, at) == recall(queries, keys, at, rows=3) == wanted
    assert 0 < sum(r < 2 for r in rank) < 4
    ids = torch.tensor([0, 1, 0, 1])
    assert recall(queries, keys, 1, ids) > recall(queries, keys, 1)
    assert recall(queries[:0], keys[:0], 1) == 0


@pytest.mark.parametrize(
    "change, message",
    [
        ({"align_steps": -1}, "align_steps: must not be negative, got -1"),
        ({"clip": 0.0}, "clip: must be positive, got 0.0"),
        ({"joint_rate": 1.0}, "joint_rate: must be at most align_rate=0.02, got 1.0"),
    ],
)
def test_settings_that_cannot_be_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(TRAIN, **change)
