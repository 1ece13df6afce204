"""`livrec-fast run fluid`: the paper's tables, trained and measured on the data at hand."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import click

from .._terminal import progress, require, show_table

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console

    from .experiment import Job, Tell
    from .speed import Speed
    from .tables import Table

SEEDS, QUICK_SEEDS = 5, 4
SPEED_SECONDS = 10.0  # of timing, at least five rounds
WIDTH = 112  # of the output where it is no terminal
QUICK_WORLD = {
    "users": 1000, "authors": 300, "rooms": 1200, "videos": 2400, "live_events": 60_000, "days": 4,
}  # fmt: skip


@click.command(name="fluid")
@click.option(
    "--data", default="world", show_default=True,
    help="A folder of logs, or 'world': a synthetic one for each seed.",
)  # fmt: skip
@click.option(
    "--table", "names", type=click.Choice(["T3", "T4", "T5", "T7", "all"]), multiple=True,
    default=("T3",), show_default=True, help="Of the paper; can be given several times.",
)  # fmt: skip
@click.option("--seeds", type=click.IntRange(min=1), help=f"How many; {SEEDS} by default.")
@click.option("--quick", is_flag=True, help=f"A small world and {QUICK_SEEDS} seeds.")
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("out/fluid"), show_default=True
)
@click.option(
    "--resume/--fresh", default=True, show_default=True,
    help="Go on from the checkpoints in --out, or train all anew.",
)  # fmt: skip
@click.option("--jobs", type=click.IntRange(min=1), help="Seeds at a time; one per core.")
@click.option(
    "--requests", "most", type=click.IntRange(min=10), help="So many at most, around the split."
)
@click.option(
    "--length", type=click.IntRange(min=1), default=100, show_default=True,
    help="Events of a user's history that are read, the latest.",
)  # fmt: skip
@click.option("--mixing", type=click.Choice(["rsa", "tmhsa"]), default="rsa", show_default=True)
@click.option("--boost", type=click.Choice(["swiglu", "moe"]), default="swiglu", show_default=True)
@click.option(
    "--fade", type=click.Choice(["linear", "dropout"]), default="linear", show_default=True
)
@click.option(
    "--votes", type=click.Choice(["per_level", "path"]), default="per_level", show_default=True,
    help="The rule of the rooms' votes.",
)  # fmt: skip
@click.option(
    "--world", "sizes", multiple=True, metavar="NAME=NUMBER", help="A setting of the world."
)
@click.option("--held-out", is_flag=True, help="Test on the end of what is else trained on.")
@click.option(
    "--match/--no-match", default=True, show_default=True,
    help="Seek the candidate's slice code in the user's history, in the rows that read it.",
)  # fmt: skip
@click.option("--speed", is_flag=True, help="Time the training step instead of training.")
def command(
    data: str, names: tuple[str, ...], seeds: int | None, quick: bool, out: Path, resume: bool,
    jobs: int | None, most: int | None, length: int, mixing: str, boost: str, fade: str,
    votes: str, sizes: tuple[str, ...], held_out: bool, match: bool, speed: bool,
) -> None:  # fmt: skip
    """FLUID: live rooms ranked with the room's id, then by codes of what they show.

    Trains the rows of the paper's tables over several seeds, prints the means and their 95 %
    intervals beside the paper's figures, and says which of the expected orders hold.
    """
    from .config import ModelConfig, TrainConfig
    from .experiment import Job
    from .material import WORLD, Source
    from .tables import chosen, rows_of
    from .training import Settings

    drawing, reading = () if speed else ("matplotlib",), () if data == WORLD else ("pyarrow",)
    require("this run", "run", *drawing, *reading)

    if sizes and data != WORLD:
        raise click.BadParameter(f"--data {data} is no world", param_hint="--world")
    given = (QUICK_WORLD if quick else {}) | _sizes(sizes)
    source = Source(data, tuple(given.items()), most=most, rule=votes, held_out=held_out)
    model = ModelConfig(mixing=mixing, boost=boost, match=match)
    settings = Settings(model, TrainConfig(fade=fade, length=length))
    tables = chosen(names)
    count = seeds or (QUICK_SEEDS if quick else SEEDS)
    workers = min(count, jobs or os.cpu_count() or 1)
    made = [
        Job(source, settings, tuple(rows_of(tables)), seed, out, figures=seed == 0)
        for seed in range(count)
    ]
    begin = time.perf_counter()
    try:
        source.check()
        if speed:
            _time(made[0])
        else:
            _train(made, tables, workers, out, resume)
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from None
    click.echo(f"{time.perf_counter() - begin:.0f} s in all.")


def _train(
    jobs: Sequence[Job], tables: Sequence[Table], workers: int, out: Path, resume: bool
) -> None:
    from . import checkpoints
    from .experiment import run_all
    from .material import Material
    from .plots import write_plots
    from .tables import write_csv

    console = _console()
    stages = out / "stages"
    stages.mkdir(parents=True, exist_ok=True)
    checkpoints.sweep(stages)
    if not resume:
        Material(jobs[0].source, jobs[0].settings, jobs[0].seed)  # or nothing is deleted
        for path in stages.glob("*.safetensors"):
            path.unlink()
    with _bars(console, [job.seed for job in jobs], jobs[0].rows) as tell:
        found = run_all(jobs, workers, tell)
    results = {seed: one["rows"] for seed, one in found.items()}
    _show_data(console, jobs[0].source.data, found[0]["data"])
    for table in tables:
        _show_table(console, table, results)
    write_csv(out / "results.csv", tables, results)
    drawn = write_plots(found[0]["figures"], out)
    files = ", ".join(str(path) for path in (out / "results.csv", *drawn))
    for number, why in found[0]["figures"].get("missing", {}).items():
        console.print(f"Figure {number} is not drawn: {why}.", highlight=False)
    console.print(f"Wrote {files}.", highlight=False, soft_wrap=True)


def _time(job: Job) -> None:
    from .material import Material
    from .speed import compare, lines

    data = Material(job.source, job.settings, job.seed)
    console = _console()
    settings = job.settings
    try:
        found: Speed = compare(data, "fluid", settings.model, settings.train, SPEED_SECONDS)
    except AssertionError as error:
        raise click.ClickException(f"the three ways to train are not the same: {error}") from error
    for heads, *rows in lines(found):
        show_table(console, heads, rows, wrap=True)
        console.print()
    console.print(
        f"{found.threads} threads. The three train one model on the same batches: losses differ by "
        f"at most {found.worst:.1e} of their size. Of a history {settings.train.length:,} events "
        f"at most are read; these requests have {fmean(found.events):,.1f} in the mean, "
        f"{max(found.events):,} at most.",
        highlight=False,
    )


def _console() -> Console:
    """Return a console that is wide enough for the tables where nobody says how wide it is."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=WIDTH)


