"""`livrec-fast run fluid` from data to tables, files and figures, on a tiny world."""

import csv
import json
import sys

import pytest
from click.testing import CliRunner
from fluid_batches import HandMade

from livrec_fast.cli import main
from livrec_fast.data import live_log, world
from livrec_fast.systems.fluid import command, experiment, speed
from livrec_fast.systems.fluid.config import TrainConfig
from livrec_fast.systems.fluid.recipes import ROWS
from livrec_fast.systems.fluid.tables import METRICS, TABLES
from livrec_fast.systems.fluid.training import Settings, stage_key

TINY = {"users": 60, "authors": 20, "rooms": 60, "videos": 100, "live_events": 1500, "days": 1.0}
SIZES = [text for name, n in TINY.items() for text in ("--world", f"{name}={n}")]
pytestmark = pytest.mark.xdist_group("fluid_command")


def run(*arguments):
    done = CliRunner().invoke(main, ["run", "fluid", *map(str, arguments)])
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    out = tmp_path_factory.mktemp("fluid")
    tables = ["--table", "T7"]
    return out, tables, run("--out", out, "--seeds", 2, "--jobs", 1, *tables, *SIZES)


def test_tables_are_printed_beside_the_papers(done):
    _, _, result = done
    assert result.exit_code == 0, result.output
    for name in ("T7 fusion", "T7 recipe"):
        for title, auc, _ in TABLES[name].rows.values():
            line = next(line for line in result.output.splitlines() if line.startswith(title))
            assert f"{auc:.4f}"[1:] in line and line.count("±") == 5
        for order in TABLES[name].orders:
            said = next(line for line in result.output.splitlines() if f" {order}:" in line)
            assert any(word in said for word in ("holds", "reversed", "undecided"))
    assert "level-wise" not in result.output
    assert "s in all" in result.output


def test_all_numbers_are_in_the_csv(done):
    out, _, _ = done
    with open(out / "results.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    rows = sum(len(TABLES[name].rows) for name in ("T7 fusion", "T7 recipe"))
    assert len(lines) == rows * 2 * len(METRICS)
    lines = [line for line in lines if (line["table"], line["metric"]) == ("T7 recipe", "AUC")]
    found = {(line["row"], line["seed"]): float(line["value"]) for line in lines}
    assert all(0.3 < value < 1 for value in found.values())
    assert len(set(found.values())) == len(found)  # no row stands in for another
    one = json.loads((out / "seed-1.json").read_text())
    assert one["rows"]["FLUID"]["AUC"] == found["FLUID", "1"]


def test_figures_are_drawn(done):
    out, _, _ = done
    pictures = {path.name.split("-")[1]: path for path in out.glob("figure-*.png")}
    assert set(pictures) == {"1", "4", "5"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures.values())

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    text = (out / "seed-0.json").read_text()
    drawn = json.loads(text, parse_constant=refuse)["figures"]
    assert None in drawn["1"]["mean"]  # ages that no candidate has
    assert sum(drawn["1"]["count"]) > 0 and drawn["4"]["within"] > drawn["4"]["apart"]
    assert 0 < drawn["5"]["overall"][0] < 1 and len(drawn["5"]["mean"]) == 10


def test_again_nothing_is_trained_and_fresh_trains_to_the_same_numbers(done, monkeypatch):
    out, tables, first = done
    text = (out / "results.csv").read_bytes()
    files = {path: path.stat().st_mtime_ns for path in (out / "stages").iterdir()}
    run("--out", out, "--seeds", 2, "--jobs", 1, *tables, *SIZES)
    assert (out / "results.csv").read_bytes() == text
    assert {path: path.stat().st_mtime_ns for path in (out / "stages").iterdir()} == files
    run("--out", out, "--seeds", 2, "--jobs", 2, "--fresh", *SIZES)  # T3, in two processes
    with open(out / "results.csv", newline="") as file:
        fresh = {(line["row"], line["seed"], line["metric"]): line["value"] for line in
                 csv.DictReader(file)}  # fmt: skip
    before = {(line["row"], line["seed"], line["metric"]): line["value"] for line in
              csv.DictReader(text.decode().splitlines())}  # fmt: skip
    both = fresh.keys() & before.keys()
    assert {row for row, _, _ in both} == {"base", "+slice", "FLUID"}
    assert all(fresh[key] == before[key] for key in both)


def test_a_folder_of_logs_is_read(tmp_path):
    live_log.write(world.make(0, **TINY).log, tmp_path / "log")
    result = run("--data", tmp_path / "log", "--out", tmp_path, "--seeds", 1, "--jobs", 1)
    assert result.exit_code == 0, result.output
    assert "baseline w/o item ID" in result.output and "undecided" in result.output


def test_the_step_is_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "SPEED_SECONDS", 0.1)
    result = run("--speed", "--out", tmp_path, *SIZES)
    assert result.exit_code == 0, result.output
    assert "EmbeddingBag + SDPA" in result.output and "matrix products" in result.output
    assert not list(tmp_path.iterdir())


