"""The search units of Moment&Cross on time-synced comment streams, item by item."""

import pytest
import torch
from test_real_data import DATA
from torch.nn import functional

from livrec_fast import ExtractUnit, SearchUnit, TargetAttention


@pytest.fixture(scope="module")
def histories():
    """Return the 40 longest histories of comment streams, and vectors of what was commented on."""
    folder = DATA / "danmaku"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent; LIVREC_TEST_DATA names the folder of the data")
    parquet = pytest.importorskip("pyarrow.parquet")
    columns = ["user", "item", "author", "ts_ms", "value"]
    table = parquet.read_table(folder / "events.parquet", columns=columns)
    events = {name: torch.from_numpy(table[name].to_numpy().copy()).long() for name in columns}
    users = events["user"].bincount().topk(40).indices.sort().values
    mine = torch.isin(events["user"], users).nonzero()[:, 0]
    order = mine[events["user"][mine].argsort(stable=True)]  # sorted by time already
    events = {name: column[order] for name, column in events.items()}
    slices = parquet.read_table(folder / "slices.parquet", columns=["item", "embedding"])
    vectors = slices["embedding"].combine_chunks().flatten().to_numpy().reshape(len(slices), -1)
    items = torch.from_numpy(slices["item"].to_numpy().copy()).long()
    sums = torch.zeros(int(items.max().maximum(events["item"].max())) + 1, 64)
    means = functional.normalize(sums.index_add(0, items, torch.from_numpy(vectors.copy()).float()))
    lengths = torch.stack([(events["user"] == user).sum() for user in users])
    return events, means[events["item"]], functional.pad(lengths.cumsum(0), (1, 0))


def test_units_of_moment_and_cross_on_comment_streams(histories):
    events, x, offsets = histories
    assert offsets.diff().min() > 1000 and offsets.diff().max() > 20_000
    ends, k = offsets[1:] - 1, 50
    now = {"item_times": events["ts_ms"], "until": events["ts_ms"][ends][:, None]}
    author = {"item_ids": events["author"], "query_ids": events["author"][ends][:, None]}
    long = {"item_bits": (events["value"] >= 10).to(torch.uint8), "required_bits": 1}
    query = x[ends][:, None]  # the last item, and what came before it
    found = {
        "latest": SearchUnit("latest", k)(offsets, **now),
        "dot_product": SearchUnit("dot_product", k)(offsets, query=query, keys=x, **now),
        "author": SearchUnit("author", k)(offsets, **author, **now),
        "long_view": SearchUnit("long_view", k)(offsets, **long, **now),
    }
    torch.manual_seed(0)
    unit, whole = ExtractUnit(64, 4, out_dim=64), TargetAttention(64, 4, out_dim=64)
    whole.load_state_dict(unit.state_dict())
    for kind, positions in found.items():
        out = unit(query, x, offsets, positions=positions)
        for user, (first, last) in enumerate(zip(offsets, offsets[1:], strict=False)):
            may = events["ts_ms"][first:last] < events["ts_ms"][last - 1]
            if kind == "author":
                may &= events["author"][first:last] == events["author"][last - 1]
            elif kind == "long_view":
                may &= events["value"][first:last] >= 10
            left, own = may.nonzero()[:, 0], positions[user, 0]
            own = own[own >= 0]
            assert len(own) == min(k, len(left))
            if kind == "dot_product":
                scores = x[first:last] @ query[user, 0]
                wanted = scores[left].topk(len(own)).values
                torch.testing.assert_close(scores[own], wanted, rtol=0, atol=1e-5)
                assert torch.isin(own, left).all() and len(own.unique()) == len(own)
            else:
                assert torch.equal(own, left.flip(0)[:k])
            alone = torch.tensor([0, len(own)])
            seen = whole(query[user][None], x[first:last][own], alone)
            torch.testing.assert_close(out[user], seen[0], rtol=1e-4, atol=1e-5)
