"""The contrastive loss over the joined batch of all ranks, for the losses of other libraries."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor

from ..modules.in_batch_contrastive import InBatchContrastive
from ..ops._contrastive import as_tensor


class _AtTemperature(InBatchContrastive):
    """InBatchContrastive over all ranks, at a temperature that somebody else learns."""

    def __init__(self, given: Tensor, **settings: Any):
        super().__init__(learnable=False, ranks="gathered", **settings)
        self._given = given
        self.eval()  # puts no parameter into a range

    @property
    def temperature(self) -> Tensor:
        """T, 0-d."""
        return self._given


def over_all_ranks(
    query: Tensor,
    key: Tensor,
    *,
    temperature: float | Tensor,
    extra_keys: Tensor | None = None,
    **settings: Any,
) -> Tensor:
    """Return the mean loss of the joined batch, whose gradient is the mean of the ranks'.

    That mean is what DistributedDataParallel takes. Without ranks: `in_batch_contrastive`.
    """
    return _AtTemperature(as_tensor(temperature, query), **settings)(
        query, key, extra_keys=extra_keys
    )


def check_world_size(wanted: int) -> None:
    """Check that torch.distributed has been started with as many ranks as somebody else says."""
    size = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if size != wanted:
        raise ValueError(f"world_size: torch.distributed has {size} rank(s), got {wanted}")
