"""Every case and contestant through pytest-benchmark, for its --benchmark-compare and -histogram.

The tables in the README come from `livrec-fast bench`, which lets contestants take turns; here each
is timed by itself, so compare numbers of a quiet machine only.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from livrec_fast.benchmarking import Absent, Case, Contestant, Machine, enter


def test_speed(benchmark: Any, case: Case, contestant: Contestant | Absent, request: Any) -> None:
    """Assert agreement with the reference, then time."""
    device = request.config.getoption("device")
    entered = enter(contestant, case, case.make(), device)
    if isinstance(entered, Absent):
        pytest.skip(f"{entered.name}: {entered.reason}")
    benchmark.group = case.title
    benchmark.extra_info.update(Machine(device).describe(), contestant=contestant.name)

    def run() -> None:
        entered.run()
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(run, rounds=2 if case.long else 10, warmup_rounds=0 if case.long else 2)
