"""The Triton kernels of prefix n-grams: their edges, and how they reach the chip."""

import re
from importlib.util import find_spec
from math import prod

import gpu_gates as gates
import pytest
import torch
from conftest import run_in_tritons_interpreter
from test_gates import needs_triton

from livrec_fast import explain, pack_codes, prefix_ngram_gradient, prefix_ngram_lookup

HASHES = ("modulo", "murmur3", "order_preserving")


def _draw(*sizes, items=37, unknown=True):
    generator = torch.Generator().manual_seed(items)
    codes = [torch.randint(size, (items,), generator=generator) for size in sizes]
    codes = torch.stack(codes, 1)
    codes[0] = torch.tensor(sizes) - 1
    if unknown:
        codes[torch.rand(codes.shape, generator=generator) < 0.1] = -1
    return codes, generator


def keys_of_63_bits_find_their_rows():
    """Hashes of keys near 2^63, and codes of 31 bits, across bytes where they are packed."""
    sizes = (2**30, 2**31, 3)
    assert 2**62 < prod(sizes) < 2**63
    for packed in (False, True):
        codes, generator = _draw(*sizes, unknown=not packed)
        rows = (5, 1000, 999_983)
        tables = [torch.randn(count, 3, generator=generator) for count in rows]
        given = {"packed": packed, "levels": sizes, "tables": tables}
        given["codes"] = pack_codes(codes, sizes) if packed else codes
        for hashing in HASHES:
            got = prefix_ngram_lookup(**given, hashing=hashing, backend="triton")
            assert got.equal(prefix_ngram_lookup(**given, hashing=hashing, backend="reference"))
            assert got.count_nonzero() > got.numel() // 2


def tables_wider_than_a_block():
    """Of several column blocks, a different number at each level; whole numbers add up exactly."""
    codes, generator = _draw(9, 7, 4)
    offsets = torch.tensor([0, 0, 20, 21, 37])
    for dims, mode in (((300, 17, 129), "concat"), ((300,) * 3, "sum")):
        tables = [torch.randint(-9, 9, (6, d), generator=generator).float() for d in dims]
        for given in ({}, {"offsets": offsets, "pool": "sum"}):
            given = {"mode": mode, "groups": (1, 2), **given}
            got = prefix_ngram_lookup(codes, tables, (9, 7, 4), **given, backend="triton")
            wanted = prefix_ngram_lookup(codes, tables, (9, 7, 4), **given, backend="reference")
            assert got.equal(wanted) and got.count_nonzero() > 0


def int8_rows_are_scaled():
    codes, generator = _draw(9, 7)
    tables = [
        torch.randint(-127, 128, (n, 20), generator=generator).to(torch.int8) for n in (9, 40)
    ]
    scales = [torch.rand(2 * len(table), generator=generator)[::2] for table in tables]
    got = prefix_ngram_lookup(codes, tables, (9, 7), scales=scales, backend="triton")
    wanted = prefix_ngram_lookup(codes, tables, (9, 7), scales=scales, backend="reference")
    assert got.dtype == torch.float32 and got.equal(wanted) and got.count_nonzero() > 0


def bad_contents_stay_in_bounds():
    """The host does not look at them: codes out of range are unknown, offsets are cut off."""
    from livrec_fast.kernels import prefix_ngram, prefix_ngram_gradient

    codes = torch.tensor([[0, 1], [2, 0], [-7, 1], [1, 3], [1, 2]])
    tables = [torch.ones(2, 4), torch.full((6, 4), 2.0)]
    rest = ((2, 3), "concat", None, None, "modulo", (2,), False)
    got = prefix_ngram.prefix_ngram_lookup(codes, tables, *rest, ())
    wanted = torch.tensor([[1.0, 2], [0, 0], [0, 0], [1, 0], [1, 2]]).repeat_interleave(4, 1)
    assert got.equal(wanted)
    found = prefix_ngram_gradient.prefix_ngram_gradient(
        torch.ones(5, 8), codes, (2, 3), (2, 6), (4, 4), *rest[1:]
    )
    assert [t.tolist() for t in found[::2]] == [[0, 1], [1, 5]]
    assert [t[:, 0].tolist() for t in found[1::2]] == [[1, 2], [1, 1]]
    offsets = torch.tensor([-3, 2**62, 1, 2**62])
    rest = ((2, 3), "concat", offsets, "sum", "modulo", (2,), False)
    got = prefix_ngram.prefix_ngram_lookup(codes, tables, *rest, ())
    assert got[0].equal(wanted.sum(0)) and (got[1] == 0).all() and got[2].equal(wanted[1:].sum(0))
    prefix_ngram_gradient.prefix_ngram_gradient(
        torch.ones(3, 8), codes, (2, 3), (2, 6), (4, 4), *rest[1:]
    )


