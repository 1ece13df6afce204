"""History search by faiss: what the op finds, ties and masks too, and what it refuses."""

import sys

import pytest
import torch
from test_history_search import BAD_INPUTS

from livrec_fast import history_search
from livrec_fast.interop import history_search_faiss
from livrec_fast.reference.history_search import ORACLES

pytest.importorskip("faiss", reason="faiss is not installed")
ORACLE = ORACLES["history_search"]
OFFSETS = torch.tensor([0, 5, 5, 812, 1000])


def _case(name, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return ORACLE.make_inputs(generator, dtype, **ORACLE.cases[name])


def _whole_numbers(seed=0):
    """Draw vectors whose products are exact, and many of which are equal."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randint(-2, 3, (4, 3, 4), generator=generator).float()
    return query, torch.randint(-2, 3, (1000, 4), generator=generator).float()


@pytest.mark.parametrize("k", [1, 3, 50, 150, 2000])
def test_ties_go_to_the_most_recent(k):
    query, keys = _whole_numbers()
    query[2, 1] = 0  # all equal: the latest
    scores, positions = history_search_faiss(query, keys, OFFSETS, k)
    wanted = history_search(query, keys, OFFSETS, k, backend="reference")
    assert torch.equal(scores, wanted[0]) and torch.equal(positions, wanted[1])
    count = min(k, 807)
    assert torch.equal(positions[2, 1, :count], torch.arange(806, 806 - count, -1))
    assert (positions[1] == -1).all() and (scores[1] == -torch.inf).all()


@pytest.mark.parametrize("case", sorted(ORACLE.cases))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_finds_what_the_op_finds(case, dtype):
    inputs = _case(case, dtype)
    scores, positions = history_search_faiss(**inputs)
    wanted, at = history_search(**inputs, backend="reference")
    assert scores.dtype == torch.float32 and positions.dtype == torch.int64
    torch.testing.assert_close(scores, wanted)
    close = wanted[..., 1:] - wanted[..., :-1] > -1e-4  # rounding may swap these
    clear = torch.nn.functional.pad(~close, (1, 0), value=True)
    clear &= torch.nn.functional.pad(~close, (0, 1), value=False)
    assert torch.equal(positions[clear], at[clear])


@pytest.mark.parametrize("mask", ["ids", "bits", "times", "all"])
def test_masks(mask):
    query, keys = _whole_numbers(1)
    generator = torch.Generator().manual_seed(2)

    def draw(low, high, *shape):
        return torch.randint(low, high, shape, generator=generator)

    masks = {"item_ids": draw(-1, 4, 1000), "query_ids": draw(-1, 4, 4, 3)}
    bits = {"item_bits": draw(0, 8, 1000).to(torch.uint8), "required_bits": 5}
    times = {"item_times": torch.arange(1000), "since": 4, "until": draw(3, 1000, 4, 3)}
    given = {"ids": masks, "bits": bits, "times": times, "all": masks | bits | times}[mask]
    found = history_search_faiss(query, keys, OFFSETS, 20, **given)
    wanted = history_search(query, keys, OFFSETS, 20, **given, backend="reference")
    assert all(map(torch.equal, found, wanted)) and (found[1] >= 0).any()


def test_takes_what_needs_gradients_and_is_not_contiguous():
    query, keys = _whole_numbers()
    query, keys = query.requires_grad_(), keys.T.contiguous().T
    found = history_search_faiss(query, keys, OFFSETS, 9)
    assert not found[0].requires_grad
    assert torch.equal(found[1], history_search(query, keys, OFFSETS, 9)[1])


@pytest.mark.parametrize("bad", BAD_INPUTS["history_search"], ids=lambda bad: bad[0])
def test_refuses_what_the_op_refuses(bad):
    _, change, error, message = bad
    good = _case("typical")
    with pytest.raises(error, match=message):
        history_search_faiss(**good | change(good))


def test_refuses_what_faiss_cannot():
    with pytest.raises(TypeError, match="query: faiss computes in float32; got float64"):
        history_search_faiss(**_case("typical", torch.float64))


def test_says_how_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match="faiss is needed: pip install"):
        history_search_faiss(**_case("typical"))
