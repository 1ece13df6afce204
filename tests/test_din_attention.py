"""DIN attention: against modules built of torch's own layers, Dice at rest, weights, jaggedness."""

import pytest
import torch
from torch import nn

from livrec_fast import din_attention, explain
from livrec_fast.reference.din_attention import ACTIVATIONS, make_inputs


def _changed(name, at, change):
    """Return a change of one tensor of a list."""

    def make(good):
        items = list(good[name])
        items[at] = change(items[at])
        return {name: items}

    return make


def _offsets(good, change, name="offsets"):
    offsets = good["offsets"].clone() if name == "offsets" else 4 * torch.arange(6)
    change(offsets)
    return {name: offsets}


def _jagged(good, change=lambda offsets: None):
    """Lay the typical candidates out jaggedly."""
    return {"q": good["q"].flatten(0, 1), **_offsets(good, change, "q_offsets")}


def _typed(good, dtype, length):
    return {"q": good["q"][0], "q_offsets": torch.zeros(length, dtype=dtype)}


def _dice(good, **other):
    lists = {n: [torch.ones(20), torch.ones(17)] for n in ("slopes", "gains", "shifts")}
    return {"activation": "dice", **lists, **other}


BAD_INPUTS = {
    "din_attention": [
        ("q list", lambda g: {"q": [[1.0]]}, TypeError, "q: must be a tensor, got list"),
        ("q int", lambda g: {"q": g["q"].int()}, TypeError, "q: .* float16.* int32"),
        ("q 2-d", lambda g: {"q": g["q"][0]}, ValueError, r"q: .*\[B, C, d\], got \[4, 16\]"),
        ("no width", lambda g: {"q": g["q"][..., :0]}, ValueError, "q: d must be at least 1"),
        ("k list", lambda g: {"k": [[1.0]]}, TypeError, "k: must be a tensor, got list"),
        ("k half", lambda g: {"k": g["k"].half()}, TypeError, "k: dtype .* q, .*float32.*float16"),
        ("k wide", lambda g: {"k": g["k"].repeat(1, 2)}, ValueError, r"k: .*\[T, 16\], got .*32\]"),
        ("k device", lambda g: {"k": g["k"].to("meta")}, ValueError, "k: device .* meta"),
        ("v double", lambda g: {"v": g["k"].double()}, TypeError, "v: dtype .*float64"),
        ("v short", lambda g: {"v": g["k"][1:]}, ValueError, "v: shape must be"),
        ("v narrow", lambda g: {"v": g["k"][:, :0]}, ValueError, "v: dv must be at least 1"),
        ("v device", lambda g: {"v": g["k"].to("meta")}, ValueError, "v: device .* meta"),
        ("a weight", lambda g: {"weights": g["weights"][0]}, TypeError, "weights: .* list of ten"),
        ("no weights", lambda g: {"weights": []}, ValueError, "weights: at least one .* got none"),
        (
            "one layer",
            lambda g: {"weights": g["weights"][2:]},
            ValueError,
            "a hidden layer .* 1",
        ),
        ("few biases", lambda g: {"biases": g["biases"][1:]}, ValueError, "per layer, 3, got 2"),
        ("w int", _changed("weights", 1, torch.Tensor.int), TypeError, r"weights\[1\]: .* int32"),
        ("w half", _changed("weights", 1, torch.Tensor.half), TypeError, r"weights\[1\]: dtype .*"),
        ("w .T", _changed("weights", 1, lambda w: w.T), ValueError, r"\[20, h\], got \[17, 20\]"),
        (
            "w wide",
            _changed("weights", 2, lambda w: w.expand(-1, 2)),
            ValueError,
            r"\[17, 1\]",
        ),
        ("no unit", _changed("weights", 0, lambda w: w[:, :0]), ValueError, r"\[0\]: h must"),
        ("w of 3 d", _changed("weights", 0, lambda w: w[16:]), ValueError, r"\[64, h\], got"),
        ("w dev", _changed("weights", 0, lambda w: w.to("meta")), ValueError, "device .* meta"),
        ("b long", _changed("biases", 0, lambda b: b.repeat(2)), ValueError, r"\[20\], got \[40\]"),
        ("b list", _changed("biases", 0, lambda b: b.tolist()), TypeError, r"biases\[0\]: must be"),
        ("b dev", _changed("biases", 2, lambda b: b.to("meta")), ValueError, "device .* meta"),
        ("tanh", lambda g: {"activation": "tanh"}, ValueError, "activation: .* 'dice', got 'tanh'"),
        ("softmax", lambda g: {"softmax": 1}, TypeError, "softmax: must be True or False, got 1"),
        ("no slopes", lambda g: {"activation": "prelu"}, ValueError, "slopes: needed with .*prelu"),
        ("slopes", lambda g: {"slopes": g["biases"]}, ValueError, "slopes: 'sigmoid' has none"),
        ("gains", lambda g: _dice(g, activation="prelu"), ValueError, "gains: 'prelu' has none"),
        ("no gains", lambda g: _dice(g, gains=None), ValueError, "gains: needed with .*'dice'"),
        ("few", lambda g: _dice(g, shifts=g["biases"][:1]), ValueError, "hidden layer, 2, got 1"),
        (
            "short",
            lambda g: _dice(g, shifts=[g["biases"][0]] * 2),
            ValueError,
            r"\[17\], got",
        ),
        (
            "text",
            lambda g: _dice(g, shifts=["0", "1"]),
            TypeError,
            r"shifts\[0\]: must be",
        ),
        ("int32", lambda g: {"offsets": g["offsets"].int()}, TypeError, "offsets: .* got int32"),
        (
            "few",
            lambda g: {"offsets": g["offsets"][:-1]},
            ValueError,
            r"offsets: .*\[6\], got",
        ),
        ("meta", lambda g: {"offsets": g["offsets"].to("meta")}, ValueError, "offsets: device"),
        (
            "first",
            lambda g: _offsets(g, lambda o: o[0].fill_(1)),
            ValueError,
            "first must be 0",
        ),
        ("last", lambda g: _offsets(g, lambda o: o[-1].sub_(1)), ValueError, "offsets: .* must"),
        ("falls", lambda g: _offsets(g, lambda o: o[2].add_(999)), ValueError, "not decrease"),
        ("negative", lambda g: _offsets(g, lambda o: o[1].fill_(-1)), ValueError, "not decrease"),
        ("huge", lambda g: _offsets(g, lambda o: o[-1].fill_(2**62)), ValueError, str(2**62)),
        (
            "3-d",
            lambda g: {"q_offsets": g["offsets"]},
            ValueError,
            r"q: .*\[Q, d\], got \[5",
        ),
        ("users", lambda g: _typed(g, torch.int64, 3), ValueError, r"q_offsets: .*\[6\], got \[3"),
        ("q int32", lambda g: _typed(g, torch.int32, 6), TypeError, "q_offsets: dtype .* int32"),
        (
            "q first",
            lambda g: _jagged(g, lambda o: o[0].fill_(1)),
            ValueError,
            "q_offsets: the",
        ),
        (
            "q falls",
            lambda g: _jagged(g, lambda o: o[2].add_(99)),
            ValueError,
            "q_offsets: .* not",
        ),
        (
            "q last",
            lambda g: _jagged(g, lambda o: o[-1].add_(9)),
            ValueError,
            "q_offsets: the",
        ),
    ]
}


