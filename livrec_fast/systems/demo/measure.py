"""Time and memory of the ops inside a training step, by op, direction and backend that ran."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

STEP = "livrec demo step"


@dataclass(frozen=True, order=True)
class Part:
    """An op in one direction, as a run has it: its gradient is an operator of its own."""

    op: str
    direction: str


class OpTimer(TorchDispatchMode):
    """Times each call of an operator of this package by the clock; all others pass through.

    What an operator does inside is not seen, so that an op of many small steps is not slowed by
    being watched. On a GPU the device is waited for before and after each of these operators.
    """

    def __init__(self, device: torch.device):
        super().__init__()
        self.device = device
        self.seconds: dict[Part, float] = defaultdict(float)
        self.backends: dict[Part, set[str]] = defaultdict(set)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func`; time it where it is one of `livrec::`."""
        if func.namespace != "livrec":
            return func(*args, **(kwargs or {}))
        part = part_of(func._schema.name)
        synchronize(self.device)
        begin = time.perf_counter()
        out = func(*args, **(kwargs or {}))
        synchronize(self.device)
        self.seconds[part] += time.perf_counter() - begin
        self.backends[part].add(func._overloadname)
        return out


def part_of(name: str) -> Part:
    """Return op and direction of an operator's name, such as livrec::code_attention_backward."""
    op = name.split("::")[1].split(".")[0]
    forward = op.removesuffix("_backward")
    return Part(forward, "forward" if op == forward else "backward")


def synchronize(device: torch.device) -> None:
    """Wait for the device, if it is one that computes on its own."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(step: Callable[[], Any], device: torch.device) -> tuple[int, dict[Part, int]]:
    """Run a step under torch's profiler; return its peak bytes and those of each op's worst call.

    Counted are the tensors that torch's allocator of the device hands out above what was there when
    the step, or the call, began: the results themselves and every intermediate.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with (
        _quiet(),
        torch.profiler.profile(activities=activities, profile_memory=True) as profiler,
        torch.profiler.record_function(STEP),
    ):
        step()
        synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    return _peaks(events, kind=1 if device.type == "cuda" else 0)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what the profiler's C++ library says on standard error out of the progress bars."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _peaks(events: Sequence[dict[str, Any]], kind: int) -> tuple[int, dict[Part, int]]:
    changes = sorted(
        (event["ts"], event["args"]["Bytes"])
        for event in events
        if event.get("name") == "[memory]" and event["args"]["Device Type"] == kind
    )
    whole = 0
    ops: dict[Part, int] = defaultdict(int)
    for event in events:
        name = event.get("name", "")
        if event.get("cat") not in ("cpu_op", "user_annotation"):
            continue
        if name == STEP:
            whole = _peak_within(changes, event)
        elif name.startswith("livrec::"):
            part = part_of(name)
            ops[part] = max(ops[part], _peak_within(changes, event))
    return whole, dict(ops)


def _peak_within(changes: Sequence[tuple[float, int]], event: dict[str, Any]) -> int:
    level = peak = 0
    for when, change in changes:
        if event["ts"] <= when <= event["ts"] + event["dur"]:
            level += change
            peak = max(peak, level)
    return peak
