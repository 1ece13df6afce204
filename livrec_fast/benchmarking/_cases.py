"""What is benchmarked: cases, and the contestants of each."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch

from .. import _native

Inputs = dict[str, Any]
Run = Callable[[], Any]
Facts = Mapping[str, Any]
Kind = Literal["ours", "reference", "peer", "floor"]  # floor: no rival, but what bounds all


class Disagreement(AssertionError):
    """An op of ours computes something else than the reference; nothing of its case is timed."""


@dataclass(frozen=True)
class Options:
    """What the user asked for, which the cases may depend on."""

    device: str = "cpu"
    quick: bool = False
    all_isa: bool = False
    threads: int = field(default_factory=torch.get_num_threads)


@dataclass(frozen=True)
class Contestant:
    """One way to compute a case.

    prepare: of the case's inputs, returns the function that is timed; it builds and compiles. A
    `note` of that function (an attribute, such as the settings it chose) goes into the row.
    finish: brings what that function returns to the form that the case's `agree` takes; untimed.
    agree: the rule of a peer that computes in less precision than the case's own rule grants.
    """

    name: str
    prepare: Callable[[Inputs], Run]
    kind: Kind = "peer"
    finish: Callable[[Any], Any] = lambda output: output
    agree: Callable[[Any, Inputs], Facts | None] | None = None


@dataclass(frozen=True)
class Absent:
    """A contestant that cannot take part, or is not timed as its output is wrong, and why."""

    name: str
    reason: str
    kind: Kind = "peer"


@dataclass(frozen=True)
class Case:
    """One computation at one size, and everybody who computes it.

    sizes: what the label abbreviates. make: draws the inputs, on the device that is benchmarked.
    agree: `(output, inputs)` raises AssertionError where an output is wrong; it may return facts
    about a right one, such as its error, which go into the row.
    compare: of the facts by contestant, raises AssertionError where they do not go together.
    long: a run takes seconds, so few are made: the run that is held to agree is measured, too, and
    only those that take less than half of the budget run again.
    contestants: ours first, the best of ours first among them; ratios are taken to it.
    bytes: what has to be read and written at least. flops: useful floating-point operations.
    math: the dtype whose matrix rate bounds the flops; None is `dtype`.
    """

    op: str
    label: str
    sizes: Mapping[str, Any]
    dtype: torch.dtype
    make: Callable[[], Inputs]
    agree: Callable[[Any, Inputs], Facts | None]
    contestants: Sequence[Contestant | Absent]
    bytes: int
    flops: int
    direction: str = "forward"
    math: torch.dtype | None = None
    compare: Callable[[Mapping[str, Facts]], None] | None = None
    long: bool = False

    @property
    def title(self) -> str:
        """The case in a line."""
        return f"{self.op}, {self.label}, {str(self.dtype)[6:]}, {self.direction}"


_BACKENDS_OF = {"cpu": ("native",), "cuda": ("cuda", "triton")}


def ours(
    function: Callable[..., Any], options: Options, backends: Sequence[str] | None = None
) -> list[Contestant]:
    """Return the contestants that are a public op's backends on the device, best first.

    backends: their names, by default those that the device can have. With `--all-isa`, each lower
    instruction-set level of the compiled library is a contestant too.
    """

    def backend(name: str) -> Contestant:
        return Contestant(name, lambda inputs: lambda: function(**inputs, backend=name), "ours")

    def at_level(level: str) -> Contestant:
        def prepare(inputs: Inputs) -> Run:
            def run() -> Any:
                with _native.use_isa(level):
                    return function(**inputs, backend="native")

            return run

        return Contestant(f"native {level}", prepare, "ours")

    names = _BACKENDS_OF[options.device] if backends is None else backends
    contestants = [backend(name) for name in names]
    if options.all_isa and "native" in names:
        contestants += [at_level(level) for level in _native.isa_levels() if level != _native.isa()]
    return contestants


def find_cases(folder: Path, options: Options, names: Sequence[str] = ()) -> Iterator[Case]:
    """Yield the cases of the files bench_<stem>.py in `folder`; `names` picks by stem or by op."""
    for path in sorted(folder.glob("bench_*.py")):
        stem = path.stem.removeprefix("bench_")
        for case in _load(folder, path.stem).cases(options):
            if not names or stem in names or case.op in names:
                yield case


def _load(folder: Path, name: str) -> ModuleType:
    """Import a file of `folder` in a package, so that it can say `from . import peers`."""
    package = "livrec_benches"
    if package not in sys.modules or sys.modules[package].__path__ != [str(folder)]:
        for old in [n for n in sys.modules if n == package or n.startswith(f"{package}.")]:
            del sys.modules[old]
        sys.modules[package] = ModuleType(package)
        sys.modules[package].__path__ = [str(folder)]
    return importlib.import_module(f"{package}.{name}")
