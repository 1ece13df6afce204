"""Gradients of a prefix n-gram embedding, row by row: sums, runs, threads, sparse, bad inputs."""

import prefix_by_hand as by_hand
import pytest
import torch
from hard_vectors import kernels_of, run
from prefix_inputs import BAD_CODES, LEVELS, pooled, some_codes

from livrec_fast import pack_codes, prefix_ngram_gradient, prefix_ngram_lookup


def _grad(good, change):
    return {"grad": change(good["grad"])}


BAD_INPUTS = {
    "prefix_ngram_gradient": [
        ("list", lambda g: {"grad": [[0.0]]}, TypeError, "grad: .* list"),
        ("int", lambda g: _grad(g, torch.Tensor.int), TypeError, "grad: .* int32"),
        ("few", lambda g: _grad(g, lambda t: t[1:]), ValueError, r"grad: shape .* 27\], got"),
        ("narrow", lambda g: _grad(g, lambda t: t[:, 1:]), ValueError, r"grad: .* got .* 26\]"),
        ("1-d", lambda g: _grad(g, lambda t: t[:, 0]), ValueError, "grad: shape"),
        ("of items", lambda g: pooled(g, 0, None, grad=g["grad"]), ValueError, r"\[1, 27\]"),
        ("meta", lambda g: _grad(g, lambda t: t.to("meta")), ValueError, "device .* meta"),
        ("rows few", lambda g: {"rows": [6, 42]}, ValueError, r"rows: .* got \[6, 42\]"),
        ("rows 0", lambda g: {"rows": [6, 0, 9]}, ValueError, r"rows: .* got \[6, 0, 9\]"),
        ("rows float", lambda g: {"rows": [6, 7.5, 9]}, ValueError, r"rows: .* got \[6, 7.5, 9\]"),
        ("dims many", lambda g: {"dims": [8] * 4}, ValueError, r"dims: .* got \[8, 8, 8, 8\]"),
        ("dims below", lambda g: {"dims": [8, 9, -1]}, ValueError, r"dims: .* got \[8, 9, -1\]"),
        ("dims differ", lambda g: {"mode": "sum"}, ValueError, r"dims: .* got \[8, 9, 10\]"),
        *BAD_CODES,
    ]
}  # fmt: skip

KERNELS = kernels_of("prefix_ngram_gradient")
DIMS = (3, 1, 4)


def _whole(*shape):
    """Return small whole numbers: float32 adds them exactly, in any order."""
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(1)).float()


def _same(ours, wanted):
    for at, (mine, want) in enumerate(zip(ours, wanted, strict=True)):
        assert mine.dtype == (torch.float32 if at % 2 else torch.int64)
        assert mine.tolist() == want.tolist()


