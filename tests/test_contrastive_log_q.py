"""log_q_rule="unsampled_positive": the formula by itself, and what it is for."""

import math

import pytest
import torch

from livrec_fast import in_batch_contrastive
from livrec_fast.testing.checks import check_forward, check_gradients, expected
from livrec_fast.testing.subjects import inputs_for, subjects

B, D, E = 9, 6, 4
RULE = {"log_q_rule": "unsampled_positive"}
IDS = torch.tensor([1, 2, 3, 2, 4, 5, 6, 7, 4])


def draw(seed=0, rows=B):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2 * rows + E, D, generator=generator, dtype=torch.float64).split(
        [rows, rows, E]
    )


def naive(query, key, extra, log_q, temperature, is_negative):
    """-w log(e^f_ii / sum_j e^(f_ij - log Q'_j)), Q'_j = Q_j / (1 - Q_i), w = 1 - P(i)."""
    losses, keys = [], [*key, *extra]
    for i, row in enumerate(query):
        scores = [float(row @ other) / temperature for other in keys]
        some = [
            math.exp(scores[j]) / (math.exp(log_q[j]) / (1 - math.exp(log_q[i])))
            for j in range(len(keys))
            if is_negative(i, j)
        ]
        if not some:
            losses.append(0.0)
            continue
        own = math.exp(scores[i])
        weight = 1 - own / (own + sum(some) / len(some))
        losses.append(-weight * math.log(own / sum(some)))
    return torch.tensor(losses, dtype=torch.float64)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_equals_the_papers_formula(temperature):
    query, key, extra = draw()
    log_q = torch.linspace(-5, -0.2, B + E).double()
    options = {"temperature": temperature, "normalize": False, "key_ids": IDS, "log_q": log_q}
    options |= {"extra_keys": extra, "reduction": "none", **RULE}
    wanted = naive(
        query, key, extra, log_q.tolist(), temperature,
        lambda i, j: j != i and (j >= B or bool(IDS[i] != IDS[j])),
    )  # fmt: skip
    torch.testing.assert_close(in_batch_contrastive(query, key, **options), wanted)
    found = in_batch_contrastive(
        query.float(), key.float(), **options | {"extra_keys": extra.float()}
    )
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)


def test_the_weight_is_a_constant():
    query, key, extra = draw()
    log_q = torch.linspace(-5, -0.2, B + E).double().requires_grad_()
    leaves = [query.requires_grad_(), key.requires_grad_(), log_q]
    loss = in_batch_contrastive(
        query, key, extra_keys=extra, log_q=log_q, normalize=False, temperature=1.0,
        reduction="none", **RULE,
    )  # fmt: skip
    scores = query @ torch.cat([key, extra]).T
    others = ~torch.eye(B, B + E, dtype=torch.bool)
    corrected = scores - log_q + (1 - log_q[:B].exp()).log()[:, None]
    total = corrected.masked_fill(~others, -torch.inf).logsumexp(1)
    own = scores.diagonal()
    weight = 1 - own.exp() / (own.exp() + total.exp() / (B + E - 1))
    wanted = weight.detach() * (total - own)
    assert (weight > 0.01).all() and (weight < 0.99).any()
    torch.testing.assert_close(loss, wanted)
    for got, want in zip(
        torch.autograd.grad(loss.sum(), leaves),
        torch.autograd.grad(wanted.sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


def test_its_gradient_is_nearer_the_full_softmaxs_than_the_standard_rules():
    """A catalogue of 8 items, each the positive of one row; 64 samples by popularity for all."""
    generator = torch.Generator().manual_seed(0)
    table, users = torch.randn(2, 8, 4, generator=generator, dtype=torch.float64)
    popular = torch.tensor([0.5, 0.2, 0.1, 0.05, 0.05, 0.04, 0.03, 0.03], dtype=torch.float64)
    items = torch.arange(8)
    users.requires_grad_()
    full = torch.nn.functional.cross_entropy(users @ table.T, items, reduction="sum")
    (wanted,) = torch.autograd.grad(full, users)
    samples = torch.multinomial(popular, 200 * 64, replacement=True, generator=generator)
    errors = {}
    for rule in ("standard", "unsampled_positive"):
        found = torch.zeros_like(users)
        for sample in samples.split(64):
            ids = torch.cat([items, sample])
            loss = in_batch_contrastive(
                users, table, extra_keys=table[sample], query_ids=torch.zeros_like(items),
                key_ids=ids, log_q=popular.log()[ids], log_q_rule=rule, temperature=1.0,
                normalize=False, reduction="sum",
            )  # fmt: skip
            found += torch.autograd.grad(loss, users)[0] / 200
        errors[rule] = float((found - wanted).norm() / wanted.norm())
    assert errors["unsampled_positive"] < 0.3 * errors["standard"], errors


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_agrees_over_many_tiles(dtype, symmetric):
    subject = subjects()["in_batch_contrastive"]
    inputs = inputs_for(subject.oracle, {"B": 301, "D": 40, "E": 77, "rule": 1}, dtype)
    inputs["symmetric"] = symmetric
    if subject.refusal(inputs, "native"):
        pytest.skip("no C++ kernel here")
    wanted = expected(subject, inputs)
    check_forward(subject, "native", inputs, wanted)
    check_gradients(subject, "native", inputs, wanted)


def test_rows_without_negatives_are_exactly_zero():
    query, key, _ = (x.float().requires_grad_() for x in draw())
    log_q = torch.full((B,), -2.0, requires_grad=True)
    ids = torch.zeros(B, dtype=torch.int64)
    losses = in_batch_contrastive(query, key, key_ids=ids, log_q=log_q, reduction="none", **RULE)
    assert losses.tolist() == [0.0] * B
    for grad in torch.autograd.grad(losses.sum(), (query, key, log_q)):
        assert (grad == 0).all()
