"""The paper's tables beside what was measured: T3, T4, T5 and T7."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..._files import replacing
from .evaluation import VIEWS
from .statistics import Estimate, Order, estimate, judge

METRICS = (
    "AUC", "logloss", "GAUC", "AUC new rooms", "AUC older rooms", "AUC like", "AUC long", *VIEWS
)  # fmt: skip
_SHOWN = ("AUC", "logloss", "AUC new rooms", "AUC older rooms")
MARGIN = 0.001  # of AUC, within which rows count as equal; the paper's largest gain is 0.0018

Results = Mapping[int, Mapping[str, Mapping[str, float]]]  # by seed and row, the metrics


@dataclass(frozen=True)
class Table:
    """One of the paper's tables.

    rows: by name, what the paper calls it, its AUC and, where it has one, its logloss. changes: of
    metrics other than the AUC, the paper's changes from the base, by metric and row; where there
    are any, the table is of these.
    """

    name: str
    title: str
    rows: Mapping[str, tuple[str, float, float | None]]
    orders: tuple[Order, ...]
    changes: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


_T3 = {
    "base": ("baseline (with item ID)", 0.7784, 0.1264),
    "+slice": ("baseline + slice codes", 0.7801, 0.1263),
    "-ID": ("baseline w/o item ID", 0.7748, 0.1273),
    "FLUID": ("w/o item ID, slice & room codes", 0.7802, 0.1262),
}
_T4 = {
    metric: dict(zip(("+slice", "-ID", "FLUID"), changes, strict=True))
    for metric, changes in (
        ("quality watch seconds", ("+0.43", "-0.02", "+0.55")),
        ("quality watch sessions", ("+0.39", "-0.10", "+0.51")),
        ("cold-start room views", ("+1.15", "+1.58", "+2.05")),
        ("niche room views", ("+0.69", "+2.23", "+2.87")),
        ("unique tags", ("+0.55", "+0.20", "+1.63")),
        ("stay seconds", ("n.s.", "-0.05", "+0.07")),
    )
}
_EXPLORING = ("cold-start room views", "niche room views")  # where -ID is ahead of +slice


TABLES = {
    table.name: table
    for table in (
        Table(
            "T3",
            "Model performance on clicks (the paper's table 3)",
            _T3,
            (
                Order("-ID", "<", "base"),
                Order("base", "<", "+slice"),
                Order("+slice", "<=", "FLUID"),
                Order("base", "<", "FLUID"),
            ),
        ),
        Table(
            "T4",
            "What would be shown first, change in % (for the paper's table 4, an online test)",
            _T3,
            tuple(
                Order(left, "<", right, metric)
                for metric in _T4
                for left, right in (
                    ("+slice", "-ID") if metric in _EXPLORING else ("-ID", "+slice"),
                    ("+slice", "FLUID"),
                    ("-ID", "FLUID"),
                )
            ),
            _T4,
        ),
        Table(
            "T5",
            "Embedding of codes (the paper's table 5)",
            {
                "base": ("baseline (item ID only)", 0.7784, None),
                "level-wise": ("level-wise, separate tables", 0.7793, None),
                "shared": ("prefix n-grams, shared table", 0.7798, None),
                "FLUID": ("prefix n-grams, separate tables", 0.7802, None),
            },
            (
                Order("base", "<", "level-wise"),
                Order("level-wise", "<", "shared"),
                Order("shared", "<", "FLUID"),
                Order("level-wise", "<", "FLUID"),
            ),
        ),
        Table(
            "T7 fusion",
            "Fusion of id and slice codes (the paper's table 7, upper half)",
            {
                "base": ("baseline (item ID only)", 0.7784, None),
                "replace": ("early: replace", 0.7774, None),
                "concat": ("early: concat", 0.7785, None),
                "learnable gate": ("early: learnable gate", 0.7783, None),
                "feature gate": ("early: feature gate", 0.7785, None),
                "EM3": ("late: EM3 alignment", 0.7785, None),
                "+slice": ("late: independent token", 0.7801, None),
            },
            (
                Order("replace", "<", "base"),
                Order("base", "~", "concat"),
                Order("base", "~", "learnable gate"),
                Order("base", "~", "feature gate"),
                Order("base", "~", "EM3"),
                Order("concat", "<", "+slice"),
                Order("learnable gate", "<", "+slice"),
                Order("feature gate", "<", "+slice"),
                Order("EM3", "<", "+slice"),
            ),
        ),
        Table(
            "T7 recipe",
            "Training recipe (the paper's table 7, lower half)",
            {
                "base": ("baseline (item ID only)", 0.7784, None),
                "replace": ("early: replace", 0.7774, None),
                "naive joint": ("naive: joint, from scratch", 0.7784, None),
                "+slice": ("stage 1: slice add-on", 0.7801, None),
                "stage 2": ("stage 2: ID phase-out", 0.7793, None),
                "FLUID": ("stage 3: room add-on", 0.7802, None),
                "ID added back": ("ID added back (no gain)", 0.7802, None),
            },
            (
                Order("naive joint", "~", "base"),
                Order("stage 2", "<", "+slice"),
                Order("+slice", "<=", "FLUID"),
                Order("stage 2", "<", "FLUID"),
                Order("replace", "<", "stage 2"),
                Order("ID added back", "<=", "FLUID"),
            ),
        ),
    )
}


def chosen(names: Sequence[str]) -> list[Table]:
    """Return the tables that are asked for; "T7" is both its halves, "all" is all."""
    return [t for t in TABLES.values() if "all" in names or t.name.split()[0] in names]


def rows_of(tables: Sequence[Table]) -> list[str]:
    """Return the rows that tables need, each once."""
    return list(dict.fromkeys(name for table in tables for name in table.rows))


def over_seeds(results: Results, row: str, metric: str) -> list[float]:
    """Return a row's metric, seed by seed."""
    return [results[seed][row][metric] for seed in sorted(results)]


