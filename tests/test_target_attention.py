"""Target attention: against torch's own attention, lse, bias, empty and masked histories, scale."""

import pytest
import torch
import torch.nn.functional as F

from livrec_fast import explain, target_attention
from livrec_fast.reference.target_attention import make_inputs


def _offsets(good, change):
    offsets = good["offsets"].clone()
    change(offsets)
    return {"offsets": offsets}


def _jagged(good, change):
    """Four candidates of each user, one after the other."""
    users, candidates = good["q"].shape[:2]
    q_offsets = change(torch.arange(0, users * candidates + 1, candidates))
    return {"q": good["q"].flatten(0, 1), "q_offsets": q_offsets}


COMMON = [
    ("q list", lambda g: {"q": [[1.0]]}, TypeError, "q: must be a tensor, got list"),
    ("q int", lambda g: {"q": g["q"].int()}, TypeError, "q: .* float16.* int32"),
    ("q 3-d", lambda g: {"q": g["q"][0]}, ValueError, r"q: .*\[B, C, H, d\], got \[4, 2, 16\]"),
    ("no heads", lambda g: {"q": g["q"][:, :, :0]}, ValueError, "q: H and d .* at least 1"),
    ("no width", lambda g: {"q": g["q"][..., :0]}, ValueError, "q: H and d .* at least 1"),
    ("bias list", lambda g: {"bias": [0.0]}, TypeError, "bias: must be a tensor, got list"),
    ("bias int", lambda g: {"bias": g["bias"].int()}, TypeError, "bias: dtype .* int32"),
    ("bias long", lambda g: {"bias": g["bias"].repeat(2, 1)}, ValueError, "bias: shape .*, 2"),
    ("bias 3-d", lambda g: {"bias": g["bias"][None]}, ValueError, "bias: shape .*"),
    ("bias heads", lambda g: {"bias": g["bias"][:, :1]}, ValueError, r"bias: .* 2\], got .* 1\]"),
    ("bias device", lambda g: {"bias": g["bias"].to("meta")}, ValueError, "bias: device .* meta"),
    ("scale text", lambda g: {"scale": "1"}, TypeError, "scale: must be a float, got str"),
    ("scale inf", lambda g: {"scale": float("inf")}, ValueError, "scale: must be finite, got inf"),
    ("scale NaN", lambda g: {"scale": float("nan")}, ValueError, "scale: must be finite, got nan"),
    ("int32", lambda g: {"offsets": g["offsets"].int()}, TypeError, "offsets: .* int64, got int32"),
    ("short", lambda g: {"offsets": g["offsets"][:-1]}, ValueError, r"offsets: .*\[7\], got \[6\]"),
    ("meta", lambda g: {"offsets": g["offsets"].to("meta")}, ValueError, "offsets: device .* meta"),
    ("first", lambda g: _offsets(g, lambda o: o[0].fill_(1)), ValueError, "the first must be 0"),
    (
        "last",
        lambda g: _offsets(g, lambda o: o.clamp_(max=int(o[-1]) - 1)),
        ValueError,
        "the last must be",
    ),
    ("falls", lambda g: _offsets(g, lambda o: o[3].add_(999)), ValueError, "not decrease"),
    ("negative", lambda g: _offsets(g, lambda o: o[1].fill_(-1)), ValueError, "not decrease"),
    ("huge", lambda g: _offsets(g, lambda o: o[-1].fill_(2**62)), ValueError, str(2**62)),
]
BAD_INPUTS = {
    "target_attention": [
        *COMMON,
        ("k list", lambda g: {"k": [[1.0]]}, TypeError, "k: must be a tensor, got list"),
        ("k half", lambda g: {"k": g["k"].half()}, TypeError, "k: dtype .* q, .*float32.*float16"),
        ("k wide", lambda g: {"k": g["k"].repeat(1, 1, 2)}, ValueError, r"\[T, 2, 16\].* 2, 32\]"),
        ("k device", lambda g: {"k": g["k"].to("meta")}, ValueError, "k: device .* meta"),
        ("v double", lambda g: {"v": g["v"].double()}, TypeError, "v: dtype .*float64"),
        ("v short", lambda g: {"v": g["v"][1:]}, ValueError, "v: shape must be"),
        ("v narrow", lambda g: {"v": g["v"][..., :0]}, ValueError, "v: dv must be at least 1"),
        ("relu", lambda g: {"activation": "relu"}, ValueError, "activation: .*'silu'.* 'relu'"),
        ("no lse", lambda g: {"activation": "silu"}, ValueError, "return_lse: .* got 'silu'"),
        ("q 4-d", lambda g: {"q_offsets": g["offsets"]}, ValueError, r"q: .*\[Q, H, d\]"),
        ("q int32", lambda g: _jagged(g, lambda o: o.int()), TypeError, "q_offsets: .* int32"),
        ("q short", lambda g: _jagged(g, lambda o: o[1:]), ValueError, r"q_offsets: .*\[7\].*6"),
        ("q meta", lambda g: _jagged(g, lambda o: o.to("meta")), ValueError, "q_offsets: .* meta"),
        ("q last", lambda g: _jagged(g, lambda o: o + o.sign()), ValueError, "q_offsets: .*24.*25"),
        ("q falls", lambda g: _jagged(g, lambda o: o.flip(0)), ValueError, "q_offsets: the first"),
    ]
}


