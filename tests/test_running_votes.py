"""running_votes: every row against majority_vote of the slices so far, in numba and NumPy alike."""

import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from livrec_fast import majority_vote
from livrec_fast.logs import running_votes, votes

RULES = ["per_level", "path"]
WAYS = ["numba", "numpy"]


@pytest.fixture(autouse=True)
def numba_or_skip(request):
    named = getattr(request.node, "callspec", None)
    if named is not None and named.params.get("way") == "numba":
        pytest.importorskip("numba")


def draw(slices, levels, rooms, seed=0, dtype=np.int64):
    rng = np.random.default_rng(seed)
    ids = rng.integers(-(2**62), 2**62, rooms)
    few = [np.minimum(rng.integers(-1, 4, slices), size - 1) for size in levels]
    few[0] = np.where((few[0] >= 0) & (rng.random(slices) < 0.5), levels[0] - 1 - few[0], few[0])
    return rng.choice(ids, slices), np.stack(few, 1).astype(dtype)


def by_op(rooms, codes, levels, rule):
    """Vote after each slice with the op: O(M^2)."""
    sofar = [codes[: t + 1][rooms[: t + 1] == rooms[t]] for t in range(len(rooms))]
    offsets = torch.tensor([0, *map(len, sofar)]).cumsum(0)
    slices = torch.from_numpy(np.concatenate([codes[:0], *sofar]).astype(np.int64))
    return majority_vote(slices, offsets, levels, rule=rule).numpy()


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=60, deadline=None)
@given(
    slices=st.integers(0, 60),
    rooms=st.integers(1, 5),
    levels=st.lists(st.sampled_from([1, 2, 3, 300, 40_000, 2**31]), min_size=1, max_size=4),
    rule=st.sampled_from(RULES),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_row_is_the_vote_of_the_slices_so_far(way, slices, rooms, levels, rule, seed):
    rooms, codes = draw(slices, levels, rooms, seed)
    found = running_votes(rooms, codes, levels, rule=rule, backend=way)
    wanted = by_op(rooms, codes, levels, rule)
    assert found.dtype == wanted.dtype and found.shape == codes.shape
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("rule", RULES)
def test_both_ways_agree_and_end_with_the_vote_over_the_log(rule):
    levels = (64, 5, 2**31)
    rooms, codes = draw(20_000, levels, 300)
    found = running_votes(rooms, codes, levels, rule=rule, backend="numpy")
    if "numba" in sys.modules or pytest.importorskip("numba"):
        np.testing.assert_array_equal(
            found, running_votes(rooms, codes, levels, rule=rule, backend="numba")
        )
    order = np.argsort(rooms, kind="stable")
    ends = np.flatnonzero(np.diff(rooms[order], append=rooms.max() + 1)) + 1
    offsets = torch.from_numpy(np.concatenate([[0], ends]))
    voted = majority_vote(torch.from_numpy(codes[order]), offsets, levels, rule=rule)
    np.testing.assert_array_equal(found[order[ends - 1]], voted.numpy())
    assert len(np.unique(found, axis=0)) > 20


@pytest.mark.parametrize("way", WAYS)
def test_a_row_knows_nothing_of_later_slices(way):
    rooms, codes = draw(500, (64, 64), 7)
    found = running_votes(rooms, codes, (64, 64), backend=way)
    np.testing.assert_array_equal(
        found[:200], running_votes(rooms[:200], codes[:200], (64, 64), backend=way)
    )


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32, np.uint16])
def test_any_integers_laid_out_in_any_way(way, dtype):
    rooms, codes = draw(300, (60, 9, 3), 9, dtype=np.int64)
    codes = np.maximum(codes, 0).astype(dtype)
    wanted = by_op(rooms, codes, (60, 9, 3), "path")
    for laid in (codes, np.asfortranarray(codes), np.repeat(codes, 2, axis=1)[:, ::2]):
        np.testing.assert_array_equal(
            running_votes(rooms, laid, (60, 9, 3), rule="path", backend=way), wanted
        )


def test_without_numba_numpy_does_it(monkeypatch):
    rooms, codes = draw(50, (5, 5), 4)
    monkeypatch.setattr(votes, "_compiled", lambda: None)
    np.testing.assert_array_equal(
        running_votes(rooms, codes, (5, 5)), by_op(rooms, codes, (5, 5), "per_level")
    )
    with pytest.raises(ImportError, match="pip install numba"):
        running_votes(rooms, codes, (5, 5), backend="numba")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rooms": [1, 2]}, TypeError, "rooms: must be a NumPy array, got list"),
        ({"rooms": np.zeros(2)}, TypeError, "rooms: .* float64"),
        ({"codes": np.zeros((2, 2))}, TypeError, "codes: .* float64"),
        ({"rooms": np.zeros((2, 1), int)}, ValueError, r"rooms: shape must be \[M\], got \[2, 1\]"),
        ({"codes": np.zeros((3, 2), int)}, ValueError, r"codes: shape must be \[2, 2\], got \[3,"),
        ({"codes": np.array([[0, 0], [0, 4]])}, IndexError, r"codes\[1, 1\] = 4 .* \[-1, 4\)"),
        ({"codes": np.array([[-2, 0], [0, 0]])}, IndexError, r"codes\[0, 0\] = -2 .* \[-1, 4\)"),
        ({"levels": ()}, ValueError, "levels: "),
        ({"rule": "mean"}, ValueError, "rule: .* 'mean'"),
        ({"backend": "triton"}, ValueError, "backend: .* 'triton'"),
    ],
)
def test_bad_inputs(change, error, message):
    good = {"rooms": np.zeros(2, int), "codes": np.zeros((2, 2), int), "levels": (4, 4)}
    with pytest.raises(error, match=message):
        running_votes(**(good | change))
