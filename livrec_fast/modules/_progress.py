"""The progress bar of a fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any


class Bar:
    """The bar of one level, or none."""

    def __init__(self, progress: Any = None, task: Any = None):
        self._progress, self._task = progress, task

    def step(self) -> None:
        """Tell that an assignment is done."""
        if self._progress is not None:
            self._progress.advance(self._task)

    def finish(self) -> None:
        """Tell that the level is done, perhaps early."""
        if self._progress is not None:
            self._progress.update(self._task, completed=self._progress.tasks[self._task].total)


@contextmanager
def progress_bars(shown: bool, levels: Sequence[int], iterations: int) -> Iterator[list[Bar]]:
    """Yield a bar per level, of up to `iterations` + 1 assignments."""
    if not shown:
        yield [Bar() for _ in levels]
        return
    from rich.progress import Progress

    with Progress() as progress:
        yield [
            Bar(
                progress,
                progress.add_task(f"level {level}: {size} codewords", total=iterations + 1),
            )
            for level, size in enumerate(levels)
        ]
