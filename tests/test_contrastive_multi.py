"""in_batch_contrastive_multi against single losses, and bad inputs."""

import math

import pytest
import torch
from conftest import SUBJECTS

from livrec_fast import _native, in_batch_contrastive, in_batch_contrastive_multi
from livrec_fast.ops import _contrastive
from livrec_fast.testing.checks import check_forward, check_gradients, expected, results
from livrec_fast.testing.subjects import inputs_for

native = pytest.mark.skipif(_native.MISSING is not None, reason=f"{_native.MISSING}")
T, B, D = 3, 131, 20
SIZES = {"T": T, "B": B, "D": D, "temperatures": 1}


def draw(dtype=torch.float32, **changes):
    subject = SUBJECTS["in_batch_contrastive_multi"]
    generator = torch.Generator().manual_seed(2)
    return subject.oracle.make_inputs(generator, dtype, **SIZES) | changes


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_equals_single_losses_with_their_gradients(shared, listed, reduction):
    inputs = draw(torch.float64, reduction=reduction)
    if shared:
        inputs |= {"valid": inputs["valid"][0], "weights": inputs["weights"][0]}
        inputs |= {"temperature": torch.tensor(0.3, dtype=torch.float64), "key_ids": None}
    leaves = [inputs[n].requires_grad_() for n in ("anchor", "keys", "temperature", "weights")]
    terms = [
        in_batch_contrastive(
            leaves[0], leaves[1][t], temperature=leaves[2] if shared else leaves[2][t],
            symmetric=True, query_ids=inputs["query_ids"],
            key_ids=None if shared else inputs["key_ids"][t], false_negative_threshold=0.4,
            weights=leaves[3] if shared else leaves[3][t],
            valid=inputs["valid"] if shared else inputs["valid"][t], reduction=reduction,
        )
        for t in range(T)
    ]  # fmt: skip
    keys = list(leaves[1].unbind()) if listed else leaves[1]
    found, wanted = in_batch_contrastive_multi(**inputs | {"keys": keys}), torch.stack(terms)
    torch.testing.assert_close(found, wanted)
    flow = torch.linspace(-1, 2, wanted.numel(), dtype=torch.float64).view(wanted.shape)
    for got, want in zip(
        torch.autograd.grad(found, leaves, flow), torch.autograd.grad(wanted, leaves, flow),
        strict=True,
    ):  # fmt: skip
        assert want.any()
        torch.testing.assert_close(got, want)


