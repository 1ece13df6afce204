"""`livrec-fast bench`: time the ops on this machine against whatever else is installed."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table

from .benchmarking import (
    DISAGREES,
    Case,
    Disagreement,
    Machine,
    Options,
    Row,
    find_cases,
    run_case,
)
from .benchmarking._results import add, case_of, floor_ms, milliseconds, remarks

_HERE = Path(__file__).resolve().parents[1] / "benches"


@click.command("bench")
@click.option("--op", "ops", multiple=True, help="Only this op or file stem; may be repeated.")
@click.option(
    "--quick",
    is_flag=True,
    help="A look: a tenth of the rows, float32 only, few rounds, no memory.",
)
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), help="Folder of the results."
)
@click.option("--json", "as_json", is_flag=True, help="Print the rows as JSON, not as tables.")
@click.option("--threads", type=click.IntRange(1), help="Threads of a CPU, for all contestants.")
@click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), help="Default: cuda where there is one."
)
@click.option("--all-isa", is_flag=True, help="Time the lower instruction-set levels, too.")
@click.option("--budget", type=float, help="Seconds of timing per case (10; quick: 0.3).")
@click.option("--minutes", type=float, help="Begin no case later; the cases are spread over all.")
@click.option("--benches", type=click.Path(exists=True, file_okay=False, path_type=Path),
              help="Folder of bench_<stem>.py files (default: the checkout's).")  # fmt: skip
def command(
    ops: tuple[str, ...],
    quick: bool,
    out: Path | None,
    as_json: bool,
    threads: int | None,
    device: str | None,
    all_isa: bool,
    budget: float | None,
    minutes: float | None,
    benches: Path | None,
) -> None:
    """Time the ops against their peers, after asserting that all agree with the reference.

    Results go to benches/results/<device>.json, those of --quick to out/bench/results/, case by
    case. A case that fails stops no other, and a peer that disagrees is not timed; the exit status
    is then 1.
    """
    folder = _benches_folder(benches)
    device = _usable_device(device)
    if threads:
        torch.set_num_threads(threads)
    options = Options(device, quick, all_isa)
    machine = Machine(device)
    cases = list(find_cases(folder, options, ops))
    if not cases:
        raise click.UsageError(
            f"no case for --op {' '.join(ops)}" if ops else f"no cases in {folder}"
        )
    out = out or folder.parent / ("out/bench/results" if quick else "benches/results")
    console = Console(stderr=True)
    chosen = {"budget": budget or (0.3 if quick else 10.0), "memory": not quick}
    rows, failed = _run_all(cases, machine, out, console, minutes, chosen)
    if rows:
        click.echo(json.dumps(rows, indent=1)) if as_json else show(rows, machine, Console())
        path = out / f"{machine.slug}.json"
        console.print(f"written: {path}", highlight=False, soft_wrap=True)
    if failed:
        raise click.ClickException("\n".join(failed))


def _run_all(
    cases: list[Case], machine: Machine, out: Path, console: Console, minutes: float | None,
    chosen: dict[str, Any],
) -> tuple[list[Row], list[str]]:  # fmt: skip
    """Run the cases and write down each; return all rows, and what failed or disagrees."""
    rows: list[Row] = []
    failed: list[str] = []
    end = float("inf")
    if minutes is not None:
        cases, end = spread(cases), time.monotonic() + 60 * minutes
    while cases and time.monotonic() < end:
        case = cases.pop(0)  # what it has kept, to be compared with, goes with it
        console.print(f"{case.title} ...", style="dim", highlight=False)
        try:
            found = run_case(case, machine, **chosen)
        except Disagreement as error:
            failed.append(str(error))
        except Exception as error:
            console.print_exception()
            failed.append(f"{case.title}: {type(error).__name__}: {error}")
        else:
            rows += found
            add(out, machine, found)
            wrong = (row for row in found if row.get("reason", "").startswith(DISAGREES))
            failed += [f"{case.title}: {row['contestant']} {row['reason']}" for row in wrong]
    if cases:
        console.print(f"out of time; cases left out: {len(cases)}", style="yellow")
    return rows, failed


def spread(cases: Sequence[Case]) -> list[Case]:
    """Order cases so that the first few, however many, lie all over: by their numbers' bits."""
    bits = max(1, (len(cases) - 1).bit_length())
    turned = (int(f"{number:0{bits}b}"[::-1], 2) for number in range(2**bits))
    return [cases[number] for number in turned if number < len(cases)]


def _benches_folder(given: Path | None) -> Path:
    for folder in (given, _HERE, Path.cwd() / "benches"):
        if folder is not None and list(folder.glob("bench_*.py")):
            return folder
    raise click.UsageError(
        "the benchmarks are not part of the installed package. Run this in a checkout of the "
        "repository, or point --benches at its folder benches/"
    )


def _usable_device(device: str | None) -> str:
    if device == "cuda" and not torch.cuda.is_available():
        raise click.UsageError("--device cuda: this torch sees no CUDA device")
    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def show(rows: Sequence[Row], machine: Machine, console: Console) -> None:
    """Print a table per op: our time, its share of the floor, others as multiples of it."""
    rates = ", ".join(f"{name} {value:.3g}" for name, value in machine.measured().items())
    console.print(f"{machine.name}, {torch.get_num_threads()} threads; {rates}", highlight=False)
    busy = max((row["others_busy"] or 0.0 for row in rows), default=0.0)
    if busy > 0.05:
        console.print(f"warning: other processes took {busy:.0%} of the cores", style="yellow")
    ops: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        ops[row["op"]].append(row)
    for op, members in ops.items():
        console.print(table(op, members, machine.measured()))
    for name, reason in sorted({(r["contestant"], r["reason"]) for r in rows if "reason" in r}):
        console.print(f"absent: {name}: {reason}", highlight=False, markup=False)


def table(op: str, rows: Sequence[Row], rates: Mapping[str, float]) -> Table:
    """Make the table of one op, a line per case."""
    cases: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in rows:
        cases[case_of(row)].append(row)
    made = Table("case", "ours", "p50 ms", "of floor", "others take", title=op, show_lines=True)
    for (_, label, dtype, direction), members in cases.items():
        best = next((r for r in members if r["kind"] == "ours" and "p50_ms" in r), None)
        others = "\n".join(
            f"{ratio(row, best):>7} {row['contestant']}{remarks(row)}"
            for row in members
            if row is not best
        )
        case = f"{label}\n{dtype}, {direction}"
        if best is None:
            made.add_row(case, "absent", "", "", others)
        else:
            share = floor_ms(best, rates) / best["p50_ms"]
            made.add_row(
                case,
                best["contestant"] + remarks(best),
                milliseconds(best["p50_ms"]),
                f"{share:.0%}",
                others,
            )
    return made


def ratio(row: Row, best: Row | None) -> str:
    """Say how many times the time of `best` a row's contestant takes."""
    if "p50_ms" not in row:
        return "absent"
    return f"{row['p50_ms'] / best['p50_ms']:.2f}x" if best else f"{milliseconds(row['p50_ms'])} ms"
