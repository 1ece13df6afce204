"""Rows that all heads share: their candidates are those of one head."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Shared:
    """Attention over rows that all heads share, as that of one head whose candidates are theirs.

    q [.., C * H, 1, D], or [Q * H, 1, D] with q_offsets; k is x [T, 1, D], and v is None. mixed: H
    where each head has a bias of its own, else 1.
    """

    q: Tensor
    k: Tensor
    q_offsets: Tensor | None
    mixed: int

    @staticmethod
    def of(q: Tensor, x: Tensor, bias: Tensor | None, q_offsets: Tensor | None) -> Shared:
        """Take the operator's arguments."""
        heads = q.shape[-2]
        if q_offsets is not None:
            q_offsets = q_offsets.clamp(0, len(q)) * heads
        mixed = 1 if bias is None or bias.dim() == 1 else heads
        return Shared(folded(q), x[:, None], q_offsets, mixed)


def folded(values: Tensor) -> Tensor:
    """Return values [.., C, H, n] as those of one head, [.., C * H, 1, n]."""
    *leading, C, H, n = values.shape
    return values.reshape(*leading, C * H, 1, n)
