"""What target_attention and code_attention share: checks, defaults, the shape of results."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._checks import FLOATS, check_tensor
from ..reference._formula import wide_dtype


def fake(q: Tensor, value_dim: int) -> tuple[Tensor, Tensor]:
    """Return empty results for q [B, C, H, d]: out [B, C, H, value_dim] and lse [B, C, H]."""
    lse = q.new_empty(q.shape[:3], dtype=wide_dtype(q.dtype))
    return q.new_empty((*q.shape[:3], value_dim)), lse


def check_query(q: Any, offsets: Any) -> None:
    """Check q [B, C, H, d] and the offsets [B + 1] of its users' histories."""
    check_tensor("q", q, ("B", "C", "H", "d"), FLOATS)
    if q.shape[2] < 1 or q.shape[3] < 1:
        raise ValueError(f"q: H and d must be at least 1, got shape {list(q.shape)}")
    check_tensor("offsets", offsets, (q.shape[0] + 1,), (torch.int64,))


def check_bias(bias: Any, q: Tensor, rows: int) -> Tensor | None:
    """Check bias [T] or [T, H], and return it in the dtype of logits."""
    if bias is None:
        return None
    per_head = isinstance(bias, Tensor) and bias.dim() == 2
    dtypes = FLOATS if q.dtype == torch.float64 else FLOATS[:3]
    check_tensor("bias", bias, (rows, q.shape[2]) if per_head else (rows,), dtypes)
    return bias.to(wide_dtype(q.dtype))


def resolve_scale(scale: Any, q: Tensor) -> float:
    """Return `scale`, by default d ** -0.5."""
    if scale is None:
        return q.shape[3] ** -0.5
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale: must be a float, got {type(scale).__name__}")
    if not -float("inf") < scale < float("inf"):
        raise ValueError(f"scale: must be finite, got {scale}")
    return float(scale)
