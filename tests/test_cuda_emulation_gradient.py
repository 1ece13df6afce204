"""The CUDA kernels of code attention's gradient, on an emulated GPU, against the formula."""

from functools import partial

import cuda_emulation as gpu
import pytest
import torch
from test_cuda_emulation import (
    ORDERS,
    SIZES,
    SUBJECTS,
    at_the_limits,
    needs_compiler,
    with_offsets,
)

from livrec_fast.reference.code_attention import code_attention as attention
from livrec_fast.testing.checks import check_forward, expected
from livrec_fast.testing.subjects import FORMULA, corners, inputs_for

pytestmark = [needs_compiler, pytest.mark.xdist_group("cuda_emulation")]
GRADIENT, ATTENTION = SUBJECTS["code_attention_gradient"], SUBJECTS["code_attention"]
SETTINGS = ({"limit": gpu.H100}, {"limit": gpu.OLD, "room": 1})


def agrees(inputs, **given):
    """Hold the gradient to the contract's rule."""
    kernel = gpu.emulated(GRADIENT, partial(gpu.differentiate, **given))
    check_forward(kernel, FORMULA, inputs, expected(GRADIENT, inputs))


def attended(inputs):
    """Return the attention's inputs as the gradient's: with its results, and their gradients."""
    args = ATTENTION.arguments(inputs)
    given = {name: value for name, value in inputs.items() if name != "return_lse"}
    out, lse = attention(*args)
    generator = torch.Generator().manual_seed(2)
    flows = [torch.randn(one.shape, generator=generator).to(one) for one in (out, lse)]
    return {**given, "out": out, "lse": lse, "grad": flows[0], "grad_lse": flows[1]}


def draw(offsets=None, **sizes):
    inputs = inputs_for(ATTENTION.oracle, {**SIZES, **sizes})
    return attended(inputs if offsets is None else with_offsets(inputs, offsets))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_corners_of_the_contract(dtype):
    every = corners(GRADIENT.oracle).values()
    plain = [sizes for sizes in every if not sizes["kind"] and sizes["N"] < 100]
    assert len(plain) > 12
    for sizes in plain:
        inputs = inputs_for(GRADIENT.oracle, sizes, dtype)
        for setting in SETTINGS:
            agrees(inputs, **setting)


@pytest.mark.parametrize("bias", [0, 1, 2])
def test_many_pieces(bias):
    """And not all of them at a time."""
    inputs = draw([0, 1, 1, 1023, 1024, 2049, 2049, 5600, 5600], B=8, H=1 + bias // 2, bias=bias)
    for room in (64 << 20, 4 * 2 * 63 * 4 * 3):
        agrees(inputs, room=room)


def test_any_number_of_columns_and_rows():
    for sizes in (
        {"C": 1, "H": 1, "F": 1, "d": 1, "dv": 1},
        {"C": 11, "H": 3, "d": 8, "dv": 70},
        {"C": 40, "H": 2, "F": 2, "d": 33, "dv": 2, "bias": 1},
        {"C": 3, "H": 3, "N": 330, "d": 5, "dv": 128, "B": 2},
        {"C": 1, "H": 4, "F": 8, "N": 120, "B": 1},
        {"C": 32, "H": 1, "N": 9, "d": 4, "dv": 200, "B": 2},
    ):
        inputs = draw(**sizes)
        for setting in SETTINGS:
            agrees(inputs, **setting)


def test_the_order_of_blocks_and_threads_does_not_matter():
    args = GRADIENT.arguments(draw([0, 700, 2100, 3000], C=9, bias=1))
    for setting in SETTINGS:
        first, *others = (gpu.differentiate(*args, order=order, **setting) for order in ORDERS)
        assert all(one.any() for one in first)
        assert all(a.equal(b) for other in others for a, b in zip(first, other, strict=True))


def test_hot_logits_and_values_with_a_common_part():
    inputs = draw([0, 1300, 1301, 2100], F=2, H=1, bias=1)
    generator = torch.Generator().manual_seed(0)
    shapes = [table.shape for table in inputs["key_tables"]]
    whole = [torch.randint(-9, 10, s, generator=generator).float() for s in shapes]
    hot = {"key_tables": whole, "q": torch.full((3, 3, 1, 6), 50.0), "scale": 2.0}
    hot["bias"] = torch.arange(2100).float() % 2 * 20_000 - 10_000
    far = {"value_tables": [table + 1000 for table in inputs["value_tables"]]}
    for changed in (hot, far, hot | far):
        given = {name: inputs[name] for name in inputs if name not in ("out", "lse", "grad_lse")}
        given.pop("grad")
        agrees(attended({**given, **changed}))


def test_masked_histories_get_zeros():
    inputs = draw([0, 1200, 1300, 1300], bias=1)
    inputs["bias"][:1200] = -torch.inf
    inputs["grad_lse"][0] = torch.inf
    grad_q, grad_bias, *found = gpu.differentiate(*GRADIENT.arguments(inputs))
    assert grad_q[[0, 2]].eq(0).all() and grad_q[1].any()
    assert grad_bias[:1200].eq(0).all() and grad_bias[1200:].any()
    assert all(one.isfinite().all() and one.any() for one in found)


def test_bad_contents_stay_in_bounds():
    inputs = draw([0, 900, 2100, 3900], bias=1)
    inputs["codes"] = inputs["codes"].int()
    inputs["codes"][::7] += 1000
    args = GRADIENT.arguments(inputs)
    for offsets in ([0, 3000, 1200, 3900], [-5, 2**62, 7, 2**40], [3900, 100, 90, 0]):
        args[6] = torch.tensor(offsets)
        first, *others = (gpu.differentiate(*args, order=order) for order in ORDERS)
        assert not any(one.isnan().any() for one in first if one.is_floating_point())
        assert all(a.equal(b) for other in others for a, b in zip(first, other, strict=True))
        assert all(one.lt(20).all() and one.diff().gt(0).all() for one in first[2::3])


def test_its_limits_fit_every_chip_and_no_more():
    agrees(attended(at_the_limits(1024)), limit=gpu.OLD)
    with pytest.raises(AssertionError):
        agrees(attended(at_the_limits(1025)), limit=gpu.H100)