def _inputs(dtype=torch.float32, seed=0, **sizes):
    sizes = {"B": 5, "C": 3, "L": 20, "d": 8, "dv": 0, "h": 12, "layers": 2} | sizes
    sizes = {"activation": 0, "softmax": 0, "jagged": 0} | sizes
    return make_inputs(torch.Generator().manual_seed(seed), dtype, **sizes)


class Dice(nn.Module):
    """Dice as published: gates by batch-normalised inputs."""

    def __init__(self, units):
        super().__init__()
        self.norm = nn.BatchNorm1d(units, eps=1e-8)
        self.alpha = nn.Parameter(torch.randn(units))

    def forward(self, x):
        """Gate x."""
        gate = torch.sigmoid(self.norm(x))
        return gate * x + self.alpha * (1 - gate) * x


MODULES = {"sigmoid": nn.Sigmoid, "relu": nn.ReLU, "silu": nn.SiLU, "prelu": nn.PReLU, "dice": Dice}


def _perceptron(kind, dim, widths):
    """Build a unit of torch's layers, in float64, as a user has it."""
    layers = []
    for width, out in zip([4 * dim, *widths[:-1]], widths, strict=True):
        unit = MODULES[kind](out) if kind in ("dice", "prelu") else MODULES[kind]()
        layers += [nn.Linear(width, out), unit]
    perceptron = nn.Sequential(*layers, nn.Linear(widths[-1], 1)).double()
    for layer in perceptron:
        if isinstance(layer, Dice):  # as after training
            layer.norm.running_mean.normal_()
            layer.norm.running_var.uniform_(0.5, 2)
            layer.norm.weight.data.normal_()
            layer.norm.bias.data.normal_()
    return perceptron.eval()


