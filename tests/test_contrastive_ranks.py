"""Negatives of all ranks: three processes equal one that has the joined batch, gradients too."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from contrastive_by_hand import loss_by_hand
from ranks import leave
from torch import nn

from livrec_fast import CrossBatchQueue, InBatchContrastive

RANKS, N, E, IN, D = 3, 17, 7, 5, 4
SHARDS = {"uneven": (6, 2, 9), "one without rows": (10, 0, 7), "all on one": (0, 17, 0)}
EXTRA = (3, 0, 4)  # rows of extra keys
CASES = {
    "plain": {},
    "symmetric": {"symmetric": True},
    "sum": {"reduction": "sum", "symmetric": True},
    "raw": {"normalize": False, "symmetric": True, "temperature": 2.0},
    "key ids": {"known": ("key_ids",)},
    "log_q, weights": {"known": ("log_q", "weights"), "symmetric": True},
    "valid": {"known": ("valid", "weights"), "symmetric": True},
    "extra keys": {"extra": True, "symmetric": True},
    "extra keys, all known": {"extra": True, "known": ("key_ids", "log_q", "valid", "weights")},
    "nothing valid": {"known": ("none_valid",)},
    "query ids": {"known": ("query_ids", "key_ids"), "symmetric": True},
    "false negatives": {"false_negative_threshold": 0.3, "symmetric": True},
    "unsampled": {"known": ("log_q",), "log_q_rule": "unsampled_positive", "symmetric": True},
    "groups": {"known": ("group_ids", "key_ids"), "symmetric": True},
    "all": {
        "known": ("query_ids", "key_ids", "group_ids", "pair_vectors", "log_q", "valid", "weights"),
        "false_negative_threshold": 0.5, "symmetric": True, "extra": True,
    },
}  # fmt: skip
CASES = {name: {"known": (), "extra": False} | case for name, case in CASES.items()}
RUNS = [(case, shards, torch.float64) for case in CASES for shards in SHARDS]
RUNS += [(case, "uneven", torch.float32) for case in CASES]  # by the kernel


class Model(nn.Module):
    """Two towers and the loss of what they make."""

    def __init__(self, settings, ranks, queue=None):
        super().__init__()
        torch.manual_seed(0)
        self.query, self.key = nn.Linear(IN, D), nn.Linear(IN, D)
        settings = {"temperature": 0.4} | settings
        self.loss = InBatchContrastive(ranks=ranks, queue=queue, **settings)

    def forward(self, x, y, z=None, **known):
        """Return the loss of rows x, of rows y, their positives, and further ones z."""
        extra = None if z is None else self.key(z)
        return self.loss(self.query(x), self.key(y), extra_keys=extra, **known)


def model(case, ranks="own", dtype=torch.float64, queue=None):
    settings = {k: v for k, v in CASES[case].items() if k not in ("known", "extra")}
    return Model(settings, ranks, queue).to(dtype)


def inputs(case, dtype=torch.float64, seed=0):
    """The joined batch, its extra keys and what is known of them."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    x, y, z = normal(N, IN), normal(N, IN), normal(E, IN)
    total = N + E if CASES[case]["extra"] else N
    every = {
        "query_ids": torch.randint(40, (total,), generator=generator),
        "key_ids": torch.randint(25, (total,), generator=generator),
        "group_ids": torch.randint(30, (total,), generator=generator),
        "pair_vectors": normal(total, 3),
        "log_q": -normal(total).abs() - 0.01,
        "weights": torch.rand(N, generator=generator, dtype=torch.float64).to(dtype),
        "valid": torch.rand(N, generator=generator) < 0.7,
    }
    known = {name: every[name] for name in CASES[case]["known"] if name in every}
    if "none_valid" in CASES[case]["known"]:
        known["valid"] = torch.zeros(N, dtype=torch.bool)
    return x, y, z if CASES[case]["extra"] else None, known


def shard(case, shards, rank, dtype=torch.float64, seed=0):
    """The part of a rank."""
    x, y, z, known = inputs(case, dtype, seed)
    rows = slice(sum(shards[:rank]), sum(shards[: rank + 1]))
    extras = slice(sum(EXTRA[:rank]), sum(EXTRA[: rank + 1]))
    mine = {}
    for name, values in known.items():
        mine[name] = values[rows]
        if name not in ("weights", "valid") and z is not None:
            mine[name] = torch.cat([values[rows], values[N:][extras]])
    z = None if z is None or not EXTRA[rank] else z[extras]
    return x[rows], y[rows], z, mine


