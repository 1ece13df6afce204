"""Checks that the contrastive losses share, and their reduction."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .._checks import FLOATS, check_choice, check_tensor
from ..reference._formula import wide_dtype

WIDE = (torch.float32, torch.float64)
REDUCTIONS = ("mean", "sum", "none")
RULES = ("standard", "unsampled_positive")
PRECISIONS = (None, "bf16")
ENDLESS = (-math.inf, math.inf)
_MOST_KEPT = 2**28  # pairs whose masks are kept as bits: 32 MiB


_MOST_PRODUCTS = 2**24  # that are kept in float32: 64 MiB


def products_kept(*leaves: Tensor | None) -> int:
    """Return how many products may be kept for the gradients of leaves: 0 where none is wanted."""
    wanted = any(tensor is not None and tensor.requires_grad for tensor in leaves)
    return _MOST_PRODUCTS if wanted and torch.is_grad_enabled() else 0


def keeps_pairs(rows: int, columns: int) -> bool:
    """Tell whether the false negatives among so many pairs are kept for the gradient."""
    return rows * columns <= _MOST_KEPT


def kept_shape(rows: int, columns: int, threshold: float | None, kept: bool) -> tuple[int, int]:
    """Return the shape of the bits of false negatives that are kept for the gradient, in words."""
    return (rows, (columns + 63) // 64) if kept and threshold is not None else (0, 0)


def check_vector(
    name: str, value: Any, lengths: tuple[int, ...], dtypes: tuple[torch.dtype, ...]
) -> None:
    """Check an optional vector that may have one of several lengths."""
    if value is None:
        return
    check_tensor(name, value, ("B",), dtypes)
    check_rows(name, value, lengths)


def check_rows(name: str, value: Tensor, lengths: tuple[int, ...], tail: str = "") -> None:
    """Check that a tensor has one of several numbers of rows; tail: of the shape in words."""
    if all(value.shape[0] != length for length in lengths):
        allowed = " or ".join(f"[{length}{tail}]" for length in dict.fromkeys(lengths))
        raise ValueError(f"{name}: shape must be {allowed}, got {list(value.shape)}")


def check_pair_vectors(value: Any, lengths: tuple[int, ...]) -> None:
    """Check the optional vectors that pairs are compared by."""
    if value is None:
        return
    check_tensor("pair_vectors", value, ("B", "P"), FLOATS)
    check_rows("pair_vectors", value, lengths, ", P")
    if value.shape[1] < 1:
        raise ValueError(f"pair_vectors: P must be at least 1, got shape {list(value.shape)}")


def check_flags(**flags: Any) -> None:
    """Check that each is a bool."""
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise TypeError(f"{name}: must be a bool, got {type(flag).__name__}")


def check_threshold(threshold: Any) -> float | None:
    """Check the optional threshold, and return it as a float."""
    if threshold is None:
        return None
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)):
        raise TypeError(
            f"false_negative_threshold: must be a float, got {type(threshold).__name__}"
        )
    if threshold != threshold:
        raise ValueError("false_negative_threshold: must be a number, got nan")
    return float(threshold)


def check_rule(rule: Any, log_q: Any, group_ids: Any) -> None:
    """Check the rule of log_q, which is of rows with one positive unless it is the standard one."""
    check_choice("log_q_rule", rule, RULES)
    if rule == "standard":
        return
    if log_q is None:
        raise ValueError(f"log_q_rule: {rule!r} needs log_q, got None")
    if group_ids is not None:
        raise ValueError(f"log_q_rule: {rule!r} is of one positive a row; group_ids must be None")


def precision_of(precision: Any) -> str:
    """Check the precision, and return it as the operator has it."""
    check_choice("precision", precision, PRECISIONS)
    return precision or "input"


def as_tensor(temperature: Any, query: Tensor) -> Tensor:
    """Return the temperature as a 0-d tensor; a float is checked here, a tensor's value later."""
    if isinstance(temperature, Tensor):
        check_tensor("temperature", temperature, (), FLOATS)
        return temperature
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)):
        raise TypeError(
            f"temperature: must be a float or a 0-d tensor, got {type(temperature).__name__}"
        )
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature: must be positive and finite, got {temperature}")
    return query.new_full((), temperature, dtype=wide_dtype(query.dtype))


def log_range(temperature: Any, limits: Any) -> tuple[float, float]:
    """Check T and its range; return the logs of the range."""
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)):
        raise TypeError(f"temperature: must be a float, got {type(temperature).__name__}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature: must be positive and finite, got {temperature}")
    if limits is None:
        return ENDLESS
    if not isinstance(limits, (list, tuple)) or len(limits) != 2:
        raise TypeError(f"temperature_range: must be a pair of floats or None, got {limits!r}")
    low, high = (
        given if limit is None else limit
        for limit, given in zip(limits, (0, math.inf), strict=True)
    )
    if not 0 <= low <= temperature <= high:
        raise ValueError(
            f"temperature_range: must hold the temperature, {temperature}, got {limits!r}"
        )
    return math.log(low) if low > 0 else -math.inf, math.log(high)


def check_temperature(temperature: Tensor) -> None:
    """Check the value of a temperature."""
    value = float(temperature)
    if not 0 < value < float("inf"):
        raise ValueError(f"temperature: must be positive and finite, got {value}")


def check_log_q(log_q: Tensor | None, rule: str, batch: int, valid: Tensor | None) -> None:
    """Check that log_q is finite and, where the rule makes probabilities of it, negative."""
    if log_q is None:
        return
    _refuse_where(~log_q.isfinite(), "finite", log_q, valid)
    if rule != "standard":
        wanted = f"negative with log_q_rule={rule!r}"
        _refuse_where(log_q[:batch] >= 0, wanted, log_q, valid)


def _refuse_where(bad: Tensor, wanted: str, log_q: Tensor, valid: Tensor | None) -> None:
    if valid is not None:
        bad[: len(valid)] &= valid
    if bad.any():
        at = int(bad.nonzero()[0])
        raise ValueError(f"log_q: must be {wanted}, got log_q[{at}] = {float(log_q[at])}")


def reduce(losses: Tensor, weights: Tensor | None, valid: Tensor | None, reduction: str) -> Tensor:
    """Weigh the losses, which are 0 in invalid rows, and reduce them over the last dimension."""
    if weights is None:
        weights = torch.ones_like(losses) if valid is None else valid.to(losses.dtype)
    elif valid is not None:
        weights = weights.masked_fill(~valid, 0)
    weighted = losses * weights
    if reduction == "none":
        return weighted
    if reduction == "sum":
        return weighted.sum(-1)
    total = weights.sum(-1)
    return weighted.sum(-1) / total.masked_fill(total == 0, 1)