def _sizes(given: Sequence[str]) -> dict[str, float]:
    made: dict[str, float] = {}
    for text in given:
        name, _, number = text.partition("=")
        try:
            value = float(number)
        except ValueError:
            raise click.BadParameter(f"{text!r} is not NAME=NUMBER", param_hint="--world") from None
        made[name] = int(value) if value.is_integer() else value
    return made


@contextmanager
def _bars(console: Console, seeds: Sequence[int], rows: Sequence[str]) -> Iterator[Tell]:
    """Show a bar per seed."""
    with progress(console, 34) as bars:
        tasks = {seed: bars.add_task(f"seed {seed}: data", total=None) for seed in seeds}

        def tell(seed: int, what: str, number: int) -> None:
            task = tasks[seed]
            if what == "total":
                bars.update(task, total=number, description=f"seed {seed}: {rows[0]}")
            elif what == "steps":
                bars.advance(task, number)
            else:
                done = number + 1 == len(rows)
                row = "done" if done else rows[number + 1]
                bars.update(task, description=f"seed {seed}: {row}")

        yield tell


def _show_data(console: Console, source: str, facts: dict[str, Any]) -> None:
    """Say what the first seed's data are."""
    said = (
        f"{name}: {value:,}" if isinstance(value, int) else f"{name}: {value:.1%}"
        for name, value in facts.items()
    )
    console.print(f"Data (seed 0): {source}. {'; '.join(said)}.", highlight=False)


def _show_table(console: Console, table: Table, results: Any) -> None:
    from .tables import MARGIN, lines, shown, verdicts

    console.print()
    console.print(f"[bold]{table.title}[/bold], {len(results)} seeds, mean ± 95 % interval")
    heads, *rows = lines(table, results)
    show_table(console, heads, rows, wrap=True)
    for order, verdict, gap in verdicts(table, results):
        colour = {"holds": "green", "reversed": "red"}.get(verdict, "yellow")
        console.print(
            f"  {order}: [{colour}]{verdict}[/{colour}] (difference {shown(gap)})", highlight=False
        )
    if any(order.relation != "<" for order in table.orders):
        console.print(f"  '<=' and '~' allow for {MARGIN}.", highlight=False)
