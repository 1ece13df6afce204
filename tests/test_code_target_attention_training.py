"""The attention unit inside rankers: training, compiled, under autocast, over ranks; bad inputs."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from ranks import leave
from test_code_target_attention import GAPS, LEVELS, OFFSETS, WAYS, T, _inputs, _unit
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits

from livrec_fast import CodeTargetAttention, gap_bucket, pack_codes


class Ranker(nn.Module):
    """Scores candidates by themselves and what they find in the history."""

    def __init__(self, **settings):
        super().__init__()
        self.unit = CodeTargetAttention(
            8, 2, levels=LEVELS, authors=50, gap_buckets=GAPS, **settings
        )
        self.score = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1))

    def forward(self, own, **history):
        """Score rows of fields [B, C, 3 + 1], (codes, author), with the tables of the histories."""
        known = self.unit.embed(own[..., :3].flatten(0, 1), authors=own[..., 3].flatten())
        candidates = known.unflatten(0, own.shape[:2])
        seen = self.unit(candidates, **history)
        return self.score(torch.cat([candidates, seen], 2))[..., 0]


def _history():
    inputs = _inputs(torch.float32)
    del inputs["candidates"]
    return inputs


def _candidates():
    """Return candidates and labels: whether the author is in the history, as is half of them."""
    generator = torch.Generator().manual_seed(2)
    own = torch.stack([torch.randint(n, (4, 6), generator=generator) for n in (*LEVELS, 50)], 2)
    authors = _history()["authors"]
    for user in (0, 2, 3):
        own[user, :3, 3] = authors[OFFSETS[user] : OFFSETS[user] + 3].clamp(min=0)
    seen = [own[u, :, 3, None] == authors[OFFSETS[u] : OFFSETS[u + 1]] for u in range(4)]
    return own, torch.stack([each.any(1) for each in seen]).float()


@pytest.mark.parametrize(("absorb", "sparse"), WAYS)
def test_a_ranker_learns(absorb, sparse):
    torch.manual_seed(0)
    ranker = Ranker(absorb=absorb, sparse=sparse)
    tables = list(ranker.unit.tables.parameters())
    dense = [p for p in ranker.parameters() if all(p is not table for table in tables)]
    steps = [torch.optim.Adam(dense, 0.01)]
    steps.append((torch.optim.SparseAdam if sparse else torch.optim.Adam)(tables, 0.01))
    own, labels = _candidates()
    losses = []
    for _ in range(60):
        for step in steps:
            step.zero_grad()
        loss = binary_cross_entropy_with_logits(ranker(own, **_history()), labels)
        loss.backward()
        for step in steps:
            step.step()
        losses.append(loss.item())
    assert losses[0] > 0.5 and losses[-1] < 0.05


@pytest.mark.parametrize(("absorb", "packed"), [("tables", False), ("query", True)])
def test_compiles(absorb, packed):
    unit, inputs = _unit(torch.float32, absorb=absorb), _inputs(torch.float32, unknown=not packed)
    if packed:
        inputs |= {"codes": pack_codes(inputs["codes"], LEVELS), "packed": True}
    compiled = torch.compile(unit, fullgraph=True, dynamic=True, backend="aot_eager")
    bias = torch.randn(T, 2)
    grads = []
    for module in (unit, compiled):
        out = module(**inputs, bias=bias)
        assert torch.equal(out, unit(**inputs, bias=bias))
        grads.append(torch.autograd.grad(out.square().sum(), list(unit.parameters())))
    for ours, theirs in zip(*grads, strict=True):
        assert ours.any()
        torch.testing.assert_close(ours, theirs)


def test_gap_bucket_and_embed_compile():
    ranker = Ranker()
    (own, _), history, seconds = _candidates(), _history(), torch.rand(T) * 100

    def call():
        return ranker(own, **history | {"gaps": gap_bucket(seconds, GAPS)})

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(), call())


@pytest.mark.parametrize(("absorb", "sparse"), WAYS)
def test_autocast(absorb, sparse):
    unit, inputs = _unit(torch.float32, absorb=absorb, sparse=sparse), _inputs(torch.float32)
    exact = unit(**inputs)
    wanted = torch.autograd.grad(exact.square().sum(), list(unit.parameters()))
    with torch.autocast("cpu", torch.bfloat16):
        out, plain = unit(**inputs), unit.unabsorbed(**inputs)
    assert out.dtype == plain.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), exact, rtol=0.05, atol=0.05 * exact.abs().max().item())
    grads = torch.autograd.grad(out.float().square().sum(), list(unit.parameters()))
    for ours, theirs in zip(grads, wanted, strict=True):
        ours, theirs = ours.to_dense(), theirs.to_dense()
        assert ours.dtype == torch.float32 and ours.any()
        assert (ours - theirs).norm() < 0.1 * theirs.norm()


def _shard(rank):
    """Return one rank's half of the users, and their histories."""
    users, inputs = slice(2 * rank, 2 * rank + 2), _inputs()
    items = slice(int(OFFSETS[users.start]), int(OFFSETS[users.stop]))
    part = {name: inputs[name][items] for name in ("codes", "authors", "gaps")}
    offsets = OFFSETS[users.start : users.stop + 1] - items.start
    return part | {"candidates": inputs["candidates"][users], "offsets": offsets}


def _work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = {}
    for way in WAYS:
        unit = _unit(absorb=way[0], sparse=way[1], seed=rank)  # the first rank's parameters count
        shared = nn.parallel.DistributedDataParallel(unit)
        shared(**_shard(rank)).square().mean().backward()
        found[way] = [parameter.grad.to_dense() for parameter in unit.parameters()]
    torch.save(found, f"{folder}/{rank}.pt")
    leave()


