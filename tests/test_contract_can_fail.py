"""The suite can fail: toy ops, each wrong in one way, and the check that must catch each."""

import itertools

import pytest
import torch
from click.testing import CliRunner

from livrec_fast._dispatch import OPS, Backend, Op
from livrec_fast.reference._oracle import Oracle, randn
from livrec_fast.testing import (
    Subject,
    check_forward,
    check_gradients,
    check_poisoned,
    check_repeat,
    check_strided,
    check_threads,
    command,
    inputs_for,
    validate,
)

_number = itertools.count()


def formula(x, weight):
    """Return x * weight + x, whose gradient is nowhere zero."""
    return x * weight + x


def make_inputs(generator, dtype, *, M, D):
    """Draw x and weight, [M, D] each."""
    return {"x": randn(generator, dtype, M, D), "weight": randn(generator, dtype, M, D)}


ORACLE = Oracle(
    formula,
    make_inputs,
    {"M": (0, 8), "D": (1, 8)},
    {"typical": {"M": 6, "D": 5}, "no rows": {"M": 0, "D": 5}},
)


def gradient_of(grads, x, weight):
    """Return the true gradients."""
    return [grads[0] * (weight + 1), grads[0] * x]


@pytest.fixture
def toy():
    """Make a subject whose backend "toy" is the given function, and forget it afterwards."""
    made = []

    def make(run, gradient=gradient_of, oracle=ORACLE):
        name = f"toy_{next(_number)}"

        def backward(grads, *args, outputs, needs):
            found = gradient(grads, *args)
            return [grad for grad, need in zip(found, needs, strict=True) if need]

        op = Op(
            name,
            "(Tensor x, Tensor weight) -> Tensor",
            fake=lambda x, weight: torch.empty_like(x),
            reference=formula,
            backends=(Backend("toy", lambda *args: None, run, backward),),
        )
        made.append(name)

        def function(x, weight, *, backend="auto"):
            return op(x, weight, backend=backend)

        return Subject(op, function, oracle, "toy")

    yield make
    for name in made:
        del OPS[name]


def inputs(dtype=torch.float32):
    return inputs_for(ORACLE, "typical", dtype)


ALL = (check_forward, check_gradients, check_repeat, check_threads, check_strided, check_poisoned)


@pytest.mark.parametrize("check", ALL)
@pytest.mark.parametrize("dtype", ORACLE.dtypes)
def test_the_right_op_passes(toy, check, dtype):
    check(toy(formula), "toy", inputs(dtype))


def one_off(x, weight):
    out = formula(x, weight)
    out[3, 2] += 0.1
    return out


def rounds_to_bfloat16(x, weight):
    return formula(x, weight).bfloat16().to(x.dtype)


def ignores_strides(x, weight):
    x, weight = (t.as_strided(t.shape, (t.shape[1], 1)) for t in (x, weight))
    return formula(x, weight)


@pytest.mark.parametrize(
    "run, message",
    [
        (lambda x, w: torch.zeros_like(x), "output 0: max error"),
        (one_off, "output 0: max error"),
        (rounds_to_bfloat16, "output 0: max error"),
        (lambda x, w: formula(x, w).double(), "outputs are .*float64"),
        (lambda x, w: formula(x, w)[:, :4].clone(), r"outputs are .*\[6, 4\]"),
        (lambda x, w: formula(x, w) / 0, "not finite"),
    ],
)
def test_wrong_outputs(toy, run, message):
    with pytest.raises(AssertionError, match=message):
        check_forward(toy(run), "toy", inputs())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_wrong_outputs_in_half_precision(toy, dtype):
    with pytest.raises(AssertionError, match="output 0: max error"):
        check_forward(toy(one_off), "toy", inputs(dtype))


def test_wrong_integers(toy):
    oracle = Oracle(
        lambda x, w: (4 * x).round().long(), ORACLE.make_inputs, ORACLE.sizes, ORACLE.cases
    )

    def run(x, weight):
        out = oracle.function(x, weight)
        out[2, 1] += 1
        return out

    subject = toy(run, oracle=oracle)
    with pytest.raises(AssertionError, match=r"1 elements are wrong, the first at \[2, 1\]"):
        check_forward(subject, "toy", inputs())


def test_a_misplaced_infinity(toy):
    oracle = Oracle(
        lambda x, w: (x * w).masked_fill(x > 0, -torch.inf),
        ORACLE.make_inputs,
        ORACLE.sizes,
        ORACLE.cases,
    )
    check_forward(toy(oracle.function, oracle=oracle), "toy", inputs())
    with pytest.raises(AssertionError, match="differs where float64 gives an infinity"):
        check_forward(toy(lambda x, w: x * w, oracle=oracle), "toy", inputs())


def changed(at, change):
    """Return the true gradients with a change in one of them."""

    def gradient(grads, x, weight):
        found = gradient_of(grads, x, weight)
        found[at] = change(found[at])
        return found

    return gradient


