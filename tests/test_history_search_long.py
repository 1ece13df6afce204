"""Search of one long history, which several threads share, and the lists of the best it fills."""

import pytest
import torch
from conftest import SUBJECTS

from livrec_fast import _native, history_search, history_search_codes
from livrec_fast.testing import inputs_for

pytestmark = pytest.mark.skipif(_native.MISSING is not None, reason=f"{_native.MISSING}")
LENGTH, K = 30_000, 300


def draw(name, distinct):
    """Draw one history; few distinct scores make ties, which go to the latest."""
    generator = torch.Generator().manual_seed(0)
    inputs = inputs_for(SUBJECTS[name].oracle, "no masks")
    inputs |= {"offsets": torch.tensor([0, LENGTH]), "k": K, "query": inputs["query"][:1]}
    count = inputs["query"].shape[2]
    rows = torch.randint(-3, 4, (distinct, count), generator=generator).float()
    if name == "history_search":
        return inputs | {"keys": rows[torch.randint(distinct, (LENGTH,), generator=generator)]}
    tables = [rows] + [torch.zeros(2, count)] * (len(inputs["tables"]) - 1)
    codes = [torch.randint(len(t), (LENGTH,), generator=generator) for t in tables]
    codes = torch.stack(codes, 1).to(torch.int16)
    return inputs | {"tables": tables, "codes": codes, "levels": [len(t) for t in tables]}


@pytest.mark.parametrize("distinct", [1, 40, 30_000])
@pytest.mark.parametrize("function", [history_search, history_search_codes])
@pytest.mark.parametrize("threads", [1, 3])
def test_finds_what_sorting_finds(function, distinct, threads):
    inputs, before = draw(function.__name__, distinct), torch.get_num_threads()
    wanted = function(**inputs, backend="reference")
    try:
        torch.set_num_threads(threads)
        found = function(**inputs, backend="native")
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(found[0], wanted[0], rtol=0, atol=0)
    assert torch.equal(found[1], wanted[1])
    assert (found[0][..., 1:] <= found[0][..., :-1]).all() and found[1].unique().numel() >= K


def test_a_sample_that_misleads_loses_nothing():
    """The kernel scores the last 8 of 64 items first: there lie 188 of the first query's best."""
    generator = torch.Generator().manual_seed(2)
    scores = torch.randint(10_000, (LENGTH, 2), generator=generator).float()
    sampled = (LENGTH - 1 - torch.arange(LENGTH)) % 64 < 8
    scores[sampled.nonzero()[::20], 0] += 10_000
    offsets, query = torch.tensor([0, LENGTH]), torch.eye(2)[None]
    found, positions = history_search(query, scores, offsets, K, backend="native")
    order = torch.argsort(scores.flip(0), dim=0, descending=True, stable=True)[:K]
    assert torch.equal(positions[0], (LENGTH - 1 - order).T)
    assert torch.equal(found[0], scores.gather(0, LENGTH - 1 - order).T)
