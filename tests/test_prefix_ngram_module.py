"""The embedding module beyond lookups: pairs, packed codes, warm starts, files, int8 copies."""

import json

import pytest
import torch
from safetensors import safe_open

from livrec_fast import (
    PairedPrefixNgramEmbedding,
    PrefixNgramEmbedding,
    RowAdagrad,
    pack_codes,
    prefix_ngram_lookup,
)
from livrec_fast.modules import prefix_ngram as home

LEVELS = (6, 4, 5)
OFFSETS = torch.tensor([0, 9, 9, 20, 50])


def _codes(seed=0, unknown=True, levels=LEVELS):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.stack([torch.randint(n, (50,), generator=generator) for n in levels], 1)
    if unknown:
        codes[torch.rand(codes.shape, generator=generator) < 0.15] = -1
    return codes


@pytest.mark.parametrize("hashing", ["modulo", "murmur3", "order_preserving"])
@pytest.mark.parametrize("sparse", [False, True])
def test_hashing_and_sparse_reach_the_op(hashing, sparse):
    module = PrefixNgramEmbedding(LEVELS, 4, max_rows=15, hashing=hashing, sparse=sparse)
    out = module(_codes())
    wanted = prefix_ngram_lookup(_codes(), list(module.tables), LEVELS, hashing=hashing)
    assert torch.equal(out, wanted)
    out.sum().backward()
    assert all(table.grad.is_sparse == sparse for table in module.tables)
    assert all(table.grad.to_dense().any() for table in module.tables)


@pytest.mark.parametrize("scheme", ["prefix", "levelwise"])
def test_keys_are_the_rows_of_every_table(scheme):
    module = PrefixNgramEmbedding(LEVELS, 4, max_rows=15, hashing="murmur3", scheme=scheme)
    rows = module.keys(_codes())
    parts = [
        torch.where((row >= 0)[:, None], table[row.clamp(min=0)], 0)
        for row, table in zip(rows.T, module.tables, strict=True)
    ]
    assert rows.min() == -1
    assert torch.equal(torch.cat(parts, 1), module(_codes()))


@pytest.mark.parametrize("scheme", ["prefix", "levelwise"])
def test_packed_codes(scheme):
    module = PrefixNgramEmbedding(LEVELS, 4, scheme=scheme)
    codes = _codes(unknown=False)
    packed = pack_codes(codes, LEVELS)
    assert torch.equal(module(packed, packed=True), module(codes))
    assert torch.equal(module.keys(packed, packed=True), module.keys(codes))


def test_levelwise_takes_one_call(monkeypatch):
    calls = []
    given = home.Lookup.embed
    monkeypatch.setattr(
        home.Lookup, "embed", lambda self, *a, **k: (calls.append(self), given(self, *a, **k))[1]
    )
    PrefixNgramEmbedding(LEVELS, 4, scheme="levelwise")(_codes())
    assert [call.groups for call in calls] == [[1, 1, 1]]


def _pair(mode="concat", pool=None, **settings):
    settings |= {"mode": mode, "pool": pool, "max_rows": 30}
    room = PrefixNgramEmbedding((7, 3), 4, scheme="levelwise", **settings)
    return PairedPrefixNgramEmbedding(PrefixNgramEmbedding(LEVELS, 4, **settings), room)


@pytest.mark.parametrize("pool", [None, "sum", "mean"])
@pytest.mark.parametrize("mode", ["concat", "sum"])
def test_a_pair_is_its_two_parts(mode, pool):
    pair = _pair(mode, pool)
    first, second = _codes(), _codes(1, levels=(7, 3))
    offsets = OFFSETS if pool else None
    parts = [pair.slice(first, offsets), pair.room(second, offsets)]
    wanted = torch.cat(parts, 1) if mode == "concat" else sum(parts)
    codes = torch.cat([first, second], 1)
    out = pair(codes, offsets)
    assert out.shape[1] == pair.out_dim
    torch.testing.assert_close(out, wanted)
    flow = torch.randn(out.shape)
    ours, theirs = (torch.autograd.grad(o, list(pair.parameters()), flow) for o in (out, wanted))
    assert len(ours) == 5 and all(grad.any() for grad in ours)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert torch.equal(pair.keys(codes), torch.cat([pair.slice.keys(first), second], 1))


def test_a_pair_of_one_embedding_shares_its_tables():
    one = PrefixNgramEmbedding(LEVELS, 4)
    pair = PairedPrefixNgramEmbedding(one, one)
    codes = torch.cat([_codes(), _codes(1)], 1)
    out = pair(codes)
    assert torch.equal(out, torch.cat([one(_codes()), one(_codes(1))], 1))
    out.sum().backward()
    known = (codes[:, [0, 3]] >= 0).sum()
    assert one.tables[0].grad.sum() == 4 * known


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "sum"}, "room: its mode must be that of slice, 'concat', got 'sum'"),
        ({"pool": "mean"}, "room: its pool"),
        ({"hashing": "murmur3"}, "room: its hashing"),
        ({"sparse": True}, "room: its sparse"),
        ({"optimizer": RowAdagrad(0.1)}, "room: its optimizer"),
    ],
    ids=str,
)
def test_a_pair_must_fit(change, message):
    with pytest.raises(ValueError, match=message):
        PairedPrefixNgramEmbedding(
            PrefixNgramEmbedding(LEVELS, 4), PrefixNgramEmbedding(LEVELS, 4, **change)
        )
    with pytest.raises(ValueError, match="room: mode 'sum' needs the dim of slice, 4, got 5"):
        PairedPrefixNgramEmbedding(
            *(PrefixNgramEmbedding(LEVELS, dim, mode="sum") for dim in (4, 5))
        )