@native
@pytest.mark.parametrize("changes", [{}, {"symmetric": False}, {"precision": "bf16"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_kernel_agrees(dtype, changes):
    subject, inputs = SUBJECTS["in_batch_contrastive_multi"], draw(dtype, **changes)
    wanted = expected(subject, inputs)
    check_forward(subject, "native", inputs, wanted)
    check_gradients(subject, "native", inputs, wanted)


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernels_losses_and_key_gradients_are_those_of_single_losses(dtype):
    inputs = draw(dtype, valid=None, temperature=0.1, reduction="sum", backend="native")
    anchor, keys = inputs["anchor"], inputs["keys"].requires_grad_()
    found = in_batch_contrastive_multi(**inputs)
    (grads,) = torch.autograd.grad(found.sum(), keys)
    options = {n: v for n, v in inputs.items() if n not in ("anchor", "keys", "key_ids", "weights")}
    for t in range(T):
        key = keys[t].detach().requires_grad_()
        options |= {"key_ids": inputs["key_ids"][t], "weights": inputs["weights"][t]}
        loss = in_batch_contrastive(anchor, key, **options)
        assert loss == found[t]
        assert torch.equal(torch.autograd.grad(loss, key)[0], grads[t])


@native
@pytest.mark.parametrize("op", ["in_batch_contrastive", "in_batch_contrastive_multi"])
@pytest.mark.parametrize("more", [-10, -1, 1])
def test_a_raw_gradient_is_asked_of_every_tensor_or_refused(op, more):
    """Torch asks by a bool for each tensor that is given; others may call the operator wrongly."""
    subject = SUBJECTS[op]
    args = subject.arguments(inputs_for(subject.oracle, "typical"))
    outputs = subject.op.operator("native")(*args)
    backward = getattr(torch.ops.livrec, f"{op}_backward").native
    grads = [torch.ones_like(outputs[0])] + [None] * (len(outputs) - 1)
    needs = [True] + [False] * (sum(isinstance(arg, torch.Tensor) for arg in args) - 1)
    (found,) = backward(grads, *args, outputs, needs)
    assert found.any()
    wrong = needs + [False] if more > 0 else needs[:more]
    with pytest.raises(RuntimeError, match="needs: must be one bool per tensor that is given, got"):
        backward(grads, *args, outputs, wrong)


@native
def test_pairs_kept_or_found_again_are_the_same():
    subject, inputs, found = SUBJECTS["in_batch_contrastive_multi"], draw(), []
    args = subject.arguments(inputs)
    at = next(i for i, a in enumerate(subject.op.schema.arguments) if a.name == "keep_pairs")
    for kept in (True, False):
        args[at] = kept
        leaves = [a.detach().requires_grad_() for a in args[:3]]
        losses, _, pairs = subject.op.operator("native")(*leaves, *args[3:])
        assert kept == bool(pairs.any())
        found.append([losses, *torch.autograd.grad(losses.sum(), leaves)])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other) and one.any()


@native
@pytest.mark.parametrize("kept", [True, False])
def test_threads_change_no_bit(kept, monkeypatch):
    subject, before, found = SUBJECTS["in_batch_contrastive_multi"], torch.get_num_threads(), []
    monkeypatch.setattr(_contrastive, "keeps_pairs", lambda rows, columns: kept)
    generator = torch.Generator().manual_seed(0)
    inputs = subject.oracle.make_inputs(generator, torch.float32, **SIZES | {"B": 900})
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(results(subject, "native", inputs).named())
    finally:
        torch.set_num_threads(before)
    for name, tensor in found[0].items():
        assert torch.equal(tensor, found[1][name]), name
        assert tensor.any() or name == "pairs"


@native
def test_many_terms_are_single_losses():
    generator = torch.Generator().manual_seed(0)
    anchor, *keys = torch.randn(41, 70, 64, generator=generator)
    found = in_batch_contrastive_multi(anchor, keys, reduction="none", backend="native")
    for key, losses in zip(keys, found, strict=True):
        assert torch.equal(losses, in_batch_contrastive(anchor, key, reduction="none"))


@pytest.mark.parametrize("backward_of", ["anchor", "keys", "temperature"])
def test_one_gradient_alone(backward_of):
    inputs = draw(reduction="sum")
    inputs[backward_of].requires_grad_()
    (found,) = torch.autograd.grad(in_batch_contrastive_multi(**inputs).sum(), inputs[backward_of])
    exact = {
        n: v.detach().double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for n, v in inputs.items()
    }
    exact[backward_of].requires_grad_()
    (wanted,) = torch.autograd.grad(in_batch_contrastive_multi(**exact).sum(), exact[backward_of])
    torch.testing.assert_close(found.double(), wanted, rtol=1e-3, atol=1e-4)


def test_anchors_that_no_term_reads_may_hold_anything():
    inputs = draw(reduction="sum")
    gone = torch.arange(B) % 5 == 2
    valid = inputs["valid"] & ~gone
    wanted = in_batch_contrastive_multi(**inputs | {"valid": valid})
    anchor = inputs["anchor"].masked_fill(gone[:, None], math.nan).requires_grad_()
    keys = inputs["keys"].masked_fill(~valid[:, :, None], math.inf).requires_grad_()
    found = in_batch_contrastive_multi(**inputs | {"anchor": anchor, "keys": keys, "valid": valid})
    assert torch.equal(found, wanted)
    of_anchor, of_keys = torch.autograd.grad(found.sum(), (anchor, keys))
    assert (of_anchor[gone] == 0).all() and of_anchor.isfinite().all()
    assert (of_keys[~valid] == 0).all() and of_keys.isfinite().all()


def given(name, value):
    return lambda inputs: {name: value}


def changed(name, change):
    return lambda inputs: {name: change(inputs[name])}


BAD_INPUTS = {
    "in_batch_contrastive_multi": [
        ("anchor list", given("anchor", [[1.0]]), TypeError, "anchor: must be a tensor, got list"),
        ("anchor ints", changed("anchor", lambda t: t.long()), TypeError, "anchor: dtype .*int64"),
        ("no columns", changed("anchor", lambda t: t[:, :0]), ValueError, r"anchor: D .*\[96, 0\]"),
        ("keys number", given("keys", 1), TypeError, "keys: must be a list of tensors, got int"),
        ("no keys", given("keys", []), ValueError, "keys: at least one"),
        ("no terms", changed("keys", lambda t: t[:0]), ValueError, r"keys: at least one .*\[0, 96"),
        ("keys 2-d", changed("keys", lambda t: t[0]), ValueError, r"keys: shape must be \[T, 96, "),
        ("keys rows", changed("keys", lambda t: t[:, 1:]), ValueError, r"keys: shape .*\[4, 95, "),
        ("a key", changed("keys", lambda t: [t[0], t[1, 1:]]), ValueError, r"keys\[1\]: shape"),
        ("keys dtype", changed("keys", lambda t: t.double()), TypeError, "keys: dtype must be"),
        ("keys device", changed("keys", lambda t: t.to("meta")), ValueError, "keys: device"),
        ("temperatures", given("temperature", torch.ones(3)), ValueError, "temperature: .*4.*3"),
        ("temperature 0", given("temperature", torch.zeros(4)), ValueError, "temperature: .*got 0"),
        ("temperature text", given("temperature", "1"), TypeError, "temperature: .*got str"),
        ("normalize", given("normalize", 1), TypeError, "normalize: must be a bool, got int"),
        ("symmetric", given("symmetric", None), TypeError, "symmetric: must be a bool"),
        ("query_ids", changed("query_ids", lambda t: t[1:]), ValueError, r"query_ids: .*\[95\]"),
        ("key_ids", changed("key_ids", lambda t: t[0]), ValueError, r"key_ids: shape .*\[96\]"),
        ("threshold", given("false_negative_threshold", math.nan), ValueError, "threshold: .*nan"),
        ("weights", changed("weights", lambda t: t[:, 1:]), ValueError, r"weights: .*\[4, 95\]"),
        ("weights dtype", changed("weights", lambda t: t.half()), TypeError, "weights: .*float16"),
        ("valid", changed("valid", lambda t: t[0, 1:]), ValueError, r"valid: shape .*\[95\]"),
        ("valid dtype", changed("valid", lambda t: t.int()), TypeError, "valid: dtype .*int32"),
        ("precision", given("precision", "f16"), ValueError, "precision: .*got 'f16'"),
        ("reduction", given("reduction", "max"), ValueError, "reduction: .*got 'max'"),
    ]
}
