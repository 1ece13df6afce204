"""Target attention of few candidates, or sets of few, which the widest vectors hold at once."""

import pytest
import torch
from conftest import SUBJECTS

from livrec_fast import _native, target_attention
from livrec_fast.testing.checks import check_forward, check_gradients, expected

pytestmark = pytest.mark.skipif(_native.MISSING is not None, reason=f"{_native.MISSING}")
LENGTHS = [65, 1, 0, 300, 64, 63, 2]  # about tiles of 64 items, of which every fourth is sampled
H = 3


def draw(candidates, d, dv, dtype=torch.float32, lengths=LENGTHS, heads=H):
    """Draw queries and histories; logits are of the size of one."""
    generator = torch.Generator().manual_seed(0)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    q = torch.randn(len(lengths), candidates, heads, d, generator=generator)
    k, v = (torch.randn(int(offsets[-1]), heads, n, generator=generator) for n in (d, dv))
    made = {"q": q.to(dtype), "k": k.to(dtype), "v": v.to(dtype), "offsets": offsets}
    return made | {"bias": None, "scale": d**-0.5, "activation": "softmax", "return_lse": True}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("candidates", [*range(1, 18), 32, 48])
def test_every_count_agrees_with_float64(candidates, dtype):
    subject = SUBJECTS["target_attention"]
    for d, dv in [(16, 16), (48, 32)]:
        inputs = draw(candidates, d, dv, dtype)
        wanted = expected(subject, inputs)
        check_forward(subject, "native", inputs, wanted)
        check_gradients(subject, "native", inputs, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("candidates", [1, 2, 3, 7, 12, 32])
def test_every_candidate_is_as_if_alone(candidates, dtype):
    inputs = draw(candidates, 32, 16, dtype)
    out, lse = target_attention(**inputs, backend="native")
    assert (out != 0).float().mean() > 0.8  # all but those of the empty history
    for c in range(candidates):
        mine, own = target_attention(**inputs | {"q": inputs["q"][:, c : c + 1]}, backend="native")
        close = (
            {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-3}
        )
        torch.testing.assert_close(mine[:, 0], out[:, c], **close)
        torch.testing.assert_close(own[:, 0], lse[:, c], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("candidates", [1, 6, 32])
def test_logits_that_rise_from_tile_to_tile_agree_with_float64(candidates, dtype):
    """By far more than exponentials take, by little, and after items that count for nothing."""
    subject = SUBJECTS["target_attention"]
    inputs = draw(candidates, 16, 16, dtype, lengths=[400, 400, 400, 1_100])
    rise = torch.cat(
        [
            torch.arange(400) // 64 * 12.0,
            torch.arange(400) / 20,
            torch.arange(400) // 64 * 300.0 - 900,
        ]
    )
    inputs["q"][..., 0], inputs["scale"] = 1.0, 1.0
    inputs["k"][:1_200, :, 0] = rise[:, None]
    wanted = expected(subject, inputs)
    check_forward(subject, "native", inputs, wanted)
    check_gradients(subject, "native", inputs, wanted)


@pytest.mark.parametrize(("heads", "d", "dv"), [(1, 16, 16), (2, 16, 48), (3, 16, 32), (4, 48, 16)])
@pytest.mark.parametrize("candidates", [1, 5, 32])
def test_gradients_in_16_bits_of_every_shape_of_lines(candidates, heads, d, dv):
    """Large enough to go past the caches, where rows fill lines of memory or do not."""
    count = 2**19 // (heads * max(d, dv)) + 100
    inputs = draw(candidates, d, dv, torch.bfloat16, lengths=[count // 3, count], heads=heads)
    subject = SUBJECTS["target_attention"]
    check_gradients(subject, "native", inputs, expected(subject, inputs))


def gradients(backend, q, k, v, offsets, grad, dtype=torch.float32):
    """Return the gradients of q, k and v."""
    leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
    out = target_attention(*leaves, offsets, backend=backend)
    return torch.autograd.grad(out, leaves, grad.to(dtype))


@pytest.mark.parametrize("candidates", [1, 4, 8, 16, 32])
@pytest.mark.parametrize("kind", ["plain", "far from zero", "nearly equal", "one dominates"])
def test_gradients_round_no_more_than_in_the_formula(kind, candidates):
    """Most of all where keys and values are far from zero: a sample of the items corrects dq."""
    inputs = draw(candidates, 16, 16, lengths=[3_000, 700])
    q, k, v, offsets = (inputs[name] for name in ("q", "k", "v", "offsets"))
    grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(1))
    if kind == "far from zero":
        k, v = k + 5, v + 100
    if kind == "nearly equal":
        k, v = k / 10 + 5, v / 10 + 100
    if kind == "one dominates":
        k[1_500] = q[0, 0] * 3
    exact = gradients("reference", q, k, v, offsets, grad, torch.float64)

    def errors(backend):
        found = gradients(backend, q, k, v, offsets, grad)
        return [
            float((mine - true).norm() / true.norm())
            for mine, true in zip(found, exact, strict=True)
        ]

    ours, eager = errors("native"), errors("reference")
    assert all(mine <= 3 * other + 1e-7 for mine, other in zip(ours, eager, strict=True))
    assert ours[0] < eager[0] / 2 or kind in ("plain", "one dominates")


def test_all_weight_on_one_item_leaves_no_gradient_of_logits():
    inputs = draw(5, 16, 16, lengths=[200])
    q, k, v, offsets = (inputs[name] for name in ("q", "k", "v", "offsets"))
    q[..., 0], k[..., 0] = 100.0, 0.0
    k[77, :, 0] = 100.0
    dq, dk, dv = gradients("native", q, k, v, offsets, torch.ones_like(q))
    assert dq.abs().max() == 0 and dk.abs().max() == 0
    torch.testing.assert_close(dv[77], torch.full_like(dv[77], 5.0))
    assert dv.abs().sum() == dv[77].abs().sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("candidates", [1, 6, 16, 32])
def test_nothing_past_the_history_is_looked_at(candidates, dtype):
    inputs = draw(candidates, 16, 16, dtype)
    grad = torch.ones_like(inputs["q"])

    def all_of(k, v):
        q, offsets = inputs["q"], inputs["offsets"]
        return gradients("native", q, k, v, offsets, grad, dtype)

    def within_nan(x):
        wide = torch.full((len(x) + 80, *x.shape[1:]), float("nan"), dtype=dtype)
        wide[: len(x)] = x
        return wide[: len(x)]

    plain = all_of(inputs["k"], inputs["v"])
    assert all((mine != 0).float().mean() > 0.6 for mine in plain)  # one item alone has no dq
    for mine, other in zip(
        plain, all_of(within_nan(inputs["k"]), within_nan(inputs["v"])), strict=True
    ):
        assert torch.isfinite(mine).all() and torch.equal(mine, other)


@pytest.mark.parametrize("wanted", [["k"], ["v"], ["q"], ["q", "k"]])
def test_some_gradients_are_those_of_the_formula(wanted):
    inputs = draw(8, 16, 16)

    def found(backend):
        leaves = {
            name: inputs[name].clone().requires_grad_(name in wanted) for name in ("q", "k", "v")
        }
        out = target_attention(**leaves, offsets=inputs["offsets"], backend=backend)
        return torch.autograd.grad(out.square().sum(), [leaves[name] for name in wanted])

    for mine, other in zip(found("native"), found("reference"), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
