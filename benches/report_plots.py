"""Pictures of benchmark results: bars per case, and time over the length of histories."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from livrec_fast.benchmarking import floor_ms, milliseconds

Row = dict[str, Any]
COLOURS = {"ours": "#1b6ca8", "reference": "#9aa5b1", "peer": "#d9a441", "floor": "#5f6b76"}


def first_of_ours(members: Sequence[Row]) -> Row | None:
    """Return the row that stands for the library, the first of ours that ran."""
    return next((r for r in members if r["kind"] == "ours" and "p50_ms" in r), None)


def plot(op: str, cases: dict[str, list[Row]], machine: dict[str, Any], path: Path) -> None:
    """Draw one op: a panel per case, a bar per contestant, whiskers from p20 to p80."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ran = {case: [r for r in rows if "p50_ms" in r] for case, rows in cases.items()}
    ran = {case: rows for case, rows in ran.items() if rows}
    heights = [len(rows) + 1.5 for rows in ran.values()]
    figure, axes = pyplot.subplots(
        len(ran), 1, figsize=(8, 0.32 * sum(heights) + 0.8), squeeze=False, layout="constrained",
        gridspec_kw={"height_ratios": heights},
    )  # fmt: skip
    for axis, (case, rows) in zip(axes[:, 0], ran.items(), strict=True):
        panel(axis, case, rows, machine)
    figure.suptitle(f"{op} on {machine['device']}", fontsize=11)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def panel(axis: Any, case: str, rows: Sequence[Row], machine: dict[str, Any]) -> None:
    """Draw one case."""
    best = first_of_ours(rows)
    middle = [row["p50_ms"] for row in rows]
    low = [row["p50_ms"] - row["p20_ms"] for row in rows]
    high = [row["p80_ms"] - row["p50_ms"] for row in rows]
    colours = [COLOURS[row["kind"]] for row in rows]
    axis.barh(
        range(len(rows)), middle, xerr=(low, high), color=colours, ecolor="#333333", capsize=2
    )
    edge = 1.02 * max(row["p80_ms"] for row in rows)
    for y, row in enumerate(rows):
        times = f" ({row['p50_ms'] / best['p50_ms']:.2f}x)" if best and row is not best else ""
        axis.text(edge, y, f"{milliseconds(row['p50_ms'])} ms{times}", va="center", fontsize=8)
    axis.axvline(floor_ms(rows[0], machine), color="#b03a2e", linestyle="--", linewidth=1)
    axis.set_yticks(range(len(rows)), [row["contestant"] for row in rows], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.3 * edge)
    axis.tick_params(axis="x", labelsize=8)
    axis.set_title(f"{case}   (ms; dashed: the machine's floor)", fontsize=9, loc="left")
    axis.spines[["top", "right"]].set_visible(False)


def by_length(rows: Sequence[Row]) -> dict[str, dict[str, list[Row]]]:
    """Return by op, then by shape, the rows of cases that differ in T alone, at three at least."""
    shapes: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        if row["sizes"].get("T") and "p50_ms" in row:
            rest = [f"{k} {v}" for k, v in row["sizes"].items() if k not in ("T", "levels")]
            shape = ", ".join([row["direction"], *rest, row["dtype"]])
            shapes[row["op"], shape].append(row)
    ops: dict[str, dict[str, list[Row]]] = defaultdict(dict)
    for (op, shape), members in shapes.items():
        if len({row["sizes"]["T"] for row in members}) >= 3:
            ops[op][shape] = members
    return ops


def quickest_by_length(rows: Sequence[Row]) -> dict[str, dict[int, Row]]:
    """Return by sort of contestant, of which peers that compile are one, the quickest at each T."""
    found: dict[str, dict[int, Row]] = defaultdict(dict)
    for row in rows:
        compiled = "compile" in row["contestant"] or "Flex" in row["contestant"]
        sort = "peer, compiled" if row["kind"] == "peer" and compiled else row["kind"]
        length = row["sizes"]["T"]
        found[sort][length] = min(row, found[sort].get(length, row), key=lambda r: r["p50_ms"])
    return found


def plot_lengths(
    op: str, series: dict[str, list[Row]], machine: dict[str, Any], path: Path
) -> None:
    """Draw time over T, both logarithmic: a panel per shape, a line per sort of contestant."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(series), figsize=(5 * len(series), 4.2), squeeze=False, layout="constrained"
    )
    for axis, (shape, rows) in zip(axes[0], series.items(), strict=True):
        for sort, found in quickest_by_length(rows).items():
            lengths = sorted(found)
            names = sorted({found[length]["contestant"] for length in lengths})
            axis.plot(
                lengths, [found[length]["p50_ms"] for length in lengths], marker="o",
                color=COLOURS[sort.split(",")[0]], linestyle="--" if "," in sort else "-",
                label=" or ".join(names),
            )  # fmt: skip
        axis.set(xscale="log", yscale="log", xlabel="T, items of a history", ylabel="ms (p50)")
        axis.set_title(shape, fontsize=9, loc="left")
        axis.legend(fontsize=7, frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{op} on {machine['device']}", fontsize=11)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
