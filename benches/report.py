"""Tables and pictures of benches/results/*.json: `python benches/report.py [--into README.md]`.

Writes out/bench/report.md, and per machine and op a bar plot, PNG and SVG, and one of time over the
length of histories where cases differ in nothing else. With --into, a summary takes the place of
what stands between the markers in that file, and the full tables go into the README.md of the
results' folder, to which the summary points.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run as a script, of which Python knows the folder alone

from benches.report_plots import Row, by_length, first_of_ours, plot, plot_lengths  # noqa: E402
from livrec_fast.benchmarking import floor_ms, milliseconds, remarks  # noqa: E402

BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
HEADING = """# Results

Every case and contestant, as `python benches/report.py` writes them from the files beside this one.
In brackets: what a contestant chose by trial (the size of its blocks of rows, the way it adds), and
of a fit the mean squared error that it ended at, all computed alike in float64.

While contestants take turns, memory that one frees stays with the process, so that page faults of
large results are not timed. "As the system gives memory" are the ratios of medians without that:
torch leaves memory to the C library, which returns large blocks to the system, so that who
allocates more pays for more page faults in every step.

On a CPU each timed run follows 5 ms of its own kind, or one run that took longer; it is the first
if it takes more than 0.1 s. Cases whose runs
take seconds have few: the one that was held to agree, and more only of who is quick; they have no
second ratio. Cases timed otherwise, before that was so, are named below their table.
"""
_KEEPING = ("108dd6adf0", "b687bd7007")  # commits before freed memory stayed with the process
_FOLLOWING = (*_KEEPING, "c4f2072c8e", "7f6f4bbfaa", "cf3c11a789", "11d516c4b6")
_ONE_BEFORE = ("b8e25b663b", "5c707057f7", "1fb977c189", "677763cfab")
EARLIER = {  # commits, and the milliseconds below which a run was timed otherwise
    "each contestant pays for its own page faults": (_KEEPING, math.inf),
    "a timed run follows another contestant's": (_FOLLOWING, math.inf),
    "a timed run of less than 5 ms follows just one of its own": (_ONE_BEFORE, 5.0),
}
COLUMNS = ("op", "case", "contestant", "p50 ms (p20 to p80)", "of floor", "GB/s", "TFLOP/s",
           "extra MB", "time, ours = 1", "as the system gives memory")  # fmt: skip
_FOLDER = click.Path(file_okay=False, path_type=Path)


@click.command()
@click.option("--results", type=_FOLDER, default=ROOT / "benches/results", help="Folder to read.")
@click.option("--out", type=_FOLDER, default=ROOT / "out/bench", help="Folder to write.")
@click.option("--into", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help=f"File whose text between {BEGIN} and {END} becomes the table.")  # fmt: skip
def main(results: Path, out: Path, into: Path | None) -> None:
    """Write the report of all results."""
    files = sorted(results.glob("*.json"))
    if not files:
        raise click.UsageError(f"--results: no *.json in {results}")
    out.mkdir(parents=True, exist_ok=True)
    sections, summaries = [], []
    for file in files:
        held = json.loads(file.read_text())
        sections.append(section(held["machine"], held["rows"]))
        summaries.append(summary(held["machine"], held["rows"]))
        for op, cases in grouped(held["rows"]).items():
            for suffix in ("png", "svg"):
                plot(op, cases, held["machine"], out / f"{file.stem}-{op}.{suffix}")
        for op, series in by_length(held["rows"]).items():
            for suffix in ("png", "svg"):
                plot_lengths(op, series, held["machine"], out / f"{file.stem}-{op}-T.{suffix}")
    full = "\n".join(sections)
    (out / "report.md").write_text(full)
    if into is not None:
        into.write_text(replaced(into.read_text(), "\n".join(summaries) + pointer(results, into)))
        (results / "README.md").write_text(f"{HEADING}\n{full}")
    click.echo(f"written: {out}")


def grouped(rows: Sequence[Row]) -> dict[str, dict[str, list[Row]]]:
    """Return the rows by op, then by case."""
    ops: dict[str, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        case = f"{row['label']}, {row['dtype']}"
        case += "" if row["direction"] == "forward" else f", {row['direction']}"
        ops[row["op"]][case].append(row)
    return ops


def section(machine: dict[str, Any], rows: Sequence[Row]) -> str:
    """Write one machine's Markdown: what it is, then a table of all its cases."""
    lines = [f"**{machine['device']}**: {', '.join(facts(machine, rows))}.", ""]
    lines += [f"| {' | '.join(COLUMNS)} |", "|---|---|---|--:|--:|--:|--:|--:|--:|--:|"]
    for op, cases in grouped(rows).items():
        for case, members in cases.items():
            lines += [f"| {cells} |" for cells in table_lines(op, case, members, machine)]
    reasons = sorted({f"{row['contestant']}: {row['reason']}" for row in rows if "reason" in row})
    lines += ["", *(f"- absent: {reason}" for reason in reasons), *earlier(rows)]
    lines += [
        "- of floor: above 100% where a kernel outruns the library that measured the rate",
        "",
    ]
    return "\n".join(lines)


