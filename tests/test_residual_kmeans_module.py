"""ResidualKMeans: what a fit finds, that it repeats, and what is measured of it."""

import math

import numpy as np
import pytest
import torch

from livrec_fast import ResidualKMeans
from livrec_fast.modules import _seeding

NAN, INF = float("nan"), float("inf")


def clustered(rows=3000, centres=20, dim=16, spread=0.05, seed=0):
    """Draw rows around far apart centres; return rows, centres and which centre each is of."""
    generator = torch.Generator().manual_seed(seed)
    middle = 5 * torch.randn(centres, dim, generator=generator)
    of = torch.arange(rows) % centres
    return middle[of] + spread * torch.randn(rows, dim, generator=generator), middle, of


def same_bits(a, b):
    return all(
        x.equal(y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_finds_well_separated_clusters(dtype):
    x, middle, of = clustered()
    quantizer = ResidualKMeans((20,)).fit(x.to(dtype))
    distance = torch.cdist(middle, quantizer.codebooks[0].float())
    assert distance.min(1).values.max() < (0.1 if dtype == torch.bfloat16 else 0.03)
    code = quantizer.encode(x.to(dtype))[:, 0].long()
    assert (code == distance.argmin(1)[of]).all()
    assert quantizer.codebooks[0].dtype == (dtype if dtype == torch.float64 else torch.float32)


def test_codewords_are_the_means_of_their_rows():
    x, *_ = clustered(spread=2.0)
    quantizer = ResidualKMeans((8, 4), iterations=300, tolerance=0).fit(x)
    residual = x.double()
    codes = quantizer.encode(x).long()
    for level, (codebook, count) in enumerate(
        zip(quantizer.codebooks, quantizer.counts, strict=True)
    ):
        for word in range(len(codebook)):
            rows = residual[codes[:, level] == word]
            assert len(rows) == count[word] > 0
            torch.testing.assert_close(codebook[word].double(), rows.mean(0), rtol=1e-4, atol=1e-4)
        residual = residual - codebook[codes[:, level]]


@pytest.mark.parametrize("init", ["k-means++", "random"])
def test_inertia_never_rises_and_error_falls_level_by_level(init):
    x = torch.randn(4000, 12, generator=torch.Generator().manual_seed(1))
    quantizer = ResidualKMeans((16, 8, 8), iterations=12, tolerance=0, init=init).fit(x)
    for course in quantizer.history:
        assert 2 <= len(course.inertia) <= 13
        for before, after in zip(course.inertia, course.inertia[1:], strict=False):
            assert after <= before * (1 + 1e-6)
        assert course.inertia[-1] < 0.95 * course.inertia[0]
    quality = quantizer.quality(x)
    assert 1 > quality.relative_error[0] > quality.relative_error[1] > quality.relative_error[2] > 0
    for error, course in zip(quality.error, quantizer.history, strict=True):
        assert error * len(x) == pytest.approx(course.inertia[-1], rel=1e-5)


def test_stops_early_by_tolerance():
    x, *_ = clustered()
    settled = ResidualKMeans((20,), iterations=100).fit(x)
    assert len(settled.history[0].inertia) < 20
    x = torch.randn(2000, 8, generator=torch.Generator().manual_seed(0))
    hasty = ResidualKMeans((16,), iterations=100, tolerance=0.2).fit(x)
    patient = ResidualKMeans((16,), iterations=100, tolerance=1e-4).fit(x)
    assert len(hasty.history[0].inertia) < len(patient.history[0].inertia)


def test_does_not_touch_its_input_nor_need_it_contiguous():
    x, *_ = clustered(rows=500)
    wide = torch.cat([x, x], 1)[:, ::2]
    kept = wide.clone()
    strided = ResidualKMeans((5, 3)).fit(wide)
    assert wide.equal(kept) and same_bits(strided, ResidualKMeans((5, 3)).fit(kept))


def test_a_sample_serves_kmeans_plus_plus_on_many_rows(monkeypatch):
    monkeypatch.setattr(_seeding, "_INIT_ROWS", 64)
    monkeypatch.setattr(_seeding, "_INIT_ROWS_PER_CODEWORD", 2)
    x, middle, _ = clustered(rows=5000, centres=4)
    quantizer = ResidualKMeans((4,)).fit(x)
    assert torch.cdist(middle, quantizer.codebooks[0]).min(1).values.max() < 0.03


def test_kmeans_plus_plus_never_draws_a_row_twice_nor_one_of_no_weight():
    rows = torch.tensor([[0.0], [0], [1e-3], [50], [100], [7]])
    weights = np.array([1.0, 1, 1, 1, 1, 0])
    for seed in range(40):
        random = np.random.default_rng(seed)
        chosen = rows[_seeding.plus_plus(rows, weights, 4, random), 0]
        assert len(set(chosen.tolist())) == 4 and 7 not in chosen


def test_fewer_distinct_rows_than_codewords():
    x = torch.tensor([[1.0, 2], [3, 4], [5, 6]]).repeat(10, 1)
    for init in ("k-means++", "random"):
        quantizer = ResidualKMeans((8, 2), init=init).fit(x)
        torch.testing.assert_close(quantizer.decode(quantizer.encode(x)), x)
        assert quantizer.codebooks[0].isfinite().all()


@pytest.mark.parametrize("init", ["k-means++", "random"])
def test_rows_of_no_weight_are_not_learnt_from(init):
    x, *_ = clustered(rows=300)
    outliers = torch.full((50, 16), 1000.0)
    weights = torch.cat([torch.ones(300), torch.zeros(50)])
    quantizer = ResidualKMeans((20, 3), init=init).fit(torch.cat([x, outliers]), weights=weights)
    assert quantizer.codebooks[0].abs().max() < 100


def test_partial_fit_follows_a_drift_at_every_level():
    x, *_ = clustered(rows=2000, spread=1.0)
    quantizer = ResidualKMeans((20, 8)).fit(x)
    drifted = x + 1.5
    before = quantizer.quality(drifted)
    for batch in drifted.repeat(3, 1).split(500):
        quantizer.partial_fit(batch)
    after = quantizer.quality(drifted)
    assert after.error[0] < 0.7 * before.error[0] and after.error[1] < 0.9 * before.error[1]


def test_quality_of_a_hand_made_example():
    """Rows -4, -2, 2, 5, of mean 0.25; codewords -3, 3 and 99, which no row uses, then -1 and 1."""
    quantizer = ResidualKMeans((3, 2))
    books = [torch.tensor([[-3.0], [3], [99]]), torch.tensor([[-1.0], [1]])]
    quantizer.load_state_dict({
        "codebook_0": books[0], "codebook_1": books[1],
        "count_0": torch.zeros(3, dtype=torch.int64), "count_1": torch.zeros(2, dtype=torch.int64),
    })  # fmt: skip
    x = torch.tensor([[-4.0], [-2], [2], [5]])
    quality = quantizer.quality(x)
    assert quantizer.encode(x).tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert quality.rows == 4
    assert quality.error == pytest.approx([(1 + 1 + 1 + 4) / 4, 1 / 4])
    variance = (4.25**2 + 2.25**2 + 1.75**2 + 4.75**2) / 4
    assert quality.relative_error == pytest.approx([1.75 / variance, 0.25 / variance])
    assert quality.usage == pytest.approx([2 / 3, 1])
    assert quality.entropy == pytest.approx([1, 1])
    assert quality.heaviest == pytest.approx([2 / 4 * 3, 1])
    assert (quality.unique_rate, quality.collisions) == (1, 0)
    shared = quantizer.quality(torch.tensor([[-4.0], [-4], [-2], [2.1], [2.2], [1.9], [2], [5]]))
    assert (shared.unique_rate, shared.collisions) == (4 / 8, 2 + 4)
    shares = (3 / 8, 5 / 8)
    assert shared.entropy[0] == pytest.approx(-sum(p * math.log2(p) for p in shares))
    alone = quantizer.quality(torch.tensor([[4.0]]))
    assert alone.error == [1, 0] and alone.relative_error == [INF, 0]


def test_another_fit_starts_from_scratch():
    x, *_ = clustered(rows=300)
    quantizer = ResidualKMeans((6, 3)).fit(torch.randn(50, 4))
    assert same_bits(quantizer.fit(x), ResidualKMeans((6, 3)).fit(x))


def test_progress_shows_every_level(capsys):
    ResidualKMeans((6, 3)).fit(torch.randn(50, 4), progress=True)
    shown = capsys.readouterr().out
    assert "level 0: 6 codewords" in shown and "level 1: 3 codewords" in shown
    ResidualKMeans((6, 3)).fit(torch.randn(50, 4))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "settings, error, message",
    [
        ({"levels": ()}, ValueError, "levels"),
        ({"levels": (4, 0)}, ValueError, "levels"),
        ({"levels": (65537,)}, ValueError, "levels: .*65,536"),
        ({"levels": 4}, TypeError, "levels"),
        ({"init": "kmeans"}, ValueError, "init: .*'k-means\\+\\+', 'random', got 'kmeans'"),
        ({"iterations": 0}, ValueError, "iterations: must be at least 1, got 0"),
        ({"iterations": 2.0}, TypeError, "iterations: must be an int, got float"),
        ({"tolerance": -1e-3}, ValueError, "tolerance: .* got -0.001"),
        ({"tolerance": NAN}, ValueError, "tolerance: .* got nan"),
        ({"balance": 0.9}, ValueError, "balance: must be at least 1 and finite, got 0.9"),
        ({"balance": INF}, ValueError, "balance: .* got inf"),
        ({"sample": 0}, ValueError, "sample: must be at least 1, got 0"),
        ({"sample": 10.0}, TypeError, "sample: must be an int, got float"),
        ({"init": 3}, TypeError, "init: must be a list of tensors, got int"),
    ],
)
def test_bad_settings(settings, error, message):
    with pytest.raises(error, match=message):
        ResidualKMeans(**settings)


X = torch.arange(20.0).reshape(10, 2)


@pytest.mark.parametrize(
    "x, weights, error, message",
    [
        (X[:5], None, ValueError, "x: at least 6 rows are needed.* got 5"),
        (X[0], None, ValueError, r"x: shape must be \[M, D\]"),
        (X[:, :0], None, ValueError, "x: D must be at least 1"),
        (X.long(), None, TypeError, "x: dtype"),
        (1.0, None, TypeError, "x: must be a tensor"),
        ([[1.0]], None, ValueError, "sample: must be given"),
        (X / 0, None, ValueError, "x: row 0 is not finite"),
        (X * 3e18, None, ValueError, "x: row 1 is too large; squared distances may overflow"),
        (X, torch.ones(9), ValueError, r"weights: shape must be \[10\], got \[9\]"),
        (X, torch.ones(10).half(), TypeError, "weights: dtype"),
        (X, torch.arange(10.0) - 1, ValueError, r"weights: .* weights\[0\] = -1"),
        (X, torch.full((10,), NAN), ValueError, r"weights: .* weights\[0\] = nan"),
        (X, torch.full((10,), INF), ValueError, r"weights: .* weights\[0\] = inf"),
        (X, torch.ones(10, device="meta"), ValueError, "weights: device"),
        (X, (torch.arange(10) < 5).float(), ValueError, "6 rows of positive weight .* got 5"),
    ],
)
def test_bad_rows(x, weights, error, message):
    with pytest.raises(error, match=message):
        ResidualKMeans((2, 6)).fit(x, weights=weights)


def test_bad_calls():
    quantizer = ResidualKMeans((2,))
    for call in (quantizer.encode, quantizer.decode, quantizer.quality, quantizer.save):
        with pytest.raises(RuntimeError, match="codebooks: there are none yet"):
            call(X)
    quantizer.fit(X)
    with pytest.raises(ValueError, match=r"x: shape must be \[M, 2\], got \[10, 1\]"):
        quantizer.partial_fit(X[:, :1])
    with pytest.raises(ValueError, match="quality needs at least one row"):
        quantizer.quality(X[:0])
    assert quantizer.encode(X[:0]).shape == (0, 1) and quantizer(X).equal(quantizer.encode(X))