def _inputs(dtype=torch.float32, seed=0, **sizes):
    sizes = {"B": 5, "C": 3, "L": 30, "H": 2, "d": 8, "dv": 6, "bias": 2} | sizes
    return make_inputs(torch.Generator().manual_seed(seed), dtype, **sizes)


def _leaves(inputs, *names):
    return [inputs[name].requires_grad_() for name in names]


def test_equal_lengths_match_scaled_dot_product_attention():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(4, n, 2, 8, generator=generator).double() for n in (3, 20, 20))
    bias = torch.randn(4, 20, 2, generator=generator).double()
    leaves = [t.requires_grad_() for t in (q, k, v, bias)]
    rows = [t.flatten(0, 1) for t in (k, v, bias)]
    out = target_attention(q, *rows[:2], torch.arange(0, 81, 20), bias=rows[2])
    mask = bias.transpose(1, 2)[:, :, None].expand(4, 2, 3, 20)
    heads_first = [t.transpose(1, 2) for t in (q, k, v)]
    want = F.scaled_dot_product_attention(*heads_first, attn_mask=mask).transpose(1, 2)
    torch.testing.assert_close(out, want)
    flow = torch.randn(out.shape, generator=generator).double()
    got, wanted = (torch.autograd.grad(o, leaves, flow) for o in (out, want))
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_matches_one_user_at_a_time_by_hand(kind):
    inputs = _inputs(bias=kind)
    q, k, v, offsets = (inputs[name] for name in ("q", "k", "v", "offsets"))
    bias = inputs["bias"]
    bias = torch.zeros(len(k), 2) if bias is None else bias.reshape(len(k), -1).expand(-1, 2)
    out, lse = target_attention(**inputs)
    for user, (first, last) in enumerate(zip(offsets[:-1], offsets[1:], strict=True)):
        for candidate in range(3):
            for head in range(2):
                logit = inputs["scale"] * k[first:last, head] @ q[user, candidate, head]
                logit = (logit + bias[first:last, head]).double()
                want = logit.softmax(0) @ v[first:last, head].double()
                at = user, candidate, head
                torch.testing.assert_close(out[at].double(), want, atol=1e-5, rtol=1e-5)
                torch.testing.assert_close(lse[at].double(), logit.logsumexp(0), atol=1e-5, rtol=0)


def test_scale_defaults_to_the_root_of_d():
    inputs = _inputs()
    out = target_attention(**inputs | {"scale": None, "return_lse": False})
    assert isinstance(out, torch.Tensor)
    assert torch.equal(out, target_attention(**inputs | {"scale": 8**-0.5})[0])
    assert not torch.equal(out, target_attention(**inputs | {"scale": 2})[0])


