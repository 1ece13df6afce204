"""in_batch_contrastive's reductions and weights, and where there are several positives."""

import math

import pytest
import torch
from conftest import SUBJECTS

from livrec_fast import _native, in_batch_contrastive
from livrec_fast.testing.checks import check_forward, check_gradients, expected

B, D, E = 12, 8, 5
NAN = math.nan


def draw(seed=0, rows=B, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, D, generator=generator).to(dtype) for n in (rows, rows, E)]


def test_reductions_and_weights():
    query, key, _ = draw()
    weights = torch.linspace(0, 2, B)
    valid = torch.arange(B) != 4
    options = {"weights": weights.masked_fill(~valid, NAN), "valid": valid}
    losses = in_batch_contrastive(query, key, valid=valid, reduction="none")
    kept = weights.double() * valid
    weighted = in_batch_contrastive(query, key, reduction="none", **options)
    torch.testing.assert_close(weighted, kept * losses)
    total = in_batch_contrastive(query, key, reduction="sum", **options)
    torch.testing.assert_close(total, (kept * losses).sum())
    mean = in_batch_contrastive(query, key, **options)
    torch.testing.assert_close(mean, (kept * losses).sum() / kept.sum())
    unweighted = in_batch_contrastive(query, key, valid=valid)
    torch.testing.assert_close(unweighted, losses.sum() / (B - 1))
    assert in_batch_contrastive(query, key, weights=torch.zeros(B)) == 0
    assert in_batch_contrastive(query, key, valid=torch.zeros(B, dtype=torch.bool)) == 0


def test_weights_have_a_gradient():
    query, key, _ = draw()
    weights = torch.rand(B, dtype=torch.float64, requires_grad=True)
    losses = in_batch_contrastive(query, key, reduction="none")
    (found,) = torch.autograd.grad(in_batch_contrastive(query, key, weights=weights), weights)
    mean = (weights * losses).sum() / weights.sum()
    torch.testing.assert_close(found, (losses - mean.detach()) / weights.sum())


def test_groups_of_one_are_no_groups():
    query, key, extra = draw()
    options = {"extra_keys": extra, "symmetric": True, "reduction": "none"}
    for ids in (torch.arange(B), torch.arange(B + E)):
        found = in_batch_contrastive(query, key, group_ids=ids, **options)
        torch.testing.assert_close(found, in_batch_contrastive(query, key, **options))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_positives_alone_are_exactly_zero(dtype, symmetric):
    """Three rows of a group, the only valid ones; and all of one group."""
    query, key, _ = (x.requires_grad_() for x in draw(dtype=dtype))
    ids = torch.tensor([0] * 3 + list(range(1, B - 2)))
    for groups, valid in ((ids, torch.arange(B) < 3), (torch.zeros_like(ids), None)):
        losses = in_batch_contrastive(
            query, key, group_ids=groups, valid=valid, symmetric=symmetric, reduction="none"
        )
        assert losses.tolist() == [0] * B and not losses.signbit().any()
        for grad in torch.autograd.grad(losses.sum(), (query, key)):
            assert (grad == 0).all()


def test_a_mask_never_hides_a_positive():
    query, key, _ = draw()
    ids = torch.arange(B) // 3
    plain = in_batch_contrastive(query, key, group_ids=ids, reduction="none")
    for mask in ({"key_ids": ids}, {"query_ids": ids}):
        found = in_batch_contrastive(query, key, group_ids=ids, reduction="none", **mask)
        assert torch.equal(found, plain)


@pytest.mark.skipif(_native.MISSING is not None, reason=f"{_native.MISSING}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("most", [1, 40, 400])
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_kernel_agrees_on_groups_over_many_tiles(symmetric, most, dtype):
    """Groups of 301 rows, of some and of hardly any; masks and corrections besides."""
    subject = SUBJECTS["in_batch_contrastive"]
    generator = torch.Generator().manual_seed(most)
    inputs = subject.oracle.make_inputs(generator, dtype, B=301, D=40, E=77, P=6)
    inputs |= {
        "group_ids": torch.randint(most, (378,), generator=generator),
        "symmetric": symmetric,
        "temperature": torch.tensor(0.1),
    }
    wanted = expected(subject, inputs)
    assert (most > 1) == bool(wanted.exact.returned.any())
    check_forward(subject, "native", inputs, wanted)
    check_gradients(subject, "native", inputs, wanted)


@pytest.mark.skipif(_native.MISSING is not None, reason=f"{_native.MISSING}")
@pytest.mark.parametrize("of_extra_keys", [False, True])
def test_pair_vectors_kept_or_found_again_are_the_same(of_extra_keys):
    """Blocks of pairs begin in the batch and end among the extra keys; some cosines are 14 / 70."""
    subject, rows = SUBJECTS["in_batch_contrastive"], 1_100
    generator = torch.Generator().manual_seed(1)
    inputs = subject.oracle.make_inputs(generator, torch.float32, B=rows, D=24, E=600, P=70)
    vectors = inputs["pair_vectors"][: None if of_extra_keys else rows].sign()
    inputs |= {"pair_vectors": vectors, "false_negative_threshold": 0.2, "valid": None}
    args = subject.arguments(inputs)
    at = next(i for i, a in enumerate(subject.op.schema.arguments) if a.name == "keep_pairs")
    found = []
    for kept in (True, False):
        args[at] = kept
        leaves = [a.detach().requires_grad_() for a in args[:3]]
        losses, _, pairs, _ = subject.op.operator("native")(*leaves, *args[3:])
        found.append([losses, *torch.autograd.grad(losses.sum(), leaves)])
        assert kept == (pairs.numel() > 0)
        if kept:
            bits = ((pairs[:, :, None] >> torch.arange(64)) & 1).bool().flatten(1)
            products = vectors[:rows] @ vectors.T
            assert bits.shape == (rows, len(vectors) + -len(vectors) % 64)
            sure = products != 14
            assert torch.equal(bits[:, : len(vectors)][sure], (products > 14)[sure])
            assert torch.equal(bits[:, :rows], bits[:, :rows].T) and not sure.all()
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other) and one.any()
