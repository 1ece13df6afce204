"""CrossBatchQueue against a list of what was pushed."""

import copy

import pytest
import torch

from livrec_fast import CrossBatchQueue

D, P = 3, 2
FIELDS = ("key_ids", "query_ids", "group_ids", "log_q", "pair_vectors")


def full(capacity=10, **settings):
    """A queue that keeps everything."""
    flags = dict.fromkeys(FIELDS[:4], True)
    return CrossBatchQueue(capacity, D, pair_dim=P, **flags, **settings)


def batch(seed, rows):
    generator = torch.Generator().manual_seed(seed)
    ids = {name: torch.randint(2**62, (rows,), generator=generator) for name in FIELDS[:3]}
    return {
        "keys": torch.randn(rows, D, generator=generator),
        **ids,
        "log_q": torch.randn(rows, generator=generator),
        "pair_vectors": torch.randn(rows, P, generator=generator),
    }


def assert_holds(queue, batches, count):
    """Check that the queue shows the last `count` rows of what was pushed, the oldest first."""
    rows = queue.rows()
    assert len(queue) == len(rows.keys) == count
    for name in ("keys", *FIELDS):
        pushed = torch.cat([b[name] for b in batches])
        assert torch.equal(getattr(rows, name), pushed[len(pushed) - count :]), name


@pytest.mark.parametrize(
    "sizes", [(4, 4, 4), (10, 3), (3, 10, 1), (25, 2), (0, 4, 0, 9), (1,) * 23, (7, 13, 7)], ids=str
)
def test_first_in_first_out(sizes):
    queue, batches = full(), []
    assert len(queue) == 0 and queue.rows().keys.shape == (0, D)
    for seed, size in enumerate(sizes):
        batches.append(batch(seed, size))
        queue.push(**batches[-1])
        assert_holds(queue, batches, min(10, sum(sizes[: seed + 1])))


def test_keeps_valid_rows_only():
    queue, pushed = full(), batch(0, 8)
    valid = torch.tensor([True, False, True, True, False, False, True, False])
    pushed["keys"][~valid] = torch.nan
    queue.push(**pushed, valid=valid)
    assert_holds(queue, [{name: values[valid] for name, values in pushed.items()}], 4)
    assert queue.keys.isfinite().all()


def test_age_counts_pushes():
    queue, batches = full(100, max_age=3), []
    sizes = (5, 2, 0, 4, 0, 0, 0, 6)
    for number, size in enumerate(sizes):
        batches.append(batch(number, size))
        queue.push(**batches[-1])
        assert_holds(queue, batches, sum(sizes[max(0, number - 2) : number + 1]))


def test_age_and_capacity_both_hold():
    queue, batches = full(6, max_age=2), []
    for number, size in enumerate((4, 4, 4, 1, 1, 20, 0, 0)):
        batches.append(batch(number, size))
        queue.push(**batches[-1])
        assert len(queue) == (4, 6, 6, 5, 2, 6, 6, 0)[number]
    assert_holds(queue, batches, 0)


def test_what_is_pushed_and_what_is_shown_are_copies():
    queue, pushed = full(), batch(0, 4)
    leaf = pushed["keys"].requires_grad_()
    queue.push(**pushed)
    shown = queue.rows()
    assert not shown.keys.requires_grad and not queue.keys.requires_grad
    before = shown.keys.clone()
    with torch.no_grad():
        leaf.zero_()
    queue.push(**batch(1, 10))
    assert torch.equal(shown.keys, before) and before.any()


def test_a_loss_may_be_differentiated_after_a_push():
    queue = CrossBatchQueue(10, D)
    queue.push(batch(0, 6)["keys"])
    query = batch(1, 4)["keys"].requires_grad_()
    loss = (query @ queue.rows().keys.T).square().sum()
    queue.push(batch(2, 10)["keys"])
    loss.backward()
    assert query.grad.any()


