"""One case from its inputs to its rows: agreement first, then time and memory."""

from __future__ import annotations

from typing import Any

from .._dispatch import BackendError
from ._cases import Absent, Case, Contestant, Disagreement, Inputs, Run
from ._clock import Bystanders, clock_of, interleave, peak_extra_bytes, percentiles
from ._machine import Machine

Row = dict[str, Any]


def run_case(case: Case, machine: Machine, *, budget: float, memory: bool = True) -> list[Row]:
    """Hold every contestant of `case` to the reference, then time them in turns; return a row each.

    budget: seconds for the timing. memory: whether to measure the peak memory too.
    """
    inputs = case.make()
    runs: dict[str, Run] = {}
    absent: list[Absent] = []
    for contestant in case.contestants:
        entered = enter(contestant, case, inputs)
        if isinstance(entered, Absent):
            absent.append(entered)
        else:
            runs[contestant.name] = entered
    machine.measure(case.math or case.dtype)
    extra = {
        name: peak_extra_bytes(run, machine.device) if memory else None
        for name, run in runs.items()
    }
    bystanders = Bystanders()
    times = interleave(runs, clock_of(machine.device), budget=budget)
    disturbed = bystanders.share()
    kinds = {contestant.name: contestant.kind for contestant in case.contestants}
    head = {**_head(case, machine), "others_busy": disturbed}
    rows = [
        {
            **head,
            "contestant": name,
            "kind": kinds[name],
            **_speed(case, times[name]),
            "extra_bytes": extra[name],
        }
        for name in runs
    ]
    return rows + [
        {**head, "contestant": a.name, "kind": a.kind, "reason": a.reason} for a in absent
    ]


def enter(contestant: Contestant | Absent, case: Case, inputs: Inputs) -> Run | Absent:
    """Prepare a contestant, run it once, and hold its output to the reference.

    A peer that fails is absent with what it said; a fault of ours is raised.
    """
    if isinstance(contestant, Absent):
        return contestant
    try:
        run = contestant.prepare(inputs)
        output = contestant.finish(run())
    except BackendError as error:
        lines = [line.split(maxsplit=1) for line in str(error).splitlines()]
        said = [line[1] for line in lines if len(line) == 2 and line[0] == contestant.name]
        return Absent(contestant.name, (said or [str(error)])[0], contestant.kind)
    except Exception as error:
        if contestant.kind != "peer":
            raise
        words = str(error).strip().splitlines() or [""]
        return Absent(contestant.name, f"{type(error).__name__}: {words[0][:160]}")
    try:
        case.agree(output, inputs)
    except AssertionError as error:
        raise Disagreement(f"{case.title}: {contestant.name} is wrong: {error}") from error
    return run


def _head(case: Case, machine: Machine) -> Row:
    return {
        "op": case.op,
        "label": case.label,
        "sizes": dict(case.sizes),
        "dtype": str(case.dtype)[6:],
        "direction": case.direction,
        "bytes": case.bytes,
        "flops": case.flops,
        "math": str(case.math or case.dtype)[6:],
        **machine.describe(),
    }


def _speed(case: Case, times: list[float]) -> Row:
    low, middle, high = percentiles(times)
    return {
        "p20_ms": 1e3 * low,
        "p50_ms": 1e3 * middle,
        "p80_ms": 1e3 * high,
        "rounds": len(times),
        "gb_s": case.bytes / middle / 1e9,
        "tflop_s": case.flops / middle / 1e12,
    }
