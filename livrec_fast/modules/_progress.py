"""The progress bar of a fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial


@contextmanager
def progress_bars(
    shown: bool, levels: Sequence[int], iterations: int
) -> Iterator[list[Callable[[], None]]]:
    """Yield, per level, what to call after each of up to `iterations` + 1 assignments."""
    if not shown:
        yield [lambda: None for _ in levels]
        return
    from rich.progress import Progress

    with Progress() as progress:
        tasks = [
            progress.add_task(f"level {level}: {size} codewords", total=iterations + 1)
            for level, size in enumerate(levels)
        ]
        yield [partial(progress.advance, task) for task in tasks]
