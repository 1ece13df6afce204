"""ResidualKMeans.fit over ranks: two processes end with the bits that one has."""

import functools

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from ranks import leave

from livrec_fast import ResidualKMeans
from livrec_fast.modules import _seeding

ROWS = 3001


@functools.cache
def rows():
    """Draw rows, some alike, and weights, some 0."""
    generator = torch.Generator().manual_seed(0)
    middle = 4 * torch.randn(30, 10, generator=generator)
    x = middle[torch.arange(ROWS) % 30] + torch.randn(ROWS, 10, generator=generator)
    x[2000:2400] = x[100:500]  # equal errors on both ranks: the lowest number decides
    x[5] = -0.0
    weights = (2 * torch.rand(ROWS, generator=generator) - 0.5).relu()
    return x, weights


def empty_clusters():
    """Start where most codewords win no row."""
    x = rows()[0]
    return [torch.cat([x[:6], 1e3 + x[:18]]), torch.cat([x[:2], -1e3 - x[:8]])]


CASES = {
    "k-means++": {},
    "random": {"init": "random"},
    "weighted": {"weighted": True},
    "balanced": {"balance": 1.0},
    "balanced, weighted": {"balance": 1.2, "weighted": True},
    "empty clusters": {"init": empty_clusters},
    "empty clusters, weighted": {"init": empty_clusters, "weighted": True, "balance": 1.5},
    "sample": {"sample": 900},
    "sample of the rows for k-means++": {"few": True},
    "float64": {"dtype": torch.float64},
}
SHARDS = {"uneven": 1234, "all on the second": 0, "all on the first": ROWS}


def fit(case, part=slice(None), group=None):
    """Fit a case on a part of the rows."""
    x, weights = rows()
    settings = dict(CASES[case])
    x = x[part].to(settings.pop("dtype", torch.float32))
    weights = weights[part] if settings.pop("weighted", False) else None
    if settings.pop("few", False):
        _seeding._INIT_ROWS, _seeding._INIT_ROWS_PER_CODEWORD = 128, 4
    if callable(settings.get("init")):
        settings["init"] = settings["init"]()
    try:
        module = ResidualKMeans((24, 10), iterations=6, **settings)
        return module.fit(x.numpy() if case == "random" else x, weights=weights, group=group)
    finally:
        _seeding._INIT_ROWS, _seeding._INIT_ROWS_PER_CODEWORD = 32_768, 32


def work(rank, folder):
    """Do as one of two ranks."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = {}
    for case in CASES:
        for shards, cut in SHARDS.items():
            if shards == "uneven" or case in ("k-means++", "balanced, weighted"):
                part = slice(cut, None) if rank else slice(0, cut)
                module = fit(case, part, dist.group.WORLD)
                found[case, shards] = module.state_dict(), module.history
    found["errors"] = errors(rank)
    torch.save(found, f"{folder}/{rank}.pt")
    leave()


def errors(rank):
    """Return what both ranks say of what is wrong on one of them."""
    x = rows()[0][rank * 100 : rank * 100 + 100].clone()
    bad = x.clone()
    bad[7 * rank, 0] = float("nan") if rank else 0.0
    said = []
    for given in (bad, x[:, : 10 - rank], x.double() if rank else x, x[:10]):
        with pytest.raises(ValueError) as error:
            ResidualKMeans((24,)).fit(given, group=dist.group.WORLD)
        said.append(str(error.value))
    return said


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(work, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_give_the_bits_of_one_process(found, case):
    alone = fit(case)
    together = [(key, rank[key]) for rank in found for key in rank if key[0] == case]
    assert len(together) >= 2
    for key, (state, history) in together:
        assert history == alone.history, key
        for name, value in alone.state_dict().items():
            assert value.view(torch.uint8).equal(state[name].view(torch.uint8)), (key, name)
    if case.startswith("empty"):
        assert alone.history[0].reseeded[0] >= 8


def test_the_cases_differ(found):
    versions = {fit(case).version for case in CASES}
    assert len(versions) == len(CASES)


def test_every_rank_tells_of_what_is_wrong_on_one(found):
    said = found[0]["errors"]
    assert said == found[1]["errors"]
    assert said[0] == "x: row 107 is not finite"
    assert "D = [10, 9]" in said[1] and "bytes per value [4, 8]" in said[2]
    assert said[3].startswith("x: at least 24 rows are needed") and said[3].endswith("got 20")


def test_numbers_of_ranks_alone():
    from livrec_fast.modules._ranks import Ranks

    ranks, x = Ranks(), torch.arange(4.0)
    assert (ranks.size, ranks.rank) == (1, 0) and ranks.gather(x) is x
    assert np.signbit(ranks.merge(torch.tensor([-0.0])).numpy()).all()
