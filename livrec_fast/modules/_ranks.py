"""The ranks that share a fit: sums, gathered lists and broadcasts; one process is a rank alone."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Ranks:
    """Collective calls of a process group, or what they amount to without one."""

    def __init__(self, group: Any = None):
        self._group = group
        self.size = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)

    def sum(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """Add up each tensor over the ranks; they share a dtype, and travel together.

        Integers, and sums of whole quanta, come out the same in whatever order they are added.
        """
        if self.size == 1:
            return parts
        flat = torch.cat([part.reshape(-1) for part in parts])
        dist.all_reduce(flat, group=self._group)
        sums = flat.split([part.numel() for part in parts])
        return tuple(total.view(part.shape) for total, part in zip(sums, parts, strict=True))

    def merge(self, rows: Tensor) -> Tensor:
        """Merge float rows of which each rank has filled its own and left zeros for the rest.

        They are added as integers, which keeps every bit, even the sign of a zero.
        """
        whole = torch.int64 if rows.dtype == torch.float64 else torch.int32
        return self.sum(rows.view(whole))[0].view(rows.dtype)

    def gather(self, rows: Tensor) -> Tensor:
        """Return the rows of all ranks, in the order of the ranks; each may have its own number."""
        if self.size == 1:
            return rows
        count = torch.tensor([len(rows)], device=rows.device)
        counts = [torch.empty_like(count) for _ in range(self.size)]
        dist.all_gather(counts, count, group=self._group)
        most = int(max(counts))
        padded = rows.new_zeros((most, *rows.shape[1:]))
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded, group=self._group)
        return torch.cat([part[: int(n)] for part, n in zip(parts, counts, strict=True)])

    def from_first(self, value: Tensor) -> Tensor:
        """Return what the first rank has; the others give a tensor of its shape and dtype."""
        if self.size == 1:
            return value
        value = value.contiguous()
        dist.broadcast(value, src=dist.get_global_rank(self._group, 0), group=self._group)
        return value
