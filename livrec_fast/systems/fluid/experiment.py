"""All rows of the tables that are wanted, over seeds, several at a time."""

from __future__ import annotations

import json
import math
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from queue import Empty
from typing import Any

import torch

from ..._files import replacing
from . import checkpoints, figures
from .evaluation import measure, views
from .material import Material, Source
from .recipes import ROWS
from .training import Settings, stage_steps, train_row

Tell = Callable[[int, str, int], None]  # of a seed: "total", "steps" or "row", and a number


@dataclass(frozen=True)
class Job:
    """One seed: its log or its world, its negatives, its codebooks and its initial weights.

    figures: also gather what the figures show. A job runs on one thread, as the number of threads
    decides on the last bits of matrix products.
    """

    source: Source
    settings: Settings
    rows: tuple[str, ...]
    seed: int
    folder: Path
    figures: bool = False


def run_job(job: Job, tell: Tell = lambda seed, what, number: None) -> dict[str, Any]:
    """Train a seed's rows, as far as they are not trained, and measure them."""
    torch.set_num_threads(1)
    data = Material(job.source, job.settings, job.seed)
    rows = [ROWS[name] for name in job.rows]
    stream = job.settings.train.stream
    tell(job.seed, "total", sum(stage_steps(data, row.stages, stream) for row in rows))
    stages = job.folder / "stages"
    found: dict[str, Any] = {"rows": {}, "data": data.facts()}
    traces = {}
    for number, row in enumerate(rows):
        path = train_row(
            data, row, job.settings, job.seed, stages, lambda n: tell(job.seed, "steps", n)
        )
        traces[row.name], _ = checkpoints.read(path)
        logits = traces[row.name]["logits"].numpy()
        found["rows"][row.name] = measure(logits, *data.tested())
        found["rows"][row.name] |= views(logits[..., 0], data.test, *data.watched())
        tell(job.seed, "row", number)
    if job.figures:
        found["figures"] = _figures(data, traces)
    path = job.folder / f"seed-{job.seed}.json"
    with replacing(path) as file:
        file.write(json.dumps(_without_nan(found), indent=1, allow_nan=False).encode())
    return found


def _without_nan(found: Any) -> Any:
    """Return the same with None for each number that JSON cannot hold."""
    if isinstance(found, dict):
        return {name: _without_nan(value) for name, value in found.items()}
    if isinstance(found, list):
        return [_without_nan(value) for value in found]
    return None if isinstance(found, float) and not math.isfinite(found) else found


def _figures(data: Material, traces: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return what there is to draw, by the figure's number in the paper, and what is not to be."""
    found: dict[str, Any] = {}
    try:
        found["4"] = figures.prefix_coherence(data.log, data.codes)
    except ValueError as error:
        found["missing"] = {"4": str(error)}
    if "base" in traces:
        norms = traces["base"]["id_norm"].numpy()
        found["1"] = figures.norm_by_age(norms, data.test.age_s)
    gated = traces.get("learnable gate")
    if gated is not None:
        found["5"] = figures.gate_by_norm(gated["gate"].numpy(), gated["id_norm"].numpy())
    return found


def run_all(jobs: Sequence[Job], workers: int, tell: Tell) -> dict[int, dict[str, Any]]:
    """Run jobs, several at a time in processes of their own, and return what each found."""
    if workers <= 1:
        return {job.seed: run_job(job, tell) for job in jobs}
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        queue = manager.Queue()
        pool = ProcessPoolExecutor(min(workers, len(jobs)), mp_context=context)
        try:
            futures = {job.seed: pool.submit(run_job, job, _Teller(queue)) for job in jobs}
            waiting = set(futures.values())
            while waiting:
                done, waiting = wait(waiting, timeout=0.2)
                _drain(queue, tell)
                for future in done:
                    future.result()  # raise what it raised, without waiting for the others
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list((pool._processes or {}).values()):
                process.terminate()
            raise
        pool.shutdown()
        return {seed: future.result() for seed, future in futures.items()}


@dataclass(frozen=True)
class _Teller:
    """Tell from another process; steps are sent as they come."""

    queue: Any

    def __call__(self, seed: int, what: str, number: int) -> None:
        self.queue.put((seed, what, number))


def _drain(queue: Any, tell: Tell) -> None:
    while True:
        try:
            tell(*queue.get_nowait())
        except Empty:
            return
