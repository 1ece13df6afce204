"""TargetAttention: by hand, its forms of histories and candidates, training, refusals."""

import math

import pytest
import torch
from torch import nn

from livrec_fast import TargetAttention

OFFSETS = torch.tensor([0, 9, 9, 30, 41])
LENGTHS, T, DIM, KEY = OFFSETS.diff(), 41, 6, 8
WEIGHTS = {
    "softmax": lambda z: z.softmax(0),
    "none": lambda z: z,
    "silu": lambda z: z * z.sigmoid(),
    "sigmoid": torch.sigmoid,
}


@pytest.fixture(autouse=True)
def forget():
    """Let each test compile the module anew."""
    torch.compiler.reset()


class Torchrec:
    """Has the methods of torchrec's JaggedTensor that are read."""

    def __init__(self, values, offsets):
        self.values, self.offsets = lambda: values, lambda: offsets.int()


class Keyed(Torchrec):
    """Has those of a KeyedJaggedTensor."""

    def __init__(self, keys, values, offsets):
        super().__init__(values, offsets)
        self.keys = lambda: keys


def _inputs(dtype=torch.float64, seed=0):
    draw = {"generator": torch.Generator().manual_seed(seed), "dtype": dtype}
    return torch.randn(4, 3, DIM, **draw), torch.randn(T, KEY, **draw)


def _unit(dtype=torch.float64, **settings):
    torch.manual_seed(1)
    given = {"key_dim": KEY, "head_dim": 3, "value_dim": 5, "out_dim": 4, "dtype": dtype}
    unit = TargetAttention(DIM, 2, **given | settings)
    for name, parameter in unit.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return unit


def _bias(kind):
    if kind is None:
        return None
    bias = torch.randn((T, 2)[:kind], generator=torch.Generator().manual_seed(2)).double()
    bias[3] = -torch.inf
    return bias


def _padded(x, fill=math.nan, right=True):
    """Pad to 25 rows; on the right, or anywhere but for the order."""
    padded = torch.full((4, 25, *x.shape[1:]), fill, dtype=x.dtype)
    mask = torch.zeros(4, 25, dtype=torch.bool)
    generator = torch.Generator().manual_seed(3)
    for user, length in enumerate(LENGTHS.tolist()):
        at = torch.arange(length) if right else torch.randperm(25, generator=generator)[:length]
        padded[user, at.sort().values] = x[OFFSETS[user] : OFFSETS[user + 1]]
        mask[user, at] = True
    return padded, mask


def _by_hand(unit, candidates, x, bias=None):
    """Attend candidate by candidate and head by head."""

    def project(layer, row):
        return layer.weight @ row + (0 if layer.bias is None else layer.bias)

    rows = []
    for user, own in enumerate(candidates):
        span = slice(OFFSETS[user], OFFSETS[user + 1])
        for c in own:
            out = x.new_zeros(2, unit.value_dim)
            q = project(unit.query, c).view(2, -1)
            for h in range(2 if len(x[span]) else 0):
                k = torch.stack([project(unit.key, row).view(2, -1)[h] for row in x[span]])
                v = torch.stack([project(unit.value, row).view(2, -1)[h] for row in x[span]])
                b = 0 if bias is None else bias[span, h] if bias.dim() == 2 else bias[span]
                z = k @ q[h] * unit.scale + b
                left = z > -torch.inf
                out[h] = WEIGHTS[unit.activation](z[left]) @ v[left]
            rows.append(project(unit.out, out.flatten()))
    return torch.stack(rows).view(4, 3, -1)


@pytest.mark.parametrize("bias", [None, 1, 2])
@pytest.mark.parametrize("activation", WEIGHTS)
@pytest.mark.parametrize("absorb", ["none", "query", "auto"])
def test_by_hand(absorb, activation, bias):
    (candidates, x), bias = _inputs(), _bias(bias)
    unit = _unit(absorb=absorb, activation=activation, biases=("query",), scale=0.7)
    wanted = _by_hand(unit, candidates, x, bias)
    out = unit(candidates, x, OFFSETS, bias=bias)
    torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-12)
    assert torch.equal(out[1], torch.zeros(3, 4).double())
    grads = [torch.autograd.grad(o.cos().sum(), list(unit.parameters())) for o in (out, wanted)]
    for ours, theirs in zip(*grads, strict=True):
        assert theirs.any()
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("activation", WEIGHTS)
def test_biases(activation):
    candidates, x = _inputs()
    unit = _unit(biases=("query", "key", "value", "out"), activation=activation)
    torch.testing.assert_close(unit(candidates, x, OFFSETS), _by_hand(unit, candidates, x))
    assert torch.equal(unit(candidates, x, OFFSETS)[1], unit.out.bias.expand(3, 4))


