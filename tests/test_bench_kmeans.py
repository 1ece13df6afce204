"""The k-means benches: their agreement can fail, peers find what ours finds, blocks join right."""

import importlib
import os
import sys
from pathlib import Path

import pytest
import torch

from livrec_fast.benchmarking import Absent, Machine, Options, find_cases, run_case
from livrec_fast.reference import residual_kmeans as encode_reference

BENCHES = Path(__file__).parent.parent / "benches"
OPTIONS = Options(quick=True, threads=os.cpu_count() or 1)  # superkmeans takes all cores


def module(name):
    next(find_cases(BENCHES, OPTIONS))  # makes the folder a package
    return importlib.import_module(f"livrec_benches.{name}")


def entrant(contestant):
    if isinstance(contestant, Absent):
        pytest.skip(contestant.reason)
    return contestant


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + shape[0]))


def test_blocks_join_to_the_whole_and_are_noted(monkeypatch):
    peers = module("peers")
    monkeypatch.setattr(peers, "BLOCKS", (3, 64))
    x = draw(10, 4)
    run = peers.in_blocks({"twice": lambda rows: 2 * rows}, x, OPTIONS, whole=False)
    assert run.note == "twice, blocks of 3" and run().equal(2 * x)
    run = peers.in_blocks({"sum": len}, x, OPTIONS, join=sum, whole=False)
    assert run() == 10
    monkeypatch.setattr(peers, "BLOCKS", (64,))
    assert peers.in_blocks({"twice": lambda rows: 2 * rows}, x, OPTIONS).note == "twice"


def test_the_quickest_way_wins():
    peers, calls = module("peers"), []
    ways = {"slow": lambda: sum(range(300_000)), "quick": lambda: calls.append(1)}
    assert peers.quickest("cpu", ways) == "quick" and len(calls) > 3  # the last ones are timed


def test_a_fresh_formula_is_compiled_for_itself():
    peers = module("peers")
    first, second = peers.fresh(encode_reference.code_dtype), peers.fresh(draw)
    assert first(300) == torch.int16 and second(2, 2).equal(draw(2, 2))
    assert peers.fresh(draw).__code__ != second.__code__


def test_wrong_codes_are_found_whoever_comes_first():
    codes_of = module("agreement").Codes
    inputs = {"x": draw(50, 8), "codebooks": [draw(20, 8), draw(16, 8) / 4]}
    codes = encode_reference.residual_kmeans_encode(**inputs)
    wrong = codes.clone()
    wrong[17, 1] = (wrong[17, 1] + 1) % 16
    agree = codes_of()
    agree(codes, inputs)
    agree(codes.clone(), inputs)
    for attempt in (wrong, codes[:49], codes.int()):
        with pytest.raises(AssertionError):
            agree(attempt, inputs)
    with pytest.raises(AssertionError, match="scores"):
        codes_of()(wrong, inputs)


def test_of_many_rows_those_in_dispute_are_checked(monkeypatch):
    inputs = {"x": draw(9_000, 4), "codebooks": [draw(20, 4)]}
    codes = encode_reference.residual_kmeans_encode(**inputs)
    wrong = codes.clone()
    wrong[1, 0] = (wrong[1, 0] + 1) % 20  # row 1 is not in the spread of every other row
    agree = module("agreement").Codes(most=4_500)
    agree(wrong, inputs)
    with pytest.raises(AssertionError, match="the first contestant's"):
        agree(codes, inputs)


def test_squared_error_is_that_of_the_nearest_codes():
    books, x = [draw(9, 6), draw(5, 6) / 2], draw(40, 6)
    codes = encode_reference.residual_kmeans_encode(x.double(), [b.double() for b in books]).long()
    rest = x.double() - sum(book.double()[codes[:, at]] for at, book in enumerate(books))
    expected = float(rest.square().sum(1).mean())
    assert module("agreement").squared_error(x, books) == pytest.approx(expected, rel=1e-12)


LEVELS, DIM = (32, 16, 8), 24


@pytest.mark.parametrize(
    "peer", ["faiss 0", "faiss 1", "vector_quantize", "semantic_id", "superkmeans"]
)
def test_encoders_agree(peer):
    peers = module("peers_encode")
    inputs = {"x": draw(500, DIM), "codebooks": [draw(n, DIM) / 2**i for i, n in enumerate(LEVELS)]}
    made = {
        "faiss 0": lambda: peers.faiss_residual_quantizer(LEVELS, torch.float32, OPTIONS, lut=0),
        "faiss 1": lambda: peers.faiss_residual_quantizer(LEVELS, torch.float32, OPTIONS, lut=1),
        "vector_quantize": lambda: peers.vector_quantize(LEVELS, DIM, OPTIONS),
        "semantic_id": lambda: peers.semantic_id(LEVELS, OPTIONS),
        "superkmeans": lambda: peers.superkmeans(LEVELS, OPTIONS),
    }
    contestant = entrant(made[peer]())
    encode_reference.agree(contestant.finish(contestant.prepare(inputs)()), inputs)


@pytest.mark.parametrize("peer", ["eager_in_blocks", "faiss_step", "superkmeans_step"])
def test_steps_agree(peer, monkeypatch):
    monkeypatch.setattr(module("peers"), "BLOCKS", (128,))
    inputs = {"x": draw(500, DIM), "codebook": draw(30, DIM)}
    contestant = entrant(getattr(module("peers_step"), peer)(OPTIONS))
    output = contestant.finish(contestant.prepare(inputs)())
    module("bench_kmeans_step").Agreement()(output, inputs)


