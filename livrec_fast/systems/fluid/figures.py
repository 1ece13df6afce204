"""The numbers behind the paper's figures 1, 4 and 5."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...logs.log import VIDEO, Array, LiveLog
from .codes import CodeBook

_AGES = (0, 1, 2, 5, 10, 15, 20, 30, 40, 60, 90, 120, 180, 360, 720)  # minutes
_BUCKETS = 10
_SHOWN = 8  # prefixes of figure 4
_PAIRS = 200_000  # drawn for the mean cosine within a prefix


def norm_by_age(id_norm: Array, age_s: Array) -> dict[str, list[float]]:
    """Return the mean norm of the id's embedding by the room's age: figure 1.

    Of the candidates of the test period, as the training had left them when they were scored.
    """
    minutes = age_s.ravel() / 60
    place = np.digitize(minutes, _AGES) - 1
    place[~np.isfinite(minutes) | (minutes < 0)] = -1
    return _binned(place, id_norm.ravel(), [float(age) for age in _AGES])


def gate_by_norm(gate: Array, id_norm: Array) -> dict[str, list[float]]:
    """Return the mean weight of the id by tenths of the id's norm: figure 5.

    slope: of the means over the tenths, by least squares; start: the tenths' mean norms.
    """
    norm, weight = id_norm.ravel(), gate.ravel()
    edges = np.quantile(norm, np.arange(1, _BUCKETS) / _BUCKETS)
    place = np.searchsorted(edges, norm, "right")
    found = _binned(
        place, weight, [float(n) for n in _binned(place, norm, range(_BUCKETS))["mean"]]
    )
    middle = np.asarray(found["mean"])
    there = np.isfinite(middle)
    slope = np.polyfit(np.arange(_BUCKETS)[there], middle[there], 1)[0] if there.sum() > 1 else 0.0
    return found | {"slope": [float(slope)], "overall": [float(weight.mean())]}


def prefix_coherence(log: LiveLog, codes: CodeBook, seed: int = 0) -> dict[str, Any]:
    """Return how alike live slices and videos of one two-level prefix are: figure 4.

    within: the mean cosine of a live slice and a video of the same prefix. apart: of any two. Where
    there is one domain only, of two slices. largest: prefixes with their counts in each domain and
    the mean cosine of pairs of theirs.

    Raises: ValueError where the codes have one level only.
    """
    if codes.slice_codes.shape[1] < 2:
        raise ValueError("levels: prefixes of two need at least 2 levels, got 1")
    prefix = codes.slice_codes[:, 0].astype(np.int64) * 65_536 + codes.slice_codes[:, 1]
    video = log.slice_domain == VIDEO
    first = np.flatnonzero(~video)
    second = np.flatnonzero(video) if video.any() else first
    rng = np.random.default_rng(seed)
    one, other = _pairs(prefix, first, second, rng)
    within = _cosines(log.slice_embedding, one, other)
    drawn = rng.choice(first, len(one)), rng.choice(second, len(one))
    apart = _cosines(log.slice_embedding, *drawn)
    largest = []
    kinds, sizes = np.unique(prefix[first], return_counts=True)
    for kind in kinds[np.argsort(-sizes, kind="stable")][:_SHOWN]:
        mine = prefix[one] == kind
        largest.append(
            {
                "prefix": [int(kind) // 65_536, int(kind) % 65_536],
                "live": int((prefix[~video] == kind).sum()),
                "video": int((prefix[video] == kind).sum()),
                "cosine": float(within[mine].mean()) if mine.any() else float("nan"),
            }
        )
    bins = np.linspace(-1, 1, 41)
    return {
        "within": float(within.mean()) if len(within) else float("nan"),
        "apart": float(apart.mean()) if len(apart) else float("nan"),
        "bins": bins.tolist(),
        "within counts": np.histogram(within, bins)[0].tolist(),
        "apart counts": np.histogram(apart, bins)[0].tolist(),
        "both domains": bool(video.any()),
        "largest": largest,
    }


def _pairs(prefix: Array, first: Array, second: Array, rng: Any) -> tuple[Array, Array]:
    """Draw for some of `first` one of `second` with the same prefix."""
    order = second[np.argsort(prefix[second], kind="stable")]
    some = rng.choice(first, min(len(first), _PAIRS), replace=False)
    low = np.searchsorted(prefix[order], prefix[some], "left")
    count = np.searchsorted(prefix[order], prefix[some], "right") - low
    some, low, count = some[count > 0], low[count > 0], count[count > 0]
    picked = order[low + (rng.random(len(some)) * count).astype(np.int64)]
    apart = picked != some
    return some[apart], picked[apart]


def _cosines(vectors: Array, one: Array, other: Array) -> Array:
    a, b = vectors[one].astype(np.float32), vectors[other].astype(np.float32)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return (a * b).sum(1) / np.maximum(norms, 1e-12)


def _binned(place: Array, values: Array, starts: Any) -> dict[str, list[float]]:
    """Return count and mean by bin; -1 is in no bin."""
    there = place >= 0
    count = np.bincount(place[there], minlength=len(starts)).astype(np.float64)
    total = np.bincount(place[there], values[there], minlength=len(starts))
    mean = np.divide(total, count, out=np.full(len(count), np.nan), where=count > 0)
    return {"start": list(starts), "count": count.tolist(), "mean": mean.tolist()}
