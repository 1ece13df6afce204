"""Requests: what a ranker trains on, and nothing that was not known at their time."""

from __future__ import annotations

import builtins
from dataclasses import dataclass, fields, replace

import numpy as np

from .._checks import check_choice
from . import _sweep
from ._counters import ages, counters, new_rooms, timed_stay
from .log import KINDS, LIVE, UNKNOWN, Array, LiveLog, histories, slice_at

TASKS = ("click", "like", "long")
DENSE = (
    "log1p(events of the room)",
    "log1p(events of the author)",
    "log1p(events of the user)",
    "log1p(events of the user with the author)",
    "log1p(age of the room in seconds)",
    "sin(hour of the day)",
    "cos(hour of the day)",
)
_HALF_HOUR, _DAY = 1_800_000, 86_400_000
_FEW = 10_000  # entries up to which NumPy is done before numba has compiled


@dataclass(frozen=True)
class Requests:
    """N moments at which a user entered a room, each with C candidates; candidate 0 is that room.

    Attributes:
        user: int64 [N]. ts: int64 [N], never decreasing. event: int64 [N], the row of the log.
        room: int64 [N, C].
        position: int64 [N, C], ms in the candidate's stream at that time.
        slice: int64 [N, C], the candidate's last complete slice, a row of the log's slices, or -1.
        labels: float32 [N, C, K], `TASKS`. mask: bool [N, C, K], where a label is known.
        label_ts: int64 [N], what labels and mask follow from has happened by then: who learns from
            them at that time or before knows what is still to come.
        history_end: int64 [N], how many events of the user there were strictly before `ts`.
        dense: float32 [N, C, F], `DENSE`, counted strictly before `ts`.
        age_s: float32 [N, C], seconds since the candidate's start.
        new_room: bool [N, C]; false until `split` has said what is new.
    """

    user: Array
    ts: Array
    event: Array
    room: Array
    position: Array
    slice: Array
    labels: Array
    mask: Array
    label_ts: Array
    history_end: Array
    dense: Array
    age_s: Array
    new_room: Array

    def __len__(self) -> int:
        """Return N."""
        return len(self.user)

    def rows(self, chosen: Array | builtins.slice) -> Requests:
        """Return some of the requests, by index, mask or slice."""
        return Requests(**{field.name: getattr(self, field.name)[chosen] for field in fields(self)})


@dataclass(frozen=True)
class Options:
    """How requests are made; see `make`."""

    candidates: int = 8
    window_ms: int | None = None
    long_s: float = 60.0
    popular: float = 0.5
    seed: int = 0


def make(log: LiveLog, *, backend: str = "auto", **options: float) -> Requests:
    r"""Turn a log into requests, in the order of their times.

    A user *enters* a live room with an event there after none in the `window_ms` before. Each entry
    into a room that is on air makes a request; the other candidates are drawn from the rooms
    on air. A room is on air from its start to its end; where the end is not known, if somebody
    entered it in the `window_ms` before (so that a room is no positive where it could be no
    negative).

    What a request sees (candidates, positions, slices, counters, history) depends on events
    strictly before `ts` only. A drawn room in which the user was in the `window_ms` before is drawn
    anew; one in which the user turns out to be within `window_ms` after `ts` has its labels masked:
    that is known too late to choose by. Where rooms run out, the room of candidate 0 fills
    up, masked.

    Labels: "click" is 1 for candidate 0 and 0 for the others; "like" and "long" are known of
    candidate 0 only, by the user's events in the room from `ts` to `ts + window_ms`: a like among
    them; at least `long_s` from `ts` to the last one, or watched as the value of a click says. A
    log that tells with some click how long was watched leaves "long" unknown where none of the
    user's there does (a value of 0); in a log that never tells, it is by the events alone.

    Positions: `ts` - start where the end of the room is known; else that of the event for
    candidate 0, and for the others that of the latest entry of anybody into the room before `ts`.

    Args:
        log: E events, sorted by time.
        backend: "auto", "numba" or "numpy" (less than a millisecond a request); "auto" takes numba
            where there are enough entries to be worth the seconds that it takes to compile.
        options: `candidates` C, 8; `window_ms`, half an hour, or a day where the end of no room is
            known; `long_s`, 60; `popular`, 0.5, the share of the draws
            that pick the room of an entry of the `window_ms` before, hence by popularity, the
            others picking any room on air; `seed`, 0. Each draw depends on the seed, user, time and
            room, not on other requests.

    Returns:
        The requests, `new_room` all false.

    Exact, the same with both backends. Workspace: some ten int64 per event, and per room.

    Raises:
        TypeError: an option that does not exist. ValueError: one out of range, or a wrong backend.
        ImportError: "numba" is named and not installed.

    Source: FLUID, section 4.1, for the new-room setting.

    Example:
        >>> train, test = split(log, share=0.8, candidates=8)
    """
    chosen = Options(**options)  # type: ignore[arg-type]
    check_choice("backend", backend, ("auto", "numba", "numpy"))
    _check(chosen)
    window = chosen.window_ms
    if window is None:
        timed = (log.room_end[log.room_domain == LIVE] != UNKNOWN).any()
        window = _HALF_HOUR if timed else _DAY
    entry = entries(log, window)
    few = backend == "auto" and len(entry) < _FEW
    fast = None if few or backend == "numpy" else _sweep.compiled()
    if backend == "numba" and fast is None:
        raise ImportError("backend: 'numba' is not installed (pip install numba)")
    drawn = _sweep.draw(log, histories(log), entry, chosen, window, fast)
    return _assemble(log, drawn, chosen, window, fast is not None)


