"""Memory for tables whose rows are read at random."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._native import ask_for_huge_pages


def empty_rows(
    shape: Sequence[int], dtype: torch.dtype | None, device: torch.device | str | None
) -> Tensor:
    """Return a tensor that was not written yet, on a CPU in huge pages if the system gives them.

    A lookup and an update of rows at random take about a seventh less time in them.
    """
    made = torch.empty(tuple(shape), dtype=dtype, device=device)
    if type(made) is Tensor and made.device.type == "cpu":
        ask_for_huge_pages(made.data_ptr(), made.nbytes)
    return made
