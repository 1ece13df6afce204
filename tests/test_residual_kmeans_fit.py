"""ResidualKMeans.fit: sources, threads, chunks, weights, balance, seeding."""

import numpy as np
import pytest
import torch

import livrec_fast.modules._rows as rows_module
import livrec_fast.modules._shard as shard_module
from livrec_fast import ResidualKMeans, kmeans_step
from livrec_fast.modules import _balance, _seeding
from livrec_fast.modules._lloyd import lloyd
from livrec_fast.modules._ranks import Ranks
from livrec_fast.modules._rows import MappedRows, MemoryRows
from livrec_fast.modules._shard import Shard


def blobs(rows=3000, centres=20, dim=12, spread=1.0, skew=False):
    """Draw rows about centres, as many about each or, skewed, fewer and fewer."""
    generator = torch.Generator().manual_seed(0)
    middle = 4 * torch.randn(centres, dim, generator=generator)
    share = 1 / torch.arange(1.0, 1 + centres) if skew else torch.ones(centres)
    of = torch.multinomial(share, rows, replacement=True, generator=generator)
    return middle[of] + spread * torch.randn(rows, dim, generator=generator)


def same_bits(a, b):
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(x.equal(y) for x, y in pairs) and a.history == b.history


def mapped(tmp_path, x):
    np.save(tmp_path / "x.npy", x.numpy())
    return np.load(tmp_path / "x.npy", mmap_mode="r")


def shard_of(x, weights=None):
    return Shard(MemoryRows(x), weights, Ranks())


SETTINGS = [
    {},
    {"init": "random", "iterations": 5},
    {"balance": 1.1, "iterations": 6},
    {"sample": 700, "tolerance": 0.0},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(s) or "plain")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_memory_file_and_chunk_sizes_give_the_same_bits(tmp_path, monkeypatch, settings, dtype):
    x = blobs(2000, spread=2.0).to(dtype)
    x[7] = -0.0
    weights = torch.rand(2000, generator=torch.Generator().manual_seed(1))
    make = lambda: ResidualKMeans((24, 9, 5), **settings)  # noqa: E731
    in_memory = make().fit(x, weights=weights)
    assert same_bits(in_memory, make().fit(x.numpy(), weights=weights.numpy()))
    assert same_bits(in_memory, make().fit(mapped(tmp_path, x), weights=weights))
    monkeypatch.setattr(rows_module, "_READ", 12 * 171)
    monkeypatch.setattr(shard_module, "_KERNEL_ROWS", 333)
    monkeypatch.setattr(shard_module, "_REFERENCE_ROWS", 333)
    assert same_bits(in_memory, make().fit(mapped(tmp_path, x), weights=weights))
    assert same_bits(in_memory, make().fit(x, weights=weights))


@pytest.mark.parametrize("settings", SETTINGS[:3], ids=lambda s: "-".join(s) or "plain")
def test_same_bits_for_any_number_of_threads(settings):
    x, fits = blobs(20_000, spread=3.0), []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            fits.append(ResidualKMeans((12, 7), seed=3, **settings).fit(x))
    finally:
        torch.set_num_threads(before)
    assert same_bits(fits[0], fits[1]) and same_bits(fits[0], fits[2])
    assert fits[0].version != ResidualKMeans((12, 7), seed=4, **settings).fit(x).version


def test_a_file_is_never_held_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(rows_module, "_READ", 12 * 64)
    held, real = [], MappedRows._left_of

    def watched(self, part, codes_at, room, count):
        held.append(count)
        return real(self, part, codes_at, room, count)

    monkeypatch.setattr(MappedRows, "_left_of", watched)
    ResidualKMeans((8, 4), init="random").fit(mapped(tmp_path, blobs(1000)))
    assert 64 <= max(held) < 100 and sum(held) > 4000


def test_arrays_of_any_layout():
    x = blobs(600)
    fitted = ResidualKMeans((6, 3)).fit(x)
    array = x.numpy()
    frozen = array.copy()
    frozen.setflags(write=False)
    for same in (np.asfortranarray(array), array[::-1].copy()[::-1], frozen, array.astype(">f4")):
        assert same_bits(fitted, ResidualKMeans((6, 3)).fit(same))
    with pytest.raises(TypeError, match="x: dtype must be float32, float16 or float64, got int64"):
        ResidualKMeans((6, 3)).fit(array.astype(np.int64))
    with pytest.raises(ValueError, match=r"x: shape must be \[M, D\], got \[12\]"):
        ResidualKMeans((6, 3)).fit(array[0])


