"""Training that is stopped in the middle of stage 2 ends where an uninterrupted run does."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fluid_batches import MODEL, TRAIN, HandMade

from livrec_fast.systems.fluid import checkpoints
from livrec_fast.systems.fluid.recipes import ROWS
from livrec_fast.systems.fluid.training import SCORE, Settings, moves, stage_steps, train_row

ROOT = Path(__file__).parent.parent
SETTINGS, ROW, STEPS = Settings(MODEL, TRAIN), ROWS["FLUID"], 5
FADING = stage_steps(HandMade(STEPS), ROW.stages[:2])  # steps before stage 2


class Stop(Exception):
    """Somebody pressed Ctrl-C."""


def stopping_after(steps):
    """Return a callback that raises once so many steps are done."""
    done = 0

    def on_step(units):
        nonlocal done
        done += units
        if done >= steps:
            raise Stop

    return on_step


def contents(folder):
    return {path.name: checkpoints.read(path) for path in sorted(folder.iterdir())}


def assert_same(one, other):
    ours, theirs = contents(one), contents(other)
    assert ours.keys() == theirs.keys() and len(ours) == 10
    for name, (tensors, facts) in ours.items():
        assert facts == theirs[name][1]
        assert tensors.keys() == theirs[name][0].keys() and tensors
        for key, tensor in tensors.items():
            assert torch.equal(tensor, theirs[name][0][key]), (name, key)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    train_row(HandMade(STEPS), ROW, SETTINGS, 0, folder)
    return folder


@pytest.mark.parametrize("into", [1, 3, 4])
def test_a_run_stopped_in_stage_2_ends_with_the_same_bits(whole, tmp_path, into):
    data = HandMade(STEPS)
    with pytest.raises(Stop):
        train_row(data, ROW, SETTINGS, 0, tmp_path, stopping_after(FADING + into))
    assert len(list(tmp_path.glob("*.part.*"))) == (into > TRAIN.save_every)
    seen = []
    train_row(data, ROW, SETTINGS, 0, tmp_path, seen.append)
    assert sum(seen) == stage_steps(data, ROW.stages)
    assert seen.count(1) < sum(seen) - FADING + TRAIN.save_every
    assert_same(whole, tmp_path)


def test_a_killed_process_ends_with_the_same_bits(whole, tmp_path):
    program = f"""
import sys, time; sys.path.insert(0, {str(ROOT / "tests")!r})
import torch; torch.set_num_threads(1)
from test_fluid_resume import *
class Slow(HandMade):
    def batch(self, period, step):
        if period == 2 and step == 3: time.sleep(60)
        return super().batch(period, step)
train_row(Slow(STEPS), ROW, SETTINGS, 0, Path({str(tmp_path)!r}))
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", program], env=environment)
    for _ in range(600):
        if list(tmp_path.glob("*.part.safetensors")) and len(list(tmp_path.iterdir())) == 5:
            break
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(list(tmp_path.glob("*.part.safetensors"))) == 1
    train_row(HandMade(STEPS), ROW, SETTINGS, 0, tmp_path)
    assert_same(whole, tmp_path)


def test_another_seed_or_setting_is_another_run(whole, tmp_path):
    train_row(HandMade(STEPS), ROW, SETTINGS, 1, tmp_path)
    assert not {path.name for path in whole.iterdir()} & {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize("left", [1, 3, 4])
def test_a_run_stopped_in_the_test_period_ends_with_the_same_bits(whole, tmp_path, left):
    data, every = HandMade(STEPS), stage_steps(HandMade(STEPS), ROW.stages)
    with pytest.raises(Stop):
        train_row(data, ROW, SETTINGS, 0, tmp_path, stopping_after(every - left))
    (part,) = tmp_path.glob("*.part.*")
    tensors, facts = checkpoints.read(part)
    done = moves(data, ROW.stages[-1], stream=True)[: facts["done"]]
    scored = sum(move.what == SCORE for move in done)
    assert len(tensors["trace.logits"]) == scored * data.requests > 0
    assert len(tensors["trace.loss"]) == len(done) - scored > STEPS
    train_row(data, ROW, SETTINGS, 0, tmp_path)
    assert_same(whole, tmp_path)


def test_a_run_that_drops_ids_out_draws_the_same_again(whole, tmp_path):
    dropping = replace(SETTINGS, train=replace(TRAIN, fade="dropout"))
    train_row(HandMade(STEPS), ROW, dropping, 0, tmp_path / "whole")
    with pytest.raises(Stop):
        halfway = stopping_after(FADING + 3)
        train_row(HandMade(STEPS), ROW, dropping, 0, tmp_path / "stopped", halfway)
    train_row(HandMade(STEPS), ROW, dropping, 0, tmp_path / "stopped")
    assert_same(tmp_path / "whole", tmp_path / "stopped")
    ends = [
        next(t for t, facts in contents(folder).values() if "logits" in t)["logits"]
        for folder in (whole, tmp_path / "whole")
    ]
    assert not torch.equal(*ends)
