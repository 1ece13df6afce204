"""From codes to rows of a table: keys, the three hashes, groups, packed codes, int8 tables."""

import prefix_by_hand as by_hand
import pytest
import torch
from hard_vectors import kernels_of, run

from livrec_fast import pack_codes, prefix_ngram_lookup
from livrec_fast.reference.prefix_ngram import murmur3, table_rows

KERNELS = kernels_of("prefix_ngram_lookup")
HASHES = ("modulo", "murmur3", "order_preserving")
LARGEST = (153_092_023, 92_737, 649_657)  # whose product is 2^63 - 1


def _identity(rows):
    """A table whose row k says k."""
    return torch.arange(rows, dtype=torch.float32)[:, None]


def _read_rows(kernel, codes, levels, rows, **settings):
    """Return the table row that is read, per item and level."""
    tables = [_identity(height) for height in rows]
    return run(prefix_ngram_lookup, kernel, codes, tables, levels, **settings).long().tolist()


def _random(count, *bounds):
    generator = torch.Generator().manual_seed(count)
    return torch.stack([torch.randint(n, (count,), generator=generator) for n in bounds], 1)


@pytest.mark.parametrize("kernel", KERNELS)
def test_identity_tables_show_the_keys_of_the_paper(kernel):
    codes = torch.tensor([[0, 2], [3, 2]], dtype=torch.uint8)
    assert _read_rows(kernel, codes, (4, 4), (4, 16)) == [[0, 2], [3, 14]]


def test_murmur3_agrees_with_pythons_integers():
    keys = [0, 1, 2, 2**31, 2**63 - 1, *_random(500, 2**63 - 1)[:, 0].tolist()]
    for key, found in zip(keys, murmur3(torch.tensor(keys)).tolist(), strict=True):
        h1, h2 = by_hand.murmur3(key.to_bytes(8, "little") + bytes(8))
        assert found % 2**64 == h1 ^ h2
    assert table_rows(torch.tensor([1, 2]), 10**6, 1000, "murmur3").tolist() == [125, 258]


@pytest.mark.parametrize("rows", [1000, 2**20, 3**20])
def test_murmur3_is_that_of_fbgemm(rows):
    pytest.importorskip("fbgemm_gpu", reason="fbgemm-gpu-cpu is not installed")
    keys = _random(10**6, 2**63 - 1)[:, 0]
    free = torch.full((1, 1), -1).expand(rows, 1)  # no key has a place: each gets that of its hash
    theirs, _ = torch.ops.fbgemm.zero_collision_hash(
        keys, free, 1, circular_probe=True, readonly=True
    )
    ours = table_rows(keys, 2**63 - 1, rows, "murmur3")
    assert torch.equal(ours, theirs) and ours.unique().numel() > 999


@pytest.mark.parametrize("hashing", HASHES)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("levels", [(8192,) * 3, LARGEST, (2,) * 62, (1, 1, 7), (2**31 - 1,) * 2])
def test_large_keys_are_exact(kernel, levels, hashing):
    ends = torch.tensor([levels]) - 1
    codes = torch.cat([ends, ends * 0, _random(300, *levels)])
    codes[5, 0], codes[6, -1] = -1, -1
    rows = [min(size, 1000 + level) for level, size in enumerate(levels)]
    found = _read_rows(kernel, codes, levels, rows, hashing=hashing)
    for mine, wanted in zip(found, by_hand.table_rows(codes, levels, rows, hashing), strict=True):
        assert mine == [row or 0 for row in wanted]  # unknown ones add zero


def test_the_largest_key_is_exact():
    codes = torch.tensor([LARGEST]) - 1
    assert LARGEST[0] * LARGEST[1] * LARGEST[2] == 2**63 - 1
    for rows in (2**20, 999_983):
        assert _read_rows("auto", codes, LARGEST, (1, 1, rows))[0][2] == (2**63 - 2) % rows


