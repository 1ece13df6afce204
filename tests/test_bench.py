"""The benchmark harness: what it holds contestants to, how it times them, what it writes down."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import livrec_fast.bench as bench
from livrec_fast import BackendError
from livrec_fast._files import replacing
from livrec_fast.benchmarking import (
    Absent,
    Case,
    Contestant,
    Disagreement,
    Machine,
    Options,
    run_case,
)
from livrec_fast.benchmarking._clock import Bystanders, interleave, peak_extra_bytes, percentiles
from livrec_fast.benchmarking._results import add, floor_ms, merge, read

ROOT = Path(__file__).parent.parent
TOY = """
    import torch
    from livrec_fast.benchmarking import Absent, Case, Contestant

    def cases(options):
        def contestant(name, kind, add=0.0):
            return Contestant(name, lambda inputs: lambda: inputs["x"] * 2 + add, kind)

        yield Case(
            op="double", label="toy", sizes={"n": 1000}, dtype=torch.float32,
            make=lambda: {"x": torch.arange(1000.0)},
            agree=lambda output, inputs: torch.testing.assert_close(output, inputs["x"] * 2),
            contestants=[
                contestant("native", "ours"), contestant("torch eager", "reference"),
                contestant("rival", "peer", add=OFF), Absent("missing", "not installed"),
            ],
            bytes=8000, flops=1000,
        )
"""


def toy(folder, off=0.0):
    folder.mkdir(parents=True)
    (folder / "bench_double.py").write_text(textwrap.dedent(TOY.replace("OFF", str(off))))
    return folder


def invoke(*arguments):
    return CliRunner().invoke(bench.command, [str(a) for a in arguments])


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
    case = a_case(contestant("native", right, "ours"), contestant("rival", wrong))
    with pytest.raises(
        Disagreement, match="increment, one, float32, forward: rival is wrong: 3 is not 2"
    ):
        run_case(case, Machine(), budget=0.0)
    assert (right.runs, wrong.runs) == (1, 1)


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
    assert row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
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


def test_replacing_keeps_the_old_file_when_it_fails(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), replacing(path) as file:
        file.write(b"half")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with replacing(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_replacing_by_name_where_files_need_one(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    test_replacing_keeps_the_old_file_when_it_fails(tmp_path)


@pytest.mark.skipif(not hasattr(os, "O_TMPFILE"), reason="files have names here from the start")
def test_replacing_leaves_nothing_when_killed(tmp_path):
    code = """
        import sys, time
        from livrec_fast._files import replacing
        with replacing(sys.argv[1]) as file:
            file.write(b"half" * 10_000_000)
            print("writing", flush=True)
            time.sleep(60)
    """
    arguments = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "file")]
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, env=variables) as process:
        assert process.stdout.readline() == b"writing\n"
        process.send_signal(signal.SIGKILL)
    assert list(tmp_path.iterdir()) == []


def test_command_prints_a_table_and_writes_the_rows(tmp_path):
    result = invoke(
        "--benches",
        toy(tmp_path / "benches"),
        "--out",
        tmp_path / "out",
        "--quick",
        "--budget",
        0.01,
    )
    assert result.exit_code == 0, result.output
    assert "torch eager" in result.output and "absent: missing: not installed" in result.output
    (path,) = (tmp_path / "out").iterdir()
    assert path.name == f"{Machine().slug}.json"
    assert [r["contestant"] for r in read(path)["rows"]] == [
        "native",
        "torch eager",
        "rival",
        "missing",
    ]


def test_command_prints_json(tmp_path):
    result = invoke(
        "--benches", toy(tmp_path / "b"), "--out", tmp_path, "--quick", "--json", "--op", "double"
    )
    assert [r["contestant"] for r in json.loads(result.stdout)][0] == "native"


def test_command_fails_on_disagreement(tmp_path):
    result = invoke("--benches", toy(tmp_path / "b", off=1.0), "--out", tmp_path / "out", "--quick")
    assert result.exit_code == 1 and "rival is wrong" in result.output
    assert not (tmp_path / "out").exists()


def test_command_refuses_what_it_cannot_do(tmp_path, monkeypatch):
    folder = toy(tmp_path / "b")
    assert invoke("--benches", folder, "--op", "nothing").exit_code == 2
    if not torch.cuda.is_available():
        result = invoke("--benches", folder, "--device", "cuda")
        assert result.exit_code == 2 and "no CUDA device" in result.output
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "_HERE", tmp_path / "nowhere")
    result = invoke()
    assert result.exit_code == 2 and "not part of the installed package" in result.output


def test_report_writes_tables_and_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    spec = importlib.util.spec_from_file_location("report", ROOT / "benches/report.py")
    report = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(report)
    invoke(
        "--benches", toy(tmp_path / "b"), "--out", tmp_path / "results", "--quick", "--budget", 0.01
    )
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nstale\n{report.END}\nafter\n")
    arguments = ["--results", tmp_path / "results", "--out", tmp_path / "out", "--into", readme]
    result = CliRunner().invoke(report.main, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "stale" not in text
    assert (
        "| `double` | toy, float32 | native |" in text
        and "- absent: missing: not installed" in text
    )
    kinds = sorted(path.suffix for path in (tmp_path / "out").iterdir())
    assert kinds == [".md", ".png", ".svg"]


def test_quick_residual_kmeans_ends_soon_and_names_every_peer(tmp_path):
    start = time.process_time()  # a busy machine stretches the wall's time
    result = invoke(
        "--op", "residual_kmeans", "--quick", "--budget", 0.05, "--out", tmp_path, "--device", "cpu"
    )
    assert result.exit_code == 0, result.output
    assert time.process_time() - start < 40, "20 s on two cores"
    (path,) = tmp_path.iterdir()
    rows = read(path)["rows"]
    assert len({row["label"] for row in rows}) == 2
    for row in rows:
        assert row.get("reason") or (row["p50_ms"] > 0 and row["rounds"] >= 5)
    names = {row["contestant"] for row in rows}
    assert names >= {"native", "torch eager", "torch.compile", "faiss RQ, LUT 0", "faiss RQ, LUT 1"}


def test_options_know_the_threads():
    assert Options().threads == torch.get_num_threads()
