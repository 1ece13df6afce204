"""The embedding module: its tables, both schemes, training, checkpoints and torch.compile."""

import pytest
import torch
from torch import nn

from livrec_fast import PrefixNgramEmbedding, prefix_ngram_lookup

LEVELS = (6, 4, 5)
OFFSETS = torch.tensor([0, 9, 9, 20, 50])


def _codes(items=50, unknown=True):
    generator = torch.Generator().manual_seed(0)
    codes = torch.stack([torch.randint(n, (items,), generator=generator) for n in LEVELS], 1)
    if unknown:
        codes[torch.rand(codes.shape, generator=generator) < 0.15] = -1
    return codes


def test_tables_and_out_dim():
    embedding = PrefixNgramEmbedding(LEVELS, (2, 3, 4), max_rows=30)
    assert [tuple(table.shape) for table in embedding.tables] == [(6, 2), (24, 3), (30, 4)]
    assert embedding.out_dim == 9
    levelwise = PrefixNgramEmbedding(LEVELS, 4, scheme="levelwise", mode="sum", max_rows=3)
    assert [tuple(table.shape) for table in levelwise.tables] == [(6, 4), (4, 4), (5, 4)]
    assert levelwise.out_dim == 4
    assert all(isinstance(table, nn.Parameter) for table in levelwise.parameters())


def test_max_rows_is_a_million_by_default():
    embedding = PrefixNgramEmbedding((64,) * 4, 1, device="meta")
    assert [len(table) for table in embedding.tables] == [64, 4096, 262144, 1 << 20]


def test_repr_says_what_it_is():
    text = repr(PrefixNgramEmbedding(LEVELS, 4, mode="sum", pool="mean"))
    for part in ("levels=(6, 4, 5)", "mode='sum'", "scheme='prefix'", "pool='mean'", "out_dim=4"):
        assert part in text


@pytest.mark.parametrize("mode", ["concat", "sum"])
def test_an_embedding_is_about_one_long_at_first(mode):
    torch.manual_seed(0)
    embedding = PrefixNgramEmbedding((50, 50), 32, mode=mode)
    codes = torch.randint(50, (2000, 2))
    assert embedding(codes).square().sum(1).mean().item() == pytest.approx(1, abs=0.05)


def test_dtype_and_device():
    embedding = PrefixNgramEmbedding(LEVELS, 4, dtype=torch.bfloat16, device="meta")
    assert {table.dtype for table in embedding.tables} == {torch.bfloat16}
    assert {table.device.type for table in embedding.tables} == {"meta"}


@pytest.mark.parametrize("pool", [None, "sum", "mean"])
@pytest.mark.parametrize("mode", ["concat", "sum"])
def test_prefix_is_the_op(mode, pool):
    embedding = PrefixNgramEmbedding(LEVELS, 4, mode=mode, pool=pool, max_rows=30)
    offsets = OFFSETS if pool else None
    out = embedding(_codes(), offsets)
    wanted = prefix_ngram_lookup(
        _codes(), list(embedding.tables), LEVELS, mode=mode, offsets=offsets, pool=pool
    )
    assert torch.equal(out, wanted)
    assert out.shape == (4 if pool else 50, embedding.out_dim)


@pytest.mark.parametrize("mode", ["concat", "sum"])
def test_levelwise_is_one_embedding_per_level(mode):
    embedding = PrefixNgramEmbedding(LEVELS, 4, mode=mode, scheme="levelwise")
    peers = [nn.Embedding.from_pretrained(table.detach()) for table in embedding.tables]
    codes = _codes(unknown=False)
    parts = [peer(code) for peer, code in zip(peers, codes.T, strict=True)]
    wanted = torch.cat(parts, 1) if mode == "concat" else sum(parts)
    torch.testing.assert_close(embedding(codes), wanted)


def test_levelwise_pools_and_skips_an_unknown_level_only():
    embedding = PrefixNgramEmbedding(LEVELS, 2, scheme="levelwise", pool="mean")
    codes = torch.tensor([[-1, 3, 2], [5, 3, -1]])
    first, second, third = (table.detach() for table in embedding.tables)
    wanted = torch.cat([first[5] / 2, second[3], third[2] / 2])
    torch.testing.assert_close(embedding(codes, torch.tensor([0, 2])), wanted[None])


