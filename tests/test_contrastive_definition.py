"""in_batch_contrastive against its definition in loops, cross entropy and finite differences."""

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F

from livrec_fast import in_batch_contrastive

B, D, E = 12, 8, 5


def draw(seed=0, rows=B, dim=D, extras=E, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((rows, dim), (rows, dim), (extras, dim))
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes
    ]


def naive(
    query, key, *, temperature=0.07, normalize=True, symmetric=False, query_ids=None, key_ids=None,
    group_ids=None, false_negative_threshold=None, pair_vectors=None, log_q=None, valid=None,
    extra_keys=None,
):  # fmt: skip
    """Return the losses row by row, in float64 and Python loops, from the definition."""
    batch = len(query)
    keys = [*key.detach().double(), *([] if extra_keys is None else extra_keys.detach().double())]
    queries = list(query.detach().double())
    compared = queries if pair_vectors is None else list(pair_vectors.double())

    def cosine(a, b):
        return float(a @ b / (max(float(a.norm()), 1e-12) * max(float(b.norm()), 1e-12)))

    def logit(i, j, corrected):
        score = cosine(queries[i], keys[j]) if normalize else float(queries[i] @ keys[j])
        correction = float(log_q[j]) if corrected and log_q is not None and j < len(log_q) else 0
        return score / float(temperature) - correction

    def is_valid(j):
        return valid is None or j >= batch or bool(valid[j])

    def is_positive(i, j):
        grouped = group_ids is not None and j < len(group_ids) and group_ids[i] == group_ids[j]
        return i == j or (grouped and is_valid(i) and is_valid(j))

    def is_negative(i, j):
        """Whether key j is a negative of row i; symmetric in i and j below B."""
        if not (is_valid(i) and is_valid(j)) or is_positive(i, j):
            return False
        for ids in (query_ids, key_ids):
            if ids is not None and j < len(ids) and ids[j] == ids[i]:
                return False
        limit = false_negative_threshold
        if limit is None or j >= len(compared):
            return True
        return cosine(compared[i], compared[j]) <= limit

    def softmax_loss(positives, negatives):
        if not negatives:
            return 0
        return sum(
            math.log(sum(math.exp(other - one) for other in positives + negatives))
            for one in positives
        ) / len(positives)

    def direction(pairs, corrected):
        chosen = [
            [logit(i, j, corrected) for i, j in pairs if belongs(i, j)]
            for belongs in (is_positive, is_negative)
        ]
        return softmax_loss(*chosen)

    losses = []
    for i in range(batch):
        loss = direction([(i, j) for j in range(len(keys))], True)
        if symmetric:
            loss = (loss + direction([(j, i) for j in range(batch)], False)) / 2
        losses.append(loss)
    return torch.tensor(losses, dtype=torch.float64)


IDS = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8])
MASKS = {  # fmt: skip
    "no mask": {},
    "query ids": {"query_ids": IDS.roll(1)},
    "key ids": {"key_ids": IDS},
    "key ids of extra keys too": {"key_ids": torch.cat([IDS, torch.tensor([5, 7, 3, 3, 0])])},
    "query ids of extra keys too": {"query_ids": torch.cat([IDS, IDS[:E]])},
    "threshold": {"false_negative_threshold": 0.2},
    "pair vectors": {"false_negative_threshold": 0.1, "pair_vectors": draw(1, extras=B, dim=3)[2]},
    "pair vectors of extra keys too": {
        "false_negative_threshold": 0.1,
        "pair_vectors": draw(2, extras=B + E, dim=3)[2],
    },
    "groups": {"group_ids": IDS},
    "groups of extra keys too": {
        "group_ids": torch.cat([IDS, torch.tensor([5, 7, 3, 3, 0])]),
        "key_ids": IDS.roll(2),
        "valid": IDS != 1,
        "false_negative_threshold": 0.3,
    },
    "valid": {"valid": IDS != 5},
    "all": {
        "query_ids": IDS.flip(0),
        "key_ids": IDS,
        "false_negative_threshold": 0.4,
        "valid": IDS != 1,
    },
}
LOG_Q = torch.linspace(-9, -1, B + E)
CORRECTIONS = {"no log_q": {}, "log_q": {"log_q": LOG_Q[:B]}, "log_q of all keys": {"log_q": LOG_Q}}


@pytest.mark.parametrize("normalize, symmetric", list(product((True, False), repeat=2)))
@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("mask", MASKS)
def test_equals_the_definition(mask, correction, normalize, symmetric):
    query, key, extra = draw()
    options = {**MASKS[mask], **CORRECTIONS[correction], "extra_keys": extra, "temperature": 0.3}
    options |= {"normalize": normalize, "symmetric": symmetric}
    losses = in_batch_contrastive(query, key, reduction="none", **options)
    torch.testing.assert_close(losses, naive(query, key, **options), rtol=1e-10, atol=1e-12)


def test_every_mask_matters():
    query, key, extra = draw()
    losses = [
        in_batch_contrastive(query, key, extra_keys=extra, **options).item()
        for options in (*MASKS.values(), *list(CORRECTIONS.values())[1:])
    ]
    assert len(set(losses)) == len(losses)


