"""The losses for other libraries on two ranks: the gradients of these libraries' own there."""

from importlib import util

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from ranks import leave
from test_interop_open_clip import open_clip_modules
from torch.nn import functional as F

ROWS = 10
BOTH = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
CASES = {
    "open_clip": ("open_clip", 2, {}),
    "hard negatives": ("sentence_transformers", 4, {"scale": 10.0}),
    "both ways": ("sentence_transformers", 3, BOTH),
}


def drawn(rank, columns):
    generator = torch.Generator().manual_seed(rank)
    made = [F.normalize(torch.randn(ROWS, 6, generator=generator), dim=1) for _ in range(columns)]
    return [x.requires_grad_() for x in made]


def pair(library, rank, settings):
    """Return their loss and ours, both of (scale, *columns)."""
    if library == "open_clip":
        clip, _ = open_clip_modules()
        from livrec_fast.interop import ClipLoss

        theirs = clip.ClipLoss(True, True, rank=rank, world_size=2)
        ours = ClipLoss(rank=rank, world_size=2)
        return [lambda s, a, b, loss=loss: loss(a, b, s) for loss in (theirs, ours)]
    from sentence_transformers.sentence_transformer import losses

    from livrec_fast.interop import sentence_transformers as ours

    def of(module):
        loss = module.MultipleNegativesRankingLoss(
            torch.nn.Identity(), gather_across_devices=True, **settings
        )

        def compute(scale, *columns):
            loss.scale = scale
            return loss.compute_loss_from_embeddings(list(columns), None)

        return compute

    return [of(losses), of(ours)]


def work(rank, folder):
    """Do as one of two ranks."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = {}
    for case, (library, columns, settings) in CASES.items():
        for loss in pair(library, rank, settings):
            given = [torch.tensor(8.0, requires_grad=True), *drawn(rank, columns)]
            value = loss(*given)
            grads = torch.autograd.grad(value, given)
            found.setdefault(case, []).append([value.detach(), *grads])
    torch.save(found, f"{folder}/{rank}.pt")
    leave()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    for name in ("open_clip", "sentence_transformers", "datasets", "accelerate", "pandas"):
        if util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed: see requirements/peers.txt")
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(work, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_step_alike(found, case):
    theirs, ours = zip(*(rank[case] for rank in found), strict=True)
    for at in (0, 1):  # the loss, ours on both ranks, and the gradient of the scale, by their mean
        mean = (theirs[0][at] + theirs[1][at]) / 2
        torch.testing.assert_close((ours[0][at] + ours[1][at]) / 2, mean, rtol=1e-4, atol=1e-6)
        assert mean.abs() > 1e-3
    assert ours[0][0] == ours[1][0] != theirs[0][0]
    for rank in range(2):
        for got, wanted in zip(ours[rank][2:], theirs[rank][2:], strict=True):
            assert wanted.abs().max() > 1e-3
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)
