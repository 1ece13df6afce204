"""How one run is timed, how many take turns, how much memory a run takes, and who disturbs."""

from __future__ import annotations

import ctypes
import gc
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

Clock = Callable[[Callable[[], Any]], float]
_LONG = 0.1  # seconds; to wake a thread and to fill the caches takes less than one of them
_WARM = 0.005  # seconds; a processor at rest takes about so long to be at speed
_SETTLE = 0.01  # seconds; idle OpenMP threads spin for a while, on cores that the next one needs


@contextmanager
def kept_memory() -> Iterator[None]:
    """Inside the block, memory that is freed stays with the process, for whoever allocates next.

    The C library would give large blocks back, so that each run would fault its output in again,
    page by page: a cost of the system, which varies more from run to run than what is measured.
    Allocators that training jobs use keep memory, too.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    trim, mapped = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of glibc
    if mallopt is None or not (mallopt(mapped, 0) and mallopt(trim, 2**31 - 1)):
        yield
        return
    try:
        yield
    finally:
        mallopt(mapped, 65536)
        mallopt(trim, 128 * 1024)
        ctypes.CDLL(None).malloc_trim(0)


def clock_of(device: str) -> Clock:
    """Return what times one run on `device`, in seconds."""
    return cuda_clock() if device == "cuda" else cpu_clock


def cpu_clock(run: Callable[[], Any]) -> float:
    """Time one run after others of its own, for _WARM seconds, once other thread pools sleep.

    What a run finds is then its own doing: its threads awake, the processor at speed, and in the
    caches what it left there. A first run after a rest pays for all of these, and on a shared
    machine by what its neighbours do. Long runs are timed at once: of them these are no part worth
    waiting for.
    """
    time.sleep(_SETTLE)
    start = time.perf_counter()
    elapsed = _timed(run)
    if elapsed > _LONG:
        return elapsed
    while time.perf_counter() - start < _WARM:
        _timed(run)
    return _timed(run)


def _timed(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    output = run()
    elapsed = time.perf_counter() - start
    del output  # to free it is not the op's work
    return elapsed


def cuda_clock() -> Clock:
    """Make a clock of CUDA events that overwrites the L2 cache before each run."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    flush = torch.empty(4 * properties.L2_cache_size, dtype=torch.int8, device="cuda")

    def clock(run: Callable[[], Any]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        flush.zero_()  # and while it runs, the launches below get ahead of the device
        start.record()
        output = run()
        end.record()
        end.synchronize()
        del output
        return start.elapsed_time(end) / 1e3

    return clock


def interleave(
    runs: Mapping[str, Callable[[], Any]],
    clock: Clock,
    *,
    budget: float,
    least: int = 5,
    most: int = 200,
) -> dict[str, list[float]]:
    """Time all runs once per round, so that whatever disturbs the machine disturbs them alike.

    Rounds go on for `budget` seconds, at least `least` and at most `most` of them, each in an order
    drawn from a fixed seed, so that nobody always follows the same neighbour.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    shuffle, order = random.Random(0).shuffle, list(runs)
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        for done in range(most):
            if done >= least and time.perf_counter() - start > budget:
                break
            shuffle(order)
            for name in order:
                times[name].append(clock(runs[name]))
    finally:
        gc.enable()
    return times


def percentiles(times: Sequence[float]) -> tuple[float, float, float]:
    """Return p20, p50 and p80 of `times`, interpolated linearly."""
    low, middle, high = np.percentile(np.asarray(times), [20, 50, 80])
    return float(low), float(middle), float(high)


def peak_extra_bytes(run: Callable[[], Any], device: str) -> int | None:
    """Return how far a run, done before, raises the memory in use: its output and workspace.

    What a library keeps from its first call is not counted. On a CPU it is the resident set, whose
    peak Linux resets on request; None where that cannot be asked.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        output = run()
        torch.cuda.synchronize()
        del output
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # freed memory that glibc kept would hide what a run takes
        Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is resident
        before = _resident("VmRSS")
        output = run()
        peak = _resident("VmHWM")
    except (OSError, AttributeError):
        return None
    del output
    return max(0, peak - before)


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


class Bystanders:
    """How much of the cores other processes take; Linux tells."""

    def __init__(self) -> None:
        self._before = self._read()

    def share(self) -> float | None:
        """Return the share of all cores' time that others have taken since this was made."""
        now = self._read()
        if now is None or self._before is None:
            return None
        busy, idle, own = (late - early for late, early in zip(now, self._before, strict=True))
        return min(1.0, max(0.0, busy - own) / max(busy + idle, 1e-9))

    @staticmethod
    def _read() -> tuple[float, float, float] | None:
        """Return the seconds that the cores have been busy and idle, and this process's own."""
        try:
            line = Path("/proc/stat").read_text().split("\n", 1)[0]
            ticks = [int(count) / os.sysconf("SC_CLK_TCK") for count in line.split()[1:9]]
        except (OSError, ValueError):
            return None
        idle = ticks[3] + ticks[4]
        return sum(ticks) - idle, idle, time.process_time()
