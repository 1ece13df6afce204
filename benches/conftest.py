"""The benchmarks as pytest-benchmark runs them: `pytest benches --benchmark-only`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from livrec_fast.benchmarking import Options, find_cases


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add what `livrec-fast bench` has, too."""
    group = parser.getgroup("livrec_fast")
    group.addoption("--quick", action="store_true", help="a tenth of the rows, float32 only")
    group.addoption("--device", choices=["cpu", "cuda"], default="cpu")
    group.addoption("--op", action="append", default=[], help="only this op or file stem")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make one benchmark per case and contestant."""
    if "contestant" in metafunc.fixturenames:
        config = metafunc.config
        options = Options(config.getoption("device"), config.getoption("quick"))
        cases = find_cases(Path(__file__).parent, options, config.getoption("op"))
        pairs = [(case, contestant) for case in cases for contestant in case.contestants]
        names = [f"{case.title}, {contestant.name}" for case, contestant in pairs]
        metafunc.parametrize("case, contestant", pairs, ids=names)


@pytest.fixture(autouse=True)
def _synchronised(request: pytest.FixtureRequest) -> None:
    """Refuse a GPU that is not there before anything is drawn on it."""
    if request.config.getoption("device") == "cuda" and not torch.cuda.is_available():
        pytest.skip("this torch sees no CUDA device")