@pytest.mark.parametrize("rows, extras", [(0, 0), (0, 3), (1, 0), (1, 3)])
def test_the_smallest_batches(rows, extras):
    query, key, extra = (t.requires_grad_() for t in draw(rows=rows, extras=extras))
    for symmetric in (False, True):
        options = {"extra_keys": extra, "symmetric": symmetric}
        losses = in_batch_contrastive(query, key, reduction="none", **options)
        torch.testing.assert_close(losses, naive(query, key, **options))
        assert (losses > 0).all() == (extras > 0 or rows == 0)
        mean = in_batch_contrastive(query, key, **options)
        assert mean.shape == () and mean == (losses.sum() / max(rows, 1))
        mean.backward()
        assert query.grad.shape == query.shape and extra.grad.isfinite().all()


@pytest.mark.parametrize("temperature", [0.01, 0.05, 0.2, 1.0])
@pytest.mark.parametrize("symmetric", [False, True])
def test_equals_cross_entropy_with_its_gradients(temperature, symmetric):
    leaves = [t.requires_grad_() for t in draw(rows=40, dim=16)[:2]]

    def plain(query, key):
        logits = F.normalize(query, dim=1) @ F.normalize(key, dim=1).T / temperature
        target = torch.arange(len(query))
        rows = F.cross_entropy(logits, target)
        return (rows + F.cross_entropy(logits.T, target)) / 2 if symmetric else rows

    mine = in_batch_contrastive(*leaves, temperature=temperature, symmetric=symmetric)
    wanted = plain(*leaves)
    torch.testing.assert_close(mine, wanted, rtol=1e-12, atol=1e-14)
    for got, want in zip(
        torch.autograd.grad(mine, leaves), torch.autograd.grad(wanted, leaves), strict=True
    ):
        assert want.abs().max() > 0
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-13)


def test_cold_logits_do_not_cost_digits():
    """At logits near 100, logsumexp - s_ii would keep only 1e-5 of a loss."""
    near = math.sqrt(1 - 0.93**2)
    rows = torch.tensor([[1.0, 0], [0.93, near]])
    loss = in_batch_contrastive(rows, rows, temperature=0.01, reduction="none")
    wanted = naive(rows, rows, temperature=0.01)
    torch.testing.assert_close(loss.double(), wanted, rtol=0, atol=2e-7)


CASES = {
    **MASKS,
    "log_q": {"log_q": LOG_Q},
    "one negative left": {"valid": torch.arange(B) < 2},
    "none left": {"key_ids": torch.zeros(B + E, dtype=torch.int64)},
}


@pytest.mark.parametrize("value", [0.01, 0.07, 1.0])
@pytest.mark.parametrize("case", CASES)
def test_temperature_gradient_equals_finite_differences(case, value):
    query, key, extra = draw()
    options = {**CASES[case], "extra_keys": extra, "symmetric": True}

    def loss(temperature):
        return in_batch_contrastive(query, key, temperature=temperature, **options)

    temperature = torch.tensor(value, dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(loss(temperature), temperature)
    step = 1e-5 * value
    with torch.no_grad():
        wanted = (loss(temperature + step) - loss(temperature - step)) / (2 * step)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-8)
    assert (found == 0) == (case == "none left")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_finite_at_the_coldest(case, dtype):
    query, key, extra = (t.requires_grad_() for t in draw(dtype=dtype))
    temperature = torch.tensor(0.01, requires_grad=True)
    options = dict(CASES[case])
    if "pair_vectors" in options:
        options["pair_vectors"] = options["pair_vectors"].to(dtype)
    loss = in_batch_contrastive(query, key, temperature=temperature, extra_keys=extra, **options)
    for leaf, grad in zip(
        (query, temperature), torch.autograd.grad(loss, (query, temperature)), strict=True
    ):
        assert grad.isfinite().all() and grad.dtype == leaf.dtype
        assert (grad == 0).all() == (case == "none left")


def test_default_temperature_is_seven_hundredths():
    query, key, _ = draw()
    assert in_batch_contrastive(query, key) == in_batch_contrastive(query, key, temperature=0.07)
    assert in_batch_contrastive(query, key, temperature=1) == pytest.approx(
        naive(query, key, temperature=1.0).mean().item()
    )


def test_gradients_are_the_same_for_any_number_of_threads():
    """There are logits enough here for torch to split a sum of all of them among threads."""

    def gradients(seed, threads):
        torch.set_num_threads(threads)
        leaves = [t.requires_grad_() for t in draw(seed, rows=400, dim=16)]
        leaves.append(torch.tensor(0.1, dtype=torch.float64, requires_grad=True))
        loss = in_batch_contrastive(*leaves[:2], extra_keys=leaves[2], temperature=leaves[3])
        return torch.autograd.grad(loss, leaves)

    before = torch.get_num_threads()
    try:
        for seed in range(6):
            pairs = zip(gradients(seed, 1), gradients(seed, 2), strict=True)
            assert all(one.equal(two) for one, two in pairs)
    finally:
        torch.set_num_threads(before)
