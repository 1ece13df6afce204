"""What both history searches check and resolve alike: which items may be found."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .._checks import INTEGERS, check_same, check_tensor
from ..reference._search_mask import per_candidate

SCHEMA = (
    "Tensor? item_ids, Tensor? query_ids, Tensor? item_bits, Tensor? required_bits, "
    "Tensor? item_times, Tensor? since, Tensor? until"
)


def check_masks(
    query: Tensor, length: int, item_ids: Any, query_ids: Any, item_bits: Any, required_bits: Any,
    item_times: Any, since: Any, until: Any,
) -> list[Tensor | None]:  # fmt: skip
    """Check what restricts a search among `length` items and return it in the schema's order.

    Columns of items stay as they are; what is asked for becomes int64 [B, C].
    """
    _need_each_other(item_ids=item_ids, query_ids=query_ids)
    _need_each_other(item_bits=item_bits, required_bits=required_bits)
    if since is None and until is None:
        _need_each_other(**{"item_times": item_times, "since or until": None})
    else:
        name, bound = ("since", since) if since is not None else ("until", until)
        _need_each_other(**{"item_times": item_times, name: bound})
    items = {"item_ids": item_ids, "item_bits": item_bits, "item_times": item_times}
    for name, column in items.items():
        if column is not None:
            check_tensor(name, column, (length,), INTEGERS)
    if query_ids is not None:
        check_tensor("query_ids", query_ids, query.shape[:2], INTEGERS)
    asked = {"query_ids": query_ids, "required_bits": required_bits, "since": since, "until": until}
    for name, value in asked.items():
        _check_asked(name, value, query)
    tensors = {name: value for name, value in asked.items() if isinstance(value, Tensor)}
    check_same("device", query=query, **items, **tensors)
    ids, bits, least, end = (per_candidate(value, query) for value in asked.values())
    return [item_ids, ids, item_bits, bits, item_times, least, end]


def _need_each_other(**pair: Any) -> None:
    """Check that both arguments are given, or neither."""
    given = [name for name, value in pair.items() if value is not None]
    if len(given) == 1:
        (other,) = pair.keys() - set(given)
        raise ValueError(f"{given[0]}: needs {other}, got none")


def _check_asked(name: str, value: Any, query: Tensor) -> None:
    """Check an int64 or integers [B, C]."""
    if isinstance(value, Tensor):
        check_tensor(name, value, query.shape[:2], INTEGERS)
    elif value is not None:
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: must be an int or a tensor, got {type(value).__name__}")
        if not -(2**63) <= value < 2**63:
            raise ValueError(f"{name}: must be -2^63 to 2^63 - 1, got {value:,}")