def long_runs_add_up_in_pieces():
    """A prefix with more items than pieces of pieces take; -1 in the midst of it; one item."""
    items = 70_000
    codes = torch.tensor([[1, 0]]).repeat(items, 1)
    codes[::7, 1] = -1
    codes[5] = torch.tensor([0, 2])
    codes[6, 0] = -1
    grad = torch.arange(2.0 * items).view(items, 2) % 5 + 1
    got = prefix_ngram_gradient(grad, codes, (2, 3), (2, 6), (1, 1), backend="triton")
    wanted = prefix_ngram_gradient(grad, codes, (2, 3), (2, 6), (1, 1), backend="reference")
    assert all(one.equal(other) for one, other in zip(got, wanted, strict=True))
    assert got[2].tolist() == [2, 3] and got[1].min() > 0


def hashed_prefixes_merge():
    """Whole numbers, so that sums are exact; also of codes on their own, and of wide keys."""
    for sizes, groups in (((40, 30, 20), (3,)), ((40, 30, 20), (1, 1, 1)), ((2**20,) * 3, (3,))):
        codes, generator = _draw(*sizes, items=90)
        grad = torch.randint(-9, 9, (90, 12), generator=generator).float()
        for hashing in HASHES:
            given = (grad, codes, sizes, (7, 11, 13), (2, 5, 5))
            more = {"hashing": hashing, "groups": groups}
            got = prefix_ngram_gradient(*given, **more, backend="triton")
            wanted = prefix_ngram_gradient(*given, **more, backend="reference")
            assert all(one.equal(other) for one, other in zip(got, wanted, strict=True))
            assert all(sums.count_nonzero() > 0 for sums in got[1::2])


def dense_gradients_go_through_the_kernels():
    codes, generator = _draw(9, 7)
    tables = [torch.randn(n, 5, generator=generator) for n in (9, 20)]
    found = []
    for kernel in ("triton", "reference"):
        leaves = [table.clone().requires_grad_() for table in tables]
        prefix_ngram_lookup(codes, leaves, (9, 7), backend=kernel).sum().backward()
        found.append([leaf.grad for leaf in leaves])
    assert all(one.equal(other) and one.any() for one, other in zip(*found, strict=True))


def more_tables_than_arguments_are_refused():
    told = explain(prefix_ngram_lookup, torch.zeros(1, 9).int(), [torch.ones(2, 1)] * 9, (2,) * 9)
    assert "at most 8 levels" in told


EDGES = [
    keys_of_63_bits_find_their_rows,
    tables_wider_than_a_block,
    int8_rows_are_scaled,
    bad_contents_stay_in_bounds,
    long_runs_add_up_in_pieces,
    hashed_prefixes_merge,
    dense_gradients_go_through_the_kernels,
    more_tables_than_arguments_are_refused,
]


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("edge", EDGES, ids=lambda edge: edge.__name__)
def test_edge_in_tritons_interpreter(edge):
    run_in_tritons_interpreter(edge)


@needs_triton
@pytest.mark.parametrize("arch", gates.SHARED_LIMIT)
def test_rows_travel_in_128_bits(arch):
    """Of tables with 64 columns, both the loads and the stores."""
    module = gates.load("prefix_ngram")
    seen = 0
    for kernel, types, constants, options in module.compile_configs():
        levels = constants["LEVELS"]
        if kernel is module._lookup_items and {level.dim for level in levels} == {64}:
            sass = gates.compile_triton(kernel, types, constants, options, arch).sass
            parts = 1 if constants["SUM"] else len(levels)
            assert len(re.findall(r"LDG\.E\.128", sass)) >= len(levels), sass
            assert len(re.findall(r"STG\.E\.128", sass)) >= parts, sass
            seen += 1
    assert seen >= 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("hashing", HASHES)
def test_large_batches_on_a_gpu(hashing):
    """Against the reference on the CPU, and against themselves."""
    codes, _ = _draw(300, 256, 256, items=200_000)
    tables = [torch.randn(rows, 64) for rows in (300, 50_000, 1_000_000)]
    levels, rows = (300, 256, 256), (300, 50_000, 1_000_000)
    given = {"hashing": hashing, "backend": "triton"}
    on_gpu = [table.cuda() for table in tables]
    got = prefix_ngram_lookup(codes.cuda(), on_gpu, levels, **given)
    assert got.cpu().equal(prefix_ngram_lookup(codes, tables, levels, hashing=hashing))
    grad = torch.randint(-9, 9, got.shape).float()
    wanted = prefix_ngram_gradient(grad, codes, levels, rows, (64,) * 3, hashing=hashing)
    for _ in range(3):
        found = prefix_ngram_gradient(grad.cuda(), codes.cuda(), levels, rows, (64,) * 3, **given)
        assert all(one.cpu().equal(other) for one, other in zip(found, wanted, strict=True))
