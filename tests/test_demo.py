"""The demo on tiny synthetic data in the shape of the real files: no network, a few seconds."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

pytest.importorskip("matplotlib")
pytest.importorskip("pyarrow")
tokenizers = pytest.importorskip("tokenizers")

from livrec_fast import code_attention  # noqa: E402
from livrec_fast.data import movielens, wheels, word_vectors  # noqa: E402
from livrec_fast.data.movielens import Ratings  # noqa: E402
from livrec_fast.systems.demo import pipeline, report, samples  # noqa: E402
from livrec_fast.systems.demo.command import command  # noqa: E402
from livrec_fast.systems.demo.evaluation import retrieval_metrics  # noqa: E402
from livrec_fast.systems.demo.items import shared_prefixes  # noqa: E402
from livrec_fast.systems.demo.measure import OpTimer, Part, peak_memory  # noqa: E402
from livrec_fast.systems.demo.metrics import auc, gauc, hit_rates  # noqa: E402
from livrec_fast.systems.demo.training import Run, compare  # noqa: E402

ITEMS, USERS, EVENTS = 600, 50, 40  # the first codebook needs 512 items
WORDS = [f"word{number}" for number in range(80)]
GENRES = ["Comedy", "Drama", "Action", "Horror"]


def tiny_ratings(seed: int = 0) -> Ratings:
    """Draw ratings with many equal times; users like one genre."""
    rng = np.random.default_rng(seed)
    user = np.repeat(np.arange(USERS), EVENTS)
    item = np.concatenate([rng.permutation(ITEMS)[:EVENTS] for _ in range(USERS)])
    taste = item % len(GENRES) == user % len(GENRES)
    rating = np.where(taste, rng.integers(4, 6, len(user)), rng.integers(1, 5, len(user)))
    time = np.sort(rng.integers(0, 25, (USERS, EVENTS)), axis=1).flatten()
    time += 10 * rng.integers(0, 8, USERS).repeat(EVENTS)
    titles = [f"{' '.join(rng.choice(WORDS, 3))} ({1920 + number % 80})" for number in range(ITEMS)]
    genres = [GENRES[number % len(GENRES)] for number in range(ITEMS)]
    return Ratings(titles, genres, user, item, rating.astype(np.float32), time)


def write_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write the files that the wheels would have had, and let the readers expect them."""
    ratings = tiny_ratings()
    names = [f"{title} #{number}" for number, title in enumerate(ratings.titles)]
    items = ["item_id:token\tmovie_title:token\trelease_year:float\tgenre:token"]
    items += [f"{name}\t{name}\t1990\t{g}" for name, g in zip(names, ratings.genres, strict=True)]
    events = ["user_id:token\titem_id:token\trating:float\ttimestamp:float"]
    rows = zip(ratings.user, ratings.item, ratings.rating, ratings.time, strict=True)
    events += [f"u{user}\t{names[item]}\t{rating:g}\t{time}" for user, item, rating, time in rows]
    vocabulary = {word: at for at, word in enumerate(["<unk>", *WORDS, *GENRES])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    table = torch.randn(len(vocabulary), 256, generator=torch.Generator().manual_seed(0))
    from safetensors.torch import save

    content = {
        "ml-1m.item": "\n".join(items).encode(),
        "ml-1m.inter": "\n".join(events).encode(),
        "l2_supercat_256.safetensors": save({"embedding.weight": table.half()}),
        "l2_supercat_tokenizer_config.json": tokenizer.to_str().encode(),
    }
    for module in (movielens, word_vectors):
        members = {}
        for member in module.WHEEL.members:
            data = content[Path(member).name]
            members[member] = hashlib.sha256(data).hexdigest()
            path = cache / f"{module.WHEEL.name}-{module.WHEEL.version}" / Path(member).name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        monkeypatch.setattr(module, "WHEEL", replace(module.WHEEL, members=members))


def run_command(tmp_path: Path, *options: str):
    arguments = ["--quick", "--steps", "12", "--device", "cpu", "--cache", str(tmp_path / "cache")]
    return CliRunner().invoke(command, [*arguments, "--out", str(tmp_path / "out"), *options])


def test_the_whole_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_cache(tmp_path / "cache", monkeypatch)
    result = run_command(tmp_path)
    assert result.exit_code == 0, result.output
    for said in (
        "relative error",
        "The two runs agree over 12 steps",
        "GAUC",
        "code_attention grad",
    ):
        assert said in result.output
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    for said in ("Harper", "wordllama", "ratings, not\nimpressions", "history_search_codes"):
        assert said in page
    assert "http" not in page and "nan" not in page.split("data:image")[0]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["report.html"]


def test_runs_that_disagree_fail_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_cache(tmp_path / "cache", monkeypatch)
    honest = pipeline._new_model

    def skewed(items, ratings, split, backend, settings):
        model = honest(items, ratings, split, backend, settings)
        if backend == "auto":
            with torch.no_grad():
                model.ranker.score[2].bias += 0.5
        return model

    monkeypatch.setattr(pipeline, "_new_model", skewed)
    result = run_command(tmp_path, "--steps", "6")
    assert result.exit_code == 1
    assert "DISAGREE" in result.output
    assert "DISAGREE" in (tmp_path / "out" / "report.html").read_text()


def test_offline_the_command_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        wheels.subprocess, "run",
        lambda command, **_: wheels.subprocess.CompletedProcess(command, 1, "", "ERROR: no route"),
    )  # fmt: skip
    result = run_command(tmp_path)
    assert result.exit_code == 1
    assert "no route" in result.output and "--cache" in result.output
    assert not (tmp_path / "out").exists()


