"""Native operators called past the public functions' checks: they refuse what they cannot read."""

import pytest
import torch
from conftest import SUBJECTS

from livrec_fast import _native
from livrec_fast._autograd import tensors_of, with_tensors
from livrec_fast.testing import inputs_for
from livrec_fast.testing.checks import upstream
from livrec_fast.testing.subjects import listed

pytestmark = pytest.mark.skipif(_native.MISSING is not None, reason=f"{_native.MISSING}")


def _bytes(args):
    """Cast all floats, as int8 tables are allowed elsewhere."""
    return [t.to(torch.int8) if t.is_floating_point() else t for t in tensors_of(args)]


def _given(name, change=None, **sizes):
    """Return the operator and its arguments by name, of typical inputs."""
    subject = SUBJECTS[name]
    inputs = inputs_for(subject.oracle, dict(subject.oracle.cases["typical"]) | sizes)
    args = subject.arguments(inputs)
    if change is not None:
        args = with_tensors(args, change(args))
    operator = getattr(torch.ops.livrec, name).native
    names = [argument.name for argument in operator._schema.arguments]
    return operator, dict(zip(names, args, strict=True))


@pytest.mark.parametrize(
    "name",
    [
        "target_attention",
        "shared_attention",
        "code_attention",
        "din_attention",
        "prefix_ngram_gradient",
    ],
)
def test_bytes_are_not_read_as_halves(name):
    operator, args = _given(name, _bytes)
    with pytest.raises(RuntimeError, match="(q|grad): must be float32, float16 or bfloat16"):
        operator(**args)


def test_gradients_of_bytes_update_nothing():
    operator, args = _given("prefix_ngram_update")
    before = [table.clone() for table in args["tables"]]
    with pytest.raises(RuntimeError, match="grad: must be float32, float16 or bfloat16"):
        operator(**args | {"grad": args["grad"].to(torch.int8)})
    assert all(map(torch.equal, before, args["tables"]))


@pytest.mark.parametrize("name", ["prefix_ngram_lookup", "prefix_ngram_gradient"])
def test_tables_that_are_added_up_have_one_width(name):
    operator, args = _given(name)
    mode = "join" if "join" in args else "mode"
    widths = args.get("dims", [table.shape[1] for table in args.get("tables", [])])
    assert len(set(widths)) > 1
    with pytest.raises(RuntimeError, match="mode sum needs one d"):
        operator(**args | {mode: "sum"})


@pytest.mark.parametrize("part", ["weights", "biases", "slopes", "gains", "shifts"])
@pytest.mark.parametrize("change", [torch.Tensor.half, torch.Tensor.double, lambda t: t[None]])
def test_layers_of_din_have_the_dtype_of_its_queries(part, change):
    operator, args = _given("din_attention", activation=4)
    with pytest.raises(RuntimeError, match="must be .* of q's dtype"):
        operator(**args | {part: [*args[part][:-1], change(args[part][-1])]})


def test_din_knows_its_activations():
    operator, args = _given("din_attention", activation=4)
    with pytest.raises(RuntimeError, match="activation: must be .* got tanh"):
        operator(**args | {"activation": "tanh"})


BACKWARD = ["target_attention", "shared_attention", "din_attention"]


def _backward(name):
    _, given = _given(name)
    args = list(given.values())
    outputs = listed(SUBJECTS[name].op.operator("native")(*args))
    needs = [t.is_floating_point() for t in tensors_of(args)]
    operator = getattr(torch.ops.livrec, f"{name}_backward").native
    return operator, upstream(outputs), args, outputs, needs


@pytest.mark.parametrize("name", BACKWARD)
def test_needs_are_one_per_tensor(name):
    operator, flows, args, outputs, needs = _backward(name)
    assert len(operator(flows, *args, outputs, needs)) == sum(needs)
    for wrong in ([], needs[:1], needs[:-1], [*needs, False]):
        with pytest.raises(RuntimeError, match=f"needs: .* {len(needs)}, got {len(wrong)}"):
            operator(flows, *args, outputs, wrong)


def test_flows_have_the_width_of_what_flowed():
    operator, flows, args, outputs, needs = _backward("din_attention")
    with pytest.raises(RuntimeError, match="grads: must be of the output's shape"):
        operator([flows[0].flatten()], *args, outputs, needs)
