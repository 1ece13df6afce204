"""What both history searches check and resolve alike: what is asked, which items may be found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._checks import FLOATS, INTEGERS, check_same, check_tensor, named_items
from .._dispatch import refuse_triton
from ..reference._search_mask import per_candidate

_MOST = 2**31 - 1

SCHEMA = (
    "Tensor? item_ids, Tensor? query_ids, Tensor? item_bits, Tensor? required_bits, "
    "Tensor? item_times, Tensor? since, Tensor? until"
)


def refuse_lists(
    query: Tensor, items: Tensor, offsets: Tensor, k: int, *rest: object
) -> str | None:
    """Say why the Triton kernels cannot take these arguments, or None."""
    if query.dtype == torch.float64:
        return "computes in float32; queries are float64"
    if k > 1024:
        return "sorts what it finds in registers: k at most 1,024"
    if len(items) > _MOST:
        return "keeps positions in 31 bits: at most 2^31 - 1 items"
    return refuse_triton(query)


def refuse_code_lists(
    query: Tensor, codes: Tensor, tables: Sequence[Tensor], *rest: Any
) -> str | None:
    """Say why the Triton kernels cannot take these arguments with codes, or None."""
    if len(tables) > 8:
        return "takes each table as an argument: at most 8 fields"
    return refuse_lists(query, codes, *rest)


def check_query(query: Any, offsets: Any, k: Any) -> None:
    """Check what is asked for: the query, the histories and how many to find."""
    check_tensor("query", query, ("B", "C", "D"), FLOATS)
    if query.shape[2] < 1:
        raise ValueError(f"query: D must be at least 1, got shape {list(query.shape)}")
    check_tensor("offsets", offsets, (query.shape[0] + 1,), (torch.int64,))
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"k: must be an int, got {type(k).__name__}")
    if not 1 <= k <= _MOST:
        raise ValueError(f"k: must be 1 to {_MOST:,}, got {k:,}")


def check_tables(tables: Any, dim: int) -> dict[str, Tensor]:
    """Check the tables and return them by name."""
    named = named_items("tables", tables)
    for name, table in named.items():
        check_tensor(name, table, ("N", dim), FLOATS)
        if table.shape[0] < 1:
            raise ValueError(f"{name}: needs at least one row, got shape {list(table.shape)}")
    return named


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