@pytest.mark.parametrize("add", ["index_add", "scatter", "product"])
def test_every_way_to_add_agrees_and_wrong_sums_are_seen(add):
    book, agreement = draw(30, DIM), module("bench_kmeans_step").Agreement()
    inputs = {"x": draw(500, DIM), "codebook": book}
    codes, sums, mass = module("peers_step").step_ways(book)[add](inputs["x"])
    agreement((codes, sums, mass), inputs)
    moved = sums.clone()
    moved[3, 2] += 0.01
    for wrong in ((codes, moved, mass), (codes, sums, mass.roll(1)), (codes.roll(1), sums, mass)):
        with pytest.raises(AssertionError):
            agreement(wrong, inputs)


@pytest.fixture
def small_fit(monkeypatch):
    bench = module("bench_residual_kmeans_fit")
    monkeypatch.setattr(bench, "LEVELS", (16, 8))
    monkeypatch.setattr(bench, "DIM", DIM)
    return bench


@pytest.mark.parametrize("peer", ["faiss_fit", "sklearn_fit"])
def test_fits_from_the_same_start_end_alike(peer, small_fit):
    fits = module("peers_fit")
    inputs = small_fit.fit(3_000, 6, OPTIONS).make()
    errors = [
        small_fit.quality(entrant(make(6, OPTIONS)).prepare(inputs)(), inputs)["error"]
        for make in (fits.torch_fit, getattr(fits, peer))
    ]
    assert errors[1] == pytest.approx(errors[0], rel=5e-4)


def test_our_fit_ends_no_worse_than_the_yardstick(small_fit):
    case = small_fit.fit(3_000, 6, OPTIONS)
    inputs = case.make()
    ours = small_fit.quality(small_fit.our_fit("auto", 6).prepare(inputs)(), inputs)
    theirs = module("peers_fit").torch_fit(6, OPTIONS).prepare(inputs)()
    facts = {"native": ours, "torch eager, chunked": small_fit.quality(theirs, inputs)}
    small_fit.no_worse(facts)
    facts["native"] = {"error": 1.002 * facts["torch eager, chunked"]["error"]}
    with pytest.raises(AssertionError, match="native ends at error"):
        small_fit.no_worse(facts)


@pytest.mark.parametrize("peer", ["superkmeans_fit", "vector_quantize_fit"])
def test_fits_from_their_own_start_lower_the_error(peer, small_fit, capfd):
    inputs = small_fit.fit(3_000, 6, OPTIONS).make()
    fitted = entrant(getattr(module("peers_fit"), peer)(6, OPTIONS)).prepare(inputs)()
    assert small_fit.quality(fitted, inputs)["error"] < DIM
    assert "WARNING" not in capfd.readouterr().out, "what a library prints would be in --json"


def test_superkmeans_is_absent_where_its_threads_cannot_be_held():
    peers = module("peers_encode")
    assert "all cores" in peers.superkmeans_absence(Options(threads=10**6))


def test_libraries_of_gpus_say_so_on_a_cpu():
    gpu = module("peers_gpu")
    for absent in (
        gpu.flash_encode(LEVELS, OPTIONS), gpu.fastkmeans_encode(OPTIONS), gpu.flash_step(OPTIONS),
        gpu.flash_fit(3, OPTIONS), gpu.fastkmeans_fit(3, OPTIONS),
    ):  # fmt: skip
        assert isinstance(absent, Absent) and "GPU only" in absent.reason


def test_less_precise_codes_are_held_to_their_error():
    nearly = module("peers_gpu").nearly_as_near
    inputs = {"x": draw(300, DIM), "codebooks": [draw(20, DIM), draw(16, DIM) / 4]}
    codes = encode_reference.residual_kmeans_encode(**inputs)
    (ratio,) = nearly(codes, inputs).values()
    assert ratio == pytest.approx(1, abs=1e-9)
    with pytest.raises(AssertionError, match="exactly"):
        nearly((codes + 1) % 16, inputs)


def test_every_case_is_stated_for_both_devices():
    for device in ("cpu", "cuda"):
        for quick in (True, False):
            cases = list(find_cases(BENCHES, Options(device, quick)))
            titles = [case.title for case in cases]
            assert len(set(titles)) == len(titles)
            for case in cases:
                names = [contestant.name for contestant in case.contestants]
                assert len(set(names)) == len(names), case.title
                assert case.contestants[0].kind == "ours"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux tells")
def test_mapped_rows_need_no_memory_of_their_own(tmp_path):
    sys.path.insert(0, str(BENCHES))
    try:
        script = importlib.import_module("out_of_core")
    finally:
        sys.path.remove(str(BENCHES))
    path = script.write(tmp_path / "v", 200_000, torch.Generator().manual_seed(0))
    assert path.stat().st_size == 200_000 * script.DIM * 4
    x = script.mapped(path, 200_000)
    with script.Watch() as watch:
        float(x.sum())
    assert watch.peak - watch.before < 20e6
    with script.Watch() as watch:
        held = x.clone()
    assert watch.peak - watch.before > 0.9 * held.nbytes


def test_the_step_bench_runs_on_rows_that_quick_takes():
    case = next(find_cases(BENCHES, OPTIONS, ["kmeans_step"]))
    rows = run_case(case, Machine(), budget=0.0, memory=False)
    ran = {row["contestant"] for row in rows if "p50_ms" in row}
    assert ran >= {"torch eager", "torch eager, chunked"}