def wanted(case):
    """The loss of the joined batch and the gradients of the parameters, by hand."""
    one = model(case)
    loss = by_hand(one, case, *inputs(case))
    return loss.detach(), torch.autograd.grad(loss, list(one.parameters()))


def by_hand(one, case, x, y, z, known, extra=None):
    settings = {k: v for k, v in CASES[case].items() if k not in ("known", "extra", "temperature")}
    extra = extra if z is None else one.key(z)
    return loss_by_hand(
        one.query(x), one.key(y), extra_keys=extra, temperature=one.loss.temperature,
        **settings, **known,
    )  # fmt: skip


def trained(case, shards, rank, dtype):
    """Return the loss and the gradients under DistributedDataParallel."""
    mine = model(case, "gathered", dtype)
    x, y, z, known = shard(case, shards, rank, dtype)
    shared = nn.parallel.DistributedDataParallel(mine)
    loss = shared(x, y, z, **known)
    loss.backward()
    return loss.detach(), [parameter.grad for parameter in mine.parameters()]


def leaves_of(case, rank):
    """Return a rank's own gradients: of rows, log_q, weights and the temperature."""
    x, y, z, known = shard(case, SHARDS["uneven"], rank)
    mine = model(case, "gathered")
    leaves = [x, y, known["log_q"], known["weights"]]
    loss = mine(*(leaf.requires_grad_() for leaf in leaves[:2]), z, **{
        name: value.requires_grad_() if name in ("log_q", "weights") else value
        for name, value in known.items()
    })  # fmt: skip
    return torch.autograd.grad(loss, [*leaves, mine.loss.log_temperature])


def row_losses(rank):
    mine = model("symmetric", "gathered")
    mine.loss.reduction = "none"
    x, y, _, _ = shard("symmetric", SHARDS["uneven"], rank)
    losses = mine(x, y)
    return losses.detach(), torch.autograd.grad(losses.sum(), list(mine.parameters()))


def queued(rank):
    """Return the losses and the queue of a few steps with the batch on changing ranks."""
    queue = CrossBatchQueue(30, D, key_ids=True, dtype=torch.float64)
    shared = nn.parallel.DistributedDataParallel(model("key ids", "gathered", queue=queue))
    losses = []
    for seed, shards in enumerate(SHARDS.values()):
        x, y, _, known = shard("key ids", shards, rank, seed=seed)
        losses.append(shared(x, y, **known).detach())
    return losses, queue.rows()


def of_two(rank, pair):
    """Return the loss of ranks 1 and 2 alone, which are a group of their own."""
    if rank == 0:
        return None
    mine = model("plain", "gathered")
    mine.loss.group = pair
    return mine(*shard("plain", (0, 6, 11), rank)[:2]).detach()


def refused(rank):
    """Return what each rank says of rows that differ in kind."""
    found, criterion, rows = [], InBatchContrastive(ranks="gathered"), torch.ones(2, D)
    for other, known in (
        (rows.bfloat16(), {}),
        (rows, {"key_ids": torch.arange(2)}),
        (torch.ones(2, D, requires_grad=True), {}),
    ):
        mine, known = (other, known) if rank == 1 else (rows, {})
        with pytest.raises(ValueError) as caught:
            criterion(mine, mine, **known)
        found.append(str(caught.value))
    return found


def work(rank, folder):
    torch.set_num_threads(1)
    meet = f"file://{folder}/meet"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=RANKS)
    pair = dist.new_group([1, 2])
    found = {run: trained(run[0], SHARDS[run[1]], rank, run[2]) for run in RUNS}
    found["again"] = trained(RUNS[-1][0], SHARDS["uneven"], rank, RUNS[-1][2]), found[RUNS[-1]]
    found["leaves"] = leaves_of("log_q, weights", rank)
    found["none"], found["queue"] = row_losses(rank), queued(rank)
    found["pair"], found["refused"] = of_two(rank, pair), refused(rank)
    torch.save(found, f"{folder}/{rank}.pt")
    leave()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Return what the ranks found."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(work, (str(folder),), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]


pytestmark = pytest.mark.xdist_group("contrastive ranks")