def test_prefix_tells_apart_what_levelwise_confuses():
    codes = torch.tensor([[0, 2, 1], [3, 2, 1]])
    prefix = PrefixNgramEmbedding(LEVELS, 4)(codes)
    levelwise = PrefixNgramEmbedding(LEVELS, 4, scheme="levelwise")(codes)
    assert not torch.isclose(prefix[0, 4:], prefix[1, 4:]).any()
    assert torch.equal(levelwise[0, 4:], levelwise[1, 4:])


@pytest.mark.parametrize("scheme", ["prefix", "levelwise"])
@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, 10.0),
        lambda p: torch.optim.Adagrad(p, 0.3),
        lambda p: torch.optim.AdamW(p, 0.03),
    ],
    ids=["sgd", "adagrad", "adamw"],
)
def test_trains(scheme, optimizer):
    torch.manual_seed(0)
    embedding = PrefixNgramEmbedding(LEVELS, 8, mode="sum", scheme=scheme, pool="mean", max_rows=60)
    step = optimizer(embedding.parameters())
    target = torch.randn(4, 8) * (OFFSETS.diff() > 0)[:, None]
    losses = []
    for _ in range(40):
        step.zero_grad()
        loss = (embedding(_codes(), OFFSETS) - target).square().mean()
        loss.backward()
        step.step()
        losses.append(loss.item())
    assert all(table.grad.any() for table in embedding.tables)
    assert losses[-1] < 0.2 * losses[0]


def test_state_dict_round_trip():
    embedding, other = (PrefixNgramEmbedding(LEVELS, 4) for _ in range(2))
    assert not torch.equal(embedding(_codes()), other(_codes()))
    assert set(embedding.state_dict()) == {"tables.0", "tables.1", "tables.2"}
    other.load_state_dict(embedding.state_dict())
    assert torch.equal(embedding(_codes()), other(_codes()))


@pytest.mark.parametrize("scheme", ["prefix", "levelwise"])
def test_compiles(scheme):
    embedding = PrefixNgramEmbedding(LEVELS, 4, scheme=scheme, pool="sum")
    compiled = torch.compile(embedding, fullgraph=True, dynamic=True, backend="aot_eager")
    grads = []
    for module in (embedding, compiled):
        out = module(_codes(), OFFSETS)
        assert torch.equal(out, embedding(_codes(), OFFSETS))
        grads.append(torch.autograd.grad(out.square().sum(), list(embedding.parameters())))
    assert all(torch.equal(a, b) and a.any() for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"levels": ()}, ValueError, "levels: "),
        ({"levels": (2, 2.5, 2)}, TypeError, "levels: .* 2.5"),
        ({"levels": (2**22,) * 3}, ValueError, r"levels: .* 2\^63 - 1"),
        ({"dim": (4, 4)}, ValueError, r"dim: must be one or 3 positive ints, got \(4, 4\)"),
        ({"dim": 0}, ValueError, "dim: .* got 0"),
        ({"dim": (4, 4, 5), "mode": "sum"}, ValueError, "dim: mode 'sum'"),
        ({"max_rows": 0}, ValueError, "max_rows: must be at least 1, got 0"),
        ({"mode": "mean"}, ValueError, "mode: .* 'mean'"),
        ({"scheme": "level"}, ValueError, "scheme: .* 'level'"),
        ({"pool": "max"}, ValueError, "pool: .* 'max'"),
    ],
    ids=str,
)
def test_bad_arguments(change, error, message):
    with pytest.raises(error, match=message):
        PrefixNgramEmbedding(**{"levels": LEVELS, "dim": 4, **change})


@pytest.mark.parametrize("scheme", ["prefix", "levelwise"])
def test_bad_inputs(scheme):
    embedding = PrefixNgramEmbedding(LEVELS, 4, scheme=scheme)
    with pytest.raises(ValueError, match=r"codes: shape must be \[M, 3\], got \[50, 4\]"):
        embedding(torch.zeros(50, 4, dtype=torch.int64))
    with pytest.raises(IndexError, match=r"= 6 is outside \[-1, 6\)"):
        embedding(torch.tensor([[6, 0, 0]]))
    with pytest.raises(ValueError, match="offsets: need pool"):
        embedding(_codes(), OFFSETS)
    with pytest.raises(ValueError, match="pool: needs offsets"):
        PrefixNgramEmbedding(LEVELS, 4, scheme=scheme, pool="sum")(_codes())
