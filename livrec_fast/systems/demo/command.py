"""`livrec-fast demo`: fetch the data, run, show, and write the report."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click
import torch

from ...data.wheels import DataError, default_cache
from .._terminal import progress, require, show_table

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

    from .pipeline import Results

STEPS, QUICK_STEPS = 800, 100
TEST_BLOCKS, QUICK_TEST_BLOCKS = 4000, 800
COLUMNS = 7  # of a table, in the terminal; the report has all


@click.command(name="demo")
@click.option("--quick", is_flag=True, help="Fewer steps: a look in two minutes instead of eight.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("out/demo"), show_default=True)
@click.option("--cache", type=click.Path(path_type=Path), help="Where downloads are kept.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--device", help="Torch device; a GPU where there is one.")
@click.option("--steps", type=click.IntRange(min=5), help=f"Training steps; {STEPS} by default.")
def command(
    quick: bool, out: Path, cache: Path | None, seed: int, device: str | None, steps: int | None
) -> None:
    """Codes, retrieval and ranking on MovieLens-1M: by the reference, then by the fast kernels.

    Downloads 33 MB the first time. Fails with exit code 1 where the two runs disagree.
    """
    require("the demo", "demo", "matplotlib", "pyarrow", "tokenizers")
    begin = time.perf_counter()
    chosen = _device(device)
    try:
        holds = _run(quick, out, cache or default_cache(), seed, chosen, steps)
    except DataError as error:
        raise click.ClickException(str(error)) from None
    except AssertionError as error:
        raise click.ClickException(f"the backends disagree on the codes: {error}") from error
    click.echo(f"{time.perf_counter() - begin:.0f} s in all. Report: {out / 'report.html'}")
    if not holds:
        raise click.ClickException("the two runs disagree: see the report")


def _run(
    quick: bool, out: Path, cache: Path, seed: int, device: torch.device, steps: int | None
) -> bool:
    from rich.console import Console

    from ...data import movielens, word_vectors
    from .pipeline import Settings, run
    from .report import write_report

    console = Console()
    settings = Settings(
        steps=steps or (QUICK_STEPS if quick else STEPS),
        test_blocks=QUICK_TEST_BLOCKS if quick else TEST_BLOCKS,
        seed=seed,
        device=device,
    )
    with progress(console, 22) as bars:
        advance = _stage(bars, "data", 2)
        ratings = movielens.load(cache)
        advance(1)
        words = word_vectors.load(cache)
        advance(1)
        results = run(ratings, words, settings, lambda name, total: _stage(bars, name, total))
        write_report(results, out / "report.html")
    _show(console, results)
    return results.agreement.holds


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise click.BadParameter(str(error).splitlines()[0], param_hint="--device") from None
    return device


def _stage(bars: Progress, name: str, total: int) -> Callable[[int], None]:
    task = bars.add_task(name, total=total)
    return lambda units: bars.advance(task, units)


def _show(console: Console, results: Results) -> None:
    from .table import code_table, quality_table, speed_table, verdicts

    quality = results.items.quality
    for table in (code_table(results), quality_table(results), speed_table(results)):
        rows = [row[:COLUMNS] for row in table.rows]
        show_table(console, table.heads[:COLUMNS], rows, title=table.title)
        console.print()
        if table.title == "Codes":
            console.print(
                f"{quality.unique_rate:.1%} of the items have a code of their own. Sharing two:"
            )
            for (first, second), titles in results.items.neighbours.items():
                console.print(f"  ({first}, {second}): {'; '.join(titles[:4])}", highlight=False)
    for line in verdicts(results):
        console.print(line, highlight=False)
