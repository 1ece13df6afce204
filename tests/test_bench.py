"""The benchmark harness: what it holds contestants to, how it times them, what it writes down."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from livrec_fast import BackendError
from livrec_fast.benchmarking import (
    Absent,
    Case,
    Contestant,
    Disagreement,
    Machine,
    Options,
    remarks,
    run_case,
)
from livrec_fast.benchmarking._clock import Bystanders, interleave, peak_extra_bytes, percentiles
from livrec_fast.benchmarking._results import add, floor_ms, merge, read

ROOT = Path(__file__).parent.parent


def a_case(*contestants):
    def agree(output, inputs):
        assert output == inputs["x"] + 1, f"{output} is not {inputs['x'] + 1}"

    return Case("increment", "one", {}, torch.float32, lambda: {"x": 1}, agree, contestants, 8, 1)


class Counting:
    """A contestant's function that counts its runs."""

    def __init__(self, answer):
        self.answer, self.runs = answer, 0

    def __call__(self):
        """Answer, or raise the answer."""
        self.runs += 1
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def contestant(name, function, kind="peer"):
    return Contestant(name, lambda inputs: function, kind)


def test_percentiles_interpolate():
    assert percentiles([5.0]) == (5.0, 5.0, 5.0)
    assert percentiles(list(range(11))) == (2.0, 5.0, 8.0)
    assert percentiles([4.0, 1.0]) == pytest.approx((1.6, 2.5, 3.4))


def test_rounds_time_everybody_once_in_changing_order():
    ran = []
    runs = {name: (lambda name=name: ran.append(name)) for name in "abcd"}

    def clock(run):
        run()
        return float(ord(ran[-1]))

    times = interleave(runs, clock, budget=60.0, least=2, most=12)
    rounds = [tuple(ran[i : i + 4]) for i in range(0, len(ran), 4)]
    assert len(rounds) == 12 and all(sorted(members) == list("abcd") for members in rounds)
    assert len(set(rounds)) > 4
    assert times == {name: [float(ord(name))] * 12 for name in "abcd"}


def test_rounds_stop_at_the_budget_but_not_before_the_least():
    assert len(interleave({"a": lambda: None}, lambda run: 1.0, budget=0.0, least=5)["a"]) == 5
    slow = interleave({"a": lambda: None}, lambda run: time.sleep(0.02) or 1.0, budget=0.1, least=1)
    assert 3 <= len(slow["a"]) <= 6


def test_disagreement_stops_before_anything_is_timed():
    right, wrong = Counting(2), Counting(3)
    for kind in ("ours", "reference"):
        right.runs = wrong.runs = 0
        case = a_case(contestant("rival", right), contestant("native", wrong, kind))
        with pytest.raises(
            Disagreement, match="increment, one, float32, forward: native is wrong: 3 is not 2"
        ):
            run_case(case, Machine(), budget=0.0)
        assert (right.runs, wrong.runs) == (1, 1)


def test_a_peer_that_disagrees_says_so_and_is_not_timed():
    right, wrong = Counting(2), Counting(3)
    case = a_case(contestant("native", right, "ours"), contestant("rival", wrong))
    ours, rival = run_case(case, Machine(), budget=0.0, memory=False)
    assert ours["p50_ms"] > 0 and right.runs > 5 and wrong.runs == 1
    assert rival["reason"] == "disagrees: 3 is not 2" and "p50_ms" not in rival


def test_who_cannot_take_part_says_why():
    refusal = BackendError(
        "backend: 'triton' cannot run this.\nop(x)\n  triton     runs on CUDA only"
    )
    case = a_case(
        contestant("native", Counting(2), "ours"),
        contestant("triton", Counting(refusal), "ours"),
        contestant("rival", Counting(OSError("no licence\nmore"))),
        Absent("other", "not installed"),
    )
    rows = {row["contestant"]: row for row in run_case(case, Machine(), budget=0.0, memory=False)}
    assert rows["native"]["rounds"] == 5 and "reason" not in rows["native"]
    assert rows["triton"]["reason"] == "runs on CUDA only" and rows["triton"]["kind"] == "ours"
    assert rows["rival"]["reason"] == "OSError: no licence"
    assert rows["other"]["reason"] == "not installed"
    assert not any("p50_ms" in rows[name] for name in ("triton", "rival", "other"))


def test_a_fault_of_ours_is_raised():
    case = a_case(contestant("native", Counting(ZeroDivisionError("oops")), "ours"))
    with pytest.raises(ZeroDivisionError):
        run_case(case, Machine(), budget=0.0)


def test_finish_is_checked_but_not_timed():
    finished = []
    entrant = Contestant(
        "rival", lambda inputs: lambda: "2", finish=lambda o: finished.append(o) or int(o)
    )
    rows = run_case(a_case(entrant), Machine(), budget=0.0, memory=False)
    assert finished == ["2"] and rows[0]["rounds"] == 5


def test_rows_say_what_was_measured():
    (row,) = run_case(
        replace(a_case(contestant("native", Counting(2), "ours")), bytes=10**6),
        Machine(),
        budget=0.0,
    )
    assert row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"] and row["fresh_p50_ms"] > 0
    assert row["gb_s"] == pytest.approx(1e6 / row["p50_ms"] / 1e6)
    assert row["torch"] == torch.__version__ and row["threads"] == torch.get_num_threads()
    assert {
        "device",
        "triton",
        "commit",
        "sizes",
        "dtype",
        "direction",
        "extra_bytes",
    } <= row.keys()
    json.dumps(row)


