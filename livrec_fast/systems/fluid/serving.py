"""The serving path: slices of rooms on air, as they come, to published codes."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from ..._checks import FLOATS, check_tensor
from ...modules import ResidualKMeans, RoomVotes
from ...reference.majority_vote import vote_dtype
from . import checkpoints
from .code_table import Published

Encode = Callable[[Sequence[Any]], Any]
_KIND, _LEAST = "publisher", -(2**63)


class CodePublisher:
    """Turns the slices of rooms on air into published codes, one after the other.

    Every slice is encoded, quantised and counted among its room's votes; what is published is what
    `make_codes` gives for the same slices of the same room up to and with this one, however the
    slices of other rooms come between.

    The slices of a room must come in the order of their times, each later than the one before: a
    slice that is late, or comes twice, is refused and nothing of the call is counted. A room that
    was closed stays closed. `evict_before(t)` forgets rooms, closed ones too, that had their last
    slice before t, and slices older than t are refused from then on; a room that was forgotten on
    air and goes on starts anew.

    Memory: that of `RoomVotes`, and a record per room. Not safe to call from two threads at once.

    Source: FLUID, sections 3.2 and 3.4.1.

    Example:
        >>> publisher = CodePublisher(quantizer, lambda raw: encoder.encode(reader.slices(raw)))
        >>> record = publisher.publish(room, time_ms, raw_slice)
        >>> table.apply(record)  # CodeTable(quantizer.levels, quantizer.version)
    """

    def __init__(
        self, quantizer: ResidualKMeans, encode: Encode | None = None, *, rule: str = "per_level"
    ):
        """Start without rooms.

        Args:
            quantizer: fitted; a publisher belongs to the version that it has now.
            encode: gives vectors [M, D] for a list of M slices' content, such as the encoder. None
                where vectors are handed in.
            rule: of the rooms' votes, "per_level" or "path".

        Raises: RuntimeError: the quantizer is not fitted. ValueError: another rule.
        """
        if not isinstance(quantizer, ResidualKMeans):
            raise TypeError(f"quantizer: must be ResidualKMeans, got {type(quantizer).__name__}")
        if quantizer.dim == 0:
            raise RuntimeError("quantizer: has no codebooks yet; call fit or load")
        self.quantizer, self._encode, self.version = quantizer, encode, quantizer.version
        self.horizon = _LEAST
        self._votes = RoomVotes(quantizer.levels, rule=rule, version=self.version)
        self._last: dict[int, Published] = {}
        self._closed: dict[int, int] = {}  # when rooms had their last slice

    def __len__(self) -> int:
        """Count the rooms on air."""
        return len(self._last)

    @property
    def rule(self) -> str:
        """Of the votes."""
        return self._votes.rule

    def publish(
        self, room: int, time: int, content: Any = None, *, vector: Any = None
    ) -> Published:
        """Take a slice in and return what is to be published of its room.

        Args:
            room: of any int64 id.
            time: when the slice was complete, in integers of any unit.
            content: what `encode` takes a list of.
            vector: [D], in its place.

        Raises: as `publish_many`.
        """
        contents = None if content is None else [content]
        vectors = None if vector is None else torch.as_tensor(vector)[None]
        return self.publish_many([room], [time], contents, vectors=vectors)[0]

    @torch.no_grad()
    def publish_many(
        self,
        rooms: Sequence[int],
        times: Sequence[int],
        contents: Sequence[Any] | None = None,
        *,
        vectors: Any = None,
    ) -> list[Published]:
        """Take slices in, encoded together, and return a record for each.

        Args:
            rooms: M ids; a room may be there several times.
            times: M, in order for each room.
            contents: M, for `encode`.
            vectors: [M, D], in their place.

        Raises:
            TypeError, ValueError: both or neither of contents and vectors, other lengths, vectors
            that are not finite; a slice that is late or of a closed room; codebooks that changed.
            Nothing is counted then.
        """
        self._check_version()
        rooms, times = _integers("rooms", rooms), _integers("times", times)
        if len(rooms) != len(times):
            raise ValueError(f"times: one for each of {len(rooms)} rooms is needed")
        self._check_order(rooms, times)
        codes = self.quantizer.encode(self._vectors(len(rooms), contents, vectors)).cpu()
        made: list[Published | None] = [None] * len(rooms)
        for wave in _waves(rooms):
            ids = torch.tensor([rooms[at] for at in wave], dtype=torch.int64)
            self._votes.add(ids, codes[wave], version=self.version)
            voted = self._votes.codes(ids).tolist()
            for at, own, code in zip(wave, codes[wave].tolist(), voted, strict=True):
                made[at] = self._keep(rooms[at], times[at], tuple(own), tuple(code))
        return [record for record in made if record is not None]

    def current(self) -> list[Published]:
        """Return the latest record of each room on air, those of the least recent slices first."""
        return sorted(self._last.values(), key=lambda record: (record.time, record.room))

    def close(self, room: int) -> Published:
        """End a room: its votes are forgotten. Return its last record. Raises: KeyError."""
        if room not in self._last:
            raise KeyError(f"room: {room} is not on air")
        record = self._last.pop(room)
        self._closed[room] = record.time
        self._votes.evict(torch.tensor([room]))
        return record

    def evict_before(self, time: int) -> list[int]:
        """Forget rooms whose last slice is older than `time`; return those that were on air."""
        self.horizon = max(self.horizon, time)
        gone = [room for room, record in self._last.items() if record.time < time]
        for room in gone:
            del self._last[room]
        self._closed = {room: last for room, last in self._closed.items() if last >= time}
        self._votes.evict(torch.tensor(gone, dtype=torch.int64))
        return gone

    def snapshot(self, path: str | os.PathLike[str]) -> None:
        """Write everything but the codebooks to one file, whole or not at all."""
        records = list(self._last.values())
        tensors = {
            "votes": _saved(self._votes),
            "room": torch.tensor([r.room for r in records], dtype=torch.int64),
            "time": torch.tensor([r.time for r in records], dtype=torch.int64),
            "slice_code": _codes([r.slice_code for r in records], self.quantizer.levels),
            "room_code": _codes([r.room_code for r in records], self.quantizer.levels),
            "closed": torch.tensor(list(self._closed.items()), dtype=torch.int64).view(-1, 2),
        }
        facts = {"kind": _KIND, "version": self.version, "horizon": self.horizon}
        checkpoints.write(Path(path), tensors, **facts)

    @classmethod
    def restore(
        cls,
        path: str | os.PathLike[str],
        quantizer: ResidualKMeans,
        encode: Encode | None = None,
    ) -> Self:
        """Go on from a snapshot.

        Raises: ValueError: the file is none, or its codes are of codebooks of another version.
        """
        tensors, facts = checkpoints.read(Path(path))
        if facts.get("kind") != _KIND:
            raise ValueError(f"path: {path} was not written by CodePublisher.snapshot")
        publisher = cls(quantizer, encode)
        if facts["version"] != publisher.version:
            raise ValueError(
                f"path: the codes of {path} are of codebooks {facts['version']}, not of "
                f"{publisher.version}"
            )
        publisher._votes = _loaded(tensors["votes"], publisher.version)
        publisher.horizon = facts["horizon"]
        names = ("room", "time", "slice_code", "room_code")
        for room, time, own, voted in zip(*(tensors[n].tolist() for n in names), strict=True):
            publisher._keep(room, time, tuple(own), tuple(voted))
        publisher._closed = {room: time for room, time in tensors["closed"].tolist()}
        return publisher

    def _keep(
        self, room: int, time: int, own: tuple[int, ...], voted: tuple[int, ...]
    ) -> Published:
        self._last[room] = Published(room, time, own, voted, self.version)
        return self._last[room]

    def _vectors(self, count: int, contents: Sequence[Any] | None, vectors: Any) -> Tensor:
        """Return the slices' vectors as the codebooks have theirs."""
        if (contents is None) == (vectors is None):
            raise ValueError("vectors: either vectors or contents are needed, and not both")
        if contents is not None:
            if self._encode is None:
                raise ValueError("contents: this publisher has no `encode`; hand vectors in")
            vectors = self._encode(contents)
        found = torch.as_tensor(vectors)
        check_tensor("vectors", found, (count, self.quantizer.dim), FLOATS)
        return found.to(self.quantizer.codebooks[0])

    def _check_order(self, rooms: list[int], times: list[int]) -> None:
        latest: dict[int, int] = {}
        for room, time in zip(rooms, times, strict=True):
            if room in self._closed:
                raise ValueError(f"rooms: room {room} is closed, at {self._closed[room]}")
            last = latest.get(room)
            if last is None and room in self._last:
                last = self._last[room].time
            if last is not None and time <= last:
                raise ValueError(
                    f"times: the slice of room {room} at {time} is late or comes twice: the "
                    f"room's latest is at {last}"
                )
            if time < self.horizon:
                raise ValueError(
                    f"times: the slice of room {room} at {time} is late: what is older than "
                    f"{self.horizon} was forgotten"
                )
            latest[room] = time

    def _check_version(self) -> None:
        if self.quantizer.version != self.version:
            raise ValueError(
                f"quantizer: its codebooks changed to version {self.quantizer.version}, and these "
                f"rooms' codes are of {self.version}; start a new publisher"
            )


