"""How long a training step takes: with the fast ops, the reference ops, and plain PyTorch."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ...benchmarking._clock import interleave, kept_memory, percentiles
from .config import ModelConfig, TrainConfig
from .optimizers import Optimizers
from .plain import PlainOptimizers, plain
from .ranker import Ranker
from .recipes import TEST

if TYPE_CHECKING:
    from ...logs.batches import Batch
    from .training import Material

NAMES = ("fast ops", "reference ops", "EmbeddingBag + SDPA")
TOLERANCE = 1e-3  # relative, of the losses of one step
_BATCHES = 8
_GROUPS = {  # of the profile, by how an operator's name starts
    "livrec::": "",
    "aten::bmm": "matrix products", "aten::mm": "matrix products",
    "aten::addmm": "matrix products", "aten::baddbmm": "matrix products",
    "aten::native_layer_norm": "layer norm", "aten::native_layer_norm_backward": "layer norm",
    "aten::_fused_adamw": "AdamW", "Optimizer": "AdamW", "aten::gelu": "activations",
    "aten::silu": "activations", "aten::cat": "copies", "aten::stack": "copies",
    "aten::copy_": "copies", "aten::clone": "copies", "aten::zero_": "copies",
    "aten::fill_": "copies",
}  # fmt: skip


@dataclass(frozen=True)
class Speed:
    """What was measured.

    seconds: of a step, by name. losses: by name, of the steps that were compared. worst: the
    greatest relative difference of a loss from the fast ops'. profile: of a step with the fast ops,
    by operator or group of them, milliseconds and calls. events: of each request's history.
    """

    seconds: dict[str, list[float]]
    losses: dict[str, list[float]]
    worst: float
    profile: list[tuple[str, float, float]]
    threads: int
    events: list[int]

    def ratio(self, name: str) -> float:
        """Return how many times as long as with the fast ops a step takes, by medians."""
        return float(np.median(self.seconds[name]) / np.median(self.seconds[NAMES[0]]))


def compare(
    data: Material, fusion: str = "fluid", model: ModelConfig | None = None,
    train: TrainConfig | None = None, seconds: float = 10.0,
) -> Speed:  # fmt: skip
    """Train one model in three ways on the same batches, step by step in turns.

    The batches are spread over all that is trained on, so that histories are as long as they are in
    training. Tables learn by Adagrad, which PyTorch has, too, for sparse gradients. Raises:
    AssertionError where the losses of a step differ by more than TOLERANCE.
    """
    train = replace(train or TrainConfig(), rule="adagrad")
    steps = _steppers(data, fusion, model or ModelConfig(), train)
    batches = [data.batch(*place) for place in spread(data, _BATCHES)]
    losses: dict[str, list[float]] = defaultdict(list)
    for batch in batches:
        for name, step in steps.items():
            losses[name].append(step(batch))
    worst = _worst(losses)
    turns: dict[str, int] = defaultdict(int)

    def runner(name: str) -> Callable[[], float]:
        def run() -> float:
            turns[name] += 1
            return steps[name](batches[turns[name] % len(batches)])

        return run

    with kept_memory():
        taken = interleave({name: runner(name) for name in steps}, _clock, budget=seconds)
    found = profile(steps[NAMES[0]], batches)
    events = torch.cat([batch.offsets.diff() for batch in batches]).tolist()
    return Speed(taken, dict(losses), worst, found, torch.get_num_threads(), events)


def spread(data: Material, count: int) -> list[tuple[int, int]]:
    """Return where to find so many batches, or all: the middles of equal parts of the training.

    Each is a period and a step of it, before the test.
    """
    every = [(period, step) for period in range(TEST) for step in range(data.steps(period))]
    count = min(count, len(every))
    return [every[(2 * at + 1) * len(every) // (2 * count)] for at in range(count)]


def _steppers(
    data: Material, fusion: str, model: ModelConfig, train: TrainConfig
) -> dict[str, Callable[[Batch], float]]:
    """Return what takes a step, for each of NAMES, from the same parameters."""
    made: dict[str, tuple[Ranker, Any]] = {}
    for name, backend in zip(NAMES, ("auto", "reference", "auto"), strict=True):
        torch.manual_seed(0)
        ranker = Ranker(fusion, replace(model, backend=backend), data.sizes, train, data.codebooks)
        ranker.dense.mean.copy_(data.mean)
        ranker.dense.deviation.copy_(data.deviation)
        if name == NAMES[2]:
            ranker = plain(ranker)
            made[name] = ranker, PlainOptimizers(ranker, train)
        else:
            made[name] = ranker, Optimizers(ranker, train)
    return {name: _stepper(*pair) for name, pair in made.items()}


def _stepper(ranker: Ranker, optimizers: Any) -> Callable[[Batch], float]:
    def step(batch: Batch) -> float:
        optimizers.zero()
        loss = ranker.loss(ranker(batch), batch)
        loss.backward()
        optimizers.step()
        return float(loss.detach())

    return step


def _worst(losses: dict[str, list[float]]) -> float:
    fast = np.array(losses[NAMES[0]])
    worst = max(
        float(np.max(np.abs(np.array(losses[name]) - fast) / np.abs(fast))) for name in NAMES[1:]
    )
    if not worst <= TOLERANCE:
        raise AssertionError(f"losses: differ by {worst:.1e} of their size, at most {TOLERANCE:g}")
    return worst


def _clock(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def profile(
    step: Callable[[Batch], Any], batches: Sequence[Batch]
) -> list[tuple[str, float, float]]:
    """Return where a step's time goes: by operator or group, milliseconds and calls per step."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        for batch in batches:
            step(batch)
    spent: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for event in found.key_averages():
        name = _group(event.key)
        spent[name][0] += event.self_cpu_time_total / 1e3 / len(batches)
        spent[name][1] += event.count / len(batches)
    rows = [(name, ms, calls) for name, (ms, calls) in spent.items()]
    return sorted(rows, key=lambda row: -row[1])


def _group(name: str) -> str:
    for start, group in _GROUPS.items():
        if name.startswith(start):
            return group or name.removesuffix("_backward")
    return "other operators of torch" if name.startswith("aten::") else "autograd and Python"


def lines(speed: Speed, most: int = 12) -> tuple[list[list[str]], list[list[str]]]:
    """Return both tables as text, heads first: of the steps, and of the profile."""
    times = [["training step", "p20 ms", "median ms", "p80 ms", "ratio"]]
    for name in NAMES:
        values = [1e3 * value for value in percentiles(speed.seconds[name])]
        times.append([name, *(f"{v:.1f}" for v in values), f"{speed.ratio(name):.2f}x"])
    total = sum(ms for _, ms, _ in speed.profile)
    rows = [["where a step's time goes", "ms", "share", "calls"]]
    for name, ms, calls in speed.profile[:most]:
        rows.append([name, f"{ms:.2f}", f"{ms / total:.0%}", f"{calls:.0f}"])
    return times, rows
