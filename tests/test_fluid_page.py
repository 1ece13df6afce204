"""The tables of docs/fluid.md are those of the results beside it, and of five seeds or more."""

import csv
import importlib.util
import re
from pathlib import Path

import pytest

from livrec_fast.systems.fluid.tables import METRICS, TABLES, rows_of

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "docs" / "fluid"


@pytest.fixture(scope="module")
def page():
    spec = importlib.util.spec_from_file_location("fluid_page", ROOT / "scripts" / "fluid_page.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_shows_the_results_beside_it(page):
    text = page.PAGE.read_text()
    assert page.written(text, FOLDER) == text
    emptied = re.sub(r"(<!-- [Tn].*? -->\n).*?(<!-- end -->)", r"\1\2", text, flags=re.DOTALL)
    assert len(emptied) < len(text) - 3000 and page.written(emptied, FOLDER) == text
    blocks = (*TABLES, *(f"{name} large" for name in TABLES), "no match", "too early")
    assert all(f"<!-- {name} -->" in text for name in blocks)


@pytest.mark.parametrize(
    "name", ["world", "world-large", "comment-streams", "world-no-match", "world-too-early"]
)
def test_every_row_has_five_seeds(page, name):
    results = page.read(FOLDER / f"{name}.csv")
    assert len(results) >= 5
    some = {*TABLES["T3"].rows, "replace", "concat", "learnable gate"}
    wanted = some if name == "world-no-match" else set(rows_of(list(TABLES.values())))
    for rows in results.values():
        assert wanted <= rows.keys()
        assert all(set(metrics) == set(METRICS) for metrics in rows.values())


def test_what_is_kept_of_a_run_is_read_again(page, tmp_path):
    keys = [(row, seed) for row in ("base", "-ID") for seed in (1, 0)]
    lines = [
        ["T3", row, "title", 0.7, seed, metric, repr(0.123456789 + seed)]
        for row, seed in keys for metric in ("logloss", "AUC")
    ]  # fmt: skip
    with open(tmp_path / "results.csv", "w", newline="") as file:
        writer = csv.writer(file)
        heads = ["table", "row", "paper's name", "paper's AUC", "seed", "metric", "value"]
        writer.writerows([heads, *lines, *lines])  # a row can be in several tables
    page.keep(tmp_path / "results.csv", tmp_path / "kept.csv")
    assert (tmp_path / "kept.csv").read_text().splitlines()[:3] == [
        "row,seed,metric,value", "base,0,AUC,0.12345679", "base,0,logloss,0.12345679",
    ]  # fmt: skip
    found = page.read(tmp_path / "kept.csv")
    assert {seed: list(rows) for seed, rows in found.items()} == dict.fromkeys(
        (0, 1), ["base", "-ID"]
    )
    assert found[1]["-ID"]["AUC"] == 1.1234568