@pytest.mark.parametrize("groups", [(3,), (1, 2), (1, 1, 1)])
@pytest.mark.parametrize("hashing", ["modulo", "murmur3", "order_preserving"])
@pytest.mark.parametrize("mode", ["concat", "sum"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_agrees_with_adding_up_by_hand(kernel, mode, hashing, groups):
    codes, dims = some_codes(3000), (4, 4, 4) if mode == "sum" else DIMS
    grad = _whole(3000, 4 if mode == "sum" else sum(DIMS))
    settings = {"mode": mode, "hashing": hashing, "groups": groups}
    for rows in ((5, 24, 120), (2, 3, 7)):  # all keys, and rows that many keys share
        found = run(prefix_ngram_gradient, kernel, grad, codes, LEVELS, rows, dims, **settings)
        _same(found, by_hand.gradient(grad, codes, LEVELS, rows, dims, **settings))
        if groups != (1, 1, 1) and rows[1] < 4:
            assert [len(r) for r in found[::2]] == list(rows)  # every row is hit, and once


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("mode", ["concat", "sum"])
def test_unknown_codes_in_every_position(kernel, mode):
    patterns = torch.cartesian_prod(*[torch.tensor([-1, 0, 3])] * 3)  # 27 rows
    codes, dims = patterns.repeat(50, 1), (2, 2, 2)
    grad = _whole(len(codes), 2 if mode == "sum" else 6)
    found = run(prefix_ngram_gradient, kernel, grad, codes, LEVELS, (5, 20, 120), dims, mode=mode)
    _same(found, by_hand.gradient(grad, codes, LEVELS, (5, 20, 120), dims, mode))
    nothing = torch.full_like(codes, -1)
    empty = run(prefix_ngram_gradient, kernel, grad, nothing, LEVELS, (5, 20, 120), dims, mode=mode)
    assert [list(t.shape) for t in empty] == [[0], [0, 2]] * 3


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("items", [1, 1023, 1024, 1025, 3072, 10_000])
def test_runs_longer_than_a_chunk(kernel, items):
    """All items have one code, then two: the sums of 1,024 sorted items each are combined."""
    codes, grad = torch.tensor([[4, 3, 5]]).repeat(items, 1), _whole(items, sum(DIMS))
    found = run(prefix_ngram_gradient, kernel, grad, codes, LEVELS, (5, 20, 120), DIMS)
    assert [rows.tolist() for rows in found[::2]] == [[4], [19], [119]]
    assert torch.cat(found[1::2], 1)[0].tolist() == grad.sum(0).tolist()
    codes[items // 3 :, 2] = 1
    found = run(prefix_ngram_gradient, kernel, grad, codes, LEVELS, (5, 20, 120), DIMS)
    _same(found, by_hand.gradient(grad, codes, LEVELS, (5, 20, 120), DIMS))


@pytest.mark.parametrize("pool", ["sum", "mean"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_pooled_gradients_are_those_of_the_items(kernel, pool):
    lengths = torch.tensor([4, 0, 1, 16, 0, 2048, 2])  # divide exactly
    offsets = torch.cat([torch.tensor([0]), lengths.cumsum(0)])
    codes, grad = some_codes(int(offsets[-1])), _whole(len(lengths), sum(DIMS))
    each = (grad / lengths.clamp(min=1)[:, None] if pool == "mean" else grad).repeat_interleave(
        lengths, 0
    )
    rest = codes, LEVELS, (5, 7, 11), DIMS
    pooled = run(prefix_ngram_gradient, kernel, grad, *rest, offsets=offsets, pool=pool)
    _same(pooled, by_hand.gradient(each, *rest))


@pytest.mark.parametrize("kernel", KERNELS)
def test_packed_codes_give_the_same(kernel):
    codes, grad = some_codes(2000, unknown=0), torch.randn(2000, sum(DIMS))
    packed = pack_codes(codes, LEVELS)
    rest = LEVELS, (5, 7, 11), DIMS
    ours = run(prefix_ngram_gradient, kernel, grad, packed, *rest, packed=True)
    theirs = run(prefix_ngram_gradient, kernel, grad, codes, *rest)
    assert all(map(torch.equal, ours, theirs))


def test_groups_of_more_bits_than_a_word_are_the_references():
    levels, grad = (2**20, 2**20, 2**20, 2**20), _whole(50, 4)
    codes = some_codes(50, levels)
    rest = levels, (64,) * 4, (1,) * 4
    found = prefix_ngram_gradient(grad, codes, *rest, groups=(2, 2), hashing="murmur3")
    _same(found, by_hand.gradient(grad, codes, *rest, hashing="murmur3", groups=(2, 2)))


@pytest.mark.parametrize("mode", ["concat", "sum"])
def test_zipf_codes_against_float64(mode):
    levels, rows, dims = (64,) * 4, (64, 4096, 64**3, 50_000), (8,) * 4
    generator = torch.Generator().manual_seed(0)
    codes = (torch.rand((200_000, 4), generator=generator) ** 6 * 64).long()
    grad = torch.randn(len(codes), 8 if mode == "sum" else 32, generator=generator)
    found = prefix_ngram_gradient(grad, codes, levels, rows, dims, mode=mode)
    assert len(found[0]) > 60 and len(found[6]) > 20_000
    for at, part in enumerate(by_hand.parts(grad.double(), dims, mode)):
        key = sum(codes[:, n] * 64 ** (at - n) for n in range(at + 1)) % rows[at]
        wanted, sizes = torch.zeros(2, rows[at], 8, dtype=torch.float64)
        wanted.index_add_(0, key, part)
        sizes.index_add_(0, key, part.abs())
        assert torch.equal(found[2 * at], torch.unique(key))
        error = (found[2 * at + 1] - wanted[found[2 * at]]).abs()
        assert (error <= 2e-6 * sizes[found[2 * at]]).all()


@pytest.mark.parametrize("items", [70_000, 300_000])
@pytest.mark.parametrize("levels", [(1000, 50), (2**20, 2**20)])
def test_many_keys_are_sorted_whatever_their_bits(levels, items):
    codes = some_codes(items, levels, unknown=0.0)
    codes[items // 2 :] = codes[: items - items // 2].flip(0)  # all keys twice
    grad = _whole(items, 2)
    key = codes[:, 0] * levels[1] + codes[:, 1]
    found = prefix_ngram_gradient(grad, codes, levels, (levels[0], levels[0] * levels[1]), (1, 1))
    for at, keys in enumerate((codes[:, 0], key)):
        wanted, place = torch.unique(keys, return_inverse=True)
        sums = torch.zeros(len(wanted)).index_add(0, place, grad[:, at])
        _same(found[2 * at : 2 * at + 2], (wanted, sums[:, None]))


@pytest.mark.parametrize("kernel", [kernel for kernel in KERNELS if "native" in kernel])
def test_sums_that_go_past_the_caches(kernel):
    """Megabytes of them: in whole lines of memory, or not; of rows that keys share, or do not."""
    levels, dims = (70_000, 3), (32, 20)
    codes = torch.stack([torch.arange(70_000).flip(0), torch.arange(70_000) % 3], 1)
    codes = torch.cat([codes, codes[::7]])
    grad = _whole(len(codes), sum(dims))
    rows = (70_000, 131_071)
    found = run(prefix_ngram_gradient, kernel, grad, codes, levels, rows, dims)
    for at, part in enumerate(grad.split(dims, 1)):
        key = codes[:, 0] if at == 0 else (codes[:, 0] * 3 + codes[:, 1]) % rows[1]
        wanted, place = torch.unique(key, return_inverse=True)
        sums = torch.zeros(len(wanted), dims[at]).index_add(0, place, part)
        assert sums.nbytes > 4 << 20 and len(wanted) < len(codes)
        assert torch.equal(found[2 * at], wanted) and torch.equal(found[2 * at + 1], sums)


def _with_threads(count, call):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return call()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("levels", [(1, 1, 1), (3, 2, 2), (64, 64, 64)])
def test_threads_do_not_change_a_bit(levels):
    codes, grad = some_codes(150_000, levels, unknown=0.1), torch.randn(150_000, 12)
    rows = (levels[0], levels[0] * levels[1], 1000)

    def call():
        return prefix_ngram_gradient(grad, codes, levels, rows, (4,) * 3)

    one, *others = [_with_threads(count, call) for count in (1, 2, 2, 3)]
    assert all(all(map(torch.equal, one, other)) for other in others)


def _gradients(codes, sparse, flow, **rest):
    tables = [torch.randn(h, 4, generator=torch.Generator().manual_seed(h)) for h in (5, 20, 70)]
    tables = [table.requires_grad_() for table in tables]
    out = prefix_ngram_lookup(codes, tables, LEVELS, sparse=sparse, **rest)
    return torch.autograd.grad(flow(out), tables)


@pytest.mark.parametrize("kernel", ["auto", "reference"])
@pytest.mark.parametrize("mode", ["concat", "sum"])
def test_sparse_gradients_are_coalesced_and_the_dense_ones(mode, kernel):
    codes = some_codes(4000)
    rest = {"mode": mode, "hashing": "murmur3", "backend": kernel}

    def flow(out):
        return out.square().sum()

    sparse, dense = (_gradients(codes, s, flow, **rest) for s in (True, False))
    for ours, theirs in zip(sparse, dense, strict=True):
        assert ours.is_sparse and ours.is_coalesced() and theirs.any()
        assert torch.equal(ours.indices()[0], torch.unique(ours.indices()[0]))
        torch.testing.assert_close(ours.to_dense(), theirs, rtol=1e-5, atol=1e-4)
        if kernel == "auto":
            assert torch.equal(ours.to_dense(), theirs)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("mode", ["concat", "sum"])
def test_gradients_without_strides(mode, sparse):
    """What comes out of .sum() is one number, expanded."""
    codes = some_codes(2500)
    width = 4 if mode == "sum" else 12
    ours = _gradients(codes, sparse, torch.sum, mode=mode)
    rows = by_hand.gradient(torch.ones(2500, width), codes, LEVELS, (5, 20, 70), (4,) * 3, mode)
    for found, at, sums in zip(ours, rows[::2], rows[1::2], strict=True):
        wanted = torch.zeros(found.shape).index_copy(0, at, sums.float())
        assert torch.equal(found.to_dense() if sparse else found, wanted)


def test_strided_gradients_are_read_where_they_lie():
    codes, wide = some_codes(2000), _whole(2 * sum(DIMS), 4000)
    grad = wide.T[::2, ::2]  # unit stride nowhere
    rest = codes, LEVELS, (5, 7, 11), DIMS
    _same(prefix_ngram_gradient(grad, *rest), by_hand.gradient(grad, *rest))
