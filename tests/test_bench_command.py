"""`livrec-fast bench` and `benches/report.py`: what they print, write and refuse."""

import importlib.util
import json
import textwrap
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import livrec_fast.bench as bench
from livrec_fast.benchmarking import (
    Machine,
)
from livrec_fast.benchmarking._results import read

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


def test_command_fails_where_a_peer_disagrees(tmp_path):
    folder = toy(tmp_path / "b", off=1.0)
    result = invoke("--benches", folder, "--out", tmp_path / "out", "--quick", "--budget", 0.01)
    assert (
        result.exit_code == 1 and "double, toy, float32, forward: rival disagrees" in result.output
    )
    (path,) = (tmp_path / "out").iterdir()
    rows = {row["contestant"]: row for row in read(path)["rows"]}
    assert rows["rival"]["reason"].startswith("disagrees: ") and "p50_ms" not in rows["rival"]
    assert rows["native"]["p50_ms"] > 0


def test_a_case_that_fails_stops_no_other(tmp_path):
    folder = toy(tmp_path / "b")
    text = (folder / "bench_double.py").read_text()
    wrong = text.replace('"double"', '"half"').replace('"ours")', '"ours", add=1.0)', 1)
    (folder / "bench_a.py").write_text(wrong.replace("OFF", "0.0"))
    broken = text.replace('"double"', '"none"').replace("torch.arange(1000.0)", "1 // 0")
    (folder / "bench_b.py").write_text(broken)
    result = invoke("--benches", folder, "--out", tmp_path / "out", "--quick", "--budget", 0.01)
    assert result.exit_code == 1, result.output
    assert "half, toy, float32, forward: native is wrong" in result.output
    assert "none, toy, float32, forward: ZeroDivisionError" in result.output
    (path,) = (tmp_path / "out").iterdir()
    assert {row["op"] for row in read(path)["rows"]} == {"double"}


def test_cases_out_of_time_are_left_out(tmp_path):
    folder = toy(tmp_path / "b")
    result = invoke("--benches", folder, "--out", tmp_path / "out", "--minutes", 0.0)
    assert result.exit_code == 0 and "left out: 1" in result.output
    assert not (tmp_path / "out").exists()
    assert bench.spread(list(range(6))) == [0, 4, 2, 1, 5, 3]
    for count in (0, 1, 2, 7, 8, 19):
        assert sorted(bench.spread(list(range(count)))) == list(range(count))


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


def load_report():
    spec = importlib.util.spec_from_file_location("report", ROOT / "benches/report.py")
    report = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(report)
    return report


def test_report_writes_tables_and_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    report = load_report()
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
    (line,) = [line for line in text.splitlines() if line.startswith("| `double` | toy, float32 |")]
    assert any(f"| {name} " in line for name in ("torch eager", "rival"))
    assert "(results/README.md)" in text
    assert "- absent: missing" in (tmp_path / "results/README.md").read_text()
    full = (tmp_path / "out/report.md").read_text()
    assert "| `double` | toy, float32 | native |" in full
    assert "- absent: missing: not installed" in full
    kinds = sorted(path.suffix for path in (tmp_path / "out").iterdir())
    assert kinds == [".md", ".png", ".svg"]


def test_summary_takes_the_size_where_another_comes_nearest():
    report = load_report()
    machine = {"device": "chip", "cuda": None, "threads": 1, "isa": "avx2", "torch": 1, "triton": 1}

    def row(rows, who, kind, p50):
        return {
            "op": "o", "label": f"M {rows}", "sizes": {"M": rows, "D": 8}, "dtype": "float32",
            "direction": "forward", "contestant": who, "kind": kind, "p50_ms": p50,
            "extra_bytes": 10**6, "others_busy": 0.0, "commit": "c",
            "fresh_p50_ms": p50 * (2 if kind == "ours" else 4),
        }  # fmt: skip

    rows = [
        row(10, "native", "ours", 1.0), row(10, "rival", "peer", 3.0),
        row(10, "torch eager", "reference", 4.0), row(99, "native", "ours", 10.0),
        row(99, "rival", "peer", 25.0), row(99, "torch eager", "reference", 90.0),
    ]  # fmt: skip
    lines = [line for line in report.summary(machine, rows).splitlines() if "`o`" in line]
    assert lines == ["| `o` | M 99, float32 | 10 | rival 2.5 | 5.00 | 9.0 | 1.0, 1.0 |"]


def test_cases_timed_otherwise_are_named():
    report = load_report()
    old, older = "7f6f4bbfaa", "b687bd7007"
    rows = [
        {"op": op, "commit": at, "p50_ms": 1} for op, at in (("b", old), ("a", older), ("c", "x"))
    ]
    rows += [{"op": op, "commit": "1fb977c189", "p50_ms": ms} for op, ms in (("e", 4), ("f", 6))]
    absent = {"op": "d", "commit": older, "reason": "absent"}
    pages, first, short = report.earlier([*rows, absent])
    assert pages.endswith("cases of: `a`") and first.endswith("cases of: `a`, `b`")
    assert short.endswith("cases of: `e`") and not list(report.earlier([rows[2], absent]))


def test_quick_residual_kmeans_ends_soon_and_names_every_peer(tmp_path):
    start = time.process_time()  # a busy machine stretches the wall's time
    result = invoke(
        "--op", "residual_kmeans", "--quick", "--budget", 0.05, "--out", tmp_path, "--device", "cpu"
    )
    assert result.exit_code == 0, result.output
    assert time.process_time() - start < 60, "20 s on two cores"
    (path,) = tmp_path.iterdir()
    rows = read(path)["rows"]
    assert len({row["label"] for row in rows}) == 2
    for row in rows:
        assert row.get("reason") or (row["p50_ms"] > 0 and row["rounds"] >= 5)
    names = {row["contestant"] for row in rows}
    assert names >= {"native", "torch eager", "torch.compile", "faiss RQ, LUT 0", "faiss RQ, LUT 1"}
    assert names >= {"superkmeans", "semantic-id", "vector-quantize-pytorch", "flash-kmeans"}
