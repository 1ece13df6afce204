"""Tables spread over two ranks: results, gradients and training equal those of one process."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from ranks import leave
from torch.distributed.device_mesh import init_device_mesh

from livrec_fast import PairedPrefixNgramEmbedding, PrefixNgramEmbedding, RowSGD, shard_rows

LEVELS = (1, 5, 7)  # the table of one row leaves the second rank with none
OFFSETS = torch.tensor([0, 9, 9, 20, 50])
CASES = {
    "plain": {},
    "sum": {"mode": "sum"},
    "pooled": {"pool": "mean"},
    "sum, pooled": {"mode": "sum", "pool": "sum"},
    "hashed": {"max_rows": 13, "hashing": "murmur3"},
    "levelwise": {"scheme": "levelwise", "pool": "mean"},
    "pair": {"pair": True},
}


def _codes(depth):
    generator = torch.Generator().manual_seed(0)
    sizes = LEVELS * (depth // 3)
    codes = torch.stack([torch.randint(n, (50,), generator=generator) for n in sizes], 1)
    codes[torch.rand(codes.shape, generator=generator) < 0.15] = -1
    return codes


def _embedding(case):
    """Make the embedding of a case, the same wherever it is made."""
    torch.manual_seed(0)
    settings = dict(CASES[case])
    pair = settings.pop("pair", False)
    made = [PrefixNgramEmbedding(LEVELS, 4, **settings) for _ in range(1 + pair)]
    return PairedPrefixNgramEmbedding(*made) if pair else made[0]


def _whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _train(case, module):
    """Return the result, the gradients and the tables after a few steps."""
    codes = _codes(6 if case == "pair" else 3)
    offsets = OFFSETS if CASES[case].get("pool") else None
    step = torch.optim.Adagrad(module.parameters(), 0.1)
    for _ in range(3):
        step.zero_grad()
        out = module(codes, offsets)
        (out.sin() * torch.arange(out.shape[1])).sum().backward()
        step.step()
    tables = list(module.parameters())
    grads = [_whole(table.grad) for table in tables]
    return out.detach(), grads, [_whole(table.detach()) for table in tables]


def _work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    found = {}
    for case in CASES:
        embedding = _embedding(case)
        if rank:  # the first rank's tables count
            embedding.apply(
                lambda m: m.reset_parameters() if hasattr(m, "reset_parameters") else None
            )
        sharded = shard_rows(embedding, mesh)
        local = [table.to_local().shape[0] for table in sharded.parameters()]
        first = sharded(_codes(6 if case == "pair" else 3), _offsets(case)).detach()
        found[case] = first, local, _train(case, sharded)
    with pytest.raises(ValueError, match="module: must have no optimizer"):
        shard_rows(PrefixNgramEmbedding(LEVELS, 4, optimizer=RowSGD(0.1)), mesh)
    with pytest.raises(ValueError, match="module: .* got one twice"):
        one = PrefixNgramEmbedding(LEVELS, 4)
        shard_rows(PairedPrefixNgramEmbedding(one, one), mesh)
    with pytest.raises(ValueError, match="mesh: must have one dimension, got 2"):
        shard_rows(_embedding("plain"), init_device_mesh("cpu", (2, 1)))
    with pytest.raises(TypeError, match="module: .* got Linear"):
        shard_rows(torch.nn.Linear(2, 2), mesh)
    torch.save(found, f"{folder}/{rank}.pt")
    leave()


def _offsets(case):
    return OFFSETS if CASES[case].get("pool") else None


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Return what two ranks found."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(_work, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.xdist_group("sharded tables")
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_equal_one_process(ranks, case):
    embedding = _embedding(case)
    alone = embedding(_codes(6 if case == "pair" else 3), _offsets(case)).detach()
    trained = _train(case, embedding)
    assert all(grad.any() for grad in trained[1])
    for first, _, found in (rank[case] for rank in ranks):
        torch.testing.assert_close(first, alone)
        torch.testing.assert_close(found, trained, rtol=1e-4, atol=1e-5)
        if case in ("plain", "hashed", "pair"):
            assert torch.equal(first, alone)
    here, there = (rank[case][1] for rank in ranks)
    rows = [len(table) for table in embedding.parameters()]
    assert [a + b for a, b in zip(here, there, strict=True)] == rows
    assert max(here) < max(rows) and there[0] == 0
