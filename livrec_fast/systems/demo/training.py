"""Training runs, one per backend: their losses, their clock, their memory."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from .measure import OpTimer, Part, peak_memory, synchronize
from .model import DemoModel
from .samples import Batch

TIMED_EVERY = 5  # the ops are timed in every fifth step; the others are undisturbed
MEMORY_STEP = 3  # the step that is profiled for memory, in no timing


@dataclass
class Run:
    """What one run has left.

    ranking, contrast: loss per step. step_seconds: undisturbed steps only. op_seconds: per part,
    one sum per timed step. backends: which ran, per part. step_bytes, op_bytes: peak memory.
    """

    backend: str
    ranking: list[float] = field(default_factory=list)
    contrast: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    op_seconds: dict[Part, list[float]] = field(default_factory=lambda: defaultdict(list))
    backends: dict[Part, set[str]] = field(default_factory=lambda: defaultdict(set))
    step_bytes: int = 0
    op_bytes: dict[Part, int] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)

    def step_ms(self) -> float:
        """Return the median time of an undisturbed step, in milliseconds."""
        return 1000 * float(np.median(self.step_seconds))

    def op_ms(self, part: Part) -> float:
        """Return the median over timed steps of an op's total time in a step, in milliseconds."""
        return 1000 * float(np.median(self.op_seconds[part]))


class Trainer:
    """A model with its optimiser, Adam at a rate that falls linearly to 0; stepped from outside."""

    def __init__(self, model: DemoModel, device: torch.device, learning_rate: float, steps: int):
        self.model, self.device, self.run = model, device, Run(model.backend)
        self._optimizer = torch.optim.Adam(
            model.parameters(), lr=learning_rate, eps=1e-6, fused=True
        )
        self._decay = torch.optim.lr_scheduler.LambdaLR(
            self._optimizer, lambda done: 1 - done / steps
        )

    def step(self, number: int, batch: Batch) -> None:
        """Take one step, measured in the way that is due at this number."""
        run = self.run
        if number == MEMORY_STEP:
            run.step_bytes, run.op_bytes = peak_memory(lambda: self._learn(batch), self.device)
        elif number % TIMED_EVERY == 0:
            with OpTimer(self.device) as timer:
                self._learn(batch)
            for part, seconds in timer.seconds.items():
                run.op_seconds[part].append(seconds)
                run.backends[part] |= timer.backends[part]
        else:
            synchronize(self.device)
            begin = time.perf_counter()
            self._learn(batch)
            synchronize(self.device)
            run.step_seconds.append(time.perf_counter() - begin)

    def _learn(self, batch: Batch) -> None:
        ranking, contrast = self.model(batch)
        self._optimizer.zero_grad(set_to_none=True)
        (ranking + contrast).backward()
        self._optimizer.step()
        self._decay.step()
        self.run.ranking.append(ranking.item())
        self.run.contrast.append(contrast.item())


def train(
    trainers: Sequence[Trainer], batches: Iterable[Batch], on_step: Callable[[int], None]
) -> None:
    """Train all on the same batches, step by step in turns, so that none has the quieter machine.

    Who goes first changes from step to step.
    """
    for number, batch in enumerate(batches):
        batch = batch.to(trainers[0].device)
        for trainer in trainers[:: 1 if number % 2 == 0 else -1]:
            trainer.step(number, batch)
        on_step(1)


@dataclass(frozen=True)
class Agreement:
    """How the losses of two runs compare, step by step.

    worst: by loss, the greatest relative difference. step: where that is. tolerance: its limit.
    """

    worst: dict[str, float]
    step: dict[str, int]
    tolerance: dict[str, float]

    @property
    def holds(self) -> bool:
        """Return whether both losses are within their tolerance at every step; a NaN is not."""
        return all(self.worst[name] <= limit for name, limit in self.tolerance.items())


def differences(reference: Run, other: Run, name: str) -> np.ndarray:
    """Return |a - r| / max(|r|, 0.01) of a loss at each step, infinite where that is no number."""
    expected, found = np.array(getattr(reference, name)), np.array(getattr(other, name))
    if len(expected) != len(found):
        raise ValueError(f"runs: must have as many steps, got {len(expected)} and {len(found)}")
    difference = np.abs(found - expected) / np.maximum(np.abs(expected), 0.01)
    return np.where(np.isfinite(difference), difference, np.inf)


def compare(reference: Run, other: Run, tolerance: dict[str, float]) -> Agreement:
    """Compare the losses that `tolerance` names at all steps."""
    found = {name: differences(reference, other, name) for name in tolerance}
    worst = {name: float(difference.max()) for name, difference in found.items()}
    step = {name: int(difference.argmax()) for name, difference in found.items()}
    return Agreement(worst, step, tolerance)
