"""What the scores of the test period are worth, on all rooms and on new ones."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...logs.requests import TASKS
from ..demo.metrics import auc, gauc

Array = np.ndarray[Any, Any]


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