def test_as_much_of_a_history_is_read_as_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "SPEED_SECONDS", 0.1)
    words = run("--speed", "--length", 3, "--out", tmp_path, *SIZES).output.split()
    assert "Of a history 3 events at most are read;" in " ".join(words)
    mean, most = words[words.index("mean,") - 3], words[words.index("mean,") + 1]
    assert 1 < float(mean) <= int(most) == 3


def test_ways_to_train_that_differ_fail_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "TOLERANCE", -1.0)
    result = run("--speed", "--out", tmp_path, *SIZES)
    assert result.exit_code == 1
    assert "the three ways to train are not the same: losses: differ by" in result.output


@pytest.mark.parametrize(
    "arguments",
    [
        ["--world", "switch=2"],
        ["--world", "live_events=0"],
        ["--world", "live_events=3"],
        ["--data", "nowhere"],
        ["--data", "."],
    ],
)
def test_fresh_deletes_nothing_where_nothing_can_be_trained(tmp_path, arguments, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kept = tmp_path / "stages" / "a.trace.safetensors"
    kept.parent.mkdir()
    kept.touch()
    sizes = SIZES if "--world" in arguments else []
    result = run("--fresh", "--seeds", 1, "--jobs", 1, "--out", tmp_path, *sizes, *arguments)
    assert result.exit_code == 1 and "Error: " in result.output
    assert kept.exists()


def test_what_is_missing_is_told_before_anything_is_done(tmp_path, monkeypatch):
    for name, arguments in (("matplotlib", []), ("pyarrow", ["--data", tmp_path])):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, name, None)
            result = run("--out", tmp_path / "out", *arguments)
        assert result.exit_code == 1 and not (tmp_path / "out").exists()
        assert f"needs {name}; to mend: pip install 'livrec-fast[run]'" in result.output


def test_mistakes_are_told(tmp_path):
    for arguments, text in (
        (["--data", tmp_path, "--world", "users=3"], "is no world"),
        (["--data", tmp_path / "none"], "no folder"),
        (["--world", "users"], "NAME=NUMBER"),
        (["--world", "people=3"], "people"),
        (["--table", "T6"], "T6"),
    ):
        result = run("--out", tmp_path / "out", "--seeds", 1, "--jobs", 1, *arguments)
        assert result.exit_code != 0 and text in result.output, result.output


def test_settings_reach_the_training(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(experiment, "run_all", lambda jobs, *rest: asked.extend(jobs) or 1 / 0)
    for more in ([], ["--length", 7]):
        with pytest.raises(ZeroDivisionError):
            run("--out", tmp_path, "--seeds", 1, *more)
    default, changed = (job.settings for job in asked)
    assert default == Settings() and changed == Settings(train=TrainConfig(length=7))
    row, data = ROWS["base"], HandMade()
    keys = {stage_key(data, row, 1, settings, 0) for settings in (default, changed)}
    assert len(keys) == 2  # neither goes on from the other's checkpoints


def test_quick_is_a_smaller_world_and_fewer_seeds(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(experiment, "run_all", lambda jobs, *rest: asked.extend(jobs) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run("--quick", "--out", tmp_path, "--world", "rooms=70")
    assert len(asked) == command.QUICK_SEEDS
    sizes = dict(asked[0].source.sizes)
    assert sizes["rooms"] == 70 and sizes["users"] == command.QUICK_WORLD["users"]
    assert asked[0].figures and not asked[1].figures