def test_two_ranks_have_the_gradients_of_one(tmp_path):
    mp.spawn(_work, (str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for absorb, sparse in WAYS:
        unit = _unit(absorb=absorb, sparse=sparse)
        unit(**_inputs()).square().mean().backward()
        wanted = [parameter.grad.to_dense() for parameter in unit.parameters()]
        assert all(grad.any() for grad in wanted)
        for rank in ranks:
            torch.testing.assert_close(rank[absorb, sparse], wanted)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"dim": 0}, ValueError, "dim: must be from 1 to .*, got 0"),
        ({"heads": 2.0}, TypeError, "heads: must be an int, got 2.0"),
        ({"head_dim": -1}, ValueError, "head_dim: .* got -1"),
        ({"out_dim": 0}, ValueError, "out_dim: .* got 0"),
        ({"levels": ()}, ValueError, "levels: "),
        ({"levels": (2**22,) * 3, "prefix": True}, ValueError, r"levels: .* 2\^63 - 1"),
        ({"prefix": 1}, TypeError, "prefix: must be True or False, got 1"),
        ({"max_rows": 0}, ValueError, "max_rows: .* got 0"),
        ({"authors": 0}, ValueError, "authors: .* got 0"),
        ({"author_ids": 9}, ValueError, "author_ids: must be at least authors=None, got 9"),
        ({"author_ids": 9, "authors": 10}, ValueError, "author_ids: .* authors=10, got 9"),
        ({"gap_buckets": True}, TypeError, "gap_buckets: must be an int, got True"),
        ({"hashing": "md5"}, ValueError, "hashing: .* 'md5'"),
        ({"absorb": "keys"}, ValueError, "absorb: .* 'keys'"),
        ({"absorb": "tables", "sparse": True}, ValueError, "sparse: needs absorb='query'"),
    ],
    ids=str,
)
def test_bad_arguments(change, error, message):
    with pytest.raises(error, match=message):
        CodeTargetAttention(**{"dim": 8, "heads": 2, **change})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"candidates": torch.zeros(4, 3, 5)}, ValueError, r"candidates: shape .* \[B, C, 6\]"),
        ({"candidates": torch.zeros(4, 3, 6).double()}, TypeError, "candidates: dtype .* got .*64"),
        ({"candidates": [1]}, TypeError, "candidates: must be a tensor, got list"),
        ({"codes": torch.zeros(T, 4, dtype=torch.int8)}, ValueError, r"codes: shape .* \[T, 3\]"),
        ({"codes": torch.zeros(T, 3)}, TypeError, "codes: dtype"),
        ({"codes": torch.full((T, 3), 5)}, IndexError, r"codes\[0, 1\] = 5 is outside \[-1, 5\)"),
        ({"codes": torch.zeros(T, 3, dtype=torch.int8, device="meta")}, ValueError, "device"),
        ({"packed": True}, TypeError, "codes: dtype must be one of uint8, got int16"),
        ({"packed": 1}, TypeError, "packed: must be True or False, got 1"),
        ({"offsets": OFFSETS[:-1]}, ValueError, r"offsets: shape must be \[5\], got \[4\]"),
        ({"offsets": OFFSETS - 1}, ValueError, "offsets: the first must be 0, got -1"),
        ({"offsets": OFFSETS.clamp(max=40)}, ValueError, "offsets: the last must be .* 41, got 40"),
        ({"authors": None}, ValueError, "authors: needed, as the module has the field"),
        ({"authors": torch.zeros(T)}, TypeError, "authors: dtype .* got float32"),
        ({"authors": torch.zeros(3).long()}, ValueError, r"authors: shape must be \[41\], got"),
        ({"authors": torch.full((T,), 50)}, IndexError, r"authors\[0\] = 50 is outside \[-1, 50\)"),
        ({"authors": torch.full((T,), -2)}, IndexError, r"authors\[0\] = -2 is outside"),
        ({"gaps": None}, ValueError, "gaps: needed"),
        ({"gaps": torch.full((T,), 8)}, IndexError, r"gaps: gaps\[0\] = 8 is outside \[-1, 8\)"),
        ({"gaps": torch.rand(T)}, TypeError, "gaps: dtype .* got float32"),
        ({"bias": torch.zeros(T, 3)}, ValueError, r"bias: shape must be \[41, 2\], got \[41, 3\]"),
        ({"bias": torch.zeros(T).long()}, TypeError, "bias: dtype"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("absorb", ["tables", "query"])
def test_bad_inputs(absorb, change, error, message):
    unit = _unit(torch.float32, absorb=absorb)
    for call in (unit, unit.unabsorbed):
        with pytest.raises(error, match=message):
            call(**_inputs(torch.float32) | change)


def test_fields_that_the_module_lacks_are_refused():
    unit = CodeTargetAttention(6, 2, levels=LEVELS)
    inputs = _inputs(torch.float32)
    with pytest.raises(ValueError, match="authors: .* it was made without authors"):
        unit(**inputs | {"gaps": None})
    with pytest.raises(ValueError, match="gaps: .* it was made without gap_buckets"):
        unit.embed(inputs["codes"], gaps=inputs["gaps"])


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (([1], 8), TypeError, "seconds: must be a tensor, got list"),
        ((torch.zeros(2, dtype=torch.bool), 8), TypeError, "seconds: dtype .* got bool"),
        ((torch.zeros(2), 65), ValueError, "buckets: must be from 1 to 64, got 65"),
        ((torch.zeros(2), 2.5), TypeError, "buckets: must be an int, got 2.5"),
    ],
)
def test_bad_gaps(given, error, message):
    with pytest.raises(error, match=message):
        gap_bucket(*given)
