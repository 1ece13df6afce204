"""Session votes over a log: what was known of a room at each of its slices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np

from .._checks import check_choice, check_levels

Array = np.ndarray[Any, Any]


def running_votes(
    rooms: Array,
    codes: Array,
    levels: Sequence[int],
    *,
    rule: str = "per_level",
    backend: str = "auto",
) -> Array:
    r"""Give, for each slice of a log, the code of its room by the slices up to and with this one.

    Row t is what `majority_vote` gives for $\{t' \le t : rooms_{t'} = rooms_t\}$; the last row of a
    room is its vote over the whole log. A feature for slice t that must not know slice t itself is
    the row of the room's slice before.

    In NumPy, slowly::

        seen = codes[: t + 1][rooms[: t + 1] == rooms[t]]
        voted = np.bincount(seen[:, level]).argmax()  # but for ties

    Args:
        rooms: int64 [M], any ids.
        codes: [M, L] integers in the order in which they were seen, column l in [-1, N_l); -1 is an
            unknown code, which casts no vote.
        levels: (N_1, ..., N_L), 1 <= N_l <= 2^31.
        rule: "per_level" or "path", as in `majority_vote`.
        backend: "auto", "numba" or "numpy".

    Returns:
        [M, L]: int16 where every N_l <= 32,767, else int32; -1 where `majority_vote` has it.

    Ties go to the codeword seen last. Exact. Workspace: an int64 per slice to go through the log
    room by room; with "numba" also 56 L bytes for each slice of the longest room, with "numpy"
    some twenty int64 per slice.

    Raises:
        TypeError: a wrong type or dtype. ValueError: a wrong shape, level, rule or backend.
        IndexError: a code out of range. ImportError: "numba" is named and not installed.

    Source: FLUID, section 3.2 (room-level codes, updated with every slice).

    Example:
        >>> known = running_votes(log.room, log.codes, (64, 64, 64, 64))  # [M, 4]
    """
    sizes = check_levels(levels, most=2**31)
    check_choice("rule", rule, ("per_level", "path"))
    check_choice("backend", backend, ("auto", "numba", "numpy"))
    _check_log(rooms, codes, sizes)
    voted = np.full(codes.shape, -1, np.int16 if max(sizes) <= 32767 else np.int32)
    counting = _compiled() if backend != "numpy" else None
    if backend == "numba" and counting is None:
        raise ImportError("backend: 'numba' is not installed (pip install numba)")
    if counting is None:
        _by_sorting(rooms, codes, sizes, rule == "path", voted)
    elif len(rooms):
        order = np.argsort(rooms, kind="stable")  # room by room, each in the order of the log
        starts = np.flatnonzero(np.diff(rooms[order], prepend=~rooms[order[0]]))
        counting(codes, order, np.append(starts, len(rooms)), rule == "path", voted)
    return voted


def _check_log(rooms: Array, codes: Array, sizes: Sequence[int]) -> None:
    for name, array, dims in (("rooms", rooms, 1), ("codes", codes, 2)):
        if not isinstance(array, np.ndarray):
            raise TypeError(f"{name}: must be a NumPy array, got {type(array).__name__}")
        if array.dtype.kind not in ("iu" if name == "codes" else "i"):
            raise TypeError(f"{name}: dtype must be an integer, got {array.dtype}")
        if array.ndim != dims:
            wanted = "[M]" if dims == 1 else "[M, L]"
            raise ValueError(f"{name}: shape must be {wanted}, got {list(array.shape)}")
    if codes.shape != (len(rooms), len(sizes)):
        raise ValueError(
            f"codes: shape must be [{len(rooms)}, {len(sizes)}], got {list(codes.shape)}"
        )
    for level, size in enumerate(sizes):
        bad = (codes[:, level] < -1) | (codes[:, level] >= size)
        if bad.any():
            at = int(bad.argmax())
            value = int(codes[at, level])
            raise IndexError(f"codes: codes[{at}, {level}] = {value} is outside [-1, {size})")


def _by_sorting(rooms: Array, codes: Array, sizes: Sequence[int], path: bool, voted: Array) -> None:
    """Fill `voted`, level by level, with sorts.

    A vote leads its contest when no codeword had more votes before: then its own, counted so far,
    are the greatest number so far. Who leads after slice t is told by the last vote up to t.
    """
    slices = np.arange(len(rooms))
    contest = np.unique(rooms, return_inverse=True)[1]  # what is voted on by itself
    asked = contest  # whose leader is wanted
    for level, size in enumerate(sizes):
        voters = np.flatnonzero((codes[:, level] >= 0) & (contest >= 0))
        ballot = contest[voters] * size + codes[voters, level].astype(np.int64)
        candidate = np.unique(ballot, return_inverse=True)[1]
        order = np.argsort(contest[voters], kind="stable")
        voter, own = voters[order], contest[voters][order]
        votes = _appearance(candidate)[order] + own * (len(rooms) + 1)
        leads = votes == np.maximum.accumulate(votes)
        leader = np.maximum.accumulate(np.where(leads, np.arange(len(leads)), 0))
        at = np.searchsorted(own * len(rooms) + voter, asked * len(rooms) + slices, "right") - 1
        known = at >= 0
        known[known] = own[at[known]] == asked[known]
        winner = voter[leader[at[known]]]
        voted[known, level] = codes[winner, level]
        if path:
            contest = np.full(len(rooms), -1)
            contest[voters] = candidate
            asked = np.full(len(rooms), -1)
            asked[known] = contest[winner]


def _appearance(kind: Array) -> Array:
    """Return for each element how many there have been of its kind, itself included."""
    order = np.argsort(kind, kind="stable")
    first = np.flatnonzero(np.diff(kind[order], prepend=-1))
    before = np.repeat(first, np.diff(first, append=len(kind)))
    count = np.empty(len(kind), np.int64)
    count[order] = np.arange(len(kind)) - before + 1
    return count


@cache
def _compiled() -> Callable[..., None] | None:
    try:
        import numba
    except ImportError:
        return None
    return numba.njit(nogil=True)(_by_counting)


def _by_counting(codes: Array, order: Array, starts: Array, path: bool, voted: Array) -> None:
    """Fill `voted`, room by room, with a hash table of the candidates; compiled by numba.

    Contest l is level l of the room; by rule "path", contest 0 is the room and contest i + 1 what
    follows upon candidate i.
    """
    depth = codes.shape[1]
    most = np.diff(starts).max() * depth
    table = np.empty(3 * most + 1, np.int64)
    contest_of, code_of = np.empty(most, np.int64), np.empty(most, np.int64)
    votes, leader = np.empty(most, np.int64), np.empty(most + depth, np.int64)
    for room in range(len(starts) - 1):
        bits = 1
        while (2 << bits) < 3 * depth * (starts[room + 1] - starts[room]):
            bits += 1
        last = (1 << bits) - 1
        table[: last + 1] = -1
        leader[:depth] = -1
        candidates = 0
        for t in order[starts[room] : starts[room + 1]]:
            contest = 0
            for level in range(depth):
                code = np.int64(codes[t, level])
                contest = contest if path else level
                if code < 0:
                    if path:
                        break
                    continue
                slot = (((contest << 32) ^ code) * -7046029254386353131 >> (64 - bits)) & last
                found = table[slot]
                while found >= 0 and (contest_of[found] != contest or code_of[found] != code):
                    slot = (slot + 1) & last
                    found = table[slot]
                if found < 0:
                    found = table[slot] = candidates
                    contest_of[found], code_of[found], votes[found] = contest, code, 0
                    if path:
                        leader[found + 1] = -1
                    candidates += 1
                votes[found] += 1
                if leader[contest] < 0 or votes[found] >= votes[leader[contest]]:
                    leader[contest] = found
                contest = found + 1
            contest = 0
            for level in range(depth):
                found = leader[contest if path else level]
                if found >= 0:
                    voted[t, level] = code_of[found]
                elif path:
                    break
                contest = found + 1
