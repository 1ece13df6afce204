"""The contract, part 1: what each backend of each op computes, against the float64 formula."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, SUBJECTS
from hypothesis import given, settings
from hypothesis import strategies as st

from livrec_fast import _native
from livrec_fast.testing import (
    FORMULA,
    check_forward,
    check_gradients,
    check_poisoned,
    check_repeat,
    check_strided,
    check_threads,
    corners,
    inputs_for,
)
from livrec_fast.testing.checks import gradients, upstream
from livrec_fast.testing.subjects import listed, to_double, with_leaves


def runnable(subject, target, case, dtype=None, seed=0):
    """Return a case's inputs, or None where the backend has a reason against them."""
    dtype = dtype or subject.oracle.dtypes[0]
    inputs = inputs_for(subject.oracle, case, dtype, seed=seed, device=target.device)
    return inputs if subject.refusal(inputs, target.backend) is None else None


def test_agrees_with_float64(subject, target):
    ran = 0
    with target.active():
        for dtype in subject.oracle.dtypes:
            for seed in range(2):
                inputs = runnable(subject, target, "typical", dtype, seed)
                if inputs is not None:
                    check_forward(subject, target.backend, inputs)
                    check_gradients(subject, target.backend, inputs)
                    ran += 1
    assert ran, f"{target} runs typical inputs of no dtype"


def test_corners(subject, target):
    with target.active():
        for case, sizes in corners(subject.oracle).items():
            for dtype in (subject.oracle.dtypes[0], subject.oracle.dtypes[-1]):
                inputs = runnable(subject, target, sizes, dtype)
                if inputs is not None:
                    try:
                        check_forward(subject, target.backend, inputs)
                        check_gradients(subject, target.backend, inputs)
                    except Exception as error:
                        error.add_note(f"in case {case!r}, {dtype}")
                        raise


def test_layouts(subject, target):
    with target.active():
        check_strided(subject, target.backend, runnable(subject, target, "typical"))


def test_poisoned_memory(subject, target):
    with target.active():
        for sizes in corners(subject.oracle).values():
            inputs = runnable(subject, target, sizes)
            if inputs is not None:
                check_poisoned(subject, target.backend, inputs)


def grown(oracle):
    """Return the typical sizes with more rows and users, so that there is work for two threads."""
    return {n: 8 * size if n in "MB" else size for n, size in oracle.cases["typical"].items()}


def test_repeats_and_threads_give_the_same_bits(subject, target):
    with target.active():
        for case in ("typical", grown(subject.oracle)):
            inputs = runnable(subject, target, case)
            check_repeat(subject, target.backend, inputs)
            if target.backend != "reference":  # torch's own sums depend on the number of threads
                check_threads(subject, target.backend, inputs)


@settings(max_examples=15, derandomize=True, deadline=None, database=None)
@given(data=st.data())
@pytest.mark.parametrize("name", SUBJECTS)
def test_drawn_sizes(name, data):
    subject = SUBJECTS[name]
    ranges = {n: st.integers(*bounds) for n, bounds in subject.oracle.sizes.items()}
    sizes = data.draw(st.fixed_dictionaries(ranges), label="sizes")
    dtype = data.draw(st.sampled_from(subject.oracle.dtypes), label="dtype")
    inputs = inputs_for(subject.oracle, sizes, dtype)
    for backend in [backend.name for backend in subject.op.backends]:
        if subject.refusal(inputs, backend) is None:
            for level in _native.isa_levels() if backend == "native" else (None,):
                with _native.use_isa(level) if level else _native.use_isa(_native.isa()):
                    check_forward(subject, backend, inputs)


def least_sizes(oracle):
    """Return small sizes, none of them zero, for checks whose cost grows with the inputs."""
    return {n: min(max(3, low), high) for n, (low, high) in oracle.sizes.items()}


def test_formula_passes_gradcheck(subject):
    if not subject.op.differentiable:
        return
    inputs = to_double(inputs_for(subject.oracle, least_sizes(subject.oracle)))
    given_, leaves = with_leaves(inputs)
    names = list(leaves)

    def finite_outputs(*tensors):
        found = dict(zip(names, tensors, strict=True))

        def fill(name, value):
            if isinstance(value, (list, tuple)):
                return [fill(f"{name}[{i}]", item) for i, item in enumerate(value)]
            return found.get(name, value)

        outputs = subject.run({n: fill(n, v) for n, v in given_.items()}, FORMULA)
        return tuple(o[o.isfinite()] for o in listed(outputs) if o.requires_grad)

    assert torch.autograd.gradcheck(finite_outputs, tuple(leaves.values()))


def test_gradients_are_not_trivial(subject):
    """Gradients that the formula itself has as zeros would hold backends to nothing."""
    if subject.op.differentiable:
        inputs = inputs_for(subject.oracle, "typical")
        flows = upstream(listed(subject.run(inputs, FORMULA)))
        found = gradients(subject, FORMULA, inputs, flows)
        assert any(grad.abs().max() > 0 for grad in found.values())


@pytest.mark.parametrize(
    "name", [n for n, s in SUBJECTS.items() if "triton" in [b.name for b in s.op.backends]]
)
def test_triton_in_its_interpreter(name):
    program = (
        "import interpreter, json; from livrec_fast.testing import validate; "
        f"print(json.dumps(validate({name!r}, 'triton')))"
    )
    variables = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    done = subprocess.run(
        [sys.executable, "-c", program], env=variables, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (row,) = [row for row in json.loads(done.stdout) if row["device"] == "cpu"]
    assert row["checks"] > 0
    assert not row["failures"], "\n".join(row["failures"])


@pytest.mark.parametrize("name", SUBJECTS)
def test_compiled_backends_take_typical_inputs(name):
    """A backend that refuses everything would pass every other test."""
    subject = SUBJECTS[name]
    inputs = inputs_for(subject.oracle, "typical", subject.oracle.dtypes[0])
    if _native.MISSING is None and "native" in [b.name for b in subject.op.backends]:
        assert subject.refusal(inputs, "native") is None
