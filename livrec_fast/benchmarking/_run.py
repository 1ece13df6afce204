"""One case from its inputs to its rows: agreement first, then time and memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .._dispatch import BackendError
from ._cases import Absent, Case, Contestant, Disagreement, Facts, Inputs, Run
from ._clock import Bystanders, clock_of, interleave, kept_memory, peak_extra_bytes, percentiles
from ._machine import Machine

Row = dict[str, Any]
DISAGREES = "disagrees"  # how the reason of a peer begins whose output is wrong


@dataclass(frozen=True)
class Entered:
    """A contestant that agrees: its function, and the facts about its output.

    seconds, extra_bytes: of the run that was held to agree, measured in long cases only.
    """

    run: Run
    facts: Facts
    seconds: float | None = None
    extra_bytes: int | None = None


def run_case(case: Case, machine: Machine, *, budget: float, memory: bool = True) -> list[Row]:
    """Hold every contestant of `case` to the reference, then time them in turns; return a row each.

    budget: seconds for the timing. memory: whether to measure the peak memory too, and on a CPU the
        time where memory that is freed goes back to the system, as torch's allocator leaves it to
        the C library to do: whoever allocates more then pays for more page faults.
    """
    inputs = case.make()
    entered: dict[str, Entered] = {}
    absent: list[Absent] = []
    for contestant in case.contestants:
        came = enter(contestant, case, inputs, machine.device)
        if isinstance(came, Absent):
            absent.append(came)
        else:
            entered[contestant.name] = came
    _compare(case, entered)
    machine.measure(case.math or case.dtype)
    extra = {
        name: _extra_bytes(came, case, machine.device) if memory else None
        for name, came in entered.items()
    }
    bystanders = Bystanders()
    with kept_memory():
        times = _timed(entered, machine, budget)
    fresh = _fresh_times(entered, machine, budget / 2) if memory and not case.long else {}
    head = {**_head(case, machine), "others_busy": bystanders.share()}
    kinds = {contestant.name: contestant.kind for contestant in case.contestants}
    rows = [
        {
            **head,
            "contestant": name,
            "kind": kinds[name],
            **_speed(case, times[name]),
            "fresh_p50_ms": fresh.get(name),
            "extra_bytes": extra[name],
            "note": getattr(came.run, "note", ""),
            "facts": dict(came.facts),
        }
        for name, came in entered.items()
    ]
    return rows + [
        {**head, "contestant": a.name, "kind": a.kind, "reason": a.reason} for a in absent
    ]


def enter(
    contestant: Contestant | Absent, case: Case, inputs: Inputs, device: str = "cpu"
) -> Entered | Absent:
    """Prepare a contestant, run it once, and hold its output to the reference.

    A peer that fails is absent with what it said, one that disagrees with by how much, so that
    it is not timed; a fault of ours, or of the reference, is raised.
    """
    if isinstance(contestant, Absent):
        return contestant
    try:
        run = contestant.prepare(inputs)
        output, seconds, extra = _first_run(run, case, device)
        output = contestant.finish(output)
    except BackendError as error:
        lines = [line.split(maxsplit=1) for line in str(error).splitlines()]
        said = [line[1] for line in lines if len(line) == 2 and line[0] == contestant.name]
        return Absent(contestant.name, (said or [str(error)])[0], contestant.kind)
    except Exception as error:
        if contestant.kind != "peer":
            raise
        return Absent(contestant.name, f"{type(error).__name__}: {_first_line(error)}")
    try:
        facts = (contestant.agree or case.agree)(output, inputs)
    except AssertionError as error:
        if contestant.kind == "peer":
            return Absent(contestant.name, f"{DISAGREES}: {_first_line(error)}")
        raise Disagreement(f"{case.title}: {contestant.name} is wrong: {error}") from error
    return Entered(run, facts or {}, seconds, extra)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:160]


def _timed(entered: dict[str, Entered], machine: Machine, budget: float) -> dict[str, list[float]]:
    """Time all in turns; in a long case count the first run, and time again only who is quick."""
    first = {name: came.seconds for name, came in entered.items() if came.seconds is not None}
    again = {name: came.run for name, came in entered.items() if first.get(name, 0.0) <= budget / 2}
    more = interleave(again, clock_of(machine.device), budget=budget, least=2 if first else 5)
    return {name: ([first[name]] if name in first else []) + more.get(name, []) for name in entered}


def _fresh_times(entered: dict[str, Entered], machine: Machine, budget: float) -> dict[str, float]:
    """Time all in turns once more, each with memory as the system gives it; return the medians."""
    if machine.device != "cpu":
        return {}
    runs = {name: came.run for name, came in entered.items()}
    times = interleave(runs, clock_of(machine.device), budget=budget, least=3)
    return {name: 1e3 * percentiles(found)[1] for name, found in times.items()}


def _first_run(run: Run, case: Case, device: str) -> tuple[Any, float | None, int | None]:
    """Run once; in a long case, measure that run."""
    if not case.long:
        return run(), None, None
    held: list[Any] = []
    seconds: list[float] = []

    def keep() -> None:
        held.clear()  # two outputs would need twice the memory
        held.append(run())

    def timed() -> None:
        seconds.append(clock_of(device)(keep))

    extra = peak_extra_bytes(timed, device)
    return held[0], seconds[0], extra


def _extra_bytes(came: Entered, case: Case, device: str) -> int | None:
    return came.extra_bytes if case.long else peak_extra_bytes(came.run, device)


def _compare(case: Case, entered: dict[str, Entered]) -> None:
    if case.compare is not None:
        try:
            case.compare({name: came.facts for name, came in entered.items()})
        except AssertionError as error:
            raise Disagreement(f"{case.title}: {error}") from error


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
