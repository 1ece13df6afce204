"""The Triton kernel of DIN attention: its edges."""

from importlib.util import find_spec

import pytest
import torch
from conftest import SUBJECTS, run_in_tritons_interpreter

from livrec_fast import din_attention
from livrec_fast.testing.checks import check_forward

SUBJECT = SUBJECTS["din_attention"]
SIZES = {"B": 2, "C": 2, "L": 20, "d": 6, "dv": 5, "h": 20, "layers": 2, "activation": 0}
SIZES |= {"softmax": 1, "jagged": 0}


def _draw(dtype=torch.float32, **sizes):
    generator = torch.Generator().manual_seed(5)
    return SUBJECT.oracle.make_inputs(generator, dtype, **(SIZES | sizes))


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

    made = _draw()
    made |= {"q": made["q"].flatten(0, 1)[:1].expand(9, 6), "k": torch.randn(9, 6)}
    rest = [made[name] for name in ("weights", "biases")] + [[], [], [], "sigmoid", False]
    found = [
        kernel(made["q"], made["k"], None, offsets, *rest, offsets)
        for offsets in (torch.tensor([0, 4, 4, 9]), torch.tensor([-3, 4, 2, 2**62]))
    ]
    assert found[0].any() and found[0].equal(found[1])


def large_units_are_refused():
    for sizes, reason in (
        ({"d": 100, "h": 130}, "shares weights on the chip: .* at most 16384"),
        ({"layers": 4}, "unrolls layers: at most 3 hidden ones"),
    ):
        with pytest.raises(RuntimeError, match=reason):
            din_attention(**_draw(**sizes), backend="triton")


def edges():
    histories_of_several_tiles()
    layers_of_any_number_and_width()
    bad_offsets_stay_in_bounds()
    large_units_are_refused()


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_edges_in_tritons_interpreter():
    run_in_tritons_interpreter(edges)
