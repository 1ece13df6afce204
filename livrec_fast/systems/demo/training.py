"""One training run with one backend: its losses, its clock, its memory."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import torch

from .measure import OpTimer, Part, peak_memory, synchronize
from .model import DemoModel
from .samples import Batch

TIMED_EVERY = 5  # every so many steps the ops are timed; the others give the time of an undisturbed step
MEMORY_STEP = 3  # the step that is profiled for memory, in no timing


@dataclass
class Run:
    """What one run has left.

    ranking, contrast: loss per step. step_seconds: undisturbed steps only. op_seconds: per part, one sum
    per timed step. backends: which ran, per part. step_bytes, op_bytes: peak memory.
    """

    backend: str
    ranking: list[float] = field(default_factory=list)
    contrast: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    op_seconds: dict[Part, list[float]] = field(default_factory=lambda: defaultdict(list))
    backends: dict[Part, set[str]] = field(default_factory=lambda: defaultdict(set))
    step_bytes: int = 0
    op_bytes: dict[Part, int] = field(default_factory=dict)
    history_rows: int = 0
    metrics: dict[str, float] = field(default_factory=dict)

    def losses(self) -> np.ndarray:
        """Return both losses, [steps, 2]."""
        return np.stack([self.ranking, self.contrast], 1)

    def step_ms(self) -> float:
        """Return the median time of an undisturbed step, in milliseconds."""
        return 1000 * float(np.median(self.step_seconds))

    def op_ms(self, part: Part) -> float:
        """Return the median over the timed steps of an op's total time in the step, in milliseconds."""
        return 1000 * float(np.median(self.op_seconds[part]))


def train(
    model: DemoModel,
    batches: Iterable[Batch],
    steps: int,
    device: torch.device,
    learning_rate: float,
    on_step: Callable[[Run], None],
) -> Run:
    """Train on every batch once, at a rate that falls linearly to 0; both losses are simply added."""
    run = Run(model.backend)
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate, eps=1e-6, fused=True)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: 1 - done / steps)
    model.train()
    for number, batch in enumerate(batches):
        batch = batch.to(device)
        run.history_rows += len(batch.history)

        def step(batch: Batch = batch) -> None:
            ranking, contrast = model(batch)
            optimizer.zero_grad(set_to_none=True)
            (ranking + contrast).backward()
            optimizer.step()
            run.ranking.append(ranking.item())
            run.contrast.append(contrast.item())

        if number == MEMORY_STEP:
            run.step_bytes, run.op_bytes = peak_memory(step, device)
        elif number % TIMED_EVERY == 0:
            _timed(step, run, device)
        else:
            begin = time.perf_counter()
            step()
            synchronize(device)
            run.step_seconds.append(time.perf_counter() - begin)
        decay.step()
        on_step(run)
    return run


def _timed(step: Callable[[], None], run: Run, device: torch.device) -> None:
    with OpTimer(device) as timer:
        step()
    for part, seconds in timer.seconds.items():
        run.op_seconds[part].append(seconds)
        run.backends[part] |= timer.backends[part]


@dataclass(frozen=True)
class Agreement:
    """How two runs compare, step by step: the greatest relative difference of a loss, and where."""

    worst: float
    step: int
    tolerance: float

    @property
    def holds(self) -> bool:
        """Return whether every step is within the tolerance; a NaN is not."""
        return self.worst <= self.tolerance


def compare(reference: Run, other: Run, tolerance: float) -> Agreement:
    """Compare both losses of all steps: |a - r| / max(|r|, 0.01)."""
    expected, found = reference.losses(), other.losses()
    if expected.shape != found.shape:
        raise ValueError(f"runs: must have as many steps, got {len(expected)} and {len(found)}")
    difference = np.abs(found - expected) / np.maximum(np.abs(expected), 0.01)
    difference = np.where(np.isfinite(difference), difference, np.inf).max(1)
    step = int(difference.argmax())
    return Agreement(float(difference[step]), step, tolerance)