@pytest.mark.parametrize("case, shards, dtype", RUNS)
def test_ranks_equal_one_process(ranks, case, shards, dtype):
    loss, grads = wanted(case)
    assert (loss > 0) == (case != "nothing valid")
    near = {"rtol": 1e-9, "atol": 1e-11} if dtype == torch.float64 else {"rtol": 2e-4, "atol": 1e-5}
    for rank in ranks:
        found, parameters = rank[case, shards, dtype]
        assert found.dtype == dtype and torch.equal(found, ranks[0][case, shards, dtype][0])
        torch.testing.assert_close(found.double(), loss, **near)
        for got, want in zip(parameters, grads, strict=True):
            assert want.any() == (case != "nothing valid")
            torch.testing.assert_close(got.double(), want, **near)


def test_every_case_has_a_loss_of_its_own():
    losses = [wanted(case)[0].item() for case in CASES]
    assert len(set(losses)) == len(losses)


def test_the_same_bits_again(ranks):
    for rank in ranks:
        (loss, grads), (before, those) = rank["again"]
        assert torch.equal(loss, before)
        assert all(torch.equal(*pair) for pair in zip(grads, those, strict=True))


def test_gradients_of_a_rank_without_averaging(ranks):
    case, shards = "log_q, weights", SHARDS["uneven"]
    one, (x, y, _, known) = model(case), inputs(case)
    leaves = [leaf.requires_grad_() for leaf in (x, y, known["log_q"], known["weights"])]
    loss = by_hand(one, case, x, y, None, known)
    *grads, temperature = torch.autograd.grad(loss, [*leaves, one.loss.log_temperature])
    for number, grad in enumerate(grads):
        for part, rank in zip(
            grad.split(shards), ranks, strict=True
        ):  # the ranks' number times the share
            torch.testing.assert_close(rank["leaves"][number], RANKS * part)
    for rank in ranks:
        torch.testing.assert_close(rank["leaves"][-1], temperature)
        assert torch.equal(rank["leaves"][-1], ranks[0]["leaves"][-1])


def test_losses_by_row(ranks):
    one, (x, y, _, _) = model("symmetric"), inputs("symmetric")
    options = {"temperature": one.loss.temperature, "symmetric": True, "reduction": "none"}
    losses = loss_by_hand(one.query(x), one.key(y), **options)
    torch.testing.assert_close(torch.cat([rank["none"][0] for rank in ranks]), losses)
    grads = torch.autograd.grad(losses.sum(), list(one.parameters()))
    for number, ((name, _), grad) in enumerate(zip(one.named_parameters(), grads, strict=True)):
        found = sum(rank["none"][1][number] for rank in ranks)
        torch.testing.assert_close(found, grad, msg=name)


def test_queues_stay_alike(ranks):
    """Past keys of all ranks, in the order of the joined batch, as one process has them."""
    one, losses = model("key ids"), []
    keys, ids = torch.zeros(0, D, dtype=torch.float64), torch.zeros(0, dtype=torch.int64)
    for seed in range(len(SHARDS)):
        x, y, _, known = inputs("key ids", seed=seed)
        joined = {"key_ids": torch.cat([known["key_ids"], ids])}
        losses.append(by_hand(one, "key ids", x, y, None, joined, keys).detach())
        keys = torch.cat([keys, one.key(y).detach()])[-30:]
        ids = torch.cat([ids, known["key_ids"]])[-30:]
    for rank in ranks:
        found, rows = rank["queue"]
        torch.testing.assert_close(found, losses)
        torch.testing.assert_close(rows.keys, keys)
        assert torch.equal(rows.key_ids, ids)
        assert torch.equal(rows.keys, ranks[0]["queue"][1].keys)


def test_a_group_of_some_ranks(ranks):
    loss, _ = wanted("plain")
    assert ranks[0]["pair"] is None
    for rank in ranks[1:]:
        torch.testing.assert_close(rank["pair"], loss)


def test_ranks_that_bring_different_things_are_refused(ranks):
    for rank in ranks:
        dtype, ids, grad = rank["refused"]
        assert dtype.startswith("keys: must be given alike on every rank") and "bfloat16" in dtype
        assert "key_ids: must be given alike on every rank, got nothing; width 1 of int64" in ids
        assert "keys: must be given alike" in grad and "requires_grad" in grad


def test_one_process_is_all_ranks():
    loss = model("symmetric", "gathered")(*inputs("symmetric")[:2]).detach()
    torch.testing.assert_close(loss, wanted("symmetric")[0])
