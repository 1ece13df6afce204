"""What the systems' commands share: bars, tables, and what must be installed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress


def require(what: str, extra: str, *modules: str) -> None:
    """Fail with what to install where a module is missing that `what` cannot do without."""
    from importlib.util import find_spec

    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise click.ClickException(
            f"{what} needs {', '.join(missing)}; to mend: pip install 'livrec-fast[{extra}]'"
        )


def progress(console: Console, width: int) -> Progress:
    """Return bars with a description so many characters wide, a count and times."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeElapsedColumn as Elapsed
    from rich.progress import TimeRemainingColumn as Remaining

    columns = (TextColumn(f"{{task.description:<{width}}}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, Elapsed(), Remaining(), console=console)


def show_table(
    console: Console,
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    title: str | None = None,
    wrap: bool = False,
) -> None:
    """Print a table, its first column to the left; by `wrap`, that one may take several lines."""
    from rich.table import Table

    shown = Table(
        title=title, title_justify="left", title_style="bold", box=None, padding=(0, 1, 0, 0)
    )
    for column, head in enumerate(heads):
        justify, whole = ("left", not wrap) if column == 0 else ("right", True)
        shown.add_column(head, justify=justify, no_wrap=whole)  # type: ignore[arg-type]
    for row in rows:
        shown.add_row(*row)
    console.print(shown)
