"""The contrastive bench: everybody agrees, and whoever cannot take part says why."""

import importlib
import importlib.util
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from livrec_fast.benchmarking import (
    Absent,
    Contestant,
    Machine,
    Options,
    find_cases,
    run_case,
)
from livrec_fast.testing.subjects import to_double

BENCHES = Path(__file__).parent.parent / "benches"
OPTIONS = Options(quick=True)
LIBRARIES = {
    "pytorch-metric-learning": "pytorch_metric_learning",
    "pytorch-metric-learning, NTXentLoss": "pytorch_metric_learning",
    "info-nce-pytorch": "info_nce",
    "sentence-transformers": "sentence_transformers",
    "sentence-transformers, cached": "sentence_transformers",
}
ON_GPUS = ("inf-cl", "cut-cross-entropy", "cut-cross-entropy, unfiltered", "Liger")


def module(name):
    next(find_cases(BENCHES, OPTIONS))  # makes the folder a package
    return importlib.import_module(f"livrec_benches.{name}")


def without_compile(case):
    """Leave out whoever compiles for seconds."""
    kept = [c for c in case.contestants if c.name != "torch.compile"]
    return replace(case, contestants=kept)


@pytest.mark.parametrize("training", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize("symmetric", [False, True], ids=["one way", "both ways"])
def test_libraries_agree(training, symmetric, monkeypatch):
    monkeypatch.setattr(module("peers_contrastive"), "CHUNKS", (16, 48))
    case = module("bench_contrastive").case(64, OPTIONS, training=training, symmetric=symmetric)
    rows = run_case(without_compile(case), Machine(), budget=0.0, memory=False)
    rows = {row["contestant"]: row for row in rows}
    for name, package in LIBRARIES.items():
        if importlib.util.find_spec(package) is None:
            assert "is not installed" in rows[name]["reason"]
        else:
            assert "reason" not in rows[name], rows[name]["reason"]
    assert all("reason" in rows[name] for name in ON_GPUS)
    if "reason" not in rows["sentence-transformers, cached"]:
        assert rows["sentence-transformers, cached"]["note"] in ("chunks of 16", "chunks of 48")


def test_libraries_say_why_they_are_absent():
    bench = module("bench_contrastive")
    for settings in ({"threshold": 0.9}, {"dtype": torch.bfloat16}):
        case = bench.case(64, OPTIONS, training=True, **settings)
        reasons = {c.name: c.reason for c in case.contestants if isinstance(c, Absent)}
        assert all("without masks" in reasons[name] for name in LIBRARIES)
    case = bench.case(64, replace(OPTIONS, device="cuda"), training=True)
    reasons = {c.name: c.reason for c in case.contestants if isinstance(c, Absent)}
    assert "16-bit rows only" in reasons["cut-cross-entropy"]


def test_large_batches_leave_out_who_holds_all_pairs():
    case = module("bench_contrastive").case(2**22, OPTIONS, training=True)
    absent = {c.name: c.reason for c in case.contestants if isinstance(c, Absent)}
    for name in ("torch eager", "torch eager, plain", "torch.compile", "info-nce-pytorch"):
        assert "GiB for all pairs" in absent[name] or "not installed" in absent[name]
    assert {"native", "F.linear_cross_entropy"} <= {
        c.name for c in case.contestants
    } - absent.keys()
    small = module("bench_contrastive").case(512, OPTIONS, training=True)
    assert not [c for c in small.contestants if isinstance(c, Absent) and "GiB" in c.reason]


def test_many_rows_are_held_to_the_formula_in_blocks(monkeypatch):
    bench = module("bench_contrastive")
    monkeypatch.setattr(bench, "BLOCK", 24)
    for symmetric in (False, True):
        case = bench.case(64, OPTIONS, training=True, threshold=0.9, symmetric=symmetric)
        inputs, found = case.make(), []
        for most in (64, 63):
            monkeypatch.setattr(bench, "MOST_AT_ONCE", most)
            found.append(case.agree._formula(inputs))
        for whole, blocks in zip(*found, strict=True):
            assert whole.any()
            torch.testing.assert_close(blocks, whole, rtol=1e-4, atol=1e-6)


def test_very_many_rows_are_held_by_some(monkeypatch):
    bench = module("bench_contrastive")
    for name, value in (("MOST_IN_FULL", 63), ("SOME", 17), ("SCORES", 1_000)):
        monkeypatch.setattr(bench, name, value)
    case = bench.case(64, OPTIONS, training=True)
    case = replace(case, contestants=[c for c in case.contestants if c.name == "native"])
    (row,) = run_case(case, Machine(), budget=0.0, memory=False)
    assert "reason" not in row
    inputs = case.make()
    exact = to_double(inputs)
    wanted = bench.formula(None, True, bench.TEMPERATURE, None, False, exact)
    found = bench.some_gradients(bench.TEMPERATURE, exact)
    for some, whole in zip(found, bench.pick_some(wanted), strict=True):
        assert whole.any() and some.numel() in (1, 17 * bench.DIM)
        torch.testing.assert_close(some, whole)
    wanted[2][63] *= 1.01
    with pytest.raises(AssertionError, match="output 2: off by"):
        case.agree([x.float() for x in wanted], inputs)


def test_peers_of_the_largest_batch_are_quick_enough_and_small():
    case = module("bench_contrastive").case(65_536, OPTIONS, training=True)
    absent = {c.name: c.reason for c in case.contestants if isinstance(c, Absent)}
    assert "GiB for all pairs" in absent["torch.compile"]
    cached = absent["sentence-transformers, cached"]
    assert "more than a minute" in cached or "not installed" in cached
    assert {c.name for c in case.contestants} - absent.keys() == {
        "native",
        "F.linear_cross_entropy",
    }


def test_rules_can_fail():
    case = module("bench_contrastive").case(64, OPTIONS, training=True)
    native = next(c for c in case.contestants if c.name == "native")
    inputs = case.make()
    right = native.prepare(inputs)()
    off = [x * 1.01 for x in right]
    assert case.agree.roughly(right, inputs, 1e-4)["relative error"] < 1e-4
    assert case.agree.roughly(off, inputs, 0.02)["relative error"] == pytest.approx(0.01, rel=0.01)
    less = [right[0], *(0.7 * x for x in right[1:])]
    rules = [
        (off, None),
        ([right[0], *(x * 1.001 for x in right[1:])], None),
        (off, partial(case.agree.roughly, limit=0.005)),
        (off, partial(case.agree.roughly, limit=0.2, of_first=0.005)),
        (less, partial(case.agree.roughly, limit=0.2, of_first=0.01)),
    ]
    for wrong, rule in rules:
        rival = Contestant("rival", lambda inputs, wrong=wrong: lambda: wrong, agree=rule)
        (row,) = run_case(replace(case, contestants=[rival]), Machine(), budget=0.0, memory=False)
        assert row["reason"].startswith("disagrees: ") and "p50_ms" not in row
