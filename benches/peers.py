"""Peers that any op may have, torch's own, and what fair opponents share: trials and blocks.

Every peer runs in its best configuration; where that depends on the machine it is found by trial,
once and untimed, and noted in the row. A peer that misses its library, or cannot take a case, is an
`Absent` with the reason.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from types import FunctionType
from typing import Any

import numpy as np
import torch

from livrec_fast.benchmarking import Absent, Contestant, Options
from livrec_fast.benchmarking._clock import clock_of

Inputs = dict[str, Any]
Run = Callable[[], Any]
BLOCKS = (4_096, 16_384, 65_536)
TRIAL_ROWS = (16_384, 131_072)  # at the least and at the most


class Noted:
    """A function with a note of how it computes."""

    def __init__(self, run: Run, note: str):
        self._run, self.note = run, note

    def __call__(self) -> Any:
        """Compute."""
        return self._run()


def quickest(device: str, ways: Mapping[str, Run]) -> str:
    """Return the note of the quickest of `ways`, each timed once, after a run at the least."""
    clock = clock_of(device)
    times = {}
    for note, run in ways.items() if len(ways) > 1 else ():
        run()
        times[note] = clock(run)
    return min(times, key=times.__getitem__) if times else next(iter(ways))


def joined(parts: Sequence[Any]) -> Any:
    """Join blocks of rows of torch or of NumPy."""
    return torch.cat(list(parts)) if isinstance(parts[0], torch.Tensor) else np.concatenate(parts)


def trial_rows(first_block: Run, rows: Any, options: Options) -> Any:
    """Return as many of the rows as a trial can read in half a second (quick: the fewest)."""
    least, most = TRIAL_ROWS
    if options.quick or len(rows) <= least:
        return rows[:least]
    first_block()
    per_row = clock_of(options.device)(first_block) / min(BLOCKS[0], len(rows))
    return rows[: min(most, max(least, int(0.5 / per_row)))]


def in_blocks(
    ways: Mapping[str, Callable[[Any], Any]],
    rows: Any,
    options: Options,
    join: Callable[[Sequence[Any]], Any] = joined,
    whole: bool = True,
) -> Noted:
    """Return the quickest way to compute something of `rows`, at the quickest size of the blocks.

    ways: functions of a block of rows, by what the note shall say of each. whole: all rows at once
    may be quickest too.
    """

    def over(function: Callable[[Any], Any], data: Any, size: int) -> Run:
        return lambda: join([function(data[at : at + size]) for at in range(0, len(data), size)])

    few = trial_rows(over(next(iter(ways.values())), rows[: BLOCKS[0]], BLOCKS[0]), rows, options)
    sizes = [size for size in BLOCKS if size < len(rows) and size <= len(few)]
    choices = {
        ", ".join(filter(None, [way, f"blocks of {size:,}"])): (function, size)
        for way, function in ways.items()
        for size in sizes
    }
    if whole or not choices:
        choices |= {way: (function, len(rows)) for way, function in ways.items()}
    note = quickest(options.device, {n: over(f, few, size) for n, (f, size) in choices.items()})
    function, size = choices[note]
    return Noted(
        (lambda: function(rows)) if size == len(rows) else over(function, rows, size), note
    )


def eager(formula: Callable[..., Any]) -> Contestant:
    """Return the reference itself, in eager torch."""
    return Contestant("torch eager", lambda inputs: lambda: formula(**inputs), "reference")


def eager_in_blocks(
    formula: Callable[..., Any], options: Options, join: Callable[[Any], Any] = joined
) -> Contestant:
    """Return eager torch over blocks of the rows x, whose intermediates then stay in cache."""

    def prepare(inputs: Inputs) -> Run:
        return in_blocks({"": _of_rows(formula, inputs)}, inputs["x"], options, join, whole=False)

    return Contestant("torch eager, chunked", prepare)


def compiled(
    formula: Callable[..., Any], options: Options, autotuned: bool = True
) -> list[Contestant | Absent]:
    """Return the reference through torch.compile, as it comes and (unless quick) autotuned."""
    modes = {"torch.compile": None}
    if autotuned and not options.quick:
        modes["torch.compile autotuned"] = "max-autotune-no-cudagraphs"
    if _lacks_compiler(options):
        return [Absent(name, "torch.compile needs a C++ compiler on a CPU") for name in modes]

    def contestant(name: str, mode: str | None) -> Contestant:
        def prepare(inputs: Inputs) -> Run:
            function = torch.compile(fresh(formula), mode=mode, dynamic=False, fullgraph=True)
            function(**inputs)
            return lambda: function(**inputs)

        return Contestant(name, prepare)

    return [contestant(name, mode) for name, mode in modes.items()]


def compiled_in_blocks(
    formula: Callable[..., Any], options: Options, join: Callable[[Any], Any] = joined
) -> Contestant | Absent:
    """Return torch.compile over blocks of the rows x, compiled once for any number of rows."""
    name = "torch.compile, chunked"
    if _lacks_compiler(options):
        return Absent(name, "torch.compile needs a C++ compiler on a CPU")

    def prepare(inputs: Inputs) -> Run:
        function = torch.compile(fresh(formula), dynamic=True, fullgraph=True)
        return in_blocks({"": _of_rows(function, inputs)}, inputs["x"], options, join, whole=False)

    return Contestant(name, prepare)


def fresh(formula: Callable[..., Any]) -> Callable[..., Any]:
    """Copy a function, so that what torch.compile keeps of it is not shared with other cases."""
    code = formula.__code__.replace(co_name=f"{formula.__name__}_{next(_NUMBERS)}")
    given = formula.__globals__, formula.__name__, formula.__defaults__, formula.__closure__
    copy = FunctionType(code, *given)
    copy.__kwdefaults__ = formula.__kwdefaults__
    return copy


_NUMBERS = iter(range(10**9))


def _of_rows(function: Callable[..., Any], inputs: Inputs) -> Callable[[Any], Any]:
    rest = {name: value for name, value in inputs.items() if name != "x"}
    return lambda block: function(x=block, **rest)


def _lacks_compiler(options: Options) -> bool:
    return options.device == "cpu" and not any(map(shutil.which, ("c++", "g++", "clang++")))


def absence(library: str, package: str, options: Options, cpu_only: bool = True) -> str | None:
    """Return why a library cannot take part on the device: not there, or a CPU's (or GPU's) own."""
    from importlib.util import find_spec

    if options.device != ("cpu" if cpu_only else "cuda"):
        return f"{package} computes this on a {'CPU' if cpu_only else 'GPU'} only"
    if find_spec(library) is None:
        return f"{package} is not installed (pip install --no-deps -r requirements/peers.txt)"
    return None
