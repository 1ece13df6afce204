"""From a log to batches: requests, codes, and which requests belong to which period."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ...logs.batches import GAPS, Batch, Feed
from ...logs.log import KINDS, VIDEO, Array, LiveLog
from ...logs.requests import Requests, split
from . import checkpoints
from .codes import CodeBook, make_codes
from .config import Sizes
from .recipes import TEST

if TYPE_CHECKING:
    from .training import Settings

WORLD = "world"
_OF_EVENTS = ("user", "room", "author", "ts", "kind", "value", "pos")


@dataclass(frozen=True)
class Source:
    """Where logs come from.

    data: "world", a synthetic one for each seed, or a folder. sizes: of the world, by name.
    candidates: of a request. share: of the requests to train on. most: requests at
    most, those around the split; None, all. rule: of the rooms' votes. held_out: leave out all
    events from the test period on, and so train and test on what would have been trained on:
    settings are to be chosen so.
    """

    data: str = WORLD
    sizes: tuple[tuple[str, float], ...] = ()
    candidates: int = 8
    share: float = 0.8
    most: int | None = None
    rule: str = "per_level"
    held_out: bool = False

    def check(self) -> None:
        """Refuse sizes and folders that no log can be made of; what a folder holds is not read."""
        if self.data == WORLD:
            from ...data import world

            sizes: dict[str, Any] = dict(self.sizes)
            world.settings(**sizes)
        elif not Path(self.data).is_dir():
            raise ValueError(f"data: there is no folder {self.data}")

    def log(self, seed: int) -> LiveLog:
        """Make the world of a seed, or read the folder."""
        self.check()
        if self.data == WORLD:
            from ...data import world

            sizes: dict[str, Any] = dict(self.sizes)
            log = world.make(seed, **sizes).log
        else:
            log = read_folder(Path(self.data))
        return self.split(log, seed)[2] if self.held_out else log

    def split(self, log: LiveLog, seed: int) -> tuple[Requests, Requests, LiveLog]:
        """Return the requests to train and to test on, and the log before the latter."""
        train, test = split(log, self.share, candidates=self.candidates, seed=seed)
        events = int(np.searchsorted(log.ts, test.ts[0])) if len(test) else len(log.ts)
        cut = {name: getattr(log, name)[:events] for name in _OF_EVENTS}
        return train, test, replace(log, **cut)


def read_folder(folder: Path) -> LiveLog:
    """Read a log in whichever format it is of that there is a reader for."""
    from ...data import comment_streams, kuailive, live_log

    for reader in (kuailive, comment_streams):
        if reader.recognises(folder):
            return reader.read(folder)
    return live_log.read(folder)


class Material:
    """The batches of each period, in the order of time, and all that is known beside them."""

    def __init__(self, source: Source, settings: Settings, seed: int):
        """Make requests and codes; the seed draws the negatives and starts the codebooks."""
        self.log, self.train = source.log(seed), settings.train
        asked, first = _latest(*source.split(self.log, seed)[:2], source)
        if first < 5 or first == len(asked):
            raise ValueError(
                f"data: {first} requests to train on and {len(asked) - first} to test on are too "
                "few"
            )
        self.codes: CodeBook = make_codes(
            self.log, int(asked.ts[first]), settings.model.levels, rule=source.rule, seed=seed
        )
        self.asked, self.test = asked, asked.rows(slice(first, None))
        shares = np.cumsum((0, *self.train.periods))
        self._bounds = [*np.rint(shares * first).astype(int).tolist(), len(asked)]
        self._bounds[TEST] = first  # the shares are of 1, but for their rounding
        self._feed = Feed(
            asked, self.log, self.codes, self.train.requests, length=self.train.length,
            shuffle=False,
        )  # fmt: skip
        dims = asked.dense.shape[2], asked.labels.shape[2], GAPS
        self.sizes = Sizes(self.log.users, self.log.rooms, self.log.authors, *dims)
        dense = torch.from_numpy(asked.dense[:first]).flatten(0, 1)
        self.mean, self.deviation = dense.mean(0), dense.std(0).clamp(min=1e-3)
        self.codebooks: Sequence[Tensor] | None = list(self.codes.quantizer.codebooks)
        self.key = self._digest()

    def steps(self, period: int) -> int:
        """Return how many batches a period has."""
        first, last = self._bounds[period : period + 2]
        return -(-(last - first) // self.train.requests)

    def batch(self, period: int, step: int) -> Batch:
        """Return one of them."""
        return self._feed.batch(np.arange(*self._rows(period, step)))

    def times(self, period: int, step: int) -> tuple[int, int, int]:
        """Return when a batch's first and last request come, and by when its labels are known."""
        first, last = self._rows(period, step)
        ts = self.asked.ts
        return int(ts[first]), int(ts[last - 1]), int(self.asked.label_ts[last - 1])

    def _rows(self, period: int, step: int) -> tuple[int, int]:
        first, last = self._bounds[period : period + 2]
        first += step * self.train.requests
        return first, min(first + self.train.requests, last)

    def tested(self) -> tuple[Array, Array, Array, Array]:
        """Return labels, mask, users and new rooms of the test period."""
        return self.test.labels, self.test.mask, self.test.user, self.test.new_room

    def watched(self) -> tuple[Array, Array]:
        """Return of the tested requests the seconds watched, and what each candidate showed.

        The seconds are NaN where no click tells them. What a candidate showed is the first two
        codes of its slice, as one number, -1 without a slice.
        """
        log, codes = self.log, self.codes.slice_codes.astype(np.int64)
        seconds = log.value[self.test.event].astype(np.float64)
        told = (log.kind[self.test.event] == KINDS.index("click")) & (seconds > 0)
        tags = np.append(codes[:, 0] * 65_536 + codes[:, min(1, codes.shape[1] - 1)], -1)
        return np.where(told, seconds, np.nan), tags[self.test.slice]

    def facts(self) -> dict[str, Any]:
        """Return what the data are, in numbers; ratios are floats."""
        log, quantizer = self.log, self.codes.quantizer
        quality = quantizer.quality(log.slice_embedding.astype(np.float32))
        return {
            "users": log.users,
            "rooms": int((log.room_domain != VIDEO).sum()),
            "videos": int((log.room_domain == VIDEO).sum()),
            "authors": log.authors,
            "events": len(log.ts),
            "slices": len(log.slice_room),
            "training requests": self._bounds[TEST],
            "test requests": len(self.test),
            "new rooms among tested candidates": float(self.test.new_room.mean()),
            "tested candidates without a slice": float((self.test.slice < 0).mean()),
            "relative error of the codes": float(quality.relative_error[-1]),
            "unique codes": float(quality.unique_rate),
            "votes that no slice has": self.codes.unseen_votes(),
        }

    def _digest(self) -> str:
        """Name all that batches are made of, and the format of what is kept of their training."""
        facts = [checkpoints.FORMAT, asdict(self.sizes), self._bounds]
        found = hashlib.sha256(json.dumps(facts).encode())
        log, codes = self.log, self.codes
        columns = [getattr(self.asked, field.name) for field in fields(Requests)]
        columns += [log.user, log.room, log.author, log.ts, log.kind, log.pos, log.room_author]
        columns += [log.slice_room, log.slice_t1, codes.slice_codes, codes.room_codes]
        columns += [book.numpy() for book in codes.quantizer.codebooks]  # of the history's tables
        for array in columns:
            found.update(f"{array.dtype} {array.shape}".encode())
            found.update(np.ascontiguousarray(array).data)
        return found.hexdigest()[:16]


def _latest(before: Requests, after: Requests, source: Source) -> tuple[Requests, int]:
    """Return the requests as one, in order, as far as they are wanted, and how many come first."""
    if source.most is not None and source.most < len(before) + len(after):
        cut = round(source.share * source.most)
        before = before.rows(slice(max(0, len(before) - cut), None))
        after = after.rows(slice(0, source.most - cut))
    joined = {
        field.name: np.concatenate([getattr(before, field.name), getattr(after, field.name)])
        for field in fields(Requests)
    }
    return Requests(**joined), len(before)