def test_facts_and_notes_go_into_the_row_and_are_compared():
    class Noting(Counting):
        note = "blocks of 7"

    def agree(output, inputs):
        return {"error": output}

    def compare(facts):
        assert facts["native"]["error"] <= facts["rival"]["error"], "native errs more"

    right = [contestant("native", Noting(2), "ours"), contestant("rival", Counting(3))]
    case = replace(a_case(*right), agree=agree, compare=compare)
    rows = run_case(case, Machine(), budget=0.0, memory=False)
    assert [(r["note"], r["facts"]) for r in rows] == [
        ("blocks of 7", {"error": 2}), ("", {"error": 3}),
    ]  # fmt: skip
    assert [remarks(r) for r in rows] == [" (blocks of 7; error 2)", " (error 3)"]
    worse = Counting(9)
    case = replace(case, contestants=[contestant("native", worse, "ours"), right[1]])
    with pytest.raises(Disagreement, match="native errs more"):
        run_case(case, Machine(), budget=0.0)
    assert worse.runs == 1


def test_a_contestant_may_have_its_own_rule():
    off = replace(contestant("rough", Counting(3)), agree=lambda output, inputs: {"off": 1.0})
    (row,) = run_case(a_case(off), Machine(), budget=0.0, memory=False)
    assert row["facts"] == {"off": 1.0}


def test_long_cases_count_the_first_run_and_repeat_who_is_quick():
    slow, quick = Counting(2), Counting(2)
    waits = lambda: time.sleep(0.3) or slow()  # noqa: E731
    case = replace(a_case(contestant("slow", waits), contestant("quick", quick)), long=True)
    rows = run_case(case, Machine(), budget=0.2)
    assert slow.runs == 1 and rows[0]["rounds"] == 1 and rows[0]["p50_ms"] >= 300
    assert rows[1]["rounds"] >= 3 and quick.runs > 2 * rows[1]["rounds"]  # each after others
    assert isinstance(rows[0]["extra_bytes"], int | None)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux tells")
def test_bystanders_are_noticed_and_we_are_not_one():
    cores = os.cpu_count() or 1
    alone, start = Bystanders(), time.process_time()
    while time.process_time() - start < 0.3:
        pass
    alone_share = alone.share()
    command = [sys.executable, "-c", "import time\nwhile time.process_time() < 0.5: pass"]
    crowded = Bystanders()
    workers = [subprocess.Popen(command) for _ in range(cores)]
    assert [worker.wait() for worker in workers] == [0] * cores
    assert 0 <= alone_share <= 1 and 0.5 < crowded.share() <= 1


def test_floor_is_the_slower_of_copying_and_multiplying():
    machine = {"copy_gb_s": 10.0, "matmul_float32_tflop_s": 2.0}
    assert floor_ms({"bytes": 10**9, "flops": 1, "math": "float32"}, machine) == pytest.approx(100)
    assert floor_ms({"bytes": 1, "flops": 10**12, "math": "float32"}, machine) == pytest.approx(500)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux for its peak")
def test_peak_memory_is_that_of_the_run():
    def passing():
        torch.ones(2**24)  # 64 MB, gone at the end

    def many_small():
        return [torch.ones(2**8) for _ in range(2**14)]  # 16 MB in 1 kB blocks

    for run, megabytes in ((passing, 64), (many_small, 16), (lambda: None, 0)):
        run()
        measured = peak_extra_bytes(run, "cpu")
        if measured is None:
            pytest.skip("the peak cannot be reset here")
        assert megabytes * 2**20 - 2**21 <= measured <= 1.4 * megabytes * 2**20 + 2**21


def row(label, who, p50=1.0, **more):
    case = {"op": "o", "label": label, "dtype": "float32", "direction": "forward"}
    return {**case, "contestant": who, "p50_ms": p50, **more}


def test_merge_replaces_whole_cases():
    old = [row("a", "native", 1.0), row("a", "gone", 1.0), row("b", "native", 1.0)]
    new = [row("a", "native", 2.0), row("a", "rival", 3.0), row("c", "native", 4.0)]
    merged = [(r["label"], r["contestant"], r["p50_ms"]) for r in merge(old, new)]
    assert merged == [
        ("a", "native", 2.0),
        ("a", "rival", 3.0),
        ("b", "native", 1.0),
        ("c", "native", 4.0),
    ]
    assert merge(merge(old, new), new) == merge(old, new)


def test_results_keep_the_best_rate_and_other_cases(tmp_path):
    fast, slow = Machine(_rates={"copy_gb_s": 20.0}), Machine(_rates={"copy_gb_s": 10.0})
    add(tmp_path, fast, [row("a", "native", 1.0)])
    path = add(tmp_path, slow, [row("b", "native", 2.0)])
    held = read(path)
    assert held["machine"]["copy_gb_s"] == 20.0
    assert [r["label"] for r in held["rows"]] == ["a", "b"]
    assert [p.name for p in tmp_path.iterdir()] == [f"{fast.slug}.json"]


def test_options_know_the_threads():
    assert Options().threads == torch.get_num_threads()
