"""The measuring behind `livrec-fast bench`: what a file in benches/ needs to state its cases."""

from ._cases import Absent, Case, Contestant, Disagreement, Options, find_cases, ours
from ._machine import Machine
from ._results import floor_ms, milliseconds, remarks
from ._run import DISAGREES, Entered, Row, enter, run_case

__all__ = [
    "DISAGREES", "Absent", "Case", "Contestant", "Disagreement", "Entered", "Machine", "Options",
    "Row", "enter", "find_cases", "floor_ms", "milliseconds", "ours", "remarks", "run_case",
]  # fmt: skip