def _arguments(perceptron):
    """Return the op's arguments for such a unit, as its documentation says."""
    linear = [layer for layer in perceptron if isinstance(layer, nn.Linear)]
    given = {"weights": [x.weight.T for x in linear], "biases": [x.bias for x in linear]}
    if slopes := [layer.weight for layer in perceptron if isinstance(layer, nn.PReLU)]:
        given |= {"slopes": slopes}
    if dice := [layer for layer in perceptron if isinstance(layer, Dice)]:
        norms = [layer.norm for layer in dice]
        gains = [norm.weight / (norm.running_var + norm.eps).sqrt() for norm in norms]
        pairs = zip(norms, gains, strict=True)
        shifts = [norm.bias - norm.running_mean * gain for norm, gain in pairs]
        given |= {"slopes": [layer.alpha for layer in dice], "gains": gains, "shifts": shifts}
    return given


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_matches_padded_torch_modules(kind, softmax):
    torch.manual_seed(0)
    lengths, most = torch.tensor([3, 0, 7, 1]), 7
    q, padded = (torch.randn(4, n, 6).double().requires_grad_() for n in (2, most))
    perceptron = _perceptron(kind, 6, (9, 5))
    a, b = q[:, :, None].expand(4, 2, most, 6), padded[:, None].expand(4, 2, most, 6)
    pairs = torch.cat([a, b, a - b, a * b], 3)
    weights = perceptron(pairs.flatten(0, 2)).view(4, 2, most)
    held = (torch.arange(most) < lengths[:, None])[:, None]
    if softmax:
        weights = weights.masked_fill(~held, -1e9).softmax(2)
    want = (weights * held) @ padded
    rows = padded[held[:, 0]]
    offsets = torch.tensor([0, 3, 3, 10, 11])
    given = _arguments(perceptron)
    out = din_attention(q, rows, offsets, **given, activation=kind, softmax=softmax)
    torch.testing.assert_close(out, want)
    leaves = [q, padded, *perceptron.parameters()]
    flow = torch.randn_like(out)
    torch.testing.assert_close(
        torch.autograd.grad(out, leaves, flow), torch.autograd.grad(want, leaves, flow)
    )


def test_values_default_to_keys():
    inputs = _inputs()
    assert torch.equal(din_attention(**inputs), din_attention(**inputs | {"v": inputs["k"]}))
    wide = din_attention(**inputs | {"v": inputs["k"].repeat(1, 2)})
    torch.testing.assert_close(wide, din_attention(**inputs).repeat(1, 1, 2))


def test_jagged_candidates_are_those_of_a_batch():
    inputs = _inputs(softmax=1)
    jagged = {"q": inputs["q"].flatten(0, 1), "q_offsets": 3 * torch.arange(6)}
    torch.testing.assert_close(
        din_attention(**inputs | jagged), din_attention(**inputs).flatten(0, 1)
    )
    some = {"q": jagged["q"][:4], "q_offsets": torch.tensor([0, 3, 3, 3, 4, 4])}
    moved = {"q": torch.cat([inputs["q"][0], inputs["q"][3, :1]]), "q_offsets": some["q_offsets"]}
    want = din_attention(**inputs)
    got = din_attention(**inputs | moved)
    torch.testing.assert_close(got, torch.cat([want[0], want[3, :1]]))


@pytest.mark.parametrize("softmax", [0, 1])
@pytest.mark.parametrize("kind", range(len(ACTIVATIONS)))
def test_empty_histories_give_zeros_and_hide_nothing(kind, softmax):
    inputs = _inputs(activation=kind, softmax=softmax, L=30)
    inputs |= {"k": inputs["k"][:19], "offsets": torch.tensor([0, 0, 7, 7, 7, 19])}
    leaves = [inputs[name].requires_grad_() for name in ("q", "k")]
    out = din_attention(**inputs)
    empty = inputs["offsets"].diff() == 0
    assert out[empty].eq(0).all() and out[~empty].ne(0).any(-1).all()
    grads = torch.autograd.grad(out.square().sum(), leaves)
    assert grads[0][empty].eq(0).all() and grads[0][~empty].ne(0).flatten(1).any(1).all()
    assert grads[1].isfinite().all() and grads[1].ne(0).any(1).all()


def test_softmax_is_stable():
    inputs = _inputs(softmax=1)
    inputs["biases"][-1] = torch.full((1,), 3e4)
    inputs["weights"][-1] = inputs["weights"][-1] * 300
    out = din_attention(**inputs)
    doubled = {n: [t.double() for t in inputs[n]] for n in ("weights", "biases")}
    doubled |= {n: inputs[n].double() for n in ("q", "k")}
    torch.testing.assert_close(
        out.double(), din_attention(**inputs | doubled), atol=2e-2, rtol=2e-2
    )


def test_autocast_gives_mixed_inputs_one_dtype():
    inputs = _inputs() | {"k": _inputs()["k"].bfloat16()}
    with pytest.raises(TypeError, match="k: dtype"):
        din_attention(**inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert din_attention(**inputs).dtype == torch.bfloat16


def test_meta_tensors_give_shapes():
    inputs = _inputs(dv=5, jagged=1)

    def moved(value):
        if isinstance(value, list):
            return [moved(item) for item in value]
        return value.to("meta") if torch.is_tensor(value) else value

    out = din_attention(**{name: moved(value) for name, value in inputs.items()})
    assert out.shape == (len(inputs["q"]), 5) and out.is_meta


def test_explains_itself():
    inputs = _inputs()
    given = [inputs[n] for n in ("q", "k", "offsets", "weights", "biases")]
    text = explain(din_attention, *given)
    assert text.startswith("din_attention(q=float32[5, 3, 8] on cpu") and "reference" in text
