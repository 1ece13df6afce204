"""The Triton kernels of the contrastive loss: what they compute, and how they reach a chip."""

import re
from importlib.util import find_spec
from itertools import product

import gpu_gates as gates
import pytest
import torch
from conftest import SUBJECTS, run_in_tritons_interpreter
from test_gates import needs_triton

from livrec_fast import in_batch_contrastive
from livrec_fast.testing.checks import (
    check_forward,
    check_gradients,
    check_repeat,
    expected,
    results,
)

SUBJECT = SUBJECTS["in_batch_contrastive"]
SIZES = {"B": 37, "D": 20, "E": 9}
PLAIN = dict.fromkeys(
    ("query_ids", "key_ids", "false_negative_threshold", "log_q", "weights", "valid", "extra_keys")
)

UNSAMPLED = {"log_q_rule": "unsampled_positive", "log_q": torch.full((37,), -2.0)}


def _draw(dtype=torch.float32, plain=False, **changes):
    """Draw inputs with every mask at once, or none; a query in four resembles another row's."""
    sizes = SIZES | {name: changes.pop(name) for name in SUBJECT.oracle.sizes if name in changes}
    made = SUBJECT.oracle.make_inputs(torch.Generator().manual_seed(3), torch.float32, **sizes)
    made["query"][::4] = made["query"].flip(0)[::4] + 0.1 * made["query"][::4]
    made |= {name: made[name].to(dtype) for name in ("query", "key", "extra_keys")}
    return made | (PLAIN if plain else {}) | changes


def _check(**inputs):
    wanted = expected(SUBJECT, inputs)
    check_forward(SUBJECT, "triton", inputs, wanted)
    check_gradients(SUBJECT, "triton", inputs, wanted)


def dtypes_and_widths():
    for dtype, dim in ((torch.float32, 100), (torch.bfloat16, 20), (torch.float16, 260)):
        _check(**_draw(dtype, D=dim, temperature=torch.tensor(0.1)))


def sides_of_several_blocks():
    _check(**_draw(B=150, E=130, D=5))
    _check(**_draw(B=131, E=0, D=5, plain=True, symmetric=False))


def one_mask_after_another():
    ids = torch.arange(37) % 5
    for changes in (
        {"key_ids": ids, "symmetric": False},
        {"query_ids": ids, "log_q": torch.linspace(-50, 30, 37)},
        {"false_negative_threshold": -0.3, "symmetric": False},
        {"valid": ids > 0, "normalize": False, "temperature": torch.tensor(3.0)},
    ):
        _check(**_draw(plain=True, **changes))


def temperatures_far_apart():
    for value in (0.01, 30.0):
        _check(**_draw(plain=True, temperature=torch.tensor(value)))


def small_sizes():
    for name in ("no rows", "one row with extra keys", "one row of several positives",
                 "one dimension"):  # fmt: skip
        _check(**_draw(**SUBJECT.oracle.cases[name]))


def what_invalid_rows_hold_does_not_matter():
    inputs = _draw(valid=torch.arange(37) % 3 != 1)
    clean = results(SUBJECT, "triton", inputs)
    for name in ("query", "key", "log_q"):
        inputs[name] = inputs[name].clone()
        inputs[name][1:37:3] = torch.nan
    spoilt = results(SUBJECT, "triton", inputs)
    assert all(tensor.any() for tensor in clean.named().values())
    for name, tensor in clean.named().items():
        assert torch.equal(tensor, spoilt.named()[name]), name


def without_negatives_all_is_exactly_zero():
    for mask in (
        {"key_ids": torch.zeros(37, dtype=torch.int64)},
        {"false_negative_threshold": -1.5},
        {"valid": torch.arange(37) == 17},
        UNSAMPLED | {"key_ids": torch.zeros(37, dtype=torch.int64)},
        UNSAMPLED | {"valid": torch.arange(37) == 17},
    ):
        inputs = _draw(plain=True, temperature=torch.tensor(0.01)) | mask
        found = results(SUBJECT, "triton", inputs)
        for name, tensor in found.named().items():
            assert (tensor == 0).all(), name
            assert name != "output 0" or not tensor.signbit().any()


def small_losses_keep_their_digits():
    """At logits near 100, logsumexp - s_ii would keep only 1e-5 of a loss."""
    unit = torch.eye(8)[torch.arange(24) % 8]
    unit = unit + 1e-3 * torch.randn(24, 8, generator=torch.Generator().manual_seed(6))
    options = {"temperature": 0.05, "key_ids": torch.arange(24) % 8, "reduction": "none"}
    losses = in_batch_contrastive(unit, unit, **options, backend="triton")
    wanted = in_batch_contrastive(unit.double(), unit.double(), **options)
    assert wanted.max() < 1e-6
    torch.testing.assert_close(losses.double(), wanted, rtol=1e-4, atol=0)


