"""Which items a candidate may find: the masks of both history searches."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

NOW = 1_700_000_000_000  # milliseconds: past int32, and past the integers of float32


def kept(
    query: Tensor,
    offsets: Tensor,
    item_ids: Tensor | None = None,
    query_ids: Tensor | None = None,
    item_bits: Tensor | None = None,
    required_bits: Tensor | None = None,
    item_times: Tensor | None = None,
    since: Tensor | None = None,
    until: Tensor | None = None,
) -> Iterator[Tensor]:
    """Yield, user by user, which of the t items each of the C candidates may find, bool [C, t]."""
    for user, (first, last) in enumerate(pairwise(offsets.tolist())):
        may = torch.ones(query.shape[1], last - first, dtype=torch.bool, device=query.device)
        if item_ids is not None and query_ids is not None:
            wanted = query_ids[user, :, None]
            may &= (item_ids[first:last].long() == wanted) & (wanted != -1)
        if item_bits is not None and required_bits is not None:
            needed = required_bits[user, :, None]
            may &= (item_bits[first:last].long() & needed) == needed
        if item_times is not None and since is not None:
            may &= item_times[first:last].long() >= since[user, :, None]
        if item_times is not None and until is not None:
            may &= item_times[first:last].long() < until[user, :, None]
        yield may


def per_candidate(value: int | Tensor | None, query: Tensor) -> Tensor | None:
    """Return int64 [B, C] of a tensor of that shape, or of one number for all candidates."""
    if isinstance(value, int):
        return torch.full(query.shape[:2], value, dtype=torch.int64, device=query.device)
    return None if value is None else value.long()


def kept_of(inputs: dict[str, Any]) -> Iterator[Tensor]:
    """Yield what `kept` does for the keyword arguments of a public op."""
    query, offsets = inputs["query"], inputs["offsets"]
    items = {name: inputs.get(name) for name in ("item_ids", "item_bits", "item_times")}
    asked = ("query_ids", "required_bits", "since", "until")
    candidates = {name: per_candidate(inputs.get(name), query) for name in asked}
    return kept(query, offsets, **items, **candidates)


def draw_masks(
    generator: torch.Generator, offsets: Tensor, C: int, ids: int, bits: int, times: int
) -> dict[str, Any]:
    """Draw the masks that are asked for, as keyword arguments; `ids` = 2 leaves nothing."""

    def draw(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    B, T = len(offsets) - 1, int(offsets[-1])
    masks: dict[str, Any] = {}
    if ids:
        few = torch.tensor([7, 7, 7, 7, 8, -1])  # one id is common, so that something is left
        masks["item_ids"] = few[draw(0, 6, T)].to(torch.int32)
        masks["query_ids"] = few[draw(0, 6, B, C)] if ids == 1 else torch.full((B, C), -1)
    if bits:
        masks["item_bits"] = draw(0, 256, T).to(torch.uint8)
        masks["required_bits"] = torch.tensor([0, 0, 1, 128, 130])[draw(0, 5, B, C)]
    if times:  # an item every 10 ms up to now; what is asked for ends about there
        ends = offsets[1:].repeat_interleave(offsets.diff())
        masks["item_times"] = NOW + 10 * (torch.arange(T) - ends)
        masks |= {"since": NOW - 500, "until": NOW - 10 * draw(-1, 3, B, C)}
    return masks
