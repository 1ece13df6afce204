"""The Triton kernels of attention over rows that all heads share: edges, and the chip's code."""

import re
from importlib.util import find_spec
from itertools import product

import gpu_gates as gates
import pytest
import torch
from conftest import SUBJECTS, run_in_tritons_interpreter
from test_gates import needs_triton

from livrec_fast.testing.checks import check_forward, check_gradients, expected, results

SUBJECT = SUBJECTS["shared_attention"]
SIZES = {"B": 3, "C": 3, "L": 20, "H": 3, "D": 6, "bias": 2}


def _draw(dtype=torch.float32, **sizes):
    generator = torch.Generator().manual_seed(5)
    return SUBJECT.oracle.make_inputs(generator, dtype, **(SIZES | sizes))


def _check(inputs):
    wanted = expected(SUBJECT, inputs)
    check_forward(SUBJECT, "triton", inputs, wanted)
    check_gradients(SUBJECT, "triton", inputs, wanted)


def biases_and_activations():
    for bias, jagged, activation in product((1, 2), (0, 1), (0, 2)):
        _check(_draw(bias=bias, jagged=jagged, activation=activation))


def heads_fill_several_blocks():
    """Whose first candidate is of any head; the last block in part, and rows wider than tiles."""
    _check(_draw(B=2, C=8, H=5, D=17, jagged=1))
    _check(_draw(B=1, C=9, H=2, D=130, activation=3))
    _check(_draw(torch.bfloat16, B=1, C=25, H=3, D=40))


def pieces_and_hot_logits():
    inputs = _draw(B=1, L=1, H=2, C=2)
    generator = torch.Generator().manual_seed(0)
    inputs["x"] = torch.randn(700, 6, generator=generator)
    inputs["offsets"] = torch.tensor([0, 700])
    inputs["bias"] = torch.linspace(-60, 60, 1400).roll(500).view(700, 2)
    _check(inputs)


def masked_heads_get_zeros():
    inputs = _draw()
    inputs["bias"][:, 1] = -torch.inf
    named = results(SUBJECT, "triton", inputs).named()
    for tensor in (named["output 0"], named["gradient of q"]):
        alive = tensor.abs().amax(-1).gt(0).flatten(0, -2)
        assert not alive[:, 1].any() and alive[:, 0].any() and alive[:, 2].any()
    assert named["gradient of bias"][:, 1].eq(0).all() and named["gradient of bias"][:, 0].any()


def strides_change_no_bit():
    inputs = _draw(D=16)
    plain = results(SUBJECT, "triton", inputs).named()
    assert all(tensor.any() for tensor in plain.values())
    for name in ("q", "x", "bias"):
        inputs[name] = torch.stack([inputs[name]] * 2, -1)[..., 0]
    for name, tensor in results(SUBJECT, "triton", inputs).named().items():
        assert torch.equal(tensor, plain[name]), name


def bad_offsets_stay_in_bounds():
    """The host does not look at them: they are made to ascend from 0 to the end."""
    from livrec_fast.kernels.target_attention import shared_attention
    from livrec_fast.kernels.target_attention_gradient import shared_attention_gradient

    q, x = torch.ones(9, 2, 6), torch.randn(9, 6, generator=torch.Generator().manual_seed(0))
    found = []
    for offsets in (torch.tensor([0, 4, 4, 9]), torch.tensor([-3, 4, 2, 2**62 + 1])):
        given = q, x, offsets, None, 0.5, "softmax", offsets
        out, lse, _ = shared_attention(*given)
        flows = torch.ones_like(out), torch.ones_like(lse), None
        found.append([out, lse, *shared_attention_gradient(flows, *given, out, [True, True])])
        for at in (0, 1):
            needs = [at == 0, at == 1]
            (one,) = shared_attention_gradient(flows, *given, out, needs)
            assert one.any() and one.equal(found[-1][2 + at])
    assert all(one.equal(other) for one, other in zip(*found, strict=True))


def odd_arguments():
    pieces_and_hot_logits()
    masked_heads_get_zeros()
    strides_change_no_bit()
    bad_offsets_stay_in_bounds()


EDGES = [biases_and_activations, heads_fill_several_blocks, odd_arguments]


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("edges", EDGES, ids=lambda edges: edges.__name__)
def test_edges_in_tritons_interpreter(edges):
    run_in_tritons_interpreter(edges)


@needs_triton
def test_rows_travel_once_for_scores_and_sums():
    """Of keys and values half the asynchronous loads of rows are left, each of 128 bits."""
    module, loads = gates.load("target_attention"), {}
    for kernel, types, constants, options in module.compile_configs():
        wide = types["k"] == "*bf16:16" and constants.get("D") == 64
        if kernel is module._attend and wide and constants["BLOCK_C"] == 64:
            sass = gates.compile_triton(kernel, types, constants, options, 90).sass
            assert re.search(r"\bHGMMA\b", sass) and not re.search(r"\bHMMA\b", sass)
            every = re.findall(r"LDGSTS\.E\S*", sass)
            assert all(".128" in one for one in every)
            loads["v" in constants] = len(every)
    assert 0 < 2 * loads[True] <= loads[False]
