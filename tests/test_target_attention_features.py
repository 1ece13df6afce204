"""Attention over features: the factored form is the plain form; bad inputs of both ops."""

import pytest
import torch
from test_target_attention import COMMON

from livrec_fast import explain, shared_attention, target_attention, target_attention_features
from livrec_fast.ops import target_attention_features as ops
from livrec_fast.reference.target_attention_features import ORACLES, make_inputs
from livrec_fast.testing import corners, inputs_for, subjects
from livrec_fast.testing.checks import _compare, expected
from livrec_fast.testing.subjects import listed


def _jagged(good, change):
    """Four candidates of each user, one after the other."""
    return {"q": good["q"].flatten(0, 1), "q_offsets": change(torch.arange(0, 25, 4))}


SHARED = [
    *COMMON,
    ("x list", lambda g: {"x": [[1.0]]}, TypeError, "x: must be a tensor, got list"),
    ("x half", lambda g: {"x": g["x"].half()}, TypeError, "x: dtype .* q, .*float32.*float16"),
    ("x 3-d", lambda g: {"x": g["x"][None]}, ValueError, r"x: shape must be \[T, "),
    ("x device", lambda g: {"x": g["x"].to("meta")}, ValueError, "x: device .* meta"),
    ("x short", lambda g: {"x": g["x"][1:]}, ValueError, "bias: shape .*"),
    ("relu", lambda g: {"activation": "relu"}, ValueError, "activation: .*'silu'.* 'relu'"),
    ("no lse", lambda g: {"activation": "none"}, ValueError, "return_lse: .* got 'none'"),
    ("q 4-d", lambda g: {"q_offsets": g["offsets"]}, ValueError, r"q: .*\[Q, H, d\]"),
    ("q int32", lambda g: _jagged(g, lambda o: o.int()), TypeError, "q_offsets: .* int32"),
    ("q short", lambda g: _jagged(g, lambda o: o[1:]), ValueError, r"q_offsets: .*\[7\].*6"),
    ("q meta", lambda g: _jagged(g, lambda o: o.to("meta")), ValueError, "q_offsets: .* meta"),
    ("q last", lambda g: _jagged(g, lambda o: o + o.sign()), ValueError, "q_offsets: .*24.* 25"),
    ("q falls", lambda g: _jagged(g, lambda o: o.flip(0)), ValueError, "q_offsets: the first"),
]
BAD_INPUTS = {
    "shared_attention": [
        *SHARED,
        ("x wide", lambda g: {"x": g["x"].repeat(1, 2)}, ValueError, r"x: .*\[T, 16\], got .*32"),
    ],
    "target_attention_features": [
        *SHARED,
        ("x wide", lambda g: {"x": g["x"].repeat(1, 2)}, ValueError, r"w_k: .*\[48, 2, 16\]"),
        ("x empty", lambda g: {"x": g["x"][:, :0]}, ValueError, "x: D must be at least 1"),
        ("w_k list", lambda g: {"w_k": [1.0]}, TypeError, "w_k: must be a tensor, got list"),
        ("w_k half", lambda g: {"w_k": g["w_k"].half()}, TypeError, "w_k: dtype .*float16"),
        ("w_k heads", lambda g: {"w_k": g["w_k"][:, :1]}, ValueError, r"w_k: .*\[24, 2, 16\]"),
        ("w_k meta", lambda g: {"w_k": g["w_k"].to("meta")}, ValueError, "w_k: device .* meta"),
        ("w_v int", lambda g: {"w_v": g["w_v"].int()}, TypeError, "w_v: dtype .*int32"),
        ("w_v short", lambda g: {"w_v": g["w_v"][1:]}, ValueError, r"w_v: .*\[24, 2, dv\]"),
        ("w_v none", lambda g: {"w_v": g["w_v"][..., :0]}, ValueError, "w_v: dv must be at least"),
        ("w_v meta", lambda g: {"w_v": g["w_v"].to("meta")}, ValueError, "w_v: device .* meta"),
    ],
}
ORACLE = ORACLES["target_attention_features"]
NAMES = [argument.name for argument in ops._features.schema.arguments]


def _inputs(dtype=torch.float32, **sizes):
    sizes = {"B": 5, "C": 3, "L": 30, "H": 2, "D": 12, "d": 8, "dv": 6, "bias": 2} | sizes
    return make_inputs(torch.Generator().manual_seed(0), dtype, **sizes)


def _plain(inputs):
    """Make keys and values, and attend to them."""
    rest = {name: inputs[name] for name in inputs if name not in ("x", "w_k", "w_v")}
    k, v = (torch.einsum("tD,Dhd->thd", inputs["x"], inputs[name]) for name in ("w_k", "w_v"))
    return target_attention(k=k, v=v, **rest)


@pytest.mark.parametrize("jagged", [0, 1])
@pytest.mark.parametrize("activation", range(4))
def test_is_attention_to_products(activation, jagged):
    inputs = _inputs(torch.float64, activation=activation, jagged=jagged)
    leaves = [inputs[n].requires_grad_() for n in ("q", "x", "w_k", "w_v", "bias")]
    got, want = target_attention_features(**inputs), _plain(inputs)
    torch.testing.assert_close(got, want)
    got, want = (out if torch.is_tensor(out) else out[0] for out in (got, want))
    flow = torch.randn_like(got)
    grads = [torch.autograd.grad(out, leaves, flow) for out in (got, want)]
    torch.testing.assert_close(*grads)