def test_a_report_that_fails_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_cache(tmp_path / "cache", monkeypatch)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "report.html").write_text("old")

    def broken(results):
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "plots", broken)
    assert run_command(tmp_path, "--steps", "5").exit_code != 0
    assert [path.read_text() for path in (tmp_path / "out").iterdir()] == ["old"]


def test_blocks_see_only_what_was_strictly_before_them():
    ratings = tiny_ratings(1)
    split = samples.chronological_split(ratings, 0.8, 6)
    assert len(split.train) and len(split.test)
    times = []
    for part, blocks in (("train", split.train), ("test", split.test)):
        for begin, end, first, last in zip(
            blocks.begin, blocks.end, blocks.first, blocks.last, strict=True
        ):
            assert begin <= end <= first < last <= first + 6
            assert len(set(ratings.user[begin:last])) == 1
            assert begin == 0 or ratings.user[begin - 1] != ratings.user[begin]
            assert (ratings.time[begin:end] < ratings.time[first:last].min()).all()
            assert end == first or ratings.time[end] == ratings.time[first]
            assert ((ratings.time[first:last] < split.time) == (part == "train")).all()
            times.append(np.arange(first, last))
    assert sorted(np.concatenate(times)) == list(range(len(ratings.item)))


def test_a_batch_holds_what_its_blocks_say():
    ratings = tiny_ratings(2)
    blocks = samples.chronological_split(ratings, 0.8, 6).train.take(np.array([5, 0, 17]))
    batch = samples.make_batch(ratings, blocks, 6)
    for row in range(3):
        held = slice(blocks.begin[row], blocks.end[row])
        asked = slice(blocks.first[row], blocks.last[row])
        history = slice(int(batch.offsets[row]), int(batch.offsets[row + 1]))
        assert batch.history[history].tolist() == ratings.item[held].tolist()
        assert (batch.stars[history] + 1).tolist() == ratings.rating[held].tolist()
        valid = batch.valid[row]
        assert batch.candidates[row, valid].tolist() == ratings.item[asked].tolist()
        assert batch.labels[row, valid].tolist() == (ratings.rating[asked] >= 4).tolist()