def test_the_gradient_of_lse_is_the_softmax():
    inputs = _inputs(torch.float64, bias=1, H=1)
    (bias,) = _leaves(inputs, "bias")
    q, k, offsets = inputs["q"], inputs["k"], inputs["offsets"]
    _, lse = target_attention(**inputs)
    user = int(offsets.diff().argmax())
    (found,) = torch.autograd.grad(lse[user, 1, 0], bias)
    rows = slice(offsets[user], offsets[user + 1])
    logits = inputs["scale"] * k[rows, 0] @ q[user, 1, 0] + bias.detach()[rows]
    want = torch.zeros_like(bias)
    want[rows] = logits.softmax(0)
    torch.testing.assert_close(found, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_empty_histories_give_zeros_and_hide_nothing(dtype):
    inputs = _inputs(dtype)
    offsets = torch.tensor([0, 0, 7, 7, 7, 19])
    inputs |= {name: inputs[name][:19] for name in ("k", "v", "bias")} | {"offsets": offsets}
    leaves = _leaves(inputs, "q", "k", "v", "bias")
    out, lse = target_attention(**inputs)
    empty = offsets.diff() == 0
    assert empty.tolist() == [True, False, True, True, False]
    assert out[empty].eq(0).all() and lse[empty].eq(-torch.inf).all()
    assert out[~empty].ne(0).any(-1).all() and lse[~empty].isfinite().all()
    flows = [torch.ones_like(out), torch.ones_like(lse)]
    grads = torch.autograd.grad([out, lse], leaves, flows)
    assert all(grad.isfinite().all() for grad in grads)
    assert grads[0][empty].eq(0).all() and grads[0][~empty].ne(0).flatten(1).any(1).all()
    assert all(grad.ne(0).flatten(1).any(1).all() for grad in grads[1:])


def test_a_bias_of_minus_infinity_takes_rows_out():
    inputs = _inputs(bias=1)
    offsets = torch.tensor([0, 5, 9, 9, 12, 20])
    inputs |= {name: inputs[name][:20] for name in ("k", "v", "bias")} | {"offsets": offsets}
    inputs["bias"][5:9] = -torch.inf  # all of user 1
    inputs["bias"][13] = -torch.inf  # one of user 4
    leaves = _leaves(inputs, "q", "k", "v", "bias")
    out, lse = target_attention(**inputs)
    assert out[1].eq(0).all() and lse[1].eq(-torch.inf).all()
    grads = torch.autograd.grad(out.sum() + lse[[0, 3, 4]].sum(), leaves)
    assert all(grad.isfinite().all() for grad in grads)
    assert grads[1][5:9].eq(0).all() and grads[1][13].eq(0).all() and grads[0][1].eq(0).all()
    kept = torch.tensor([*range(5), *range(9, 13), *range(14, 20)])
    without = {name: inputs[name][kept] for name in ("k", "v", "bias")}
    want = target_attention(**inputs | without | {"offsets": torch.tensor([0, 5, 5, 5, 8, 15])})
    torch.testing.assert_close((out, lse), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_huge_logits_are_stable(dtype):
    inputs = _inputs(dtype, bias=0)
    inputs |= {"q": inputs["q"] * 100, "k": inputs["k"] * 100, "scale": 1.0}
    leaves = _leaves(inputs, "q", "k", "v")
    out, lse = target_attention(**inputs)
    held = inputs["offsets"].diff() > 0
    assert lse[held].max() > 1e4 and lse[held].isfinite().all()
    grads = torch.autograd.grad([out, lse], leaves, [torch.ones_like(out), torch.ones_like(lse)])
    assert out.isfinite().all() and all(grad.isfinite().all() for grad in grads)
    exact, lse64 = target_attention(
        **inputs | {name: inputs[name].detach().double() for name in ("q", "k", "v")}
    )
    torch.testing.assert_close(lse[held].double(), lse64[held], rtol=1e-5, atol=0)
    torch.testing.assert_close(out.double(), exact, rtol=1e-2, atol=2e-2)


@pytest.mark.parametrize("kind", [1, 2])
def test_bias_gradients_are_exact_in_float64(kind):
    inputs = _inputs(torch.float64, bias=kind, L=4)
    leaves = _leaves(inputs, "q", "k", "v", "bias")
    held = inputs["offsets"].diff() > 0

    def run(q, k, v, bias):
        out, lse = target_attention(**inputs | {"q": q, "k": k, "v": v, "bias": bias})
        return out, lse[held]

    assert len(inputs["k"]) > 4 and not held.all()
    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_takes_a_float32_bias(dtype):
    inputs = _inputs(dtype)
    wide = inputs | {"bias": inputs["bias"].float().requires_grad_()}
    narrow = inputs | {"bias": inputs["bias"].requires_grad_()}
    outs = [target_attention(**given) for given in (wide, narrow)]
    torch.testing.assert_close(*outs, rtol=0, atol=0)
    assert outs[0][0].dtype == dtype and outs[0][1].dtype == torch.float32
    for given, (out, _) in zip((wide, narrow), outs, strict=True):
        (grad,) = torch.autograd.grad(out.float().sum(), given["bias"])
        assert grad.dtype == given["bias"].dtype and grad.ne(0).any()


def test_autocast_gives_mixed_inputs_one_dtype():
    inputs = _inputs() | {"k": _inputs()["k"].bfloat16()}
    with pytest.raises(TypeError, match="k: dtype"):
        target_attention(**inputs)
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = target_attention(**inputs)
        with pytest.raises(TypeError, match="k: dtype"):
            target_attention(**inputs | {"q": inputs["q"].double()})
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32


def test_meta_tensors_give_shapes():
    inputs = {n: t.to("meta") if torch.is_tensor(t) else t for n, t in _inputs().items()}
    out, lse = target_attention(**inputs)
    assert out.shape == (5, 3, 2, 6) and lse.shape == (5, 3, 2) and out.is_meta


def test_compiles_with_the_default_scale():
    compiled = torch.compile(target_attention, fullgraph=True, dynamic=True, backend="eager")
    for d in (8, 12, 20):
        inputs = _inputs(d=d) | {"scale": None}
        torch.testing.assert_close(compiled(**inputs), target_attention(**inputs))


def test_explains_itself():
    inputs = _inputs()
    text = explain(target_attention, inputs["q"], inputs["k"], inputs["v"], inputs["offsets"])
    assert text.startswith("target_attention(q=float32[5, 3, 2, 8] on cpu") and "auto" in text
