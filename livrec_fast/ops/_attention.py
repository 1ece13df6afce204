"""What target_attention and code_attention share: checks, defaults, the shape of results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._checks import FLOATS, check_choice, check_same, check_tensor
from .._dispatch import refuse_triton
from ..reference._formula import wide_dtype
from ..reference.target_attention import ACTIVATIONS

MOST_COLUMNS = 256  # of rows that Triton kernels keep


def fake(q: Tensor, value_dim: int, has_lse: bool = True) -> tuple[Tensor, Tensor]:
    """Return empty results for q [..., H, d]: out [..., H, value_dim] and lse [..., H], or [0]."""
    lse = q.new_empty(q.shape[:-1] if has_lse else (0,), dtype=wide_dtype(q.dtype))
    return q.new_empty((*q.shape[:-1], value_dim)), lse


def fake_with_rest(q: Tensor, value_dim: int, activation: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return empty results of target attention: out, lse and what lse lost to rounding."""
    out, lse = fake(q, value_dim, activation == "softmax")
    return out, lse, torch.empty_like(lse)


def refuse_tiles(q: Tensor, *rows: Any) -> str | None:
    """Say why a Triton kernel cannot take q and, after it, rows whose last dimension it holds."""
    if q.dtype == torch.float64:
        return "computes in float32; queries are float64"
    if rows[0].shape[-1] > MOST_COLUMNS:
        return f"keeps rows in registers: at most {MOST_COLUMNS} columns"
    return refuse_triton(q)


def check_query(q: Any, offsets: Any, q_offsets: Any = None) -> None:
    """Check q [B, C, H, d], or [Q, H, d] with q_offsets, and its users' offsets [B + 1]."""
    check_tensor("q", q, ("B", "C", "H", "d") if q_offsets is None else ("Q", "H", "d"), FLOATS)
    if q.shape[-2] < 1 or q.shape[-1] < 1:
        raise ValueError(f"q: H and d must be at least 1, got shape {list(q.shape)}")
    check_users(q, offsets, q_offsets)


def check_users(q: Tensor, offsets: Any, q_offsets: Any) -> None:
    """Check offsets [B + 1] of q [B, ...], or of q [Q, ...] with q_offsets [B + 1]."""
    if q_offsets is None:
        check_tensor("offsets", offsets, (q.shape[0] + 1,), (torch.int64,))
        return
    check_tensor("offsets", offsets, ("B + 1",), (torch.int64,))
    if offsets.shape[0] < 1:
        raise ValueError("offsets: must have at least one element, got none")
    check_tensor("q_offsets", q_offsets, (offsets.shape[0],), (torch.int64,))
    check_same("device", q=q, q_offsets=q_offsets)


def check_rows(name: str, rows: Any, shape: Sequence[int | str]) -> None:
    """Check a tensor of floats whose last size is at least 1."""
    check_tensor(name, rows, shape, FLOATS)
    if rows.shape[-1] < 1:
        raise ValueError(f"{name}: {shape[-1]} must be at least 1, got shape {list(rows.shape)}")


def check_activation(activation: Any, return_lse: bool) -> None:
    """Check the name of the weights' activation; lse is of the softmax alone."""
    check_choice("activation", activation, ACTIVATIONS)
    if return_lse and activation != "softmax":
        raise ValueError(f'return_lse: needs activation "softmax", got {activation!r}')


def check_bias(bias: Any, q: Tensor, rows: int) -> Tensor | None:
    """Check bias [T] or [T, H], and return it in the dtype of logits."""
    if bias is None:
        return None
    per_head = isinstance(bias, Tensor) and bias.dim() == 2
    dtypes = FLOATS if q.dtype == torch.float64 else FLOATS[:3]
    check_tensor("bias", bias, (rows, q.shape[-2]) if per_head else (rows,), dtypes)
    return bias.to(wide_dtype(q.dtype))


def resolve_scale(scale: Any, q: Tensor) -> float:
    """Return `scale`, by default d ** -0.5."""
    if scale is None:
        return q.shape[-1] ** -0.5
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale: must be a float, got {type(scale).__name__}")
    if not -float("inf") < scale < float("inf"):
        raise ValueError(f"scale: must be finite, got {scale}")
    return float(scale)