def test_resumes_from_its_state():
    queue = full(max_age=4)
    batches = [batch(seed, 4) for seed in range(7)]
    for pushed in batches[:4]:
        queue.push(**pushed)
    other = full(max_age=4)
    other.load_state_dict(queue.state_dict())
    for pushed in batches[4:]:
        queue.push(**pushed)
        other.push(**pushed)
    assert_holds(other, batches, 10)
    for name, buffer in queue.state_dict().items():
        assert torch.equal(buffer, other.state_dict()[name]), name


def test_reset_forgets_all():
    queue = full()
    queue.push(**batch(0, 7))
    queue.reset()
    assert len(queue) == 0
    queue.push(**batch(1, 3))
    assert_holds(queue, [batch(1, 3)], 3)


def test_moves():
    queue = full()
    queue.push(**batch(0, 7))
    wide = copy.deepcopy(queue).double()
    rows = wide.rows()
    assert rows.keys.dtype == rows.log_q.dtype == torch.float64
    assert torch.equal(rows.keys, queue.rows().keys.double())
    assert torch.equal(rows.key_ids, batch(0, 7)["key_ids"])  # int64 keeps large ids
    wide.push(**batch(1, 2))
    assert torch.equal(wide.rows().keys[-2:], batch(1, 2)["keys"].double())
    assert {b.device.type for b in copy.deepcopy(queue).to("meta").buffers()} == {"meta"}


def test_rounds_to_its_dtype():
    queue = CrossBatchQueue(4, D, dtype=torch.bfloat16, device="cpu")
    keys = batch(0, 4)["keys"]
    queue.push(keys)
    assert torch.equal(queue.rows().keys, keys.bfloat16())


def test_keeps_only_what_it_is_told_to():
    queue = CrossBatchQueue(4, D, log_q=True, max_age=2)
    assert queue.fields == ("log_q",)
    queue.push(torch.ones(2, D), log_q=torch.tensor([-1.0, -2.0]))
    rows = queue.rows()
    assert rows.log_q.tolist() == [-1, -2] and rows.key_ids is None and rows.pair_vectors is None
    assert "log_q" in repr(queue) and "key_ids" not in repr(queue)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"capacity": 0}, ValueError, "capacity: must be from 1 to .*, got 0"),
        ({"dim": 2.0}, TypeError, "dim: must be an int, got 2.0"),
        ({"pair_dim": 0}, ValueError, "pair_dim: .* got 0"),
        ({"max_age": -1}, ValueError, "max_age: .* got -1"),
        ({"dtype": torch.int64}, TypeError, "dtype: must be a floating dtype .* got torch.int64"),
    ],
    ids=str,
)
def test_bad_settings(change, error, message):
    with pytest.raises(error, match=message):
        CrossBatchQueue(**{"capacity": 4, "dim": 2} | change)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"keys": torch.ones(4, D + 1)}, ValueError, r"keys: shape must be \[M, 3\], got \[4, 4\]"),
        ({"keys": torch.ones(4, D).long()}, TypeError, "keys: dtype"),
        ({"key_ids": torch.ones(4)}, TypeError, "key_ids: dtype must be one of int64"),
        ({"group_ids": None}, ValueError, "group_ids: needed, as the queue keeps them"),
        ({"log_q": torch.ones(5)}, ValueError, "log_q: must have 4 rows, got 5"),
        ({"pair_vectors": torch.ones(4, P + 1)}, ValueError, "pair_vectors: shape must be"),
        ({"valid": torch.ones(3).bool()}, ValueError, "valid: shape must be"),
        ({"valid": torch.ones(4)}, TypeError, "valid: dtype must be one of bool"),
        ({"keys": torch.ones(4, D, device="meta")}, ValueError, "keys: device must be"),
    ],
    ids=str,
)
def test_bad_pushes(change, error, message):
    queue = full()
    with pytest.raises(error, match=message):
        queue.push(**batch(0, 4) | change)
    assert len(queue) == 0 and not queue.keys.any()


def test_a_queue_refuses_what_it_does_not_keep():
    with pytest.raises(ValueError, match="key_ids: not kept here"):
        CrossBatchQueue(4, D).push(torch.ones(2, D), key_ids=torch.tensor([1, 2]))
