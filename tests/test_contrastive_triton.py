"""The Triton kernels of the contrastive loss: what they compute, and how they reach a chip."""

import re
from importlib.util import find_spec

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
    small = [sizes for sizes in SUBJECT.oracle.cases.values() if sizes["B"] <= 5]
    assert len(small) > 4
    for sizes in small:
        _check(**_draw(**sizes))


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
    ):
        inputs = _draw(plain=True, temperature=torch.tensor(0.01), **mask)
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
        losses, _, pairs = SUBJECT.op.operator("triton")(*args)
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
    """Against the formula: the mean over positives, masks hide none, rows with none else are 0."""
    from livrec_fast.kernels.contrastive import in_batch_contrastive as forward
    from livrec_fast.kernels.contrastive_gradient import in_batch_contrastive_gradient as backward

    made = _draw(temperature=torch.tensor(0.2))
    names = ("query", "key", "temperature", "log_q", "extra_keys")
    given = {name: value for name, value in made.items() if name not in ("weights", "reduction")}
    generator = torch.Generator().manual_seed(8)
    given |= {"keep_pairs": True, "group_ids": torch.randint(12, (46,), generator=generator)}
    given["false_negative_threshold"] = None
    for everywhere in (False, True):
        if everywhere:
            given["group_ids"] = torch.zeros_like(given["group_ids"])
        losses, lse, pairs = forward(**given)
        flow = torch.randn(37, generator=generator)
        found = backward(flow, lse, pairs, wanted=names, **given)
        leaves = {name: given[name].double().requires_grad_() for name in names}
        wanted = _several_by_hand(**given | leaves)
        grads = torch.autograd.grad(wanted @ flow.double(), leaves.values())
        torch.testing.assert_close(losses.double(), wanted, rtol=1e-5, atol=1e-5)
        assert bool(losses.any()) != everywhere
        for name, grad in zip(names, grads, strict=True):
            scale = float(grad.abs().max())
            torch.testing.assert_close(
                found[name].double(),
                grad,
                rtol=1e-5,
                atol=1e-5 * scale,
                msg=lambda m, n=name: n + m,
            )


def _several_by_hand(
    query, key, temperature, log_q, extra_keys, query_ids, key_ids, group_ids, valid, **rest
):
    batch, keys = len(query), torch.cat([key, extra_keys])
    there = torch.cat([valid, torch.ones(len(extra_keys), dtype=torch.bool)])
    unit, keys = (torch.nn.functional.normalize(x, dim=1) for x in (query, keys))
    scaled = unit @ keys.T / temperature
    same = group_ids[:batch, None] == group_ids
    masked = key_ids[:batch, None] == key_ids
    masked[:, :batch] |= query_ids[:, None] == query_ids

    def loss(logits, positive, gone):
        every = logits.masked_fill(gone, -torch.inf)
        weights = positive / positive.sum(1, keepdim=True).clamp(min=1)
        lost = every.logsumexp(1) - (logits * weights).sum(1)
        return lost.where((~gone & ~positive).any(1) & valid, lost.new_zeros(()))

    positive = same & there
    gone = (masked & ~same) | ~there
    total = loss(scaled - log_q, positive, gone)
    square = scaled[:, :batch].T
    return (total + loss(square, positive[:, :batch].T & valid, gone[:, :batch].T | ~valid)) / 2


def inputs_of_every_kind():
    dtypes_and_widths()
    temperatures_far_apart()


def blocks_and_small_sizes():
    sides_of_several_blocks()
    small_sizes()


def masks_and_groups():
    one_mask_after_another()
    several_positives()


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
    for name, kernel in (("contrastive", "_sum_terms"), ("contrastive_gradient", "_sweep")):
        for built, types, constants, options in gates.load(name).compile_configs():
            wanted = built.__name__ == kernel and options.get("oldest") == 90
            if wanted and types["own"].startswith("*bf16") and constants["STRIDE"] == 256:
                sass = gates.compile_triton(built, types, constants, options, 90).sass
                assert re.search(r"\bHGMMA\b", sass) and not re.search(r"\bHMMA\b", sass)
                assert re.search(r"LDGSTS\.E\S*\.128", sass)
