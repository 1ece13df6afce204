"""The Triton kernels of DIN attention: their edges."""

from importlib.util import find_spec

import pytest
import torch
from conftest import SUBJECTS, run_in_tritons_interpreter

from livrec_fast import din_attention
from livrec_fast.testing.checks import check_forward, check_gradients, check_repeat, expected

SUBJECT = SUBJECTS["din_attention"]
SIZES = {"B": 2, "C": 2, "L": 20, "d": 6, "dv": 5, "h": 20, "layers": 2, "activation": 0}
SIZES |= {"softmax": 1, "jagged": 0}


def _draw(dtype=torch.float32, **sizes):
    generator = torch.Generator().manual_seed(5)
    return SUBJECT.oracle.make_inputs(generator, dtype, **(SIZES | sizes))


def _check(inputs):
    wanted = expected(SUBJECT, inputs)
    check_forward(SUBJECT, "triton", inputs, wanted)
    check_gradients(SUBJECT, "triton", inputs, wanted)


def gradients_of_several_programs_and_tiles():
    """Programs with runs of candidates, the last one short; 130 items make two tiles."""
    from livrec_fast.kernels import din_attention_gradient as kernels

    most, kernels._MOST_PARTS = kernels._MOST_PARTS, 2
    inputs = _draw(B=3, C=1, d=40, dv=3, h=40, activation=4)
    generator = torch.Generator().manual_seed(0)
    inputs["k"], inputs["v"] = (torch.randn(140, n, generator=generator) for n in (40, 3))
    inputs["offsets"] = torch.tensor([0, 0, 130, 140])
    _check(inputs)
    check_repeat(SUBJECT, "triton", inputs, 2)
    kernels._MOST_PARTS = most


def gradients_of_128_columns():
    """Of the first layer four parts are read; gradients go back by 32 columns of 64."""
    _check(_draw(B=1, C=2, d=100, dv=0, h=60, layers=3))


def gradients_of_wide_layers_are_the_references():
    _check(_draw(B=1, C=1, L=5, h=70, layers=1))


def histories_of_several_tiles():
    for softmax in (0, 1):
        inputs = _draw(B=2, softmax=softmax, activation=4)
        generator = torch.Generator().manual_seed(0)
        inputs["k"], inputs["v"] = (torch.randn(420, n, generator=generator) for n in (6, 5))
        inputs["offsets"] = torch.tensor([0, 0, 420])
        check_forward(SUBJECT, "triton", inputs)


def layers_of_any_number_and_width():
    for sizes in ({"layers": 1, "h": 70, "d": 100, "dv": 0}, {"layers": 3, "h": 30, "jagged": 1}):
        check_forward(SUBJECT, "triton", _draw(**sizes))
        check_forward(SUBJECT, "triton", _draw(torch.bfloat16, **sizes))


def bad_offsets_stay_in_bounds():
    """The host does not look at them: they are made to ascend from 0 to the end."""
    from livrec_fast.kernels.din_attention import din_attention as kernel
    from livrec_fast.kernels.din_attention_gradient import din_attention_gradient as gradient

    made = _draw()
    made |= {"q": made["q"].flatten(0, 1)[:1].expand(9, 6), "k": torch.randn(9, 6)}
    rest = [made[name] for name in ("weights", "biases")] + [[], [], [], "sigmoid", False]
    needs, found = [True] * 2 + [False] + [True] * 6 + [False], []
    for offsets in (torch.tensor([0, 4, 4, 9]), torch.tensor([-3, 4, 2, 2**62])):
        given = made["q"], made["k"], None, offsets, *rest, offsets
        out = kernel(*given)
        found.append([out, *gradient(torch.ones_like(out), *given, out, needs)])
    assert all(one.any() and one.equal(other) for one, other in zip(*found, strict=True))


def large_units_are_refused():
    for sizes, reason in (
        ({"d": 100, "h": 128}, "shares weights on the chip: .* at most 16384"),
        ({"d": 130, "layers": 1}, "keeps products in registers: at most d = 128"),
        ({"h": 130, "layers": 2}, "keeps products in registers: .* 128 units"),
        ({"h": 260, "layers": 1}, "keeps products in registers: .* 256 in the last"),
        ({"layers": 4}, "unrolls layers: at most 3 hidden ones"),
    ):
        with pytest.raises(RuntimeError, match=reason):
            din_attention(**_draw(**sizes), backend="triton")


def gradients():
    gradients_of_several_programs_and_tiles()
    gradients_of_128_columns()
    gradients_of_wide_layers_are_the_references()


def edges():
    histories_of_several_tiles()
    layers_of_any_number_and_width()
    bad_offsets_stay_in_bounds()
    large_units_are_refused()


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("edges", [edges, gradients], ids=lambda edges: edges.__name__)
def test_edges_in_tritons_interpreter(edges):
    run_in_tritons_interpreter(edges)