@pytest.mark.parametrize("levels", [(2**21,) * 3, (2,) * 63, (LARGEST[0] + 1, *LARGEST[1:])])
def test_keys_beyond_int64_are_refused_but_not_in_groups(levels):
    codes, tables = torch.zeros(2, len(levels), dtype=torch.int32), [_identity(2)] * len(levels)
    with pytest.raises(ValueError, match=r"product must be at most 2\^63 - 1"):
        prefix_ngram_lookup(codes, tables, levels)
    groups = (1, len(levels) - 1)
    assert prefix_ngram_lookup(codes, tables, levels, groups=groups).shape == (2, len(levels))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("keys, rows", [(1000, 37), (1000, 999), (4096, 64), (997, 2), (50, 1)])
def test_order_preserving_keeps_order_and_reaches_every_row(kernel, keys, rows):
    codes = torch.arange(keys)[:, None]
    settings = {"hashing": "order_preserving"}
    found = torch.tensor(_read_rows(kernel, codes, (keys,), (rows,), **settings))[:, 0]
    assert (found.diff() >= 0).all() and found.unique().tolist() == list(range(rows))
    counts = found.bincount()
    assert counts.max() - counts.min() <= 1  # and evenly, but for rounding


@pytest.mark.parametrize("rows", [(9, 63, 441), (4, 5, 6)])
@pytest.mark.parametrize("hashing", HASHES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_packed_codes_read_the_same(kernel, hashing, rows):
    levels = (9, 7, 7)
    codes = _random(500, *levels).to(torch.uint8)
    packed = pack_codes(codes, levels)
    assert packed.shape[1] < codes.shape[1]
    tables = [torch.randn(height, 5) for height in rows]
    ours = run(prefix_ngram_lookup, kernel, packed, tables, levels, packed=True, hashing=hashing)
    theirs = run(prefix_ngram_lookup, kernel, codes, tables, levels, hashing=hashing)
    assert torch.equal(ours, theirs)
    assert torch.equal(ours, by_hand.lookup(codes, tables, levels, hashing=hashing))


@pytest.mark.parametrize("hashing", HASHES)
@pytest.mark.parametrize("mode", ["concat", "sum"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_groups_are_calls_of_their_own(kernel, mode, hashing):
    levels, groups = (6, 5, 4, 3, 7), (2, 2, 1)
    codes = _random(300, *levels)
    codes[torch.rand(codes.shape) < 0.2] = -1
    tables = [torch.randint(-9, 9, (rows, 3)).float() for rows in (6, 11, 4, 12, 2)]
    settings = {"mode": mode, "hashing": hashing}
    ours = run(prefix_ngram_lookup, kernel, codes, tables, levels, groups=groups, **settings)
    parts = [
        run(prefix_ngram_lookup, kernel, codes[:, at], tables[at], levels[at], **settings)
        for at in (slice(0, 2), slice(2, 4), slice(4, 5))
    ]
    assert torch.equal(ours, torch.cat(parts, 1) if mode == "concat" else sum(parts))
    assert torch.equal(ours, by_hand.lookup(codes, tables, levels, groups=groups, **settings))


@pytest.mark.parametrize("pool", [None, "sum", "mean"])
@pytest.mark.parametrize("mode", ["concat", "sum"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_int8_tables_are_their_floats(kernel, mode, pool):
    levels, rows, dims = (9, 7, 7), (9, 63, 100), (19, 19, 19)
    codes = _random(400, *levels)
    codes[torch.rand(codes.shape) < 0.1] = -1
    tables = [
        torch.randint(-128, 128, (h, d), dtype=torch.int8) for h, d in zip(rows, dims, strict=True)
    ]
    scales = [torch.rand(height) + 0.01 for height in rows]
    floats = [t * s[:, None] for t, s in zip(tables, scales, strict=True)]
    settings = {
        "mode": mode,
        "pool": pool,
        "offsets": torch.tensor([0, 0, 9, 400]) if pool else None,
    }
    ours = run(prefix_ngram_lookup, kernel, codes, tables, levels, scales=scales, **settings)
    theirs = run(prefix_ngram_lookup, kernel, codes, floats, levels, **settings)
    assert ours.dtype == torch.float32 and theirs.abs().max() > 20
    if mode == "concat" and pool is None:
        assert torch.equal(ours, theirs)  # one rounded product each
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=2e-2 if pool else 1e-4)
