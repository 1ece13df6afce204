"""Lloyd's iterations under a bound on the weight of a cluster.

Every codeword has a price, paid beside the squared distance: a dual variable of the bound. Prices
follow what the clusters weigh, and meet the bound nearly. What is still too much in a cluster is
moved before every update, which draws codewords from afar to where the rows are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.kmeans_step import kmeans_step
from ..reference.kmeans_step import round_to
from ._lloyd import LevelFit, update
from ._shard import Assigned, Shard, fair_share

_RATE, _KEPT = 0.05, 0.9  # larger steps make rows of one place leap from codeword to codeword


def follow(prices: Tensor, found: Assigned, bound: float) -> Tensor:
    """Return prices that rise where a cluster weighs more than the bound, and else fall to 0.

    The step is a share of the mean squared distance, for each factor of e between the two.
    """
    mean = float(found.inertia / found.mass.sum())
    excess = (found.mass / bound).clamp(1 / 8, 8).log().to(prices.dtype)
    return (_KEPT * prices + _RATE * mean * excess).clamp_min(0)


def balanced_lloyd(
    shard: Shard,
    book: Tensor,
    quanta: Tensor,
    *,
    balance: float,
    iterations: int,
    tolerance: float,
    step: Callable[[], None] = lambda: None,
) -> tuple[Tensor, Assigned, LevelFit]:
    """As `lloyd`; but no cluster of an update weighs as much as `balance` fair shares and a row.

    The assignment that is returned is the plain one, without prices.
    """
    course, prices = LevelFit(), book.new_zeros(len(book))
    last = False
    while not last:
        found = shard.assign(book, quanta, prices)
        course.inertia.append(float(found.inertia))
        step()
        bound = fair_share(found.mass, balance)
        last = len(course.reseeded) == iterations - 1 or course.steady(tolerance)
        bounded = enforce(shard, book, quanta, prices, found, bound)
        book = update(shard, book, bounded, course)
        prices = follow(prices, found, bound)
    found = shard.assign(book, quanta)
    course.inertia.append(float(found.inertia))
    step()
    return book, found, course


class _Offers(NamedTuple):
    """Rows that could move: from which cluster to which, what is lost, their number and weight."""

    source: Tensor
    target: Tensor
    loss: Tensor
    number: Tensor
    weight: Tensor


def enforce(
    shard: Shard, book: Tensor, quanta: Tensor, prices: Tensor, found: Assigned, bound: float
) -> Assigned:
    """Move rows out of clusters that weigh too much, those that lose least by it first.

    A cluster weighs too much at `bound` and one (the heaviest) row or more, and has room below
    `bound`. In each round every row of a too heavy cluster has one offer: the nearest codeword with
    room, prices included. Every rank decides alike, from the offers of all.
    """
    codes, error, mass = found.codes.clone(), found.error.clone(), found.mass.clone()
    weights = _weights(shard, quanta)
    limit = bound + float(round_to(quanta[1], quanta.new_tensor(shard.heaviest)))
    local = ((mass >= limit)[codes] & (weights > 0)).nonzero()[:, 0]
    target, new = torch.full_like(local, -1), error[local]
    while True:
        room, over = mass < bound, mass >= limit
        if not bool(room.any()) or not bool(over.any()):
            break
        kept = over[codes[local]]  # room is lost and never won: an offer stands until it is taken
        local, target, new = local[kept], target[kept], new[kept]
        lapsed = (~(room[target] & (target >= 0))).nonzero()[:, 0]
        barred = torch.where(room, prices, torch.inf)
        target[lapsed], new[lapsed] = _second(shard, book, quanta, barred, local[lapsed])
        source = codes[local]
        loss = new.double() + prices[target] - (error[local].double() + prices[source])
        mine = _Offers(source, target, loss, local + shard.start, weights[local])
        offers = _cheapest(mine, mass - limit)
        if shard.ranks.size > 1:
            every = _Offers(*(shard.ranks.gather(part.contiguous()) for part in offers))
            offers = _cheapest(every, mass - limit)
        taken = _accepted(offers, mass, bound)
        mass.index_add_(0, taken.source, -taken.weight).index_add_(0, taken.target, taken.weight)
        here = (taken.number >= shard.start) & (taken.number < shard.start + len(codes))
        moved = taken.number[here] - shard.start
        codes[moved] = taken.target[here].int()
        error[moved] = new[torch.searchsorted(local, moved)]
    return _summed(shard, found, quanta, codes, error, mass)


def _weights(shard: Shard, quanta: Tensor) -> Tensor:
    """Return this rank's weights as `kmeans_step` adds them."""
    if shard.weights is None:
        return torch.ones(shard.rows.count, dtype=torch.float64, device=shard.rows.device)
    return round_to(quanta[1], shard.weights.double())


def _second(
    shard: Shard, book: Tensor, quanta: Tensor, barred: Tensor, local: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the cheapest codeword that is not barred and its squared distance, of some rows."""
    codes, errors = [local.new_empty(0)], [book.new_empty(0)]
    for part in local.split(shard.most_at_once(book, barred, quanta)):
        block = shard.rows.take(part)
        step = kmeans_step(block, book, penalty=barred, quanta=quanta, backend=shard.backend)
        codes.append(step.codes.long())
        errors.append(step.error)
    return torch.cat(codes), torch.cat(errors)


def _cheapest(offers: _Offers, excess: Tensor) -> _Offers:
    """Keep, per source, the offers of least loss that are needed to work off its excess."""
    offers = _sorted(offers, offers.source)
    return _pick(offers, _before(offers.source, offers.weight) <= excess[offers.source])


def _accepted(offers: _Offers, mass: Tensor, bound: float) -> _Offers:
    """Keep, per target, the offers of least loss that come while it has room."""
    offers = _sorted(offers, offers.target)
    return _pick(offers, mass[offers.target] + _before(offers.target, offers.weight) < bound)


def _sorted(offers: _Offers, key: Tensor) -> _Offers:
    """Sort by key, then loss, then number of the row."""
    order = offers.number.sort().indices
    for values in (offers.loss, key):
        order = order[values[order].sort(stable=True).indices]
    return _pick(offers, order)


def _pick(offers: _Offers, which: Tensor) -> _Offers:
    return _Offers(*(part[which] for part in offers))


def _before(key: Tensor, weight: Tensor) -> Tensor:
    """Return, for rows sorted by key, the weight of the rows of the same key before each."""
    if not len(key):
        return weight
    before = weight.cumsum(0) - weight
    lengths = key.unique_consecutive(return_counts=True)[1]
    first = lengths.cumsum(0) - lengths
    return before - before[first].repeat_interleave(lengths)


def _summed(
    shard: Shard, found: Assigned, quanta: Tensor, codes: Tensor, error: Tensor, mass: Tensor
) -> Assigned:
    """Carry the rows that have moved from sum to sum, which is exact."""
    change = torch.zeros_like(found.sums)
    for part in (codes != found.codes).nonzero()[:, 0].split(2**16):
        terms = shard.rows.take(part).double()
        if shard.weights is not None:
            terms *= shard.weights[part].double()[:, None]
        terms = round_to(quanta[0], terms)
        change.index_add_(0, codes[part], terms).index_add_(0, found.codes[part], -terms)
    (change,) = shard.ranks.sum(change)
    return Assigned(codes, error, found.sums + change, mass, found.inertia)
