"""The contract, part 1: what each backend of each op computes, against the float64 formula."""

import json

import pytest
import torch
from conftest import SUBJECTS, in_tritons_interpreter, python
from hypothesis import given, settings
from hypothesis import strategies as st

from livrec_fast import _native
from livrec_fast.testing import (
    FORMULA,
    Target,
    check_forward,
    check_gradients,
    check_poisoned,
    check_repeat,
    check_strided,
    check_threads,
    corners,
    inputs_for,
)
from livrec_fast.testing.checks import expected, results
from livrec_fast.testing.subjects import listed, to_double, with_leaves
from livrec_fast.testing.validation import prepared


def agreement(subject, target, case, dtype, seed=0):
    """Check outputs and gradients; return whether the backend takes these inputs at all."""
    inputs, wanted = prepared(subject.op.name, case, dtype, target.device, seed)
    if subject.refusal(inputs, target.backend) is not None:
        return False
    try:
        with target.active():
            check_forward(subject, target.backend, inputs, wanted)
            check_gradients(subject, target.backend, inputs, wanted)
    except Exception as error:
        error.add_note(f"in case {case!r}, {dtype}, seed {seed}")
        raise
    return True


def test_agrees_with_float64(subject, target):
    dtypes, seeds = subject.oracle.dtypes, range(2)
    ran = [agreement(subject, target, "typical", d, seed) for d in dtypes for seed in seeds]
    assert any(ran), f"{target} runs typical inputs of no dtype"


def test_corners(subject, target):
    dtypes = {subject.oracle.dtypes[0], subject.oracle.dtypes[-1]}
    ran = [agreement(subject, target, c, d) for c in corners(subject.oracle) for d in dtypes]
    assert any(ran)


def test_layouts(subject, target):
    with target.active():
        check_strided(subject, target.backend, typical(subject, target))


def test_poisoned_memory(subject, target):
    with target.active():
        for case in corners(subject.oracle) if target.backend != "reference" else ["typical"]:
            inputs, _ = prepared(subject.op.name, case, subject.oracle.dtypes[0], target.device)
            if subject.refusal(inputs, target.backend) is None:
                check_poisoned(subject, target.backend, inputs)


def typical(subject, target, **grown):
    """Draw typical inputs, some sizes replaced."""
    sizes = subject.oracle.cases["typical"] | grown
    return inputs_for(subject.oracle, sizes, subject.oracle.dtypes[0], device=target.device)


def test_repeats_and_threads_give_the_same_bits(subject, target, two_threads):
    sizes = subject.oracle.cases["typical"]
    many = {name: 8 * size for name, size in sizes.items() if name in ("M", "B")}
    with target.active():
        for inputs in (typical(subject, target), typical(subject, target, **many)):
            check_repeat(subject, target.backend, inputs, times=2)
            if target.backend != "reference":  # torch's own sums depend on the number of threads
                check_threads(subject, target.backend, inputs)


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@settings(max_examples=15, derandomize=True, deadline=None, database=None)
@given(data=st.data())
@pytest.mark.parametrize("name", SUBJECTS)
def test_drawn_sizes(name, data):
    subject = SUBJECTS[name]
    ranges = {n: st.integers(*bounds) for n, bounds in subject.oracle.sizes.items()}
    sizes = data.draw(st.fixed_dictionaries(ranges), label="sizes")
    dtype = data.draw(st.sampled_from(subject.oracle.dtypes), label="dtype")
    inputs = inputs_for(subject.oracle, sizes, dtype)
    wanted = expected(subject, inputs)
    for backend in [backend.name for backend in subject.op.backends]:
        if subject.refusal(inputs, backend) is None:
            for level in _native.isa_levels() if backend == "native" else (None,):
                with Target(backend, level).active():
                    check_forward(subject, backend, inputs, wanted)


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
        found = results(subject, FORMULA, inputs).gradients
        assert any(grad.abs().max() > 0 for grad in found.values())


@pytest.mark.parametrize(
    "name", [n for n, s in SUBJECTS.items() if "triton" in [b.name for b in s.op.backends]]
)
def test_triton_in_its_interpreter(name):
    done = in_tritons_interpreter(
        "import json; from livrec_fast.testing import validate; "
        f"print(json.dumps(validate({name!r}, 'triton')))"
    )
    assert done.returncode == 0, done.stderr
    (row,) = [row for row in json.loads(done.stdout) if row["device"] == "cpu"]
    assert row["checks"] > 0
    assert not row["failures"], "\n".join(row["failures"])


def test_validate_command_in_perturbed_memory():
    """The C library fills what malloc returns, so that kernels' own scratch memory is tried too."""
    if _native.MISSING is None:
        command = ("-m", "livrec_fast", "validate", "--backend", "native", "--json")
        done = python(*command, MALLOC_PERTURB_="165")
        assert done.returncode == 0, done.stdout + done.stderr
        rows = json.loads(done.stdout)
        assert {row["isa"] for row in rows} == set(_native.isa_levels())
        assert all(row["checks"] > 10 and not row["failures"] for row in rows)


@pytest.mark.parametrize("name", SUBJECTS)
def test_compiled_backends_take_typical_inputs(name):
    """A backend that refuses everything would pass every other test."""
    subject = SUBJECTS[name]
    inputs = inputs_for(subject.oracle, "typical", subject.oracle.dtypes[0])
    if _native.MISSING is None and "native" in [b.name for b in subject.op.backends]:
        assert subject.refusal(inputs, "native") is None
