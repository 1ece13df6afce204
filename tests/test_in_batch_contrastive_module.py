"""InBatchContrastive in one process: its temperature, its settings, its queue."""

import copy
import math

import pytest
import torch
from contrastive_by_hand import loss_by_hand
from torch import nn

from livrec_fast import CrossBatchQueue, InBatchContrastive, in_batch_contrastive

B, D, E = 14, 6, 5


def draw(seed=0, rows=B, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(n, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for n in (rows, rows, E)
    ]


def ids(seed, count=B, kinds=9):
    return torch.randint(kinds, (count,), generator=torch.Generator().manual_seed(seed))


def tensors():
    """Every tensor that a call may bring, of the batch and of extra keys."""
    generator = torch.Generator().manual_seed(5)
    return {
        "query_ids": ids(1),
        "key_ids": ids(2, B + E),
        "log_q": torch.randn(B + E, generator=generator, dtype=torch.float64),
        "weights": torch.rand(B, generator=generator, dtype=torch.float64),
        "valid": torch.rand(B, generator=generator) < 0.8,
    }


gradients = torch.autograd.grad


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
def test_equals_the_definition(symmetric, normalize, reduction):
    settings = {"symmetric": symmetric, "normalize": normalize, "reduction": reduction}
    settings["false_negative_threshold"] = 0.5
    criterion = InBatchContrastive(temperature=0.3, dtype=torch.float64, **settings)
    query, key, extra = leaves = draw()
    known = tensors()
    loss = criterion(query, key, extra_keys=extra, **known)
    temperature = criterion.log_temperature.exp()
    wanted = loss_by_hand(
        query, key, extra_keys=extra, temperature=temperature, **settings, **known
    )
    torch.testing.assert_close(loss, wanted, rtol=1e-10, atol=1e-12)
    leaves.append(criterion.log_temperature)
    for got, want in zip(gradients(loss, leaves), gradients(wanted, leaves), strict=True):
        assert want.any()
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-11)


def test_none_gives_a_loss_for_each_row():
    query, key, _ = draw(dtype=torch.float32)
    wanted = in_batch_contrastive(query, key, reduction="none")
    torch.testing.assert_close(InBatchContrastive(reduction="none")(query, key), wanted)


def test_temperature_learns_and_stays_in_its_range():
    criterion = InBatchContrastive(temperature=0.05, temperature_range=(0.02, 0.2))
    assert criterion.temperature.item() == pytest.approx(0.05)
    step = torch.optim.SGD(criterion.parameters(), 100.0)
    query, key, _ = draw(dtype=torch.float32)
    for _ in range(3):
        step.zero_grad()
        criterion(query, key).backward()  # unrelated rows: a warmer softmax is better
        assert criterion.log_temperature.grad < 0
        step.step()
        assert criterion.log_temperature > math.log(0.2)
        assert criterion.temperature.item() == pytest.approx(0.2)
    criterion.log_temperature.data.fill_(-50)
    criterion.eval()
    wanted = in_batch_contrastive(query, key, temperature=0.02)
    torch.testing.assert_close(criterion(query, key), wanted)
    assert criterion.log_temperature == -50  # only training mends it
    criterion.train()(query, key)
    assert criterion.temperature.item() == pytest.approx(0.02)


def test_fixed_temperature_has_no_gradient():
    criterion = InBatchContrastive(temperature=0.1, learnable=False)
    query, key, _ = draw(dtype=torch.float32)
    loss = criterion(query, key)
    loss.backward()
    assert criterion.log_temperature.grad is None and query.grad.any()
    torch.testing.assert_close(loss, in_batch_contrastive(query, key, temperature=0.1))


def test_two_calls_before_one_backward():
    """The range is kept in place, which must not spoil the first call's graph."""
    criterion = InBatchContrastive(temperature_range=(0.01, 1))
    query, key, _ = draw(dtype=torch.float32)
    (criterion(query, key) + criterion(key, query)).backward()
    assert criterion.log_temperature.grad != 0


def test_a_batch_of_its_own_state():
    criterion = InBatchContrastive(temperature=0.2, queue=CrossBatchQueue(20, D))
    query, key, _ = draw(dtype=torch.float32)
    criterion(query, key)
    other = InBatchContrastive(queue=CrossBatchQueue(20, D))
    other.load_state_dict(criterion.state_dict())
    assert len(other.queue) == B and torch.equal(other(key, query), criterion(key, query))


