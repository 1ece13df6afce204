"""Published codes, and the table that a ranker is served from: codes without rooms' ids."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from ..._checks import check_codes, check_levels
from ...reference.majority_vote import vote_dtype


@dataclass(frozen=True)
class Published:
    """What is published of a room with each slice.

    time: when the slice was complete. slice_code, room_code: L ints each; the room's by its slices
    up to and with this one. version: of the codebooks, without which codes mean nothing.
    """

    room: int
    time: int
    slice_code: tuple[int, ...]
    room_code: tuple[int, ...]
    version: str

    def to_json(self) -> str:
        """Return the record as one line."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, line: str) -> Self:
        """Read what `to_json` made. Raises: ValueError where it is no such line."""
        try:
            found = json.loads(line)
            codes = {name: tuple(map(int, found[name])) for name in ("slice_code", "room_code")}
            return cls(int(found["room"]), int(found["time"]), **codes, version=found["version"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"line: no published record: {line[:80]!r} ({error!r})") from error


class RoomCodes(NamedTuple):
    """Codes of candidates, [..., L] each, -1 where a room has no complete slice yet."""

    slice_codes: Tensor
    room_codes: Tensor


@dataclass(frozen=True)
class CodeBatch:
    """What an ID-free `Ranker` reads of N requests with C candidates each, and no room's id.

    As in `livrec_fast.logs.batches.Batch`: user [N], author [N, C], slice_codes and room_codes
    [N, C, L], dense [N, C, F], offsets [N + 1], history_author [T], history_codes [T, L] and
    history_gap [T].
    """

    user: Tensor
    author: Tensor
    slice_codes: Tensor
    room_codes: Tensor
    dense: Tensor
    offsets: Tensor
    history_author: Tensor
    history_codes: Tensor
    history_gap: Tensor


_FEATURES = {field.name for field in fields(CodeBatch)} - set(RoomCodes._fields)


class CodeTable:
    """The latest codes of each room, kept up to date with records and read by a ranker.

    Rooms' ids are looked up and go no further: what is returned depends on the records alone, not
    on which ids they came under or in which order rooms appeared.

    Memory: 2 L codes and about 100 bytes per room. Not safe to change while it is read.

    Source: FLUID, section 3.4 (no candidate-side item id).

    Example:
        >>> table = CodeTable(quantizer.levels, quantizer.version)
        >>> table.apply(publisher.publish(room, time_ms, raw_slice))
        >>> ranker(table.batch(rooms, user=user, author=author, ...)).logits
    """

    def __init__(self, levels: Sequence[int], version: str):
        """Start without rooms.

        Args:
            levels: of the codes.
            version: of the codebooks that the ranker was trained with.
        """
        self.levels, self.version = tuple(check_levels(levels)), version
        self._row: dict[int, int] = {}
        self._free: list[int] = []
        dtype = torch.empty(0, dtype=vote_dtype(self.levels)).numpy().dtype
        self._codes = np.full((0, 2, len(self.levels)), -1, dtype)
        self._time = np.zeros(0, np.int64)

    def __len__(self) -> int:
        """Count the rooms."""
        return len(self._row)

    def apply(self, record: Published) -> bool:
        """Take a record in; return whether it is news: an older one than is there changes nothing.

        Raises: ValueError: it is of other codebooks, or has another number of levels. IndexError: a
        code out of range.
        """
        if record.version != self.version:
            raise ValueError(
                f"record: the codes of room {record.room} are of codebooks {record.version}, this "
                f"table is of {self.version}"
            )
        codes = self._checked(record)
        row = self._row.get(record.room)
        if row is not None and self._time[row] >= record.time:
            return False
        if row is None:
            row = self._row[record.room] = self._new_row()
        self._codes[row], self._time[row] = codes, record.time
        return True

    def forget(self, rooms: Iterable[int]) -> None:
        """Drop rooms that went off air; ids that are not known are passed over."""
        for room in rooms:
            row = self._row.pop(int(room), None)
            if row is not None:
                self._free.append(row)

    def codes(self, rooms: Tensor) -> RoomCodes:
        """Return the codes of rooms, int64 of any shape, on their device."""
        if not isinstance(rooms, Tensor) or rooms.dtype != torch.int64:
            raise TypeError(f"rooms: must be an int64 tensor, got {getattr(rooms, 'dtype', rooms)}")
        asked, inverse = np.unique(rooms.detach().cpu().numpy(), return_inverse=True)
        row = np.fromiter((self._row.get(room, -1) for room in asked.tolist()), np.int64)
        found = np.full((len(asked), *self._codes.shape[1:]), -1, self._codes.dtype)
        found[row >= 0] = self._codes[row[row >= 0]]
        spread = torch.from_numpy(found[inverse.reshape(rooms.shape)]).to(rooms.device)
        return RoomCodes(spread[..., 0, :].contiguous(), spread[..., 1, :].contiguous())

    def batch(self, rooms: Tensor, **features: Tensor) -> CodeBatch:
        """Return what a ranker reads of requests.

        Args:
            rooms: int64 [N, C], the candidates.
            features: all that `CodeBatch` has beside the codes, and nothing else.

        Raises: TypeError: a feature is missing, or there is one that an ID-free ranker has no use
        for, such as the room.
        """
        if features.keys() != _FEATURES:
            odd = sorted(features.keys() ^ _FEATURES)
            raise TypeError(f"features: must be {', '.join(sorted(_FEATURES))}; differs in {odd}")
        given: dict[str, Any] = dict(features)
        return CodeBatch(**given, **self.codes(rooms)._asdict())

    def _checked(self, record: Published) -> Any:
        codes = (record.slice_code, record.room_code)
        if any(len(code) != len(self.levels) for code in codes):
            raise ValueError(f"record: codes of {len(self.levels)} levels are needed, got {codes}")
        for name, code in zip(("slice_code", "room_code"), codes, strict=True):
            check_codes(torch.tensor([code]), self.levels, name, least=-1)
        return codes

    def _new_row(self) -> int:
        if self._free:
            return self._free.pop()
        row = len(self._row)  # all rows are taken
        if row == len(self._time):
            more = max(16, row // 2)
            self._codes = np.pad(self._codes, ((0, more), (0, 0), (0, 0)), constant_values=-1)
            self._time = np.pad(self._time, (0, more))
        return row