def estimates(table: Table, results: Results) -> dict[str, dict[str, Estimate]]:
    """Return the mean and interval of each metric of each row."""
    return {
        row: {metric: estimate(over_seeds(results, row, metric)) for metric in METRICS}
        for row in table.rows
    }


def verdicts(table: Table, results: Results) -> list[tuple[str, str, Estimate]]:
    """Return each expected order, what became of it, and the difference, paired by seed."""
    said = []
    for order in table.orders:
        left, right = (over_seeds(results, row, order.metric) for row in (order.left, order.right))
        gap = estimate([b - a for a, b in zip(left, right, strict=True)])
        said.append((str(order), judge(order, left, right, MARGIN), gap))
        if table.name == "T3":
            left, right = (over_seeds(results, r, "logloss") for r in (order.right, order.left))
            gap = estimate([b - a for a, b in zip(left, right, strict=True)])
            flipped = Order(order.right, order.relation, order.left)
            verdict = judge(flipped, left, right, MARGIN)
            said.append((f"logloss: {flipped}", verdict, gap))
    return said


def lines(table: Table, results: Results) -> list[list[str]]:
    """Return a table as text: heads first; the paper's figures, the means and the gains.

    The gain over the base is in percent of the base's AUC, paired by seed, as is the paper's. The
    last two are AUC on rooms that had no event before the split, and on the others.
    """
    if table.changes:
        return _changes(table, results)
    found = estimates(table, results)
    base, of_paper = over_seeds(results, "base", "AUC"), table.rows["base"][1]
    made = [["row", "paper", "gain", "AUC", "gain, %", "logloss", "new rooms", "older"]]
    for row, (title, auc, _) in table.rows.items():
        own = over_seeds(results, row, "AUC")
        gains = estimate([100 * (a - b) / b for a, b in zip(own, base, strict=True)])
        values = [found[row][name] for name in _SHOWN]
        made.append(
            [
                title, _short(auc, 4), f"{100 * (auc - of_paper) / of_paper:+.2f}",
                shown(values[0]), f"{gains.mean:+.2f}±{gains.half:.2f}", *map(shown, values[1:]),
            ]
        )  # fmt: skip
    return made


def _changes(table: Table, results: Results) -> list[list[str]]:
    """Return the changes from the base, in percent and paired by seed, beside the paper's."""
    arms = [row for row in table.rows if row != "base"]
    made = [["metric", *(head for row in arms for head in (row, "paper"))]]
    for metric, of_paper in table.changes.items():
        base, cells = over_seeds(results, "base", metric), [metric]
        for row in arms:
            own = over_seeds(results, row, metric)
            nothing = float("nan")  # is 0 changed by, in percent
            change = estimate(
                [100 * (a - b) / b if b else nothing for a, b in zip(own, base, strict=True)]
            )
            cells += [f"{change.mean:+.2f}±{change.half:.2f}", of_paper[row]]
        made.append(cells)
    return made


def shown(value: Estimate, digits: int = 4) -> str:
    """Write a mean and its interval, without the zeros before the point."""
    return f"{_short(value.mean, digits)}±{_short(value.half, digits)}"


def _short(number: float, digits: int) -> str:
    text = f"{number:.{digits}f}"
    return text.replace("0.", ".", 1) if abs(number) < 1 else text


def write_csv(path: Path, tables: Sequence[Table], results: Results) -> None:
    """Write a line per table, row, metric and seed."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["table", "row", "paper's name", "paper's AUC", "seed", "metric", "value"])
    for table in tables:
        for row, (title, auc, _) in table.rows.items():
            for seed in sorted(results):
                for metric in METRICS:
                    value = results[seed][row][metric]
                    writer.writerow([table.name, row, title, auc, seed, metric, repr(value)])
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(text.getvalue().encode())
