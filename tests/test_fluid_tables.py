"""What is said of results: metrics, intervals, verdicts, figures; and the codes they rest on."""

from types import SimpleNamespace

import numpy as np
import pytest

from livrec_fast.data import world
from livrec_fast.logs.log import known_before
from livrec_fast.logs.requests import DENSE
from livrec_fast.systems.fluid import figures
from livrec_fast.systems.fluid.codes import make_codes
from livrec_fast.systems.fluid.evaluation import measure, views
from livrec_fast.systems.fluid.statistics import Order, estimate, judge
from livrec_fast.systems.fluid.tables import METRICS, TABLES, chosen, lines, rows_of, verdicts


def test_an_interval_is_students():
    found = estimate([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found.mean == 3
    assert found.half == pytest.approx(2.776 * (2.5 / 5) ** 0.5)
    assert np.isnan(estimate([1.0]).half)


@pytest.mark.parametrize(
    ("relation", "gap", "verdict"),
    [
        ("<", 0.01, "holds"),
        ("<", -0.01, "reversed"),
        ("<", 0.0, "undecided"),
        ("<=", 0.0, "holds"),
        ("<=", -0.01, "reversed"),
        ("~", 0.0, "holds"),
        ("~", 0.01, "reversed"),
        ("~", -0.01, "reversed"),
        ("~", 0.002, "undecided"),
    ],
)
def test_orders_are_judged_by_differences_seed_by_seed(relation, gap, verdict):
    seeds = np.array([0.60, 0.65, 0.70, 0.75, 0.80])  # far apart, but alike for both rows
    noise = np.array([-1, 1, 0, 1, -1]) * 2e-4
    order = Order("a", relation, "b")
    assert judge(order, seeds, seeds + gap + noise, 0.0021 if gap == 0.002 else 0.001) == verdict
    assert judge(order, seeds[:1], seeds[:1] + gap, 0.001) == "undecided"


def results(**auc):
    """Make results of five seeds, by row."""
    return {
        seed: {
            row: dict.fromkeys(METRICS, 0.3) | {"AUC": value + 0.01 * seed, "logloss": 1 - value}
            for row, value in auc.items()
        }
        for seed in range(5)
    }


def test_a_table_says_what_holds_and_what_does_not():
    found = results(**{"base": 0.70, "+slice": 0.72, "-ID": 0.71, "FLUID": 0.72})
    said = {order: verdict for order, verdict, _ in verdicts(TABLES["T3"], found)}
    assert said["-ID < base"] == "reversed" and said["logloss: base < -ID"] == "reversed"
    assert said["base < +slice"] == "holds" and said["logloss: +slice < base"] == "holds"
    assert said["+slice <= FLUID"] == "holds"
    text = lines(TABLES["T3"], found)
    assert text[1][:4] == ["baseline (with item ID)", ".7784", "+0.00", ".7200±.0196"]
    assert text[3][1:3] == [".7748", "-0.46"] and text[3][4].startswith("+1.39±")


def test_the_table_of_views_shows_changes_beside_the_papers():
    found = results(**{"base": 0.7, "+slice": 0.7, "-ID": 0.7, "FLUID": 0.7})
    for seed, rows in found.items():
        rows["+slice"]["niche room views"] = 0.33 + 0.003 * seed  # of 0.3
        rows["-ID"]["niche room views"] = 0.36
        for row in rows.values():
            row["stay seconds"] = 0.0
            row["unique tags"] = float("nan")
    text = lines(TABLES["T4"], found)
    assert text[0] == ["metric", "+slice", "paper", "-ID", "paper", "FLUID", "paper"]
    assert text[4] == [
        "niche room views", "+12.00±1.96", "+0.69", "+20.00±0.00", "+2.23", "+0.00±0.00", "+2.87",
    ]  # fmt: skip
    assert text[6][:2] == ["stay seconds", "+nan±nan"] and text[5][1] == "+nan±nan"
    said = {order: verdict for order, verdict, _ in verdicts(TABLES["T4"], found)}
    assert len(said) == 18 and said["niche room views: +slice < -ID"] == "holds"
    assert said["niche room views: -ID < FLUID"] == "reversed"
    assert said["unique tags: -ID < +slice"] == said["stay seconds: -ID < +slice"] == "undecided"


def test_views_are_of_the_candidate_that_scores_best():
    dense = np.zeros((5, 2, len(DENSE)), np.float32)
    dense[..., 0] = [[5, 5], [5, 1], [5, 5], [5, 5], [0, 5]]  # log of the room's events
    dense[..., 1] = [[7, 7], [7, 7], [7, 3], [7, 7], [7, 2]]
    asked = SimpleNamespace(
        user=np.array([0, 0, 1, 1, 1]),
        room=np.array([[1, 2], [3, 4], [5, 6], [7, 8], [9, 10]]),
        dense=dense,
    )
    logits = np.array([[2.0, 1.0], [0.0, 3.0], [0.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    seconds = np.array([100.0, 500.0, 600.0, np.nan, 30.0])  # request 3: nobody knows
    tags = np.array([[4, 5], [5, 4], [6, 6], [6, 7], [8, -1]])
    found = views(logits, asked, seconds, tags)
    # shown are candidates 0, 1, 1, 0, 0; entered and of known length those of requests 0 and 4
    assert found == pytest.approx(
        {
            "quality watch seconds": 100 / 4,
            "quality watch sessions": 1 / 4,
            "cold-start room views": 2 / 5,  # of requests 1 and 4
            "niche room views": 1 / 5,  # of request 2
            "unique tags": 3 / 2,  # tag 4 of user 0, tags 6 and 8 of user 1
            "stay seconds": 130 / 4,
        }
    )
    nothing = views(logits, asked, np.full(5, np.nan), np.full((5, 2), -1))
    assert np.isnan(nothing["stay seconds"]) and nothing["unique tags"] == 0


def test_tables_are_chosen_by_their_numbers():
    assert [t.name for t in chosen(["T7"])] == ["T7 fusion", "T7 recipe"]
    assert chosen(["all"]) == list(TABLES.values())
    assert rows_of(chosen(["T4"])) == rows_of(chosen(["T3"]))
    assert rows_of(chosen(["T3", "T5"])) == [
        "base", "+slice", "-ID", "FLUID", "level-wise", "shared",
    ]  # fmt: skip


def test_metrics_are_those_of_pairs_counted_one_by_one():
    rng = np.random.default_rng(0)
    shape = (40, 4, 3)
    logits, labels = rng.standard_normal(shape).round(1), rng.integers(0, 2, shape)
    mask, users, new = rng.random(shape) < 0.8, rng.integers(0, 5, 40), rng.random((40, 4)) < 0.5

    def auc(there, task=0):
        score, label = logits[..., task][there], labels[..., task][there]
        gaps = score[label == 1][:, None] - score[label == 0]
        return ((gaps > 0) + 0.5 * (gaps == 0)).mean()

    found = measure(logits, labels, mask, users, new)
    known = mask[..., 0]
    assert found["AUC"] == pytest.approx(auc(known))
    assert found["AUC new rooms"] == pytest.approx(auc(known & new))
    assert found["AUC older rooms"] == pytest.approx(auc(known & ~new))
    assert found["AUC long"] == pytest.approx(auc(mask[..., 2], 2))
    odds = 1 / (1 + np.exp(-logits[..., 0][known]))
    label = labels[..., 0][known]
    loss = -np.where(label == 1, np.log(odds), np.log(1 - odds)).mean()
    assert found["logloss"] == pytest.approx(loss)


def test_figures_bin_what_they_are_given():
    age = np.array([[30.0, 90.0], [90.0, 50_000.0]])
    found = figures.norm_by_age(np.array([[1.0, 2.0], [4.0, 8.0]]), age)
    by_start = dict(zip(found["start"], found["mean"], strict=True))
    assert by_start[0.0] == 1 and by_start[1.0] == 3 and by_start[720.0] == 8
    assert sum(found["count"]) == 4
    norm = np.linspace(0, 1, 1000)
    gate = figures.gate_by_norm(0.9 - 0.5 * norm, norm)
    assert gate["slope"][0] == pytest.approx(-0.05, rel=0.02)
    assert gate["mean"] == sorted(gate["mean"], reverse=True)
    assert gate["overall"][0] == pytest.approx(0.65)


def test_codes_are_fitted_on_what_was_known_and_votes_on_what_had_been():
    log = world.make(0, users=50, authors=20, rooms=60, videos=80, live_events=800, days=1.0).log
    before = int(np.quantile(log.ts, 0.8))
    made = make_codes(log, before, (8, 8), seed=0)
    late = ~known_before(log, before)
    assert late.any() and made.fitted_on == (~late).sum()
    assert made.slice_codes.dtype == made.room_codes.dtype == np.int16
    log.slice_embedding[late] = log.slice_embedding[late][::-1]
    again = make_codes(log, before, (8, 8), seed=0)
    assert again.version == made.version
    assert np.array_equal(again.slice_codes[~late], made.slice_codes[~late])
    assert not np.array_equal(again.slice_codes[late], made.slice_codes[late])
    room = np.flatnonzero(log.slice_room == np.bincount(log.slice_room).argmax())
    for at in range(len(room)):
        counts = np.bincount(again.slice_codes[room[: at + 1], 0])
        assert counts[again.room_codes[room[at], 0]] == counts.max()
    with pytest.raises(ValueError, match="slices"):
        make_codes(log, before, (4096,))
    found = figures.prefix_coherence(log, made)
    assert found["within"] > found["apart"] + 0.1 and found["both domains"]
    assert 0 <= made.unseen_votes() < 1
