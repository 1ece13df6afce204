"""The measuring behind `livrec-fast bench`: what a file in benches/ needs to state its cases."""

from ._cases import Absent, Case, Contestant, Disagreement, Options, find_cases, ours
from ._machine import Machine
from ._results import floor_ms, milliseconds
from ._run import Row, enter, run_case

__all__ = [
    "Absent", "Case", "Contestant", "Disagreement", "Machine", "Options", "Row", "enter",
    "find_cases", "floor_ms", "milliseconds", "ours", "run_case",
]  # fmt: skip
