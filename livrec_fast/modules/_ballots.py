"""Votes that come in bit by bit: per contest, how many each codeword has, and which one leads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import numpy as np

Array = np.ndarray[Any, Any]


class Index:
    """Numbers given to int64 keys in the order in which they come; looked up many at a time."""

    def __init__(self, keys: Array | None = None):
        """Number `keys`, which are distinct, from 0 on."""
        self.keys = np.empty(0, np.int64) if keys is None else keys
        self._order = np.argsort(self.keys)
        self._sorted = self.keys[self._order]

    def find(self, keys: Array) -> Array:
        """Return the numbers of keys, -1 for those that have none."""
        if not len(self.keys):
            return np.full(len(keys), -1)
        at = np.minimum(np.searchsorted(self._sorted, keys), len(self.keys) - 1)
        return np.where(self._sorted[at] == keys, self._order[at], -1)

    def add(self, keys: Array) -> Array:
        """Return the numbers of keys, giving new ones where needed."""
        fresh = np.unique(keys[self.find(keys) < 0])
        at = np.searchsorted(self._sorted, fresh)
        numbers = np.arange(len(self.keys), len(self.keys) + len(fresh))
        self._sorted = np.insert(self._sorted, at, fresh)
        self._order = np.insert(self._order, at, numbers)
        self.keys = np.concatenate([self.keys, fresh])
        return self.find(keys)


class Ballots:
    """The votes of one level.

    A contest is whatever is voted on by itself: a room, or a room and a prefix. Codeword c of
    contest i is candidate i N + c: its count lies there in a dense array, or, where N is large, at
    the number that an index gives it. Of the last time a codeword was seen only the leader's is
    kept: when another one draws level, it has just been seen.
    """

    def __init__(self, size: int, dense: bool):
        """Start without contests, over `size` codewords."""
        self.size = size
        self.index = None if dense else Index()
        self.counts = np.zeros(0, np.uint16)  # per candidate
        self.leader = np.zeros(0, np.int32)  # per contest: the codeword, -1 without votes
        self.votes = np.zeros(0, np.int64)  # of the leader
        self.seen = np.zeros(0, np.int64)  # when the leader got its last vote

    def add(self, contest: Array, code: Array, time: Array) -> Array:
        """Cast votes, none of them older than those of earlier calls; return their candidates."""
        key = contest * self.size + code
        candidate = key if self.index is None else self.index.add(key)
        order = np.lexsort((time, candidate))
        last = np.flatnonzero(np.diff(candidate[order], append=-1))  # of each candidate's votes
        gained = np.diff(last, prepend=-1)
        voted, touched = order[last], candidate[order[last]]
        self._make_room(contest, touched)
        votes = self.counts[touched].astype(np.int64) + gained
        if len(votes) and votes.max() > np.iinfo(self.counts.dtype).max:
            self.counts = self.counts.astype(np.min_scalar_type(votes.max()))
        self.counts[touched] = votes
        self._settle(contest[voted], code[voted], votes, time[voted])
        return candidate

    def winner(self, contest: Array) -> tuple[Array, Array]:
        """Return the leading codeword and its candidate, -1 and -1 where nobody voted."""
        found = (contest >= 0) & (contest < len(self.leader))
        code = np.full(len(contest), -1)
        code[found] = self.leader[contest[found]]
        candidate = np.where(code >= 0, contest * self.size + code, -1)
        return code, candidate if self.index is None else self.index.find(candidate)

    def keep(self, contests: Array) -> Array:
        """Drop all contests but these, in ascending order, and number them anew in that order.

        Returns the candidates that are left, which are numbered anew, too, in ascending order;
        without an index nobody needs them, and none are returned.
        """
        contests = contests[contests < len(self.leader)]
        kept = np.empty(0, np.int64)
        if self.index is None:
            rows = self.counts[: len(self.leader) * self.size].reshape(-1, self.size)
            self.counts = rows[contests].reshape(-1)
        else:
            number = np.full(len(self.leader), -1)
            number[contests] = np.arange(len(contests))
            contest, code = np.divmod(self.index.keys, self.size)
            kept = np.flatnonzero(number[contest] >= 0)
            self.index = Index(number[contest[kept]] * self.size + code[kept])
            self.counts = self.counts[kept]
        self.leader, self.votes = self.leader[contests], self.votes[contests]
        self.seen = self.seen[contests]
        return kept

    def state(self) -> dict[str, Array]:
        """Return the arrays that `restore` takes."""
        used = int(np.flatnonzero(self.leader >= 0).max(initial=-1)) + 1
        fields = {name: getattr(self, name)[:used] for name in ("leader", "votes", "seen")}
        if self.index is None:
            return fields | {"counts": self.counts[: used * self.size]}
        return fields | {"counts": self.counts[: len(self.index.keys)], "keys": self.index.keys}

    def restore(self, state: Mapping[str, Array]) -> Self:
        """Take over what `state` returned; ValueError where that cannot be."""
        leader, counts = state["leader"], state["counts"]
        candidates = len(leader) * self.size
        keys = np.arange(candidates) if self.index is None else state["keys"]
        sound = (
            len(leader) == len(state["votes"]) == len(state["seen"])
            and len(keys) == len(counts)
            and np.all((leader >= -1) & (leader < self.size))
            and np.all((keys >= 0) & (keys < candidates))
        )
        if not sound:
            raise ValueError("the votes of a level do not fit together")
        self.leader, self.counts = leader, counts
        self.votes, self.seen = state["votes"], state["seen"]
        if self.index is not None:
            self.index = Index(keys)
        return self

    def _settle(self, contest: Array, code: Array, votes: Array, time: Array) -> None:
        """Find the new leaders among the candidates that gained votes and the old leaders."""
        old = np.unique(contest)
        contest = np.concatenate([old, contest])  # an old leader that gained is there twice
        code = np.concatenate([self.leader[old], code])
        votes = np.concatenate([self.votes[old], votes])
        time = np.concatenate([self.seen[old], time])
        order = np.lexsort((-code.astype(np.int64), time, votes, contest))
        best = order[np.flatnonzero(np.diff(contest[order], append=-1))]
        self.leader[old], self.votes[old], self.seen[old] = code[best], votes[best], time[best]

    def _make_room(self, contest: Array, candidate: Array) -> None:
        contests = int(contest.max(initial=-1)) + 1
        self.leader = grown(self.leader, contests, -1)
        self.votes, self.seen = grown(self.votes, contests), grown(self.seen, contests)
        dense = self.index is None
        most = len(self.leader) * self.size if dense else int(candidate.max(initial=-1)) + 1
        self.counts = grown(self.counts, most)


def grown(array: Array, size: int, value: int = 0) -> Array:
    """Return `array`, or a copy with room for `size` elements and as many again by halves."""
    if size <= len(array):
        return array
    fresh = np.full(max(size, len(array) * 3 // 2) - len(array), value, array.dtype)
    return np.concatenate([array, fresh])
