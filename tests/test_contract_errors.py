"""The contract, part 3: bad inputs raise the right error on every backend, and never crash.

Each tests/test_<stem>.py holds BAD_INPUTS = {op: [(label, change, exception, regex), ...]}, where
`change` returns the keyword inputs that take the place of good ones. The tables of a stem run in a
process of their own, this file, so that a crash is a failure with the signal's name.
"""

import importlib
import json
import re
import signal
import sys
from functools import cache
from inspect import signature

import torch

from livrec_fast.testing import inputs_for, subjects, targets


def table(subject):
    """Return an op's bad inputs."""
    return importlib.import_module(f"test_{subject.stem}").BAD_INPUTS[subject.op.name]


def outcome(subject, backend, change):
    """Return the type and the message of what bad inputs raise."""
    good = inputs_for(subject.oracle, "typical")
    try:
        subject.function(**{"backend": backend, **good, **change(good)})
    except Exception as error:
        return type(error).__name__, str(error)
    return "nothing", "was raised"


def run_tables(stem):
    """Print what each entry raises on each backend; an entry without an outcome was the last."""
    torch.set_num_threads(1)
    for subject in [subject for subject in subjects().values() if subject.stem == stem]:
        for target in [target for target in targets(subject) if target.device == "cpu"]:
            for number, (label, change, *_) in enumerate(table(subject)):
                print(json.dumps([subject.op.name, str(target), number, label]), flush=True)
                with target.active():
                    print(json.dumps(outcome(subject, target.backend, change)), flush=True)


if __name__ == "__main__":
    run_tables(sys.argv[1])
    sys.exit()

from conftest import ROOT, python  # noqa: E402 - the program above does without the test session


@cache
def outcomes(stem):
    """Return {(op, target, number, label): (exception, message)} of a stem's tables."""
    done = python("tests/test_contract_errors.py", stem, path=f"{ROOT}:{ROOT / 'tests'}")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    if done.returncode < 0:
        raise AssertionError(f"{signal.Signals(-done.returncode).name} at {lines[-1]}")
    assert done.returncode == 0, done.stderr
    return {tuple(at): found for at, found in zip(lines[::2], lines[1::2], strict=True)}


def test_errors(subject):
    found = {at: what for at, what in outcomes(subject.stem).items() if at[0] == subject.op.name}
    assert {number for _, _, number, _ in found} == set(range(len(table(subject))))
    wrong = []
    for (_, target, number, label), (raised, message) in found.items():
        *_, kind, text = table(subject)[number]
        if raised != kind.__name__ or not re.search(text, message):
            wrong.append(f"{label}, {target}: {raised}: {message}; not {kind.__name__}: {text}")
    assert not wrong, "\n".join(wrong)


def tensors(value):
    """Return the tensors of an argument."""
    values = value if isinstance(value, (list, tuple)) else [value]
    return [item for item in values if isinstance(item, torch.Tensor)]


def flaws(good, bad, kind):
    """Say what is wrong with `bad` in the place of the argument `good`, as far as ops must tell."""
    old, new = tensors(good), tensors(bad)
    if old and (not new or isinstance(good, torch.Tensor) != isinstance(bad, torch.Tensor)):
        yield "type", kind
    for before, after in zip(old, new, strict=False):
        if after.device != before.device:
            yield "device", kind
        elif after.dtype != before.dtype:
            yield "dtype", kind
        elif after.shape != before.shape:
            yield "shape", kind


def id_flaws(good, codes, kind):
    """Say whether codes are too great or too small."""
    if codes.is_meta or not codes.numel() or kind is not IndexError:
        return
    if codes.shape == good.shape and (codes.amax(0) > good.amax(0)).any():
        yield "id = size", kind
    if codes.min() < 0:
        yield "negative id", kind


def offset_flaws(good, offsets, kind):
    """Say what speaks against these offsets."""
    if offsets.is_meta or offsets.dtype != torch.int64 or offsets.dim() != 1 or not len(offsets):
        return
    if offsets[0] != 0:
        yield "first not 0", kind
    if (offsets.diff() < 0).any():
        yield "decreasing", kind
    if good is None or offsets[-1] < good[-1] or len(offsets) < len(good):
        yield "short", kind


def test_tables_are_complete(subject):
    """Every op is tried with every kind of flaw that its arguments can have."""
    good = inputs_for(subject.oracle, "typical")
    seen = set()
    for _, change, kind, _ in table(subject):
        for name, bad in change(good).items():
            seen |= set(flaws(good.get(name), bad, kind))
            if name == "codes" and isinstance(bad, torch.Tensor):
                seen |= set(id_flaws(good[name], bad, kind))
            if name == "offsets" and isinstance(bad, torch.Tensor):
                seen |= set(offset_flaws(good.get(name), bad, kind))
    needed = {("type", TypeError), ("dtype", TypeError), ("shape", ValueError)}
    if sum(len(tensors(value)) for value in good.values()) > 1:
        needed |= {("device", ValueError)}
    arguments = signature(subject.function).parameters
    if "codes" in arguments:
        needed |= {("id = size", IndexError), ("negative id", IndexError)}
    if "offsets" in arguments:
        needed |= {(flaw, ValueError) for flaw in ("first not 0", "decreasing", "short")}
    missing = {f"{flaw} ({kind.__name__})" for flaw, kind in needed - seen}
    assert not missing, f"BAD_INPUTS of {subject.op.name} lack: {', '.join(sorted(missing))}"