@pytest.mark.parametrize("candidates_per_user", [1, 3, 9])
def test_absorbs_where_that_is_less(candidates_per_user):
    unit = _unit(biases=())
    q = torch.zeros(4, candidates_per_user, 2, 3)
    assert unit._absorbs(q, OFFSETS) == (candidates_per_user <= 8)  # 8 (3 + 5) / (16 - 3 - 5)
    assert unit._absorbs(q.flatten(0, 1), OFFSETS) == (candidates_per_user <= 8)
    assert not _unit(biases=("key",))._absorbs(q, OFFSETS)


def _forms(x):
    """Return arguments for every form of the history."""
    padded, mask = _padded(x)
    scattered, scattered_mask = _padded(x, right=False)
    with_holes = torch.nested.narrow(
        padded.nan_to_num(), 1, torch.zeros(4).long(), LENGTHS, layout=torch.jagged
    )
    return {
        "int32 offsets": (x, {"offsets": OFFSETS.int()}),
        "lengths": (x, {"lengths": LENGTHS.int()}),
        "nested": (torch.nested.nested_tensor_from_jagged(x, OFFSETS), {}),
        "nested with holes": (with_holes, {}),
        "torchrec": (Torchrec(x, OFFSETS), {}),
        "keyed": (Keyed(["clicks"], x, OFFSETS), {}),
        "padded, lengths": (padded, {"lengths": LENGTHS}),
        "padded, mask": (padded, {"mask": mask}),
        "scattered, mask": (scattered, {"mask": scattered_mask}),
    }


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("form", _forms(torch.zeros(T, KEY)))
def test_forms_of_the_history(form, compiled):
    if compiled and form == "nested with holes":
        pytest.skip("its rows have to be counted")
    candidates, x = _inputs()
    x.requires_grad_()
    unit = _unit(activation="silu")
    history, given = _forms(x)[form]
    call = torch.compile(unit, fullgraph=True, backend="aot_eager") if compiled else unit
    wanted, out = unit(candidates, x, OFFSETS), call(candidates, history, **given)
    torch.testing.assert_close(out, wanted)
    wanted, grad = (torch.autograd.grad(o.cos().sum(), x)[0] for o in (wanted, out))
    assert wanted.any()
    torch.testing.assert_close(grad, wanted)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("right", [False, True])
def test_bias_of_a_padded_history(right, per_head, compiled):
    candidates, x = _inputs()
    unit, bias = _unit(), _bias(2 if per_head else 1)
    padded, mask = _padded(x, right=right)
    call = torch.compile(unit, fullgraph=True, backend="aot_eager") if compiled else unit
    out = call(candidates, padded, mask=mask, bias=_padded(bias, 3.0, right=right)[0])
    torch.testing.assert_close(out, unit(candidates, x, OFFSETS, bias=bias))
    whole = padded.nan_to_num()
    lengths, bias = torch.full((4,), 25), torch.randn(4, 25).double()
    wanted = unit(candidates, whole, lengths=lengths, bias=bias)
    torch.testing.assert_close(call(candidates, whole, bias=bias), wanted)


@pytest.mark.parametrize("absorb", ["none", "query"])
def test_forms_of_the_candidates(absorb):
    candidates, x = _inputs()
    unit = _unit(absorb=absorb)
    wanted = unit(candidates, x, OFFSETS)
    torch.testing.assert_close(unit(candidates[:, 0], x, OFFSETS), wanted[:, 0])
    ends, users = torch.tensor([0, 0, 2, 5, 6]), torch.tensor([1, 1, 2, 2, 2, 3])
    at = (users, torch.tensor([0, 1, 0, 1, 2, 0]))
    flat = candidates[at]
    for bias in (None, _bias(2)):
        out = unit(flat, x, OFFSETS, candidate_offsets=ends, bias=bias)
        torch.testing.assert_close(out, unit(candidates, x, OFFSETS, bias=bias)[at])
    nested = torch.nested.nested_tensor_from_jagged(flat, ends)
    out = unit(nested, torch.nested.nested_tensor_from_jagged(x, OFFSETS))
    torch.testing.assert_close(out.values(), wanted[at])
    assert torch.equal(out.offsets(), ends)
    assert torch.equal(unit(Torchrec(flat, ends), Torchrec(x, OFFSETS)), out.values())


@pytest.mark.parametrize("absorb", ["none", "query"])
def test_nothing_to_attend_to(absorb):
    unit = _unit(absorb=absorb)
    candidates, x = _inputs()
    out = unit(candidates, x[:0], torch.zeros(5).long())
    assert torch.equal(out, torch.zeros(4, 3, 4).double())
    grads = torch.autograd.grad(out.sum(), [unit.query.weight, unit.key.weight, unit.value.weight])
    assert not any(grad.any() for grad in grads)
    assert unit(candidates[:, :0], x, OFFSETS).shape == (4, 0, 4)
    assert unit(candidates[:0], x[:0], OFFSETS[:1]).shape == (0, 3, 4)
