"""Write the tables of docs/fluid.md by the results of runs, and keep these beside the page.

    python scripts/fluid_page.py world=out/world/results.csv comment-streams=out/s/results.csv

Each argument names a file of docs/fluid and the `results.csv` of a run that it is to hold; without
arguments the tables are written by the files that are there. A table stands between comments in the
page, such as `<!-- T5 -->` and `<!-- end -->`; what is around them is written by hand.
"""

from __future__ import annotations

import csv
import math
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from livrec_fast.systems.fluid.evaluation import VIEWS
from livrec_fast.systems.fluid.statistics import Estimate, estimate
from livrec_fast.systems.fluid.tables import METRICS, TABLES, Results, Table, over_seeds, verdicts

PAGE = Path(__file__).parent.parent / "docs" / "fluid.md"
FILES = {  # of docs/fluid: the runs, by the names that the page has for them
    "world": "world", "streams": "comment-streams", "no-match": "world-no-match",
    "too early": "world-too-early", "large world": "world-large",
}  # fmt: skip
_BLOCK = re.compile(r"(<!-- (T\w+(?: \w+)*|no match|too early) -->\n).*?(<!-- end -->)", re.DOTALL)
_BOTH, _LARGE = ["world", "streams"], ["large world"]


def keep(source: Path, target: Path) -> None:
    """Write a run's results without what the page does not need: a line per row, seed, metric."""
    found = {}
    with open(source, newline="") as file:
        for line in csv.DictReader(file):
            value = float(line["value"])
            found[line["row"], int(line["seed"]), METRICS.index(line["metric"])] = f"{value:.8g}"
    with open(target, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["row", "seed", "metric", "value"])
        order = list(dict.fromkeys(row for row, _, _ in found))
        for row, seed, metric in sorted(found, key=lambda key: (key[1], order.index(key[0]), key)):
            writer.writerow([row, seed, METRICS[metric], found[row, seed, metric]])