QUEUES = {
    "plain": {},
    "ids": {"key_ids": True},
    "ids and log_q": {"key_ids": True, "log_q": True},
}


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("case", QUEUES)
def test_queue_gives_the_keys_of_past_batches(case, symmetric):
    """Three batches with extra keys of their own, against the queue as a list."""
    queue = CrossBatchQueue(30, D, dtype=torch.float64, **QUEUES[case])
    settings = {"symmetric": symmetric, "false_negative_threshold": 0.4}
    criterion = InBatchContrastive(temperature=0.3, queue=queue, **settings)
    past, known = [], tensors()
    for seed in range(3):
        query, key, extra = leaves = draw(seed)
        known["key_ids"] = ids(10 + seed, B + E)
        before = past[-30:]
        loss = criterion(query, key, extra_keys=extra, **known)
        keys = torch.stack([key for key, _, _ in before]) if before else extra[:0]
        fill = torch.arange(1000, 1000 + len(before))  # equal to none
        key_ids = torch.tensor([n for _, n, _ in before]) if "key_ids" in queue.fields else fill
        log_q = torch.tensor([q for _, _, q in before], dtype=torch.float64)
        log_q = log_q if "log_q" in queue.fields else torch.zeros_like(log_q)
        joined = known | {
            "key_ids": torch.cat([known["key_ids"], key_ids.long()]),
            "log_q": torch.cat([known["log_q"], log_q]),
        }
        wanted = loss_by_hand(
            query, key, extra_keys=torch.cat([extra, keys]),
            temperature=criterion.temperature, **settings, **joined,
        )  # fmt: skip
        torch.testing.assert_close(loss, wanted, rtol=1e-9, atol=1e-12)
        for got, want in zip(gradients(loss, leaves), gradients(wanted, leaves), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-10)
        every = key.detach(), known["key_ids"].tolist(), known["log_q"].float().tolist()
        past += [tuple(values[at] for values in every) for at in known["valid"].nonzero().flatten()]
        assert len(queue) == min(30, len(past))


@pytest.mark.parametrize("given", [True, False])
def test_queue_keeps_groups_and_pair_vectors(given):
    """A second batch has positives and false negatives in the first."""
    kept = {"query_ids": True, "group_ids": True, "pair_dim": D}
    queue = CrossBatchQueue(30, D, dtype=torch.float64, **kept)
    settings = {"symmetric": True, "false_negative_threshold": 0.3}
    criterion = InBatchContrastive(temperature=0.3, queue=queue, **settings)
    batches = [draw(seed)[:2] for seed in range(2)]
    known = [{"query_ids": ids(seed), "group_ids": ids(seed + 7, kinds=20)} for seed in range(2)]
    for (query, _), mine in zip(batches, known, strict=True):
        mine["pair_vectors"] = query.detach().flip(1) if given else query.detach()
    for (query, key), mine in zip(batches, known, strict=True):
        shown = {n: v for n, v in mine.items() if given or n != "pair_vectors"}
        loss = criterion(query, key, **shown)
    (_, past), (query, key) = batches
    joined = {name: torch.cat([known[1][name], known[0][name]]) for name in known[0]}
    options = settings | {"extra_keys": past.detach(), "temperature": criterion.temperature}
    wanted = loss_by_hand(query, key, **options, **joined)
    torch.testing.assert_close(loss, wanted, rtol=1e-9, atol=1e-12)
    leaves = [query, key, criterion.log_temperature]
    torch.testing.assert_close(gradients(loss, leaves), gradients(wanted, leaves))
    for name in joined:
        less = {n: v for n, v in joined.items() if n != name}
        assert loss_by_hand(query, key, **options, **less) != wanted


def test_settings_reach_the_op():
    query, key, _ = draw(dtype=torch.float32)
    log_q = -torch.arange(1.0, B + 1)
    for settings in ({"precision": "bf16"}, {"log_q_rule": "unsampled_positive"}):
        loss = InBatchContrastive(temperature=0.2, **settings)(query, key, log_q=log_q)
        other = in_batch_contrastive(query, key, temperature=0.2, log_q=log_q)
        wanted = in_batch_contrastive(query, key, temperature=0.2, log_q=log_q, **settings)
        torch.testing.assert_close(loss, wanted)
        assert loss != other


def test_queue_is_fed_in_training_only():
    criterion = InBatchContrastive(queue=CrossBatchQueue(20, D))
    query, key, _ = draw(dtype=torch.float32)
    first = criterion(query, key)
    assert len(criterion.queue) == B
    criterion.eval()
    second = criterion(query, key)
    assert len(criterion.queue) == B and second > first  # each key is there twice
    assert torch.equal(criterion(query, key), second)


