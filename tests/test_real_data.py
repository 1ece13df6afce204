"""Residual k-means on real vectors: time-synced comment streams, and a language model's tokens."""

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from hard_vectors import kernels_of, run

from livrec_fast import ResidualKMeans, majority_vote, residual_kmeans_encode
from livrec_fast.data.wheels import default_cache
from livrec_fast.reference.residual_kmeans import agree

DATA = Path(os.environ.get("LIVREC_TEST_DATA", ROOT.parent / "shared" / "data"))
KERNELS = kernels_of("residual_kmeans_encode")


@pytest.fixture(scope="module")
def streams():
    """Vectors of 30-second windows of comment streams, and the room of each window."""
    path = DATA / "danmaku" / "slices.parquet"
    if not path.is_file():
        pytest.skip(f"{path} is absent; LIVREC_TEST_DATA names the folder of the data")
    table = pytest.importorskip("pyarrow.parquet").read_table(path)
    values = table["embedding"].combine_chunks().flatten().to_numpy().reshape(len(table), -1)
    assert values.shape == (39_174, 64) and values.dtype == np.float16
    return torch.from_numpy(values.copy()), torch.from_numpy(table["item"].to_numpy().copy())


@pytest.fixture(scope="module")
def coder(streams):
    return ResidualKMeans((64,) * 4, iterations=3).fit(streams[0])


@pytest.fixture(scope="module")
def tokens():
    """The token vectors of the demo's language model, where the demo has fetched them."""
    found = sorted(default_cache().glob("wordllama-*/l2_supercat_256.safetensors"))
    if not found:
        pytest.skip(f"no token vectors in {default_cache()}; `livrec-fast demo` fetches them")
    from safetensors.numpy import load_file

    (table,) = load_file(found[-1]).values()
    assert table.shape == (32_000, 256)
    return torch.from_numpy(table.astype(np.float32))


@pytest.fixture(scope="module")
def token_coder(tokens):
    # far rows are many here, and k-means++ likes them: after one update most codewords have but one
    return ResidualKMeans((512, 256, 128), iterations=1, init="random").fit(tokens[::3])


def hold(kernel, x, books):
    """Codes obey the rule, and hardly any is another than the reference's."""
    codes = run(residual_kmeans_encode, kernel, x, books)
    agree(codes, {"x": x, "codebooks": books})
    reference = residual_kmeans_encode(x, books, backend="reference")
    assert (codes != reference).any(1).double().mean() < 1e-3
    return codes


@pytest.mark.parametrize("kernel", KERNELS)
def test_codes_of_streams(streams, coder, kernel):
    x = streams[0]
    assert hold(kernel, x, coder.codebooks).equal(hold(kernel, x.float(), coder.codebooks))
    hold(kernel, x[::4].bfloat16(), coder.codebooks)


@pytest.mark.parametrize("kernel", KERNELS)
def test_codes_of_tokens(tokens, token_coder, kernel):
    hold(kernel, tokens, token_coder.codebooks)


def sane(quality, x, levels, least_entropy):
    """Hold figures to what they must be for any codes, and to what codes are for."""
    assert quality.rows == len(x)
    errors = quality.relative_error
    assert all(b < a for a, b in zip([1.0, *errors], errors, strict=False))
    for level, size in enumerate(levels):
        assert 0.6 < quality.usage[level] <= 1
        assert least_entropy * np.log2(size) < quality.entropy[level] <= np.log2(size)
        assert 1 <= quality.heaviest[level] <= size
    assert 0 < quality.unique_rate <= 1 and 0 <= quality.collisions < len(x)


def test_quality_on_streams(streams, coder):
    x = streams[0]
    quality = coder.quality(x)
    sane(quality, x, coder.levels, 0.7)
    left = x.double() - coder.decode(coder.encode(x)).double()
    variance = (x.double() - x.double().mean(0)).square().sum(1).mean()
    wanted = float(left.square().sum(1).mean() / variance)
    assert quality.relative_error[-1] == pytest.approx(wanted, rel=1e-4) and wanted < 0.45
    distinct = Counter(map(tuple, coder.encode(x).tolist()))
    assert quality.unique_rate == pytest.approx(len(distinct) / len(x))
    assert quality.collisions == sum(count for count in distinct.values() if count > 1)


def test_quality_on_tokens(tokens, token_coder):
    quality = token_coder.quality(tokens)  # a few long vectors get codewords of their own
    sane(quality, tokens, token_coder.levels, 0.2)
    assert quality.relative_error[-1] < 0.9


def voted(rows, rule):
    """Vote as one would by hand: count, and among the most frequent take the one seen last."""
    winner = []
    for level in range(len(rows[0])):
        ballots = rows if rule == "per_level" else [r for r in rows if r[:level] == winner]
        counts = Counter(row[level] for row in ballots)
        most = max(counts.values())
        seen = [row[level] for row in ballots if counts[row[level]] == most]
        winner.append(seen[-1])
    return winner


@pytest.mark.parametrize("rule", ["per_level", "path"])
def test_rooms_vote(streams, coder, rule):
    x, room = streams
    order = room.sort(stable=True).indices
    codes, sizes = coder.encode(x)[order], room[order].unique_consecutive(return_counts=True)[1]
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
    rooms = majority_vote(codes, offsets, coder.levels, rule=rule)
    assert rooms.shape == (811, 4)
    wanted = [voted(part.tolist(), rule) for part in codes.split(sizes.tolist())]
    assert rooms.tolist() == wanted
    if rule == "path":  # some window of the room has this very code
        parts = zip(rooms.tolist(), codes.split(sizes.tolist()), strict=True)
        assert all(code in part.tolist() for code, part in parts)