def test_warm_start():
    slices = PrefixNgramEmbedding(LEVELS, 4, pool="mean", version="a")
    rooms = PrefixNgramEmbedding(LEVELS, 4, optimizer=RowAdagrad(0.1), dtype=torch.float64)
    rooms(_codes()).sum().backward()
    state = rooms.state_0.clone()
    assert rooms.warm_start_from(slices) is rooms
    for table, source in zip(rooms.tables, slices.tables, strict=True):
        assert torch.equal(table, source.double()) and table.requires_grad
    assert state.any() and torch.equal(rooms.state_0, state)
    rooms(_codes()).sum().backward()  # the copy is a copy
    assert not torch.equal(rooms.tables[0].float(), slices.tables[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"levels": (6, 4, 6)}, r"other: its levels must be \[6, 4, 5\], got \[6, 4, 6\]"),
        ({"dim": 5}, r"other: its dims must be \[4, 4, 4\]"),
        ({"scheme": "levelwise"}, "other: its scheme must be 'prefix', got 'levelwise'"),
        ({"hashing": "murmur3"}, "other: its hashing"),
        ({"max_rows": 20}, r"other: its tables\[1\] must have 24 rows, got 20"),
        ({"version": "b"}, "other: its tables are for codes of codebooks b, not of a"),
    ],
    ids=str,
)
def test_warm_start_must_fit(change, message):
    module = PrefixNgramEmbedding(LEVELS, 4, version="a")
    before = [table.clone() for table in module.tables]
    with pytest.raises(ValueError, match=message):
        module.warm_start_from(PrefixNgramEmbedding(**{"levels": LEVELS, "dim": 4, **change}))
    assert all(torch.equal(a, b) for a, b in zip(before, module.tables, strict=True))
    with pytest.raises(TypeError, match="other: must be a PrefixNgramEmbedding, got Linear"):
        module.warm_start_from(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("optimizer", [None, RowAdagrad(0.1, seed=3)], ids=["plain", "fused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_file_round_trip(tmp_path, dtype, optimizer):
    settings = {"mode": "concat", "pool": "mean", "max_rows": 20, "hashing": "murmur3"}
    settings |= {"dtype": dtype, "optimizer": optimizer, "version": "abc"}
    module = PrefixNgramEmbedding(LEVELS, (2, 3, 4), **settings)
    module(_codes(), OFFSETS).float().sum().backward()
    module.save(tmp_path / "tables.safetensors")
    back = PrefixNgramEmbedding.load(tmp_path / "tables.safetensors", version="abc")
    assert repr(back) == repr(module) and back.version == "abc"
    assert {name: t.dtype for name, t in back.state_dict().items()} == {
        name: t.dtype for name, t in module.state_dict().items()
    }
    for _ in range(2):  # the second time after a further step
        for ours, theirs in zip(
            back.state_dict().values(), module.state_dict().values(), strict=True
        ):
            assert torch.equal(ours, theirs)
        for embedding in (module, back):
            embedding(_codes(2), OFFSETS).float().square().sum().backward()
    with safe_open(tmp_path / "tables.safetensors", "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["levels"]) == list(LEVELS)
    assert json.loads(metadata["dims"]) == [2, 3, 4] and metadata["scheme"] == '"prefix"'


def test_files_of_others_are_refused(tmp_path, coder):
    path = tmp_path / "tables.safetensors"
    PrefixNgramEmbedding(LEVELS, 4, version="abc").save(path)
    with pytest.raises(ValueError, match="path: .* are for codes of codebooks abc, not of xyz"):
        PrefixNgramEmbedding.load(path, version="xyz")
    assert PrefixNgramEmbedding.load(path).version == "abc"
    coder.save(path)
    with pytest.raises(ValueError, match="was not written by PrefixNgramEmbedding.save"):
        PrefixNgramEmbedding.load(path)
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        PrefixNgramEmbedding.load(path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("pool", [None, "mean"])
def test_quantized(pool, dtype):
    module = PrefixNgramEmbedding(LEVELS, 8, max_rows=15, pool=pool, dtype=dtype)
    module.tables[0].data[2] = 0
    small = module.quantized()
    assert {table.dtype for table in small.tables} == {torch.int8}
    offsets = OFFSETS if pool else None
    out, wanted = small(_codes(), offsets), module(_codes(), offsets).float()
    assert out.dtype == torch.float32 and not out.requires_grad
    step = max(table.abs().max().item() for table in module.tables) / 127
    assert 0 < (out - wanted).abs().max() <= step * 0.5 + (1e-3 if dtype == torch.float16 else 1e-6)
    assert {"table_0", "scale_0"} <= small.state_dict().keys() and not list(small.parameters())
    if pool is None:
        zeros = small(torch.tensor([[2, -1, -1]]))
        assert torch.equal(zeros, torch.zeros(1, 24))


def test_quantized_pair():
    pair = _pair()
    codes = torch.cat([_codes(), _codes(1, levels=(7, 3))], 1)
    torch.testing.assert_close(pair.quantized()(codes), pair(codes).detach(), atol=0.01, rtol=0)
