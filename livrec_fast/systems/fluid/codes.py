"""Codes of slices and of rooms: what the log's embeddings become before a ranker reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..._checks import check_levels
from ...logs.log import Array, LiveLog, known_before
from ...logs.votes import running_votes
from ...modules import ResidualKMeans

_CHUNK = 1 << 16  # slices encoded at a time
_COMPILED = 1 << 20  # slices from which compiling the votes takes less time than it saves


@dataclass(frozen=True)
class CodeBook:
    """A code per slice, and the code of its room by the slices up to and with it.

    slice_codes: int16 [S, L]. room_codes: int16 [S, L]. quantizer: which made them; codes of
    another version mean nothing beside these. fitted_on: how many slices the codebooks are of.
    """

    slice_codes: Array
    room_codes: Array
    quantizer: ResidualKMeans
    fitted_on: int

    @property
    def version(self) -> str | None:
        """The version of the codebooks."""
        return self.quantizer.version

    def unseen_votes(self) -> float:
        """Return the share of the rooms' codes that no slice has: what votes by level can make."""
        seen = {code.tobytes() for code in np.unique(self.slice_codes, axis=0)}
        voted, count = np.unique(self.room_codes, axis=0, return_counts=True)
        strange = [n for code, n in zip(voted, count, strict=True) if code.tobytes() not in seen]
        return float(sum(strange) / max(1, count.sum()))


def make_codes(
    log: LiveLog,
    before: int,
    levels: Sequence[int],
    *,
    rule: str = "per_level",
    seed: int = 0,
    sample: int | None = 1 << 16,
    iterations: int = 20,
) -> CodeBook:
    """Fit codebooks on the slices complete before a time (ms), then encode all and vote.

    rule: of the votes, "per_level" or "path". Both domains' slices are fitted on together.

    Raises: ValueError where a level has more codewords than int16 can tell apart, 32,768, or more
    than there are slices known.
    """
    check_levels(list(levels), most=2**15)
    known = np.flatnonzero(known_before(log, before))
    if len(known) < max(levels):
        raise ValueError(
            f"slices: {len(known)} are complete before the split, and a codebook of "
            f"{max(levels)} needs as many"
        )
    some = sample if sample is not None and sample < len(known) else None
    quantizer = ResidualKMeans(levels, iterations=iterations, seed=seed, sample=some)
    quantizer.fit(torch.from_numpy(log.slice_embedding[known]).float())
    codes = np.empty((len(log.slice_room), len(levels)), np.int16)
    for first in range(0, len(codes), _CHUNK):
        part = slice(first, first + _CHUNK)
        rows = torch.from_numpy(log.slice_embedding[part]).float()
        codes[part] = quantizer.encode(rows).to(torch.int16).numpy()
    way = "numpy" if len(codes) < _COMPILED else "auto"
    voted = running_votes(log.slice_room, codes, levels, rule=rule, backend=way)
    return CodeBook(codes, voted.astype(np.int16), quantizer, len(known))