def test_batches_are_the_same_for_a_seed_and_cover_all_blocks():
    ratings = tiny_ratings(3)
    blocks = samples.chronological_split(ratings, 0.8, 6).train
    steps = -(-len(blocks) // 8)

    def drawn(seed: int) -> list[list[int]]:
        batches = samples.training_batches(ratings, blocks, 6, users=8, steps=steps, seed=seed)
        return [batch.candidates.flatten().tolist() for batch in batches]

    assert drawn(1) == drawn(1) != drawn(2)
    once = samples.training_batches(ratings, blocks, 6, users=1, steps=len(blocks), seed=0)
    assert sum(int(batch.valid.sum()) for batch in once) == int((blocks.last - blocks.first).sum())


def test_auc_by_hand_and_against_sklearn():
    assert auc(np.array([0.1, 0.4, 0.35, 0.8]), np.array([0, 0, 1, 1])) == 0.75
    assert auc(np.array([1.0, 1.0]), np.array([0, 1])) == 0.5
    assert np.isnan(auc(np.array([1.0, 2.0]), np.array([1, 1])))
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    scores, labels = rng.integers(0, 20, 500) / 4, rng.integers(0, 2, 500)
    assert auc(scores, labels) == pytest.approx(metrics.roc_auc_score(labels, scores), abs=1e-12)


def test_gauc_weighs_groups_by_rows_and_skips_those_of_one_class():
    scores = np.array([0.9, 0.1, 0.5, 0.2, 0.8, 0.3, 0.7])
    labels = np.array([1, 0, 1, 0, 0, 1, 1])
    groups = np.array([7, 7, 2, 2, 2, 5, 5])  # AUC 1 of 2 rows, 1/2 of 3 rows, none
    value, used = gauc(scores, labels, groups)
    assert (value, used) == (pytest.approx((2 * 1 + 3 * 0.5) / 5), 2)


def test_hit_rates_by_hand():
    scores = np.array([[0.9, 0.8, 0.7, 0.6], [0.1, 0.2, 0.3, 0.4], [1.0, 1.0, 1.0, 1.0]])
    wanted = np.array([[0, 1, 0, 1], [1, 0, 0, 1], [0, 0, 0, 0]], dtype=bool)
    seen = np.array([[1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]], dtype=bool)
    assert hit_rates(scores, wanted, seen, (1, 3)) == {1: (0.5 + 0.5) / 2, 3: (1.0 + 0.5) / 2}


def test_perfect_retrieval_has_hit_rate_one():
    ratings = tiny_ratings(4)
    split = samples.chronological_split(ratings, 0.8, 6)
    scores = np.zeros((len(split.test), ITEMS))
    for row, (first, last) in enumerate(zip(split.test.first, split.test.last, strict=True)):
        scores[row, ratings.item[first:last]] = ratings.rating[first:last] >= 4
    found = retrieval_metrics(scores, ratings, split.test, split.time)
    assert found["HR@10"] == found["HR@10, returning"] == 1.0
    assert retrieval_metrics(-scores, ratings, split.test, split.time)["HR@100"] == 0.0


def test_shared_prefixes_name_titles_of_the_largest_groups():
    codes = np.array([[1, 2, 0], [1, 2, 1], [1, 2, 2], [1, 3, 0], [1, 3, 1], [4, 5, 0], [4, 5, 1]])
    found = shared_prefixes(list("abcdefg"), codes, groups=3)
    assert found == {(1, 2): ["a", "b", "c"], (4, 5): ["f", "g"]}


def attention_inputs() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 3, 2, 4, generator=generator).requires_grad_()
    tables = [torch.randn(5, 2, 4, generator=generator).requires_grad_() for _ in range(2)]
    codes = torch.randint(5, (9, 1), generator=generator)
    return q, codes, [tables[0]], [tables[1]], torch.tensor([0, 4, 9])


def test_the_op_timer_sees_both_directions_and_the_backend():
    with OpTimer(torch.device("cpu")) as timer:
        code_attention(*attention_inputs(), backend="reference").sum().backward()
    expected = {Part("code_attention", "forward"), Part("code_attention", "backward")}
    assert set(timer.seconds) == set(timer.backends) == expected
    assert all(seconds > 0 for seconds in timer.seconds.values())
    assert all(ran == {"reference"} for ran in timer.backends.values())


def test_peak_memory_counts_the_step_and_its_ops():
    megabyte = 2**20

    def step() -> None:
        kept = torch.zeros(megabyte, dtype=torch.uint8)
        del kept
        bigger = [torch.zeros(megabyte, dtype=torch.uint8) for _ in range(3)]
        del bigger
        code_attention(*attention_inputs(), backend="reference").sum().backward()

    whole, ops = peak_memory(step, torch.device("cpu"))
    assert 3 * megabyte <= whole < 3.2 * megabyte
    assert set(ops) == {Part("code_attention", "forward"), Part("code_attention", "backward")}
    assert all(0 < size < megabyte for size in ops.values())


def test_comparing_runs_finds_the_worst_step():
    one = Run("reference", ranking=[1.0, 2.0, 4.0], contrast=[1.0, 1.0, 1.0])
    other = Run("auto", ranking=[1.0, 2.0, 4.4], contrast=[1.0, 1.01, 1.0])
    found = compare(one, other, {"ranking": 0.05, "contrast": 0.05})
    assert found.step == {"ranking": 2, "contrast": 1}
    assert found.worst == pytest.approx({"ranking": 0.1, "contrast": 0.01})
    assert not found.holds
    assert compare(one, other, {"ranking": 0.2, "contrast": 0.05}).holds
    assert compare(one, one, {"ranking": 0.0, "contrast": 0.0}).holds
    broken = Run("auto", [1.0, 2.0, float("nan")], [1.0] * 3)
    assert not compare(one, broken, {"ranking": 0.05, "contrast": 0.05}).holds
    with pytest.raises(ValueError, match="as many steps"):
        compare(one, Run("auto", [1.0], [1.0]), {"ranking": 0.05})