def test_queue_that_keeps_what_is_not_given():
    criterion = InBatchContrastive(queue=CrossBatchQueue(20, D, key_ids=True))
    with pytest.raises(ValueError, match="key_ids: needed, as the queue keeps them"):
        criterion(*draw(dtype=torch.float32)[:2])


def test_autocast():
    query, key, _ = draw(dtype=torch.float32)
    criterion = InBatchContrastive(queue=CrossBatchQueue(20, D))
    towers = nn.Linear(D, D), nn.Linear(D, D)
    plain = copy.deepcopy(criterion)
    with torch.autocast("cpu", torch.bfloat16):
        found = [criterion(towers[0](query), towers[1](key)) for _ in range(2)]
    wanted = [plain(towers[0](query), towers[1](key)) for _ in range(2)]
    assert criterion.queue.keys.dtype == torch.float32 and found[1] > found[0]
    torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.02)


@pytest.fixture
def forget():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def test_compiles_in_one_graph(forget):
    criterion = InBatchContrastive(temperature_range=(0.01, 1), symmetric=True)
    query, key, extra = leaves = draw(dtype=torch.float32)
    leaves.append(criterion.log_temperature)
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    loss, wanted = (f(query, key, extra_keys=extra, key_ids=ids(0)) for f in (compiled, criterion))
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(gradients(loss, leaves), gradients(wanted, leaves))


def test_compiles_around_its_queue(forget):
    queue = CrossBatchQueue(20, D, key_ids=True)
    criterion = InBatchContrastive(queue=queue)
    plain = copy.deepcopy(criterion)
    compiled = torch.compile(criterion, backend="aot_eager")
    for seed in range(3):
        query, key, _ = draw(seed, dtype=torch.float32)
        loss, wanted = (f(query, key, key_ids=ids(seed)) for f in (compiled, plain))
        torch.testing.assert_close(loss, wanted)
        torch.testing.assert_close(gradients(loss, [key]), gradients(wanted, [key]))
    assert torch.equal(queue.keys, plain.queue.keys) and len(queue) == 20


BAD_SETTINGS = [
    ({"temperature": 0.0}, ValueError, "temperature: must be positive and finite, got 0.0"),
    ({"temperature": "1"}, TypeError, "temperature: must be a float, got str"),
    ({"temperature_range": 0.01}, TypeError, "temperature_range: must be a pair .* got 0.01"),
    ({"temperature_range": (0.1, 1)}, ValueError, "temperature_range: .* 0.07, got .0.1, 1."),
    ({"reduction": "max"}, ValueError, "reduction: .* got 'max'"),
    ({"log_q_rule": "none"}, ValueError, "log_q_rule: .* got 'none'"),
    ({"precision": "fp8"}, ValueError, "precision: .* got 'fp8'"),
    ({"ranks": "all"}, ValueError, "ranks: must be one of 'own', 'gathered', got 'all'"),
    ({"queue": 4}, TypeError, "queue: must be a CrossBatchQueue, got int"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_SETTINGS, ids=str)
def test_bad_settings(change, error, message):
    with pytest.raises(error, match=message):
        InBatchContrastive(**change)


BAD_CALLS = [
    ({"query": 3}, TypeError, "query: must be a tensor"),
    ({"key": torch.ones(B, D + 1)}, ValueError, "key: shape must be"),
    ({"key": torch.ones(B, D).double()}, TypeError, "key: dtype must be that of query"),
    ({"extra_keys": torch.ones(D)}, ValueError, "extra_keys: shape must be"),
    ({"key_ids": torch.ones(B)}, TypeError, "key_ids: dtype must be one of int64"),
    ({"key_ids": ids(0, B + 1)}, ValueError, "key_ids: "),
    ({"log_q": torch.ones(B, 1)}, ValueError, "log_q: shape must be"),
    ({"weights": torch.ones(B + 1)}, ValueError, "weights: "),
    ({"valid": torch.ones(B)}, TypeError, "valid: dtype must be one of bool"),
    ({"key_ids": ids(0).to("meta")}, ValueError, "key_ids: device must be that of query"),
]


@pytest.mark.parametrize("queued", [True, False])
@pytest.mark.parametrize(("change", "error", "message"), BAD_CALLS, ids=str)
def test_bad_calls(change, error, message, queued):
    queue = CrossBatchQueue(20, D) if queued else None
    good = {"query": torch.ones(B, D), "key": torch.ones(B, D)}
    with pytest.raises(error, match=message):
        InBatchContrastive(queue=queue)(**good | change)
    assert queue is None or not len(queue)
