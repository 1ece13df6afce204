"""Target attention over 10,000 rows: against float64, on data that hurts sums and exponentials."""

import pytest
import torch
from conftest import SUBJECTS

from livrec_fast import _native, target_attention
from livrec_fast.testing.checks import check_forward, check_gradients, expected, results

pytestmark = pytest.mark.skipif(_native.MISSING is not None, reason=f"{_native.MISSING}")
H, D = 2, 16
KINDS = ("plain", "equal rows", "one dominates", "alternating", "all equal", "far apart")


def draw(kind, users, length, candidates=3, bias=None, activation="softmax", d=D, dv=D):
    """Draw histories whose logits are as the name says; those named after ±1e4 reach it."""
    generator = torch.Generator().manual_seed(KINDS.index(kind))
    lengths = torch.full((users,), length)
    lengths[-1] = length if users == 1 else length // 3 + 1
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    total = int(offsets[-1])
    q = torch.randn(users, candidates, H, d, generator=generator)
    k, v = (torch.randn(total, H, n, generator=generator) for n in (d, dv))
    if kind == "equal rows":
        k[:], v[:] = k[0].clone(), v[0].clone()
    if kind in ("one dominates", "alternating", "far apart"):
        q[..., 0] = 1e4 if kind != "far apart" else 8.0
        k[..., 0] = 0.0 if kind != "far apart" else k[..., 0]
    if kind == "one dominates":
        k[total // 2, :, 0] = 1.0
    if kind == "alternating":
        k[::2, :, 0], k[1::2, :, 0] = 1.0, -1.0
    if kind in ("alternating", "far apart"):  # large logits are exact, in whatever order
        q, k = q.mul(8).round() / 8, k.mul(8).round() / 8
    if kind == "all equal":
        q[:], k[:] = 1.0, 1e4 / d
    made = {"q": q, "k": k, "v": v, "offsets": offsets, "bias": None, "scale": 1.0}
    if kind == "plain":
        made["scale"] = d**-0.5
    if bias:
        made["bias"] = torch.randn((total, H) if bias == "heads" else (total,), generator=generator)
    made["bias"] = made["bias"] if activation == "softmax" or bias is None else made["bias"] / 9
    return made | {"activation": activation, "return_lse": activation == "softmax"}


@pytest.mark.parametrize("bias", [None, "items", "heads"])
@pytest.mark.parametrize("kind", KINDS)
def test_agrees_with_float64(kind, bias):
    subject = SUBJECTS["target_attention"]
    inputs = draw(kind, 1, 10_000, bias=bias)
    wanted = expected(subject, inputs)
    check_forward(subject, "native", inputs, wanted)
    check_gradients(subject, "native", inputs, wanted)


@pytest.mark.parametrize("activation", ["none", "silu", "sigmoid"])
@pytest.mark.parametrize("kind", ["plain", "far apart", "alternating"])
def test_other_activations_agree_with_float64(kind, activation):
    subject = SUBJECTS["target_attention"]
    inputs = draw(kind, 2, 3_000, bias="heads", activation=activation)
    wanted = expected(subject, inputs)
    check_forward(subject, "native", inputs, wanted)
    check_gradients(subject, "native", inputs, wanted)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("candidates, d, dv", [(1, 16, 16), (3, 32, 48), (40, 16, 32)])
def test_histories_in_bfloat16_agree_with_float64(kind, candidates, d, dv):
    """Where the processor multiplies words of two numbers, these are their widths and scales."""
    subject = SUBJECTS["target_attention"]
    inputs = draw(kind, 2, 1_501, candidates=candidates, bias="heads", d=d, dv=dv)
    inputs |= {name: inputs[name].bfloat16() for name in ("q", "k", "v")}
    wanted = expected(subject, inputs)
    check_forward(subject, "native", inputs, wanted)
    check_gradients(subject, "native", inputs, wanted)


@pytest.mark.parametrize("candidates", [1, 2, 31, 33, 300])
@pytest.mark.parametrize("isa", _native.isa_levels() if _native.MISSING is None else [])
def test_every_level_at_every_count_of_candidates(isa, candidates):
    subject = SUBJECTS["target_attention"]
    inputs = draw("plain", 3, 1_100, candidates=candidates, bias="heads", d=24, dv=40)
    wanted = expected(subject, inputs)
    with _native.use_isa(isa):
        check_forward(subject, "native", inputs, wanted)
        check_gradients(subject, "native", inputs, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("d, dv", [(16, 16), (256, 1), (5, 256), (64, 48)])
def test_widths_and_dtypes(d, dv, dtype):
    subject = SUBJECTS["target_attention"]
    inputs = draw("plain", 2, 1_300, d=d, dv=dv, bias="items")
    inputs |= {name: inputs[name].to(dtype) for name in ("q", "k", "v", "bias")}
    wanted = expected(subject, inputs)
    check_forward(subject, "native", inputs, wanted)
    check_gradients(subject, "native", inputs, wanted)


@pytest.mark.parametrize("users", [1, 3])
@pytest.mark.parametrize("activation", ["softmax", "silu"])
def test_threads_change_no_bit(users, activation):
    subject, before, found = SUBJECTS["target_attention"], torch.get_num_threads(), []
    inputs = draw("plain", users, 6_000, bias="items", activation=activation)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(results(subject, "native", inputs).named())
    finally:
        torch.set_num_threads(before)
    assert all(tensor.any() for tensor in found[0].values() if tensor.numel())
    for other in found[1:]:
        for name, tensor in found[0].items():
            assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("what", ["q", "k", "v"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_spreads_as_in_the_formula(what, value):
    inputs = draw("plain", 3, 90)
    inputs[what].view(-1)[7] = value
    out, lse = target_attention(**inputs, backend="native")
    want, want_lse = target_attention(**inputs, backend="reference")
    torch.testing.assert_close(out, want, equal_nan=True, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, want_lse, equal_nan=True, atol=1e-5, rtol=1e-5)
    assert not out.isfinite().all()


@pytest.mark.parametrize("kernel", ["native", "reference"])
def test_keys_that_are_the_values(kernel):
    inputs = draw("plain", 3, 200)
    x, y = inputs["k"].requires_grad_(), inputs["k"].detach().clone().requires_grad_()
    out, _ = target_attention(**inputs | {"v": x}, backend=kernel)
    want, _ = target_attention(**inputs | {"v": y}, backend="reference")
    torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)
    (got,) = torch.autograd.grad(out.square().sum(), x)
    wanted = sum(torch.autograd.grad(want.square().sum(), (x, y)))
    assert wanted.any()
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("candidates", [1, 3])
def test_gradients_past_the_caches_are_those_of_each_user_alone(dtype, candidates):
    """Gradients of 16 MB and more are written past the caches, in 16 bits a tile at a time."""
    generator = torch.Generator().manual_seed(5)
    lengths = [33_001, 36_000, 34_999, 36_000]
    q = torch.randn(4, candidates, 4, 16, generator=generator).to(dtype).requires_grad_()
    k, v = (
        torch.randn(sum(lengths), 4, 16, generator=generator).to(dtype).requires_grad_()
        for _ in range(2)
    )
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    grad = torch.randn(q.shape, generator=generator).to(dtype)
    assert k.numel() * k.element_size() >= 16 << 20
    out = target_attention(q, k, v, offsets, backend="native")
    found = torch.autograd.grad(out, (q, k, v), grad)
    for user, (first, last) in enumerate(zip(offsets[:-1], offsets[1:], strict=True)):
        own = [x[first:last] for x in (k, v)]
        alone = target_attention(
            q[user : user + 1], *own, torch.tensor([0, last - first]), backend="native"
        )
        wanted = torch.autograd.grad(alone, (q, *own), grad[user : user + 1])
        assert all(w.count_nonzero() > w.numel() / 2 for w in (wanted[0][user], *wanted[1:]))
        assert torch.equal(found[0][user], wanted[0][user])
        assert all(
            torch.equal(f[first:last], w) for f, w in zip(found[1:], wanted[1:], strict=True)
        )