def test_starts_from_given_codebooks_and_equals_plain_lloyd():
    x = blobs(800, spread=3.0)
    start = [x[:5] + 0.1, x[:4] / 4]
    fitted = ResidualKMeans((5, 4), init=start, iterations=3, tolerance=0).fit(x)
    residual = x.double()
    for level, book in enumerate(start):
        book = book.double()
        for _ in range(3):
            codes = torch.cdist(residual, book).argmin(1)
            book = torch.stack([residual[codes == word].mean(0) for word in range(len(book))])
        torch.testing.assert_close(fitted.codebooks[level].double(), book, rtol=1e-5, atol=1e-5)
        codes = torch.cdist(residual, book).argmin(1)
        assert fitted.counts[level].equal(codes.bincount(minlength=len(book)).double())
        residual = residual - book[codes]
        inertia = float(residual.square().sum())
        assert fitted.history[level].inertia[-1] == pytest.approx(inertia, rel=1e-5)


def test_a_start_that_does_not_fit():
    x = blobs(50)
    with pytest.raises(ValueError, match="init: 2 are needed, got 1"):
        ResidualKMeans((5, 4), init=[x[:5]])
    with pytest.raises(ValueError, match=r"init\[1\]: shape must be \[4, 12\], got \[3, 12\]"):
        ResidualKMeans((5, 4), init=[x[:5], x[:3]]).fit(x)
    with pytest.raises(ValueError, match=r"init\[0\]: row 2 is not finite"):
        ResidualKMeans((5,), init=[x[:5].index_fill(0, torch.tensor([2]), float("nan"))]).fit(x)


def test_no_worse_than_faiss_from_the_same_start():
    faiss = pytest.importorskip("faiss")
    for x in (blobs(4000, spread=2.0), torch.randn(4000, 32)):
        start = x[:32].clone()
        theirs = faiss.Kmeans(x.shape[1], 32, niter=15, max_points_per_centroid=10**9)
        theirs.train(x.numpy(), init_centroids=start.numpy())
        error = theirs.index.search(x.numpy(), 1)[0].astype(np.float64).sum()
        ours = ResidualKMeans((32,), init=[start], iterations=15, tolerance=0).fit(x)
        assert ours.history[0].inertia[-1] <= 1.001 * error


def test_weights_count_rows():
    x = blobs(400, spread=3.0)
    weights = torch.randint(0, 4, (400,), generator=torch.Generator().manual_seed(0))
    settings = {"levels": (6, 3), "init": [x[:6] + 0.5, x[6:9] / 3], "tolerance": 0.0}
    for balance in (None, 1.2):
        weighted = ResidualKMeans(**settings, balance=balance).fit(x, weights=weights.float())
        repeated = ResidualKMeans(**settings, balance=balance).fit(x.repeat_interleave(weights, 0))
        for a, b in zip(weighted.history, repeated.history, strict=True):
            close = 1e-6 if balance is None else 0.05  # a heavy row moves whole
            assert a.inertia[-1] == pytest.approx(b.inertia[-1], rel=close)
        if balance is None:
            assert weighted.counts[0].equal(repeated.counts[0])
    plain = ResidualKMeans(**settings).fit(x)
    assert (weighted.codebooks[0] - plain.codebooks[0]).abs().max() > 0.01


def test_an_empty_cluster_takes_a_side_of_the_worst_row_s():
    """Two codewords start where no row is nearest, as 1, of rows -4 .. 6, starts alone."""
    x = torch.tensor([0.0, 1, 2, -4, 6])[:, None]
    start = torch.tensor([1.0, 1e4, -1e4])[:, None]
    _, found, course = lloyd(shard_of(x), start, QUANTA, iterations=1, tolerance=0.0)
    book, found, _ = lloyd(shard_of(x), start, QUANTA, iterations=3, tolerance=0.0)
    assert course.reseeded == [2] and course.heaviest == [5]
    assert book[:, 0].tolist() == [1, -4, 6] or book[:, 0].tolist() == [1, 6, -4]
    assert found.mass.tolist() == [3, 1, 1]


QUANTA = torch.full((3,), 2.0**-40, dtype=torch.float64)


def test_empty_clusters_do_not_end_as_single_far_rows():
    """Of isotropic rows in many dimensions every one is far; a codeword must still win its part."""
    x = torch.randn(5000, 64, generator=torch.Generator().manual_seed(0))
    start = torch.cat([x[:8], 100 + x[8:16]])
    fitted = ResidualKMeans((16,), init=[start], tolerance=0).fit(x)
    assert fitted.history[0].reseeded[0] == 8
    assert fitted.counts[0].min() > 100
    for before, after in zip(
        fitted.history[0].inertia, fitted.history[0].inertia[1:], strict=False
    ):
        assert after <= before * (1 + 1e-6)


