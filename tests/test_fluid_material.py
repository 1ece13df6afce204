"""What training is handed: batches of the log's periods, and a key that names all that is in it."""

import os
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from fluid_batches import MODEL, TRAIN

from livrec_fast.data import world
from livrec_fast.logs.log import KINDS, known_before
from livrec_fast.systems.fluid import checkpoints, experiment, figures, material
from livrec_fast.systems.fluid.codes import make_codes
from livrec_fast.systems.fluid.material import Material, Source
from livrec_fast.systems.fluid.recipes import ROWS, TEST
from livrec_fast.systems.fluid.training import Settings, stage_key

SIZES = {"users": 50, "authors": 20, "rooms": 60, "videos": 80, "live_events": 1200, "days": 1.0}
SOURCE = Source(sizes=tuple(SIZES.items()), candidates=4)
SETTINGS = Settings(MODEL, TRAIN)


@pytest.fixture(scope="module")
def data():
    return Material(SOURCE, SETTINGS, 0)


def batches_of(data, period):
    return [data.batch(period, step) for step in range(data.steps(period))]


def joined(batches, name):
    return torch.cat([getattr(batch, name) for batch in batches]).numpy()


def test_all_requests_come_once_in_time_and_those_tested_last(data):
    periods = [batches_of(data, period) for period in range(TEST + 1)]
    assert all(len(batches) > 1 for batches in periods)
    every = [batch for batches in periods for batch in batches]
    assert max(map(len, every)) == TRAIN.requests
    for name in ("ts", "user", "room", "labels", "mask", "dense", "new_room"):
        np.testing.assert_array_equal(joined(every, name), getattr(data.asked, name), name)
        np.testing.assert_array_equal(joined(periods[TEST], name), getattr(data.test, name), name)
    ends = [int(batches[-1].ts[-1]) for batches in periods]
    assert ends == sorted(ends) and len(data.test) / len(data.asked) == pytest.approx(0.2, abs=0.02)
    assert data.facts()["training requests"] + len(data.test) == len(data.asked)
    labels, mask, users, new = data.tested()
    assert labels.shape == mask.shape == (len(users), 4, 3) and new.any() and not new.all()


def test_dense_features_are_standardised_by_the_training_requests(data):
    before = data.asked.dense[: -len(data.test)].reshape(-1, data.sizes.features)
    np.testing.assert_allclose(data.mean, before.mean(0), rtol=1e-4, atol=1e-5)
    assert not np.allclose(data.mean, data.asked.dense.mean((0, 1)), rtol=1e-3)


def test_what_was_watched_and_shown(data):
    seconds, tags = data.watched()
    asked, log = data.test, data.log
    clicks = log.kind[asked.event] == KINDS.index("click")
    assert 0 < clicks.sum() and np.isnan(seconds[~clicks]).all()
    np.testing.assert_array_equal(seconds[clicks], log.value[asked.event][clicks])
    known = asked.slice >= 0
    codes = data.codes.slice_codes[asked.slice[known]].astype(int)
    np.testing.assert_array_equal(tags[known], codes[:, 0] * 65_536 + codes[:, 1])
    assert (tags[~known] == -1).all() and not known.all()


def test_shares_that_are_not_quite_one_leave_no_request_out_of_training():
    train = replace(TRAIN)
    object.__setattr__(train, "periods", (0.4, 0.15, 0.15, 0.15, 0.14))
    short = Material(SOURCE, replace(SETTINGS, train=train), 0)
    assert sum(map(len, batches_of(short, TEST))) == len(short.test)


def test_codes_are_fitted_on_slices_before_the_split_alone(data, monkeypatch):
    split = int(data.test.ts[0])
    late = ~known_before(data.log, split)
    assert late.any() and data.codes.fitted_on == (~late).sum()
    log = world.make(0, **SIZES).log
    log.slice_embedding[late] = log.slice_embedding[late][::-1]
    monkeypatch.setattr(Source, "log", lambda source, seed: log)
    other = Material(SOURCE, SETTINGS, 0)
    assert other.codes.version == data.codes.version
    same = (other.codes.slice_codes == data.codes.slice_codes).all(1)
    assert same[~late].all() and not same[late].all()
    assert other.key != data.key


def test_the_latest_requests_before_the_split_and_the_first_after_it(data):
    few = Material(replace(SOURCE, most=100), SETTINGS, 0)
    count = len(data.asked) - len(data.test)
    assert len(few.asked) == 100 and len(few.test) == 20
    np.testing.assert_array_equal(few.asked.event, data.asked.event[count - 80 : count + 20])
    assert few.key != data.key
    with pytest.raises(ValueError, match="4 requests to train on and 1 to test on are too few"):
        Material(replace(SOURCE, most=5), SETTINGS, 0)


