"""ResidualKMeans on streams: the reservoir, partial_fit, and what drifts."""

import numpy as np
import pytest
import torch

from livrec_fast import ResidualKMeans
from livrec_fast.modules._sampling import Reservoir, sample_of, sample_stream


def blobs(rows=2000, dim=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    middle = 4 * torch.randn(12, dim, generator=torch.Generator().manual_seed(9))
    return middle[torch.arange(rows) % 12] + torch.randn(rows, dim, generator=generator)


def same_bits(a, b):
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(x.equal(y) for x, y in pairs) and a.history == b.history


def test_a_reservoir_is_uniform():
    """Each of 50 rows is kept in 10 of 50 seeds: chi-square over 2,000 seeds, rows and pairs."""
    kept = np.stack([sample_of(50, 10, seed) for seed in range(2000)])
    assert kept.shape == (2000, 10) and (np.diff(kept) > 0).all() and kept.max() == 49
    counts = np.bincount(kept.ravel(), minlength=50)
    chi = ((counts - 400) ** 2 / (400 * (1 - 0.2))).sum()
    assert 20 < chi < 86  # 49 degrees of freedom: outside in 1 of 1,000
    both = sum(((kept == 0).any(1) & (kept == row).any(1)).sum() for row in range(1, 50))
    assert both == 9 * (kept == 0).any(1).sum()
    late = ((kept == 48).any(1) & (kept == 49).any(1)).mean()
    assert abs(late - 10 * 9 / (50 * 49)) < 0.012


def test_a_reservoir_does_not_see_how_rows_are_batched():
    whole = sample_of(5000, 64, 3)
    for sizes in ([1] * 5000, [63, 2, 4000, 935], [5000]):
        reservoir = Reservoir(64, 3)
        held = np.full(64, -1)
        for size in sizes:
            first = reservoir.seen
            places, by = reservoir.admit(size)
            held[places] = first + by
        assert np.array_equal(held, reservoir.kept) and np.array_equal(np.sort(held), whole)
    assert np.array_equal(sample_of(40, 64, 3), np.arange(40))
    assert not np.array_equal(whole, sample_of(5000, 64, 4))


@pytest.mark.parametrize("kind", [torch.Tensor, np.ndarray])
def test_a_stream_its_array_and_its_file_give_the_same_fit(tmp_path, kind):
    x = blobs()
    np.save(tmp_path / "x.npy", x.numpy())
    settings = {"levels": (10, 5), "sample": 600, "seed": 2}
    array = ResidualKMeans(**settings).fit(x)
    file = ResidualKMeans(**settings).fit(np.load(tmp_path / "x.npy", mmap_mode="r"))
    batches = (part if kind is torch.Tensor else part.numpy() for part in x.split(97))
    stream = ResidualKMeans(**settings).fit(batches)
    assert same_bits(array, file) and same_bits(array, stream)
    assert int(array.counts[0].sum()) == 600
    drawn = x[torch.from_numpy(sample_of(2000, 600, 2))]
    assert same_bits(array, ResidualKMeans((10, 5), seed=2).fit(drawn))
    short = ResidualKMeans((10, 5), sample=4000).fit(iter(x.split(300)))
    assert same_bits(short, ResidualKMeans((10, 5)).fit(x))


def test_a_stream_that_cannot_be_fitted():
    x, module = blobs(60), ResidualKMeans((4,), sample=20)
    bad = x.clone()
    bad[41] = float("inf")
    huge = x.clone()
    huge[41] = 1e25
    for stream, error, message in (
        (iter([]), ValueError, "x: at least one batch is needed, got none"),
        (bad.split(30), ValueError, "x: row 41 is not finite"),
        (huge.split(30), ValueError, "x: row 41 is too large"),
        ([x, x[:, :3]], ValueError, r"x: batch 1: shape must be \[M, 8\], got \[60, 3\]"),
        ([x, x.double()], ValueError, "x: batch 1: dtype and device"),
        ([x, [1.0]], TypeError, "x: batch 1: must be a tensor, got list"),
        (3, TypeError, "x: must be a tensor, an array or an iterable of batches, got int"),
    ):
        with pytest.raises(error, match=message):
            module.fit(stream)
    with pytest.raises(ValueError, match="sample: must be given where x is an iterable"):
        ResidualKMeans((4,)).fit(x.split(30))
    with pytest.raises(ValueError, match="weights, group: must be None"):
        module.fit(x.split(30), weights=torch.ones(60))
    assert len(sample_stream(x.split(7), 1000, 0)) == 60


def test_partial_fit_is_a_running_mean():
    quantizer = ResidualKMeans((2,))
    quantizer.fit(torch.tensor([[0.0], [2], [100], [102], [104]]))
    low = int(quantizer.codebooks[0].argmin())
    quantizer.partial_fit(torch.tensor([[4.0], [6], [110]]))
    assert quantizer.codebooks[0][low].item() == pytest.approx((0 + 2 + 4 + 6) / 4)
    assert quantizer.codebooks[0][1 - low].item() == pytest.approx((100 + 102 + 104 + 110) / 4)
    assert sorted(quantizer.counts[0].tolist()) == [4, 4]
    before = quantizer.version
    assert quantizer.partial_fit(torch.empty(0, 1)).version == before


def test_partial_fit_weighs_and_forgets():
    start = ResidualKMeans.from_codebooks([torch.tensor([[0.0], [100]])])
    start.partial_fit(torch.tensor([[1.0], [3], [90]]), weights=torch.tensor([3.0, 1, 2]))
    assert start.codebooks[0].tolist() == [[1.5], [90]] and start.counts[0].tolist() == [4, 2]
    start.partial_fit(torch.tensor([[4.5], [6.0]]), weights=torch.tensor([1.0, 0]), decay=0.5)
    assert start.counts[0].tolist() == [3, 1]
    assert start.codebooks[0].tolist() == [[(2 * 1.5 + 4.5) / 3], [90]]
    for decay in (0, -1, 1.01, float("nan")):
        with pytest.raises(ValueError, match=r"decay: must be in \(0, 1\], got"):
            start.partial_fit(torch.ones(1, 1), decay=decay)


def test_decay_follows_a_drift_that_running_means_lag_behind():
    x, shift = blobs(), torch.tensor(0.3)
    error = {}
    for decay in (1.0, 0.5):
        quantizer = ResidualKMeans((12, 6)).fit(x)
        for hour in range(1, 9):
            quantizer.partial_fit(blobs(500, seed=hour) + hour * shift, decay=decay)
        error[decay] = quantizer.quality(blobs(seed=20) + 8 * shift).error
    assert error[0.5][0] < 0.8 * error[1.0][0] and error[0.5][1] < 0.9 * error[1.0][1]


def test_partial_fit_alone_learns_and_takes_arrays():
    x = blobs(4000)
    one, two = ResidualKMeans((12, 4)), ResidualKMeans((12, 4))
    for batch in x.split(200):
        one.partial_fit(batch)
        two.partial_fit(batch.numpy())
    assert same_bits(one, two) and int(one.counts[0].sum()) == 4000
    assert one.quality(x).relative_error[0] < 0.2
    with pytest.raises(ValueError, match="at least 12 rows are needed"):
        ResidualKMeans((12, 4)).partial_fit(x[:11])


def test_counts_keep_their_dtype_and_old_states_load():
    fitted = ResidualKMeans((3,)).fit(blobs(70_000, 2))
    counts = fitted.counts[0]
    assert counts.dtype == torch.float64
    assert fitted.half().counts[0].equal(counts) and fitted.codebooks[0].dtype == torch.float16
    state = fitted.state_dict() | {"count_0": counts.long()}
    fresh = ResidualKMeans((3,))
    fresh.load_state_dict(state)
    assert fresh.counts[0].equal(counts)


def test_quality_of_a_file_is_that_of_its_rows(tmp_path):
    x = blobs(40_000, 6)
    np.save(tmp_path / "x.npy", x.numpy())
    fitted = ResidualKMeans((12, 4)).fit(x)
    file = np.load(tmp_path / "x.npy", mmap_mode="r")
    assert fitted.quality(file) == fitted.quality(x) == fitted.quality(x.numpy())
    residual = x.double()
    codes = fitted.encode(x).long()
    for level, book in enumerate(fitted.codebooks):
        residual = residual - book[codes[:, level]]
        error = float(residual.square().sum(1).mean())
        assert fitted.quality(file).error[level] == pytest.approx(error, rel=1e-5)
        share = codes[:, level].bincount(minlength=len(book)).max() / 40_000
        assert fitted.quality(file).heaviest[level] == pytest.approx(float(share) * len(book))


def test_codes_that_63_bits_do_not_hold_are_told_apart():
    generator = torch.Generator().manual_seed(0)
    books = [torch.randn(60_000, 2, generator=generator) / 10**level for level in range(5)]
    x = torch.randn(300, 2, generator=generator)[torch.arange(400) % 300]
    module = ResidualKMeans.from_codebooks(books)
    groups = module.encode(x).unique(dim=0, return_counts=True)[1]
    quality = module.quality(x)
    assert quality.unique_rate == len(groups) / 400 <= 300 / 400
    assert quality.collisions == int(groups[groups > 1].sum()) >= 200
