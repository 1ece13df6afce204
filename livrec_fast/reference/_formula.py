"""Pieces that several formulas share."""

from __future__ import annotations

import torch
from torch import Tensor


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of logits and scores: float64 for float64 inputs, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def per_user(values: Tensor, offsets: Tensor) -> tuple[Tensor, ...]:
    """Split jagged rows into one tensor per user, in order; an empty history has no rows."""
    return values.split(offsets.diff().tolist())
