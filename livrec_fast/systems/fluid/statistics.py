"""Means over seeds, their intervals, and what they say of an expected order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# 97.5 % points of Student's t, for 1 to 30 degrees of freedom
_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds, and half the width of its 95 % interval, NaN for a single seed."""

    mean: float
    half: float

    @property
    def low(self) -> float:
        """The lower end."""
        return self.mean - self.half

    @property
    def high(self) -> float:
        """The upper end."""
        return self.mean + self.half


def estimate(values: Sequence[float]) -> Estimate:
    """Return the mean and its 95 % interval by Student's t."""
    found = np.asarray(values, np.float64)
    if len(found) < 2:
        return Estimate(float(found.mean()) if len(found) else float("nan"), float("nan"))
    spread = float(found.std(ddof=1)) / len(found) ** 0.5
    return Estimate(float(found.mean()), _T[min(len(found) - 2, len(_T) - 1)] * spread)


@dataclass(frozen=True)
class Order:
    """What is expected of two rows' metric: "<" less, "<=" not greater, "~" equal."""

    left: str
    relation: str
    right: str
    metric: str = "AUC"

    def __str__(self) -> str:
        said = f"{self.left} {self.relation} {self.right}"
        return said if self.metric == "AUC" else f"{self.metric}: {said}"


def judge(order: Order, left: Sequence[float], right: Sequence[float], margin: float) -> str:
    """Say "holds", "reversed" or "undecided" by the 95 % interval of right - left, seed by seed.

    "<": it holds where the whole interval is above 0, is reversed where it is below. "<=": the same
    with -margin for 0. "~": it holds where the interval lies within +-margin, and is reversed where
    it has no part in that.
    """
    gap = estimate([b - a for a, b in zip(left, right, strict=True)])
    if not np.isfinite(gap.half):
        return "undecided"
    if order.relation == "~":
        holds = gap.low >= -margin and gap.high <= margin
        against = gap.low > margin or gap.high < -margin
    else:
        limit = 0.0 if order.relation == "<" else -margin
        holds, against = gap.low > limit, gap.high < limit
    return "holds" if holds else "reversed" if against else "undecided"
