"""The codes of rooms that are on air, kept up to date slice by slice."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Self

import numpy as np
import torch
from torch import Tensor

from .._checks import INTEGERS, check_choice, check_codes, check_levels, check_tensor
from .._files import replacing
from ..reference.majority_vote import vote_dtype
from ._ballots import Array, Ballots, Index, grown

_FORMAT = "livrec_fast.RoomVotes"
_DENSE = 256  # codewords of a level up to which every room has a counter for each


class RoomVotes:
    r"""Majority votes of many rooms, of whose slices only the counts are kept.

    After any calls of `add`, `codes(rooms)` is what `majority_vote` gives for all the slices added
    to these rooms, in the order of their times.

    Ties go to the codeword seen last, and at equal times to the lowest code. Exact; the same
    whatever slices share a call. Kept on the host, in NumPy arrays; not safe to change from two
    threads at once.

    Memory: a room takes 24 bytes for its id, 8 for its latest time, 20 per level for the leading
    codeword, and the counts. By rule "per_level" these are an array, [N_l], for levels of up to 256
    codewords (512 bytes for four levels of 64); for larger levels, and by rule "path", 26 bytes for
    each codeword, or path of codewords, that the room has had, and by "path" 20 more, as a path is
    voted on in its turn. Arrays grow by halves. Counts are uint16; once one passes 65,535, those of
    its level become uint32 (or uint64), so none overflows or stops. `add` takes
    O(M log M) for M slices and, where a room or a path is new, a copy of the index.

    Source: FLUID, section 3.2 (room-level codes, updated with every slice).

    Example:
        >>> votes = RoomVotes((64, 64, 64, 64), version=quantizer.version)
        >>> votes.add(rooms, quantizer.encode(slices))  # rooms int64 [M]
        >>> votes.codes(rooms)  # int16 [M, 4]
    """

    def __init__(
        self, levels: Sequence[int], *, rule: str = "per_level", version: str | None = None
    ):
        """Start without rooms.

        Args:
            levels: (N_1, ..., N_L), the sizes of the codebooks, 1 to 2^31 each.
            rule: "per_level" or "path", as in `majority_vote`.
            version: of the codebooks, such as `ResidualKMeans.version`: codes of one version mean
                nothing among those of another.
        """
        self.levels = tuple(check_levels(levels, most=2**31))
        check_choice("rule", rule, ("per_level", "path"))
        self.rule, self.version = rule, version
        self.clock = 0
        self._index = Index()
        self._latest = np.zeros(0, np.int64)
        dense = [rule == "per_level" and size <= _DENSE for size in self.levels]
        self._ballots = [Ballots(*args) for args in zip(self.levels, dense, strict=True)]

    def __len__(self) -> int:
        """Count the rooms."""
        return len(self._index.keys)

    @property
    def rooms(self) -> Tensor:
        """The ids of all rooms, int64, in the order in which they came."""
        return torch.from_numpy(self._index.keys.copy())

    def add(
        self,
        rooms: Tensor,
        codes: Tensor,
        *,
        time: Tensor | None = None,
        version: str | None = None,
    ) -> None:
        """Count slices; a room may have several of them, and new rooms are opened.

        Args:
            rooms: int64 [M], any ids.
            codes: [M, L] integers, column l in [-1, N_l); -1 is unknown and casts no vote.
            time: int64 [M], when the slices were seen; where None, they were seen one after the
                other, at clock + 1, clock + 2, ... The clock is the greatest time there has been.
                A slice older than what its room had before this call counts as seen at the room's
                latest time: it comes to be known no earlier.
            version: of the codebooks that made the codes, if known.

        Raises:
            TypeError: a wrong type or dtype. ValueError: a wrong shape, or another version than
            that of these votes. IndexError: a code out of range. Nothing is counted then.
        """
        self._check_version("version", version)
        check_tensor("rooms", rooms, ("M",), (torch.int64,))
        check_tensor("codes", codes, (len(rooms), len(self.levels)), INTEGERS)
        check_codes(codes, self.levels, least=-1)
        ids, voted = _array(rooms), _array(codes)
        if time is None:
            seen = self.clock + 1 + np.arange(len(ids))
        else:
            check_tensor("time", time, (len(rooms),), (torch.int64,))
            seen = _array(time)
        if not len(ids):
            return
        contest = self._index.add(ids)
        self._latest = grown(self._latest, len(self), np.iinfo(np.int64).min)
        before = self._latest[contest]
        np.maximum.at(self._latest, contest, seen)
        self.clock = max(self.clock, int(seen.max()))
        self._cast(contest, voted, np.maximum(seen, before))

    def codes(self, rooms: Tensor) -> Tensor:
        """Return the voted codes [B, L] of rooms [B], -1 for rooms that are not known.

        int16 where every N_l <= 32,767, else int32; as in `majority_vote`, a level without votes is
        -1, and by rule "path" so are all levels after it.
        """
        check_tensor("rooms", rooms, ("B",), (torch.int64,))
        contest = self._index.find(_array(rooms))
        columns = []
        for ballots in self._ballots:
            code, candidate = ballots.winner(contest)
            columns.append(code)
            contest = candidate if self.rule == "path" else contest
        return torch.from_numpy(np.stack(columns, 1)).to(vote_dtype(self.levels))

    def evict(self, rooms: Tensor) -> int:
        """Forget rooms, int64 [B]; ids that are not known are passed over. Return how many went."""
        check_tensor("rooms", rooms, ("B",), (torch.int64,))
        gone = np.zeros(len(self), bool)
        number = self._index.find(_array(rooms))
        gone[number[number >= 0]] = True
        return self._keep(~gone)

    def evict_before(self, time: int) -> int:
        """Forget rooms whose latest slice is older than `time`. Return how many went."""
        return self._keep(self._latest[: len(self)] >= time)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to a safetensors file, whole or not at all."""
        from safetensors.numpy import save

        arrays = {"rooms": self._index.keys, "latest": self._latest[: len(self)]}
        for level, ballots in enumerate(self._ballots):
            arrays |= {f"level_{level}.{name}": a for name, a in ballots.state().items()}
        settings = {name: getattr(self, name) for name in ("levels", "rule", "version", "clock")}
        metadata = {"format": _FORMAT, "settings": json.dumps(settings)}
        contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        with replacing(path) as file:
            file.write(save(contiguous, metadata))

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, version: str | None = None) -> Self:
        """Read what `save` wrote.

        version: of the codebooks in use, if known.

        Raises: ValueError where the file is not one of ours or of another version.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="np") as file:
                metadata = file.metadata() or {}
                arrays = {key: file.get_tensor(key) for key in file.keys()}
        except SafetensorError as error:
            raise ValueError(f"path: {path} is not a safetensors file ({error})") from error
        if metadata.get("format") != _FORMAT:
            raise ValueError(f"path: {path} was not written by RoomVotes.save")
        settings = json.loads(metadata["settings"])
        clock = settings.pop("clock")
        votes = cls(**settings)
        votes._check_version(f"path: {path} holds other codes", version)
        votes.clock = clock
        try:
            votes._restore(arrays)
        except (KeyError, ValueError) as error:
            raise ValueError(f"path: {path} is damaged: {error}") from error
        return votes

    def _cast(self, contest: Array, codes: Array, time: Array) -> None:
        """Give each slice's votes; by rule "path", a candidate is what the next level votes on."""
        for level, ballots in enumerate(self._ballots):
            votes = codes[:, level] >= 0
            code = codes[votes, level].astype(np.int64)
            candidate = ballots.add(contest[votes], code, time[votes])
            if self.rule == "path":
                contest, codes, time = candidate, codes[votes], time[votes]

    def _keep(self, kept: Array) -> int:
        before = len(self)
        if kept.all():
            return 0
        contests = np.flatnonzero(kept)
        self._index, self._latest = Index(self._index.keys[kept]), self._latest[contests]
        for ballots in self._ballots:
            candidates = ballots.keep(contests)
            contests = candidates if self.rule == "path" else contests
        return before - len(self)

    def _restore(self, arrays: dict[str, Array]) -> None:
        self._index, self._latest = Index(arrays["rooms"]), arrays["latest"]
        if len(self) != len(self._latest) or len(self) != len(np.unique(self._index.keys)):
            raise ValueError("rooms: each must be there once, with its latest time")
        for level, ballots in enumerate(self._ballots):
            prefix = f"level_{level}."
            named = {k.removeprefix(prefix): a for k, a in arrays.items() if k.startswith(prefix)}
            ballots.restore(named)

    def _check_version(self, name: str, version: str | None) -> None:
        if version is not None and version != self.version:
            raise ValueError(
                f"{name}: these votes are of codebooks {self.version!r}, got {version!r}"
            )


def _array(tensor: Tensor) -> Array:
    return tensor.detach().cpu().numpy()