COLUMNS = ("user", "room", "author", "ts", "kind", "pos", "room_author", "slice_room", "slice_t1")


@pytest.mark.parametrize("name", COLUMNS)
def test_another_log_has_another_key(data, name, monkeypatch):
    column = getattr(data.log, name).copy()
    column[len(column) // 2] ^= 1
    before = stage_key(data, ROWS["base"], 1, SETTINGS, 0)
    monkeypatch.setattr(data, "key", data._digest())
    assert stage_key(data, ROWS["base"], 1, SETTINGS, 0) == before
    monkeypatch.setattr(data, "log", replace(data.log, **{name: column}))
    monkeypatch.setattr(data, "key", data._digest())
    assert stage_key(data, ROWS["base"], 1, SETTINGS, 0) != before


def test_codebooks_of_another_scale_have_another_key_though_codes_are_the_same(data, monkeypatch):
    log = replace(data.log, slice_embedding=data.log.slice_embedding * np.float16(2))
    monkeypatch.setattr(Source, "log", lambda source, seed: log)
    other = Material(SOURCE, SETTINGS, 0)
    np.testing.assert_array_equal(other.codes.slice_codes, data.codes.slice_codes)
    assert not torch.equal(other.codebooks[0], data.codebooks[0])  # history tables start as these
    assert other.key != data.key


def test_other_sizes_bounds_or_formats_have_another_key(data, monkeypatch):
    keys = {data.key}
    bounds = [*data._bounds[:2], data._bounds[2] + 1, *data._bounds[3:]]
    for owner, name, value in (
        (data, "sizes", replace(data.sizes, users=data.sizes.users + 1)),
        (data, "_bounds", bounds),
        (material.checkpoints, "FORMAT", "livrec_fast.fluid/0"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value)
            keys.add(data._digest())
    assert len(keys) == 4 and data._digest() == data.key


def test_a_checkpoint_of_another_format_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    checkpoints.write(path, {"x": torch.ones(2)}, done=3)
    assert checkpoints.read(path)[1] == {"done": 3}
    monkeypatch.setattr(checkpoints, "FORMAT", "livrec_fast.fluid/0")
    with pytest.raises(ValueError, match="a.safetensors is no checkpoint"):
        checkpoints.read(path)


def test_what_interrupted_runs_left_is_deleted(tmp_path):
    old = time.time() - 2 * checkpoints._OLD
    for name in (".a.model.safetensors.xyz.part", ".b.model.safetensors.xyz.part"):
        (tmp_path / name).touch()
    os.utime(tmp_path / ".a.model.safetensors.xyz.part", (old, old))
    done = [f"c.{kind}.safetensors" for kind in ("model", "part", "trace")]
    going = [f"d.{kind}.safetensors" for kind in ("part", "trace")]  # a model is wanted, too
    for name in done + going:
        (tmp_path / name).touch()
    checkpoints.sweep(tmp_path)
    left = [".b.model.safetensors.xyz.part", done[0], done[2], *going]
    assert sorted(path.name for path in tmp_path.iterdir()) == left


def test_more_codewords_than_int16_holds_are_refused(data):
    with pytest.raises(ValueError, match=r"levels: each must be at most 32,768, got \[4, 32769\]"):
        make_codes(data.log, 2**50, (4, 32769))
    with pytest.raises(ValueError, match="slices: .* a codebook of 32768 needs as many"):
        make_codes(data.log, 2**50, (4, 32768))


def test_one_level_has_no_figure_of_prefixes_and_says_so(data, monkeypatch):
    codes = replace(data.codes, slice_codes=data.codes.slice_codes[:, :1])
    with pytest.raises(ValueError, match="levels: prefixes of two need at least 2 levels, got 1"):
        figures.prefix_coherence(data.log, codes)
    monkeypatch.setattr(data, "codes", codes)
    found = experiment._figures(data, {})
    assert set(found) == {"missing"} and "at least 2 levels" in found["missing"]["4"]


def test_numbers_that_json_cannot_hold_become_null():
    found = {"a": [1.5, float("nan"), {"b": float("-inf")}], "c": "nan", "d": 3}
    assert experiment._without_nan(found) == {"a": [1.5, None, {"b": None}], "c": "nan", "d": 3}