def _factored(args, flows):
    """Return outputs and gradients, by name, of the factored form with the formula as its kernel.

    So do kernels: the factored form is held to the rule apart from them.
    """
    form = ops._backend(ops._shared.backends[-1])
    outputs = form.run(*args)
    given = [arg for arg in args if torch.is_tensor(arg)]
    needs = [arg.is_floating_point() for arg in given]
    flows = [*flows, *[None] * (4 - len(flows))]
    found = form.backward(flows, *args, outputs=outputs, needs=needs)
    names = [name for name, arg in zip(NAMES, args, strict=True) if torch.is_tensor(arg)]
    wanted = [name for name, need in zip(names, needs, strict=True) if need]
    return outputs, dict(zip(wanted, found, strict=True))


@pytest.mark.parametrize("dtype", ORACLE.dtypes)
@pytest.mark.parametrize("case", corners(ORACLE))
def test_the_factored_form_keeps_to_the_rule(case, dtype):
    subject = subjects()["target_attention_features"]
    inputs = inputs_for(ORACLE, corners(ORACLE)[case], dtype)
    want = expected(subject, inputs)
    outputs, grads = _factored(subject.arguments(inputs), want.flows)
    atol = ORACLE.atol[dtype]
    pairs = zip(listed(want.same.returned), listed(want.exact.returned), strict=True)
    for output, pair in zip(outputs, pairs, strict=False):
        assert output.dtype == pair[0].dtype and output.is_contiguous()
        _compare("output", output, *pair, atol, 1.0)
    assert grads.keys() == want.exact.gradients.keys()
    greatest = max(float(g.abs().max()) for g in want.exact.gradients.values() if g.numel())
    for name, exact in want.exact.gradients.items():
        got, same = grads[name], want.same.gradients[name]
        assert got.is_contiguous() and (name == "bias" or got.dtype == same.dtype)
        _compare(name, got, same, exact, atol, min(1.0, greatest))
        assert exact.eq(0).all() or got.ne(0).any()


def test_the_factored_form_gives_what_is_asked_for():
    subject = subjects()["target_attention_features"]
    args = subject.arguments(_inputs(torch.float64))
    form = ops._backend(ops._shared.backends[-1])
    outputs = form.run(*args)
    flows = [torch.randn_like(output) for output in outputs[:3]]  # what lse lost has no gradient
    every = [True, True, True, True, False, True]
    whole = form.backward(flows, *args, outputs=outputs, needs=every)
    leaves = [
        arg.requires_grad_() for arg in args if torch.is_tensor(arg) and arg.is_floating_point()
    ]
    want = torch.autograd.grad(ORACLE.function(*args)[:3], leaves, flows)
    torch.testing.assert_close(tuple(whole), want)
    for at in range(5):
        needs = [False] * 6
        needs[at + (at == 4)] = True
        (one,) = form.backward(flows, *args, outputs=outputs, needs=needs)
        torch.testing.assert_close(one, want[at])


def test_shared_attention_is_attention_with_keys_as_values():
    inputs = _inputs(torch.float64, D=8)
    rest = {name: inputs[name] for name in ("q", "offsets", "bias")}
    rows = inputs["x"][:, None].expand(-1, 2, -1)
    want = target_attention(k=rows, v=rows, **rest)
    torch.testing.assert_close(shared_attention(x=inputs["x"], **rest), want)


def test_scales_default_to_the_root_of_what_is_multiplied():
    inputs = _inputs(D=8, d=4) | {"return_lse": False, "scale": None}
    out = target_attention_features(**inputs)
    assert torch.equal(out, target_attention_features(**inputs | {"scale": 4**-0.5}))
    given = {name: inputs[name] for name in ("x", "offsets", "bias")}
    q = torch.randn(5, 3, 2, 8)
    assert torch.equal(
        shared_attention(q=q, **given), shared_attention(q=q, **given, scale=8**-0.5)
    )


def test_a_bias_of_minus_infinity_takes_rows_out():
    for activation in range(4):
        inputs = _inputs(activation=activation, bias=1)
        rows = slice(*inputs["offsets"][:2].tolist())
        inputs["bias"][rows] = -torch.inf
        inputs["bias"][-1] = -torch.inf
        leaves = [inputs[name].requires_grad_() for name in ("q", "x", "w_k", "w_v", "bias")]
        found = target_attention_features(**inputs)
        out = found if torch.is_tensor(found) else found[0]
        assert out[0].eq(0).all() and out.isfinite().all() and out.ne(0).any()
        grads = torch.autograd.grad(out.square().sum(), leaves)
        assert all(grad.isfinite().all() and grad.ne(0).any() for grad in grads)
        assert grads[1][rows].eq(0).all() and grads[1][-1].eq(0).all()


def test_explains_itself():
    inputs = _inputs()
    given = [inputs[name] for name in ("q", "x", "w_k", "w_v", "offsets")]
    text = explain(target_attention_features, *given)
    assert text.startswith("target_attention_features(q=float32[5, 3, 2, 8] on cpu")
    text = explain(shared_attention, torch.randn(5, 3, 2, 12), *given[1::3])
    assert text.startswith("shared_attention(q=float32[5, 3, 2, 12] on cpu")
