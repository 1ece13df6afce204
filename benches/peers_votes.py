"""What else one would vote with: a loop over histories in numba, and one in NumPy."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch

from livrec_fast.benchmarking import Absent, Contestant, Options

Inputs = dict[str, Any]
_NUMBA, _NUMPY = "numba loop", "NumPy bincount loop"


def loops(options: Options, rule: str, histories: int) -> list[Contestant | Absent]:
    """Return both loops; the one in numba has a parallel loop over histories."""
    if options.device != "cpu":
        return [Absent(name, "runs on a CPU only") for name in (_NUMBA, _NUMPY)]
    if rule != "per_level":
        return [Absent(name, "votes every level by itself") for name in (_NUMBA, _NUMPY)]
    numpy: Contestant | Absent = Contestant(_NUMPY, _with_numpy, finish=torch.from_numpy)
    if histories > 20_000:
        numpy = Absent(_NUMPY, "takes many seconds for so many histories")
    try:
        import numba  # noqa: F401
    except ImportError:
        return [Absent(_NUMBA, "numba is not installed (pip install numba)"), numpy]

    def with_numba(inputs: Inputs) -> Callable[[], Any]:
        import numba

        numba.set_num_threads(min(options.threads, numba.config.NUMBA_NUM_THREADS))
        codes, offsets = inputs["codes"].numpy(), inputs["offsets"].numpy()
        levels, vote = np.array(inputs["levels"]), _compiled()
        return lambda: vote(codes, offsets, levels)

    return [Contestant(_NUMBA, with_numba, finish=torch.from_numpy), numpy]


def _with_numpy(inputs: Inputs) -> Callable[[], Any]:
    codes, offsets = inputs["codes"].numpy(), inputs["offsets"].numpy()
    levels = inputs["levels"]

    def run() -> np.ndarray[Any, Any]:
        voted = np.full((len(offsets) - 1, len(levels)), -1, np.int16)
        for history in range(len(voted)):
            slices = codes[offsets[history] : offsets[history + 1]]
            for level, size in enumerate(levels):
                column = slices[:, level][slices[:, level] >= 0]
                if len(column):
                    counts = np.bincount(column, minlength=size)
                    latest = column[::-1]
                    voted[history, level] = latest[(counts[latest] == counts.max()).argmax()]
        return voted

    return run


@cache
def _compiled() -> Any:
    import numba

    @numba.njit(parallel=True)
    def vote(codes: Any, offsets: Any, levels: Any) -> Any:
        histories, depth = len(offsets) - 1, len(levels)
        voted = np.full((histories, depth), -1, np.int16)
        for history in numba.prange(histories):
            counts = np.zeros((depth, levels.max()), np.int32)
            most = np.zeros(depth, np.int32)
            for t in range(offsets[history], offsets[history + 1]):
                for level in range(depth):
                    code = codes[t, level]
                    if code >= 0:
                        counts[level, code] += 1
                        if counts[level, code] >= most[level]:
                            most[level] = counts[level, code]
                            voted[history, level] = code
        return voted

    return vote
