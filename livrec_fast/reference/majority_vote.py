"""Majority voting over slices, as the rule has it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ._oracle import Oracle, random_offsets


def vote_dtype(levels: Sequence[int]) -> torch.dtype:
    """Return int16 where every level has at most 32,767 codewords, else int32; both hold -1."""
    return torch.int16 if max(levels) <= 32767 else torch.int32


def majority_vote(
    codes: Tensor, offsets: Tensor, levels: Sequence[int], rule: str = "per_level"
) -> Tensor:
    """voted[b, l] = argmax_c |{t of history b : codes[t, l] = c}|, the codeword seen last on ties.

    A slice scores count * (T + 1) + its position, so that the greatest score is the latest slice of
    the most frequent codeword. Position T, without votes, is the answer -1 where there are none.
    """
    total = len(codes)
    history = torch.repeat_interleave(offsets.diff())
    position = torch.arange(total, device=codes.device)
    may_vote = torch.ones_like(history, dtype=torch.bool)
    voted = []
    for code, size in zip(codes.long().T, levels, strict=True):
        votes = may_vote & (code >= 0)
        ballot = (history * size + code)[votes]
        _, kind, counts = torch.unique(ballot, return_inverse=True, return_counts=True)
        score = counts[kind] * (total + 1) + position[votes]
        best = offsets.new_full((len(offsets) - 1,), total)
        best = best.scatter_reduce(0, history[votes], score, "amax")
        winner = F.pad(code, (0, 1), value=-1)[best % (total + 1)]
        voted.append(winner)
        if rule == "path":
            may_vote = votes & (code == winner[history])
    return torch.stack(voted, 1).to(vote_dtype(levels))


def make_inputs(
    generator: torch.Generator, dtype: torch.dtype, *, B: int, T: int, L: int, N: int, path: int
) -> dict[str, Any]:
    """Draw histories of at most T slices with one code in eight unknown; `dtype` plays no part."""
    offsets = random_offsets(generator, B, T)
    shape = (int(offsets[-1]), L)
    levels = [N + 2 * level for level in range(L)]
    codes = torch.randint(2**31 - 1, shape, generator=generator) % torch.tensor(levels)
    unknown = torch.randint(8, shape, generator=generator) == 0
    return {
        "codes": codes.masked_fill(unknown, -1).to(torch.int32),
        "offsets": offsets,
        "levels": levels,
        "rule": "path" if path else "per_level",
    }


_SIZES = {"B": (1, 20), "T": (0, 30), "L": (1, 4), "N": (1, 12), "path": (0, 1)}
_CASES = {
    "typical": {"B": 40, "T": 30, "L": 4, "N": 6, "path": 0},
    "path": {"B": 40, "T": 30, "L": 4, "N": 3, "path": 1},
    "no histories": {"B": 0, "T": 0, "L": 2, "N": 4, "path": 0},
    "empty histories": {"B": 3, "T": 0, "L": 2, "N": 4, "path": 1},
    "one of each": {"B": 1, "T": 1, "L": 1, "N": 1, "path": 0},
    "wide codes": {"B": 5, "T": 9, "L": 2, "N": 40_000, "path": 0},
}
ORACLES = {
    "majority_vote": Oracle(majority_vote, make_inputs, _SIZES, _CASES, dtypes=(torch.float32,))
}