def split(
    log: LiveLog, share: float = 0.8, *, backend: str = "auto", **options: float
) -> tuple[Requests, Requests]:
    """Make requests and cut them at a time: the first `share` to train on, the later ones to test.

    In both, `new_room` tells the candidates whose first event is not before that time. Requests of
    the same millisecond are not parted. The other arguments are those of `make`.
    """
    if not 0 < share < 1:
        raise ValueError(f"share: must be in (0, 1), got {share}")
    made = make(log, backend=backend, **options)
    if not len(made):
        return made, made
    moment = int(made.ts[min(round(share * len(made)), len(made) - 1)])
    made = replace(made, new_room=new_rooms(log, moment)[made.room])
    cut = int(np.searchsorted(made.ts, moment))
    return made.rows(slice(0, cut)), made.rows(slice(cut, None))


def entries(log: LiveLog, window_ms: int) -> Array:
    """Return the rows of the log at which a user enters a live room, in order: int64.

    They are the user's events in the room without another one in the `window_ms` before.
    """
    rows = np.flatnonzero(log.room_domain[log.room] == LIVE)
    order = rows[np.argsort(log.user[rows] * log.rooms + log.room[rows], kind="stable")]
    user, room, ts = log.user[order], log.room[order], log.ts[order]
    fresh = np.ones(len(order), bool)
    same = (user[1:] == user[:-1]) & (room[1:] == room[:-1])
    fresh[1:] = ~(same & (ts[1:] - ts[:-1] <= window_ms))
    return np.sort(order[fresh])


def _check(options: Options) -> None:
    if not 1 <= options.candidates <= 10_000:
        raise ValueError(f"candidates: must be in [1, 10000], got {options.candidates}")
    if options.window_ms is not None and options.window_ms < 1:
        raise ValueError(f"window_ms: must be at least 1, got {options.window_ms}")
    if options.long_s < 0:
        raise ValueError(f"long_s: must not be negative, got {options.long_s}")
    if not 0 <= options.popular <= 1:
        raise ValueError(f"popular: must be in [0, 1], got {options.popular}")


def _assemble(
    log: LiveLog, drawn: _sweep.Drawn, options: Options, window: int, fast: bool
) -> Requests:
    user, ts, room = log.user[drawn.event], log.ts[drawn.event], drawn.room
    count, candidates = room.shape
    labels = np.zeros((count, candidates, len(TASKS)), np.float32)
    mask = np.zeros(labels.shape, bool)
    labels[:, 0, 0] = 1
    labels[:, 0, 1] = drawn.liked
    labels[:, 0, 2] = drawn.stay_ms >= options.long_s * 1000
    mask[:, 0] = True
    mask[:, 0, 1] = (log.kind == KINDS.index("like")).any()
    mask[:, 0, 2] = timed_stay(log, user, room[:, 0], ts, window)
    mask[:, 1:, 0] = drawn.known[:, 1:]
    age = ages(log, room, ts)
    counted = counters(log, user, ts, room, fast)
    hour = (ts % _DAY) * (2 * np.pi / _DAY)
    clock = np.broadcast_to(np.stack([np.sin(hour), np.cos(hour)], 1)[:, None], (*room.shape, 2))
    dense = np.concatenate([np.log1p(counted), np.log1p(age)[..., None], clock], 2)
    return Requests(
        user=user,
        ts=ts,
        event=drawn.event,
        room=room,
        position=drawn.position,
        slice=slice_at(log, room, drawn.position),
        labels=labels,
        mask=mask,
        label_ts=ts + max(window, int(np.ceil(options.long_s * 1000))),
        history_end=drawn.history_end,
        dense=dense.astype(np.float32),
        age_s=age.astype(np.float32),
        new_room=np.zeros(room.shape, bool),
    )
