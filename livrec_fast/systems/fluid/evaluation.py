"""What the scores of the test period are worth, on all rooms and on new ones."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...logs.requests import DENSE, TASKS, Requests
from ..demo.metrics import auc, gauc

Array = np.ndarray[Any, Any]

VIEWS = (
    "quality watch seconds", "quality watch sessions", "cold-start room views", "niche room views",
    "unique tags", "stay seconds",
)  # fmt: skip
_QUALITY_S = 60.0  # from which watching counts as of quality
_RARE = 0.2  # share of the candidates that count as cold-start, and as niche


def measure(
    logits: Array, labels: Array, mask: Array, users: Array, new: Array
) -> dict[str, float]:
    """Return AUC, logloss and GAUC of the clicks, AUC on new and on older rooms, AUC of each task.

    Args:
        logits: [N, C, K], and so are labels and mask, which tells where a label is known.
        labels: 0 or 1.
        mask: bool.
        users: [N]; GAUC is by user.
        new: bool [N, C], rooms whose first event is after the split.

    An AUC where a class is missing is NaN.
    """
    known = mask[..., 0]
    score, label = logits[..., 0][known].astype(np.float64), labels[..., 0][known] > 0.5
    fresh = new[known]
    user = np.broadcast_to(users[:, None], known.shape)[known]
    found = {
        "AUC": auc(score, label),
        "logloss": float(np.mean(np.logaddexp(0, np.where(label, -score, score)))),
        "GAUC": gauc(score, label, user)[0],
        "AUC new rooms": auc(score[fresh], label[fresh]),
        "AUC older rooms": auc(score[~fresh], label[~fresh]),
    }
    for task, name in enumerate(TASKS[1 : logits.shape[-1]], start=1):
        there = mask[..., task]
        found[f"AUC {name}"] = auc(logits[..., task][there], labels[..., task][there])
    return found


def views(logits: Array, asked: Requests, seconds: Array, tags: Array) -> dict[str, float]:
    """Return VIEWS: what users would see, and watch, if each request showed its best candidate.

    A replay of the log in place of an online test: only the room that was entered is known to be
    watched, and for how long; any other counts as not watched. Cold-start rooms are the fifth of
    the candidates with the fewest events of the room before, niche ones of the author; more of them
    where as many as that are tied.

    Args:
        logits: [N, C], of clicks; of equal ones the last is shown, as the first was entered.
        asked: the requests.
        seconds: [N], how long the room that was entered was watched, NaN where it is not known.
        tags: int64 [N, C], what each candidate shows at the time, -1 where it is not known.

    Returns:
        Seconds and sessions per request of known length, shares of the requests, and tags per user.
    """
    rows, last = np.arange(len(logits)), logits.shape[1] - 1
    best = last - logits[:, ::-1].argmax(1)
    told = np.isfinite(seconds)
    stay = np.where(asked.room[rows, best] == asked.room[:, 0], seconds, 0.0)[told]
    quality = stay >= _QUALITY_S
    rare = []
    for counted in ("log1p(events of the room)", "log1p(events of the author)"):
        events = asked.dense[..., DENSE.index(counted)]
        rare.append((events <= np.quantile(events, _RARE))[rows, best])
    tag = tags[rows, best]
    pairs = np.unique(np.stack([asked.user, tag], 1)[tag >= 0], axis=0)
    found = (
        _mean(stay * quality), _mean(quality), *map(_mean, rare),
        len(pairs) / max(1, len(np.unique(asked.user))), _mean(stay),
    )  # fmt: skip
    return dict(zip(VIEWS, found, strict=True))


def _mean(values: Array) -> float:
    return float(values.mean()) if len(values) else float("nan")
