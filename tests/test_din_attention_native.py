"""DIN attention in C++: wide and deep units, odd numbers, what it allocates."""

import json

import pytest
import torch
from conftest import python

from livrec_fast import _native, din_attention
from livrec_fast.reference.din_attention import ACTIVATIONS, ORACLES
from livrec_fast.testing import Target, check_forward, check_gradients, inputs_for, subjects
from livrec_fast.testing.checks import expected

pytestmark = pytest.mark.skipif(_native.MISSING is not None, reason=f"{_native.MISSING}")
ORACLE = ORACLES["din_attention"]
TYPICAL = ORACLE.cases["typical"]
SIZES = {
    "wide": {"B": 2, "C": 3, "L": 90, "d": 131, "dv": 67, "h": 203},
    "deep": {"layers": 3, "h": 70, "jagged": 1, "C": 9},
    "narrow": {"d": 1, "h": 1, "layers": 1, "dv": 1},
    "past a vector": {"d": 17, "h": 17, "L": 34, "dv": 17},
    "one user, many candidates": {"B": 1, "C": 75, "L": 65, "dv": 5},
    "many users": {"B": 40, "C": 3, "L": 20, "jagged": 1},
}


@pytest.mark.parametrize("case", SIZES)
def test_agrees_at_odd_sizes(case):
    subject = subjects()["din_attention"]
    for kind in range(len(ACTIVATIONS)):
        sizes = TYPICAL | SIZES[case] | {"activation": kind, "softmax": kind % 2}
        inputs = inputs_for(ORACLE, sizes, ORACLE.dtypes[kind % 3])
        wanted = expected(subject, inputs)
        for level in _native.isa_levels():
            with Target("native", level).active():
                check_forward(subject, "native", inputs, wanted)
                if ACTIVATIONS[kind] not in ("relu", "prelu"):  # of very many kinks one is close
                    check_gradients(subject, "native", inputs, wanted)


@pytest.mark.parametrize("kind", range(len(ACTIVATIONS)))
def test_odd_numbers_stay_where_they_belong(kind):
    inputs = inputs_for(ORACLE, TYPICAL | {"activation": kind, "L": 60})
    user = int(inputs["offsets"].diff().argmax())
    clean = din_attention(**inputs, backend="native")
    q, k = inputs["q"].clone(), inputs["k"].clone()
    q[user, 1, 3] = torch.nan
    with_q = din_attention(**inputs | {"q": q}, backend="native")
    assert with_q[user, 1].isnan().all()
    kept = torch.ones(clean.shape[:2], dtype=torch.bool)
    kept[user, 1] = False
    assert torch.equal(with_q[kept], clean[kept])
    k[inputs["offsets"][user] + 2] = torch.nan
    with_k = din_attention(**inputs | {"k": k}, backend="native")
    assert with_k[user].isnan().all()
    kept[user] = False
    assert torch.equal(with_k[kept], clean[kept])


@pytest.mark.parametrize("kind", range(len(ACTIVATIONS)))
@pytest.mark.parametrize("softmax", [False, True])
def test_great_numbers_are_no_trouble(kind, softmax):
    inputs = inputs_for(ORACLE, TYPICAL | {"activation": kind})
    inputs |= {"q": 300 * inputs["q"], "k": 300 * inputs["k"], "softmax": softmax}
    leaves = [inputs[name].requires_grad_() for name in ("q", "k")]
    outs, grads = [], []
    for kernel in ("native", "reference"):
        outs.append(din_attention(**inputs, backend=kernel))
        grads.append(torch.autograd.grad(outs[-1].sum(), leaves))
    assert outs[1].any() and grads[1][1].any()  # q's gradient is 0 where all units are saturated
    for ours, wanted in zip((outs[0], *grads[0]), (outs[1], *grads[1]), strict=True):
        assert ours.isfinite().all()
        size = wanted.abs().max().clamp(min=1.0)
        torch.testing.assert_close(ours / size, wanted / size, atol=1e-3, rtol=1e-3)


MB = 2**20
PROGRAM = """
import json, torch
from livrec_fast import din_attention
from livrec_fast.benchmarking._clock import peak_extra_bytes
torch.set_num_threads(2)
q, k = torch.randn(16, 128, 32), torch.randn(16 * 300, 32)
weights = [torch.randn(*io) / 8 for io in ((128, 80), (80, 40), (40, 1))]
leaves = [t.requires_grad_() for t in (q, k, *weights)]
biases = [torch.zeros(n) for n in (80, 40, 1)]
offsets = torch.arange(17) * 300
def run():
    return din_attention(q, k, offsets, weights, biases, backend="native")
ways = [lambda: run().detach(), lambda: torch.autograd.grad(run().sum(), leaves)]
for way in ways:
    way()
print(json.dumps([peak_extra_bytes(way, "cpu") for way in ways]))
"""


def test_pairs_are_never_made():
    done = python(PROGRAM)
    assert done.returncode == 0, done.stderr
    forward, training = json.loads(done.stdout)
    if forward is None:
        pytest.skip("the peak cannot be reset here")
    results, pairs = 16 * 128 * 32 * 4, 16 * 128 * 300 * 4 * 32 * 4
    sums = 16 * 4 * (3 * 80 * 32 + 80 * 48 + 8 * 80)
    assert forward < results + 2 * MB < pairs / 100, f"{forward / MB:.1f} MB"
    assert training < 3 * results + sums + 6 * MB < pairs / 20, f"{training / MB:.1f} MB"


GRADIENT = """
import json, torch
from livrec_fast import din_attention
from livrec_fast.benchmarking._clock import peak_extra_bytes
torch.set_num_threads(1)
users, each, dim = 40, 2500, 64
k = torch.randn(users * each, dim).requires_grad_()
q, offsets = torch.randn(users, 1, dim), torch.arange(users + 1) * each
weights, biases = [torch.randn(4 * dim, 1), torch.randn(1, 1)], [torch.zeros(1), torch.zeros(1)]
def run():
    out = din_attention(q, k, offsets, weights, biases, backend="native")
    return torch.autograd.grad(out.sum(), [k])
assert run()[0].any()
print(json.dumps(peak_extra_bytes(run, "cpu")))
"""


def test_values_that_are_keys_have_one_gradient():
    done = python(GRADIENT)
    assert done.returncode == 0, done.stderr
    peak = json.loads(done.stdout)
    if peak is None:
        pytest.skip("the peak cannot be reset here")
    keys = 40 * 2500 * 64 * 4
    assert keys < peak < keys + 10 * MB < 2 * keys, f"{peak / MB:.1f} MB"