def pairs_kept_or_found_again_are_the_same():
    """Also strip by strip. Cosines here lie on the threshold but for rounding."""
    from livrec_fast.kernels import _contrastive_pairs

    made = _draw(B=150, D=24, E=3, false_negative_threshold=0.5)
    made["query"] = 1.1 * made["query"].sign()
    args, found = list(SUBJECT.arguments(made)), []
    args = [a.detach().requires_grad_() if at in (0, 1, 2) else a for at, a in enumerate(args)]
    at = next(i for i, a in enumerate(SUBJECT.op.schema.arguments) if a.name == "keep_pairs")
    most = _contrastive_pairs.MOST_BITS
    for kept, bits in ((True, most), (False, most), (False, 1)):
        args[at], _contrastive_pairs.MOST_BITS = kept, bits
        losses, _, pairs, _ = SUBJECT.op.operator("triton")(*args)
        assert pairs.shape == ((150, 3) if kept else (0, 0))
        found.append([losses, *torch.autograd.grad(losses.sum(), args[:3])])
        if kept:
            held = ((pairs[:, :, None] >> torch.arange(64)) & 1).flatten(1)[:, :150]
            assert torch.equal(held, held.T) and 150 < held.sum() < 150**2 / 2
    _contrastive_pairs.MOST_BITS = most
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def repeats_and_strides_change_no_bit():
    inputs = _draw(D=16)
    check_repeat(SUBJECT, "triton", inputs, 2)
    plain = results(SUBJECT, "triton", inputs).named()
    assert all(tensor.any() for tensor in plain.values())
    for name in ("query", "key", "extra_keys"):
        inputs[name] = inputs[name].T.contiguous().T
    inputs["log_q"] = torch.stack([inputs["log_q"]] * 2, 1)[:, 0]
    for name, tensor in results(SUBJECT, "triton", inputs).named().items():
        assert torch.equal(tensor, plain[name]), name


def several_positives():
    _check(**_draw(groups=1, temperature=torch.tensor(0.2)))
    alone = {"groups": 1, "group_ids": torch.zeros(46, dtype=torch.int64)}
    assert not results(SUBJECT, "triton", _draw(**alone)).named()["output 0"].any()


def positives_that_are_no_samples():
    _check(**_draw(rule=1, temperature=torch.tensor(0.2)))
    _check(**_draw(torch.bfloat16, rule=1, symmetric=False, temperature=torch.tensor(0.1)))
    log_q = -torch.logspace(-6, 2, 37)  # of nearly all samples, and of nearly none
    rule = {"log_q_rule": "unsampled_positive", "log_q": log_q, "temperature": torch.tensor(2.0)}
    _check(**_draw(plain=True, **rule))


def temperatures_gradient_sees_no_rounded_weights():
    """Units are as given, so that only weights could be rounded to 16 bits."""
    for seed, (value, symmetric) in enumerate(product((0.01, 0.1, 1.0), (False, True))):
        generator = torch.Generator().manual_seed(seed)
        query, key = torch.randn(2, 64, 16, generator=generator)
        query, key = (torch.nn.functional.normalize(x, dim=1).bfloat16() for x in (query, key))
        flow, found = torch.randn(64, generator=generator), []
        options = {"normalize": False, "symmetric": symmetric, "reduction": "none"}
        for wide, name in ((torch.float32, "triton"), (torch.float64, "reference")):
            scale = torch.tensor(value, dtype=wide, requires_grad=True)
            rows = (query, key) if name == "triton" else (query.double(), key.double())
            losses = in_batch_contrastive(*rows, temperature=scale, **options, backend=name)
            found.append(torch.autograd.grad(losses, scale, flow.to(wide))[0].double())
        limit = 2e-7 * float(flow.abs().sum()) / value**2
        assert abs(found[0] - found[1]) <= min(limit, 1e-3 * abs(found[1])), (seed, value)


def inputs_of_every_kind():
    dtypes_and_widths()
    temperatures_far_apart()
    temperatures_gradient_sees_no_rounded_weights()


def blocks_and_small_sizes():
    sides_of_several_blocks()
    small_sizes()


def masks_and_groups():
    one_mask_after_another()
    several_positives()
    positives_that_are_no_samples()


def exact_edges():
    what_invalid_rows_hold_does_not_matter()
    without_negatives_all_is_exactly_zero()
    small_losses_keep_their_digits()


def same_bits():
    pairs_kept_or_found_again_are_the_same()
    repeats_and_strides_change_no_bit()


EDGES = [inputs_of_every_kind, blocks_and_small_sizes, masks_and_groups, exact_edges, same_bits]


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("edges", EDGES, ids=lambda edges: edges.__name__)
def test_edges_in_tritons_interpreter(edges):
    run_in_tritons_interpreter(edges)


@needs_triton
def test_half_precision_meets_warp_groups_instructions():
    """Units travel asynchronously while others are multiplied; both products are a warp group's."""
    for name in ("contrastive", "contrastive_gradient"):
        config = next(
            config
            for config in gates.load(name).compile_configs()
            if config[3]["oldest"] == 90
            and config[1]["own"].startswith("*bf16")
            and config[2]["STRIDE"] == 256
        )
        sass = gates.compile_triton(*config, 90).sass
        assert re.search(r"\bHGMMA\b", sass) and not re.search(r"\bHMMA\b", sass)
        assert re.search(r"LDGSTS\.E\S*\.128", sass)
