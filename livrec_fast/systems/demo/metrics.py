"""AUC, GAUC and hit rate in NumPy."""

from __future__ import annotations

import numpy as np


def mean_ranks(scores: np.ndarray) -> np.ndarray:
    """Return the ranks 1 .. n of `scores`, lowest first; equal scores share their mean rank."""
    _, value, counts = np.unique(scores, return_inverse=True, return_counts=True)
    last = counts.cumsum()
    return (last - (counts - 1) / 2)[value]


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Return the chance that a positive outscores a negative, ties counting half, or NaN.

    AUC = (sum of the positives' ranks - P (P + 1) / 2) / (P N); NaN where a class is missing.
    """
    positive = labels.astype(bool)
    p, n = int(positive.sum()), int((~positive).sum())
    if p == 0 or n == 0:
        return float("nan")
    return float((mean_ranks(scores)[positive].sum() - p * (p + 1) / 2) / (p * n))


def gauc(scores: np.ndarray, labels: np.ndarray, groups: np.ndarray) -> tuple[float, int]:
    """Return the mean AUC within groups, weighted by rows, and how many have both classes."""
    order = np.argsort(groups, kind="stable")
    bounds = np.flatnonzero(np.diff(groups[order])) + 1
    total, rows, used = 0.0, 0, 0
    for part in np.split(order, bounds):
        value = auc(scores[part], labels[part])
        if not np.isnan(value):
            total, rows, used = total + len(part) * value, rows + len(part), used + 1
    return (total / rows if rows else float("nan")), used


def hit_rates(
    scores: np.ndarray, wanted: np.ndarray, seen: np.ndarray, ks: tuple[int, ...]
) -> dict[int, float]:
    """Return HR@k: the share of wanted items among the k best unseen ones, mean over users.

    scores: [users, items]. wanted, seen: bool [users, items]; seen items are not ranked. Ties go to
    the lowest item. Users who want nothing are left out.
    """
    ranked = np.where(seen, -np.inf, scores)
    order = np.argsort(-ranked, axis=1, kind="stable")[:, : max(ks)]
    hits = np.take_along_axis(wanted & ~seen, order, axis=1)
    count = wanted.sum(1)
    some = count > 0
    return {k: float((hits[some, :k].sum(1) / count[some]).mean()) for k in ks}