def _integers(name: str, values: Sequence[int]) -> list[int]:
    """Return int64 values as a list of ints."""
    found = np.asarray(values)
    if found.size and found.dtype.kind != "i":
        raise TypeError(f"{name}: must be int64 integers, got {found.dtype}")
    if found.ndim != 1:
        raise ValueError(f"{name}: shape must be [M], got {list(found.shape)}")
    listed: list[int] = found.tolist()
    return listed


def _waves(rooms: Sequence[int]) -> list[list[int]]:
    """Part slices so that no room is in a part twice: the first of each room, the second, ..."""
    waves: list[list[int]] = []
    met: Counter[int] = Counter()
    for at, room in enumerate(rooms):
        if met[room] == len(waves):
            waves.append([])
        waves[met[room]].append(at)
        met[room] += 1
    return waves


def _codes(codes: Sequence[tuple[int, ...]], levels: Sequence[int]) -> Tensor:
    return torch.tensor(codes, dtype=vote_dtype(levels)).view(-1, len(levels))


def _saved(votes: RoomVotes) -> Tensor:
    """Return the bytes of the votes' own file, so that a snapshot is one file."""
    with tempfile.TemporaryDirectory() as folder:
        votes.save(Path(folder, "votes"))
        return torch.frombuffer(bytearray(Path(folder, "votes").read_bytes()), dtype=torch.uint8)


def _loaded(saved: Tensor, version: str) -> RoomVotes:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "votes").write_bytes(saved.numpy().tobytes())
        return RoomVotes.load(Path(folder, "votes"), version=version)