def summary(machine: dict[str, Any], rows: Sequence[Row]) -> str:
    """Write one machine's Markdown in a line per op and shape, at its least flattering size.

    Of the numbers of rows that a shape was timed at, it is the one where another comes nearest.
    """
    lines = [f"**{machine['device']}**: {', '.join(facts(machine, rows))}.", ""]
    lines += [
        "| op | case | ours, ms | best other, ours = 1 | as the system gives memory "
        "| torch eager | extra MB, ours and its |"
    ]
    lines += ["|---|---|--:|---|--:|--:|---|"]
    nearest: dict[str, tuple[float, str]] = {}
    for op, cases in grouped(rows).items():
        for case, members in cases.items():
            ran = [row for row in members if "p50_ms" in row]
            best = first_of_ours(ran)
            others = [row for row in ran if row["kind"] not in ("ours", "floor")]
            if best is None or not others:
                continue
            rival = min(others, key=lambda row: row["p50_ms"])
            ratio = rival["p50_ms"] / best["p50_ms"]
            shape = {name: size for name, size in best["sizes"].items() if name != "M"}
            key = json.dumps([op, best["dtype"], best["direction"], shape or case])
            line = summary_line(op, case, best, rival, others)
            nearest[key] = min(nearest.get(key, (ratio, line)), (ratio, line))
    return "\n".join([*lines, *(line for _, line in nearest.values()), "", *earlier(rows)])


def earlier(rows: Sequence[Row]) -> Iterator[str]:
    """Yield a line for each way in which cases were once timed, with the ops that have such."""
    for way, (commits, below) in EARLIER.items():
        timed = (
            row for row in rows if row["commit"] in commits and row.get("p50_ms", below) < below
        )
        if ops := sorted({row["op"] for row in timed}):
            yield f"- {way} in cases of: {', '.join(f'`{op}`' for op in ops)}"


def fresh_ratio(row: Row, best: Row | None) -> str:
    """Write a time as a multiple of ours, both with memory as the system gives it."""
    times = [(one or {}).get("fresh_p50_ms") for one in (row, best)]
    return f"{times[0] / times[1]:.2f}" if all(times) else ""


def summary_line(op: str, case: str, best: Row, rival: Row, others: Sequence[Row]) -> str:
    """Write one line: our time, the best other's and eager torch's as multiples, and memory."""
    eager = [r["p50_ms"] for r in others if r["contestant"].startswith("torch eager")]
    memory = ", ".join(
        f"{row['extra_bytes'] / 1e6:.1f}" for row in (best, rival) if row["extra_bytes"] is not None
    )
    cells = [
        f"`{op}`", case, milliseconds(best["p50_ms"]),
        f"{rival['contestant']} {rival['p50_ms'] / best['p50_ms']:.1f}",
        fresh_ratio(rival, best), f"{min(eager) / best['p50_ms']:.1f}" if eager else "", memory,
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def pointer(results: Path, into: Path) -> str:
    """Say where the full tables are, seen from the file that the summary is in."""
    return (
        "\nEach shape at the number of rows where another comes nearest; "
        f"[all sizes and contestants]({os.path.relpath(results / 'README.md', into.parent)}).\n"
    )


def facts(machine: dict[str, Any], rows: Sequence[Row]) -> Iterator[str]:
    """Say what the numbers depend on."""
    if not str(machine["cuda"] or ""):
        yield f"{machine['threads']} threads, {machine['isa'] or 'no compiled library'}"
    yield f"torch {machine['torch']}, triton {machine['triton']}"
    for name, value in machine.items():
        if name == "copy_gb_s":
            yield f"copies {value:.3g} GB/s"
        elif name.startswith("matmul_"):
            yield f"multiplies {value:.3g} TFLOP/s in {name.split('_')[1]}"
    busy = max(row["others_busy"] or 0.0 for row in rows)
    if busy > 0.05:
        yield f"DISTURBED: other processes took {busy:.0%} of the cores, so do not quote these"
    commits = sorted({row["commit"] or "unknown" for row in rows})
    yield f"commit {', '.join(commits)}"


def table_lines(
    op: str, case: str, members: Sequence[Row], machine: dict[str, Any]
) -> Iterator[str]:
    """Yield the cells of one case's rows; the first of ours is what ratios are taken to."""
    best = first_of_ours(members)
    for number, row in enumerate(members):
        head = [f"`{op}`", case] if number == 0 else ["", ""]
        if "p50_ms" not in row:
            yield " | ".join([*head, row["contestant"], "absent", *[""] * 6])
            continue
        extra = "" if row["extra_bytes"] is None else f"{row['extra_bytes'] / 1e6:.1f}"
        yield " | ".join([
            *head, row["contestant"] + remarks(row),
            "{} ({} to {})".format(*(milliseconds(row[f"p{p}_ms"]) for p in (50, 20, 80))),
            f"{floor_ms(row, machine) / row['p50_ms']:.0%}",
            f"{row['gb_s']:.3g}", f"{row['tflop_s']:.3g}", extra,
            f"{row['p50_ms'] / best['p50_ms']:.2f}" if best else "", fresh_ratio(row, best),
        ])  # fmt: skip


def replaced(text: str, table: str) -> str:
    """Put `table` between the markers of `text`."""
    if BEGIN not in text or END not in text:
        raise click.UsageError(f"--into: the file needs a line {BEGIN} and a line {END}")
    before, rest = text.split(BEGIN, 1)
    return f"{before}{BEGIN}\n\n{table}\n{END}{rest.split(END, 1)[1]}"


if __name__ == "__main__":
    main()