def zeroed_row(grad):
    return grad.index_fill(0, torch.tensor([4]), 0)


@pytest.mark.parametrize(
    "gradient, message",
    [
        (changed(0, torch.zeros_like), "gradient of x: max"),
        (changed(1, torch.zeros_like), "gradient of weight: max"),
        (changed(1, zeroed_row), "gradient of weight"),
        (changed(0, lambda grad: -grad), "gradient of x: max"),
        (changed(0, lambda grad: grad + 0.1), "gradient of x"),
        (changed(0, lambda grad: grad / 0), "gradient of x: is not finite"),
    ],
)
@pytest.mark.parametrize("dtype", ORACLE.dtypes)
def test_wrong_gradients(toy, gradient, message, dtype):
    with pytest.raises(AssertionError, match=message):
        check_gradients(toy(formula, gradient), "toy", inputs(dtype))


def test_a_small_row_that_is_zeroed(toy):
    """The tolerance rule lets a row of tiny gradients go missing; the check of rows does not."""

    def draw(generator, dtype, *, M, D):
        made = make_inputs(generator, dtype, M=M, D=D)
        made["x"][4] *= 1e-9
        return made

    oracle = Oracle(formula, draw, ORACLE.sizes, ORACLE.cases)
    subject = toy(formula, changed(1, zeroed_row), oracle)
    with pytest.raises(AssertionError, match="1 of 6 rows are all zero .* row 4"):
        check_gradients(subject, "toy", inputs_for(oracle, "typical"))


def test_gradients_that_are_small_everywhere(toy):
    """An error that is small beside 1 is not small where all gradients are."""

    def scaled(x, weight):
        return formula(x, weight) * 1e-4

    def gradient(grads, x, weight):
        return [1.05e-4 * grad for grad in gradient_of(grads, x, weight)]

    oracle = Oracle(scaled, make_inputs, ORACLE.sizes, ORACLE.cases)
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(AssertionError, match="gradient of x: max"):
            check_gradients(toy(scaled, gradient, oracle), "toy", inputs(dtype))


def test_nondeterminism(toy):
    calls = itertools.count()
    subject = toy(lambda x, weight: formula(x, weight) + next(calls) * 1e-7)
    with pytest.raises(AssertionError, match="output 0: .* elements change in a repeated run"):
        check_repeat(subject, "toy", inputs())


def test_nondeterministic_gradients(toy):
    calls = itertools.count()
    subject = toy(formula, changed(0, lambda grad: grad + next(calls) * 1e-7))
    with pytest.raises(AssertionError, match="gradient of x: .* change in a repeated run"):
        check_repeat(subject, "toy", inputs())


def test_dependence_on_threads(toy):
    subject = toy(lambda x, weight: formula(x, weight) * (1 + 1e-6 * torch.get_num_threads()))
    with pytest.raises(AssertionError, match="change in a run with 2 threads"):
        check_threads(subject, "toy", inputs())


def test_ignored_strides(toy):
    with pytest.raises(AssertionError, match="output 0") as caught:
        check_strided(toy(ignores_strides), "toy", inputs())
    assert caught.value.__notes__ == ["with transposed inputs"]


def test_ignored_strides_of_upstream_gradients(toy):
    def gradient(grads, x, weight):
        return gradient_of([grads[0].as_strided(x.shape, (x.shape[1], 1))], x, weight)

    with pytest.raises(AssertionError, match="gradient of x: max"):
        check_gradients(toy(formula, gradient), "toy", inputs())


def reads_before_writing(x, weight):
    out = torch.empty_like(x)
    out[1:] = formula(x, weight)[1:]
    return out


def test_memory_read_before_it_is_written(toy):
    subject = toy(reads_before_writing)
    with pytest.raises(AssertionError, match="output 0: 5 elements change in .* poisoned"):
        check_poisoned(subject, "toy", inputs())


def test_validate_reports_failures(toy, monkeypatch):
    subject = toy(one_off)
    monkeypatch.setattr(
        "livrec_fast.testing.validation.subjects", lambda: {subject.op.name: subject}
    )
    wrong, right = validate()
    assert (wrong["backend"], right["backend"]) == ("toy", "reference")
    assert any(text.startswith("check_forward, typical, float32") for text in wrong["failures"])
    assert right["failures"] == [] and right["checks"] > 10
    done = CliRunner().invoke(command, ["--backend", "toy"])
    assert done.exit_code == 1 and "failed" in done.output and "output 0: max error" in done.output
    assert CliRunner().invoke(command, ["--backend", "reference"]).exit_code == 0
    assert "'nop' is not one of" in CliRunner().invoke(command, ["--op", "nop"]).output
    assert "no such backend" in CliRunner().invoke(command, ["--backend", "nop"]).output