def read(source: Path) -> Results:
    """Read what `keep` wrote."""
    found: dict[int, dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    with open(source, newline="") as file:
        for line in csv.DictReader(file):
            found[int(line["seed"])][line["row"]][line["metric"]] = float(line["value"])
    return found


def with_rows(results: Results, rows: Sequence[str]) -> Results:
    """Return the seeds that have all of these rows."""
    return {seed: of for seed, of in results.items() if all(row in of for row in rows)}


def gains(results: Results, row: str, metric: str = "AUC") -> Estimate:
    """Return by how many percent of the base's a row's metric is greater, paired by seed."""
    pairs = zip(*(over_seeds(results, name, metric) for name in (row, "base")), strict=True)
    return estimate([100 * (own - base) / base if base else math.nan for own, base in pairs])


def grid(heads: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Return a table in Markdown, its first columns to the left."""
    rule = ["---"] * left + ["---:"] * (len(heads) - left)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (heads, rule, *rows))


def pm(found: Estimate, digits: int = 2) -> str:
    """Write a mean and half its interval."""
    if math.isnan(found.mean):
        return "not known"
    return f"{found.mean:+.{digits}f} ± {found.half:.{digits}f}"


def short(value: float) -> str:
    """Write an AUC without the zero before the point."""
    return f"{value:.4f}".removeprefix("0")


def values(table: Table, runs: Mapping[str, Results]) -> str:
    """Return the rows of a table, of each run side by side."""
    heads, of_paper = ["row", "paper's AUC", "gain"], table.rows["base"][1]
    for name in runs:
        heads += [f"{name}: AUC", "gain", "gain, new rooms", "logloss"]
    rows = []
    for row, (title, auc, _) in table.rows.items():
        cells = [title, short(auc), f"{100 * (auc - of_paper) / of_paper:+.2f}"]
        for results in runs.values():
            means = [estimate(over_seeds(results, row, m)).mean for m in ("AUC", "logloss")]
            own = [pm(gains(results, row, metric)) for metric in ("AUC", "AUC new rooms")]
            cells += [short(means[0]), *(own if row != "base" else ["", ""]), short(means[1])]
        rows.append(cells)
    seeds = "; ".join(f"{name}, {len(results)} seeds" for name, results in runs.items())
    return f"{seeds[0].upper()}{seeds[1:]}.\n\n{grid(heads, rows)}"


def orders(table: Table, runs: Mapping[str, Results]) -> str:
    """Return what became of the orders expected, in each run."""
    heads = ["order expected", *(head for name in runs for head in (name, "difference"))]
    found = [verdicts(table, results) for results in runs.values()]
    rows = []
    for same in zip(*found, strict=True):
        cells = [same[0][0]]
        for _, verdict, gap in same:
            cells += [f"**{verdict}**" if verdict == "reversed" else verdict, pm(gap, 4)]
        rows.append(cells)
    return grid(heads, rows)


def shown_first(runs: Mapping[str, Results]) -> str:
    """Return table 4: the changes of what would be shown first, and how many orders hold."""
    table, arms = TABLES["T4"], ("+slice", "-ID", "FLUID")
    heads = ["change in %", "paper: +slice, -ID, FLUID"]
    heads += [f"{name}: {arm}" if arm == arms[0] else arm for name in runs for arm in arms]
    rows = []
    for metric in VIEWS:
        paper = ", ".join(table.changes[metric][arm] for arm in arms)
        changes = [pm(gains(results, arm, metric)) for results in runs.values() for arm in arms]
        rows.append([metric, paper, *changes])
    text = grid(heads, rows, left=2)
    for name, results in runs.items():
        said = [v for _, v, gap in verdicts(table, results) if not math.isnan(gap.mean)]
        count = Counter(said)
        text += (
            f"\n{name.capitalize()}, of {len(said)} orders that are known: "
            f"{count['holds']} hold, {count['reversed']} are reversed, {count['undecided']} are "
            "undecided.\n"
        )
    return text


def without_match(without: Results, world: Results) -> str:
    """Return the gains of rows without the match, beside those with it."""
    rows = [row for row in next(iter(without.values())) if row not in ("base", "-ID")]
    cells = []
    for row in ("-ID", *rows):
        metrics = [gains(without, row), gains(without, row, "AUC new rooms"), gains(world, row)]
        cells.append([row, *map(pm, metrics)])
    text = grid(["row", "without the match", "new rooms", "with it"], cells)
    return f"World, {len(without)} seeds without, {len(world)} with it.\n\n{text}"


def too_early(before: Results, now: Results) -> str:
    """Return table 3 with labels learned from before they were known, and as it is now."""
    rows = []
    for row in TABLES["T3"].rows:
        cells = [row]
        for results in (before, now):
            cells += [
                short(estimate(over_seeds(results, row, "AUC")).mean),
                pm(gains(results, row)),
            ]
        pairs = zip(*(over_seeds(results, row, "AUC") for results in (before, now)), strict=True)
        rows.append([*cells, pm(estimate([new - old for old, new in pairs]), 4)])
    heads = ["row", "too early: AUC", "gain", "when known: AUC", "gain", "change of the AUC"]
    return grid(heads, rows)


def block(name: str, runs: Mapping[str, Results]) -> str:
    """Return what stands between two comments of the page."""
    if name == "no match":
        rows = next(iter(runs["no-match"].values()))
        return without_match(runs["no-match"], with_rows(runs["world"], list(rows)))
    if name == "too early":
        return too_early(runs["too early"], runs["world"])
    which_runs = _LARGE if name.endswith(" large") else _BOTH
    table = TABLES[name.removesuffix(" large")]
    chosen = {which: with_rows(runs[which], list(table.rows)) for which in which_runs}
    if table is TABLES["T4"]:
        return shown_first(chosen)
    return f"{values(table, chosen)}\n{orders(table, chosen)}"


def written(page: str, folder: Path) -> str:
    """Return the page with its tables by the files of a folder."""
    there = {name: folder / f"{file}.csv" for name, file in FILES.items()}
    runs = {name: read(path) for name, path in there.items() if path.exists()}
    return _BLOCK.sub(lambda found: found[1] + block(found[2], runs) + found[3], page)


def main(given: Sequence[str]) -> None:
    """Take in runs' results and write the page."""
    folder = PAGE.with_suffix("")
    for text in given:
        name, _, source = text.partition("=")
        if name not in FILES.values() or not source:
            raise SystemExit(f"{text!r}: must be NAME=FILE, NAME of {', '.join(FILES.values())}")
        keep(Path(source), folder / f"{name}.csv")
    PAGE.write_text(written(PAGE.read_text(), folder))


if __name__ == "__main__":
    main(sys.argv[1:])
