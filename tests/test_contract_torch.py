"""The contract, part 2: how each op behaves inside torch: opcheck, compile, autocast."""

import pytest
import torch
from conftest import SUBJECTS
from torch.utils import _pytree as pytree

from livrec_fast._autograd import tensors_of, with_tensors
from livrec_fast._dispatch import intercepted
from livrec_fast.testing import inputs_for
from livrec_fast.testing.checks import upstream
from livrec_fast.testing.subjects import listed, map_tensors, with_leaves

FIRSTS = {subject.stem: subject.op.name for subject in reversed(SUBJECTS.values())}


def operator_arguments(subject, case="typical"):
    """Return operator arguments whose floating tensors want gradients where the op has any."""
    args = subject.arguments(inputs_for(subject.oracle, case))
    return with_tensors(
        args,
        [
            t.detach().requires_grad_(subject.op.differentiable and t.is_floating_point())
            for t in tensors_of(args)
        ],
    )


def test_opcheck(subject, backend):
    small = {n: min(max(2, low), high) for n, (low, high) in subject.oracle.sizes.items()}
    for case in ("typical", small):
        args = operator_arguments(subject, case)
        torch.library.opcheck(subject.op.operator(backend), tuple(args))


def test_opcheck_of_the_gradient(subject, backend):
    if not subject.op.differentiable:
        return
    args = operator_arguments(subject)
    needs = [t.requires_grad for t in tensors_of(args)]
    args = with_tensors(args, [t.detach() for t in tensors_of(args)])
    outputs = listed(subject.op.operator(backend)(*args))
    flows = [
        flow if out.is_floating_point() else None
        for flow, out in zip(upstream(outputs), outputs, strict=True)
    ]
    gradient = getattr(getattr(torch.ops.livrec, f"{subject.op.name}_backward"), backend)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(gradient, (flows, *args, outputs, needs), test_utils=checks)


def other_sizes(subject):
    """Return typical sizes with more rows, which change no list length and no plain argument."""

    def shape_free(sizes):
        inputs = inputs_for(subject.oracle, sizes)
        leaves, tree = pytree.tree_flatten(inputs)
        return tree, [None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]

    typical = dict(subject.oracle.cases["typical"])
    sizes = dict(typical)
    for name in {"B", "C", "M", "T"} & typical.keys():
        lowered = {**sizes, name: typical[name] + 1}
        if shape_free(lowered) == shape_free(typical):
            sizes = lowered
    assert sizes != typical
    return sizes


def outputs_and_gradients(function, inputs, differentiable):
    """Return the outputs and, for random upstream gradients, the gradients of `function`."""
    given, leaves = with_leaves(inputs) if differentiable else (inputs, {})
    tensors = {n: v for n, v in given.items() if pytree.tree_any(torch.is_tensor, v)}
    outputs = listed(function(tensors))
    pairs = [(o, f) for o, f in zip(outputs, upstream(outputs), strict=True) if o.requires_grad]
    if not pairs:
        return outputs
    roots, flows = zip(*pairs, strict=True)
    wanted = list(leaves.values())
    return outputs + list(
        torch.autograd.grad(roots, wanted, flows, allow_unused=True, materialize_grads=True)
    )


def check_compiled(subject, backend, compiler):
    """Compare compiled with eager at two sizes; the second must not compile anew."""
    torch._dynamo.reset()
    typical = inputs_for(subject.oracle, "typical")
    options = {n: v for n, v in typical.items() if not pytree.tree_any(torch.is_tensor, v)}

    def function(tensors):
        return subject.run({**tensors, **options}, backend)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=compiler)
    for sizes in ("typical", other_sizes(subject)):
        inputs = inputs_for(subject.oracle, sizes)
        eager = outputs_and_gradients(function, inputs, subject.op.differentiable)
        recompile = torch._dynamo.config.patch(error_on_recompile=sizes != "typical")
        with recompile, torch.fx.experimental._config.patch(use_duck_shape=False):
            got = outputs_and_gradients(compiled, inputs, subject.op.differentiable)
        assert len(got) == len(eager)
        for mine, wanted in zip(got, eager, strict=True):
            torch.testing.assert_close(mine, wanted, equal_nan=True)


def test_traces_in_one_graph(subject, backend):
    check_compiled(subject, backend, "aot_eager")


@pytest.mark.parametrize("name", FIRSTS.values())
def test_compiles(name):
    check_compiled(SUBJECTS[name], "auto", "inductor")


def test_autocast_casts_what_the_op_says(subject):
    inputs = inputs_for(subject.oracle, "typical")
    lowered = dict(
        zip((a.name for a in subject.op.schema.arguments), subject.op.lower, strict=True)
    )

    def cast_by_hand(op, args):
        names = [argument.name for argument in op.schema.arguments]
        held = map_tensors(
            lambda name, t: (
                t.to(torch.bfloat16)
                if t.is_floating_point() and lowered[name.partition("[")[0]]
                else t
            ),
            dict(zip(names, args, strict=True)),
        )
        return op.operator("reference")(*held.values())

    with intercepted(cast_by_hand):
        wanted = listed(subject.run(inputs))
    with torch.autocast("cpu", torch.bfloat16):
        got = listed(subject.run(inputs, "reference"))
    assert [t.dtype for t in got] == [t.dtype for t in wanted]
    for mine, want in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, want, rtol=0, atol=0, equal_nan=True)


def test_autocast_keeps_the_dtype_of_gradients(subject):
    if not subject.op.differentiable:
        return
    given, leaves = with_leaves(inputs_for(subject.oracle, "typical"))
    with torch.autocast("cpu", torch.bfloat16):
        outputs = [out for out in listed(subject.function(**given)) if out.requires_grad]
    grads = torch.autograd.grad(
        sum(out[out.isfinite()].float().sum() for out in outputs),
        list(leaves.values()),
        allow_unused=True,
        materialize_grads=True,
    )
    assert [g.dtype for g in grads] == [leaf.dtype for leaf in leaves.values()]
    assert any(g.abs().max() > 0 for g in grads)