@pytest.mark.parametrize("balance", [1.0, 1.3, 4.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_bound_of_a_balanced_fit_holds(balance, weighted):
    x = blobs(1003, skew=True)
    weights = None
    if weighted:
        weights = torch.rand(1003, generator=torch.Generator().manual_seed(0))
    fitted = ResidualKMeans((20, 8), balance=balance, iterations=4).fit(x, weights=weights)
    total = 1003 if weights is None else float(weights.double().sum())
    for size, course in zip((20, 8), fitted.history, strict=True):
        heaviest = max(course.heaviest)
        if weights is None:
            assert heaviest <= -(-balance * 1003 // size)
        assert heaviest < balance * total / size + (1 if weights is None else float(weights.max()))


def test_nearest_codes_of_a_balanced_fit_are_more_even():
    x = blobs(6000, centres=100, spread=1.5, skew=True)
    free, even = (ResidualKMeans((32, 16), balance=b).fit(x).quality(x) for b in (None, 1.1))
    for level in range(2):
        assert even.entropy[level] > free.entropy[level] + 0.05
        assert even.heaviest[level] < free.heaviest[level]
    assert even.relative_error[1] < 1.15 * free.relative_error[1]


def test_enforcing_moves_the_rows_that_lose_least():
    """Rows 0 .. 5 belong to the codeword 0; the bound of 3 leaves it those farthest from 10."""
    x = torch.tensor([[0.0], [1], [2], [3], [4], [10]])
    book = torch.tensor([[0.0], [10.0]])
    found = shard_of(x).assign(book, QUANTA)
    assert found.mass.tolist() == [5, 1]
    moved = _balance.enforce(shard_of(x), book, QUANTA, torch.zeros(2), found, 3.0)
    assert moved.codes.tolist() == [0, 0, 0, 1, 1, 1]
    assert moved.mass.tolist() == [3, 3] and moved.sums[:, 0].tolist() == [3, 17]
    assert moved.error.tolist() == [0, 1, 4, 49, 36, 0]
    assert found.codes.tolist() == [0, 0, 0, 0, 0, 1]


def test_enforced_sums_are_those_of_the_codes():
    x, weights = blobs(500, skew=True), torch.rand(500)
    shard = shard_of(x, weights)
    quanta = shard.quanta(float(x.abs().max()))
    found = shard.assign(x[:10].clone(), quanta)
    moved = _balance.enforce(shard, x[:10], quanta, torch.rand(10), found, 1.0 * weights.sum() / 10)
    assert (moved.codes != found.codes).sum() > 20
    for word in range(10):
        own = moved.codes == word
        total = (weights[own, None].double() * x[own].double()).sum(0)
        torch.testing.assert_close(moved.sums[word], total, rtol=1e-12, atol=1e-9)
        assert float(moved.mass[word]) == pytest.approx(float(weights[own].double().sum()))
        error = (x[own] - x[word]).square().sum(1)
        torch.testing.assert_close(moved.error[own], error, rtol=1e-4, atol=1e-4)


def test_kmeans_plus_plus_draws_in_proportion():
    """The second row drawn: 1 and 3 from 0 are drawn as 1 to 9; the third is then the other."""
    rows, weights = torch.tensor([[0.0], [1], [3]]), np.array([1.0, 1, 1])
    second = {0: [], 1: [], 2: []}
    for seed in range(3000):
        first, then = _seeding.plus_plus(rows, weights, 2, np.random.default_rng(seed)).tolist()
        second[first].append(then)
    for first, (a, b, share) in {0: (1, 2, 0.1), 1: (0, 2, 0.2), 2: (0, 1, 9 / 13)}.items():
        assert 900 < len(second[first]) < 1100 and set(second[first]) == {a, b}
        assert abs(second[first].count(a) / len(second[first]) - share) < 0.05


def test_kmeans_plus_plus_over_many_passes_keeps_its_distribution():
    """The last of many rows drawn: as a draw by the exact distances has it (chi-square)."""
    x = torch.randn(60, 2, generator=torch.Generator().manual_seed(0))
    drawn = [_seeding.plus_plus(x, np.ones(60), 30, np.random.default_rng(s)) for s in range(400)]
    plain = [plain_plus_plus(x, 30, np.random.default_rng(10_000 + s)) for s in range(400)]
    counts = [np.bincount(np.concatenate(kind), minlength=60) for kind in (drawn, plain)]
    chi = ((counts[0] - counts[1]) ** 2 / (counts[0] + counts[1]).clip(1)).sum()
    assert chi < 90  # 60 cells that vary no more than independent ones: beyond 90 in 1 of 140
    assert all(len(set(kind.tolist())) == 30 for kind in drawn)


def plain_plus_plus(x, size, random):
    chosen = [int(random.integers(len(x)))]
    while len(chosen) < size:
        nearest = torch.cdist(x, x[chosen]).square().amin(1).double().numpy()
        chosen.append(int(random.choice(len(x), p=nearest / nearest.sum())))
    return np.array(chosen)


def test_steps_of_a_fit_are_those_of_the_op():
    x, start = blobs(300), blobs(300)[:7] + 1
    shard = shard_of(x)
    quanta = shard.quanta(shard.largest())
    step = kmeans_step(x, start, quanta=quanta)
    for found, given in zip(shard.assign(start, quanta), step, strict=True):
        assert found.equal(given)
