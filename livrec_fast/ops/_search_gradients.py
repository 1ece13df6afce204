"""The gradients of both history searches, from what was found alone: scores are products.

Sums are in float32, in one order: on CUDA `index_put_` sorts what it accumulates, where
`index_add_` would add as threads come.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..reference.prefix_ngram_keys import prefix_ngram_keys


def _found(
    grads: Sequence[Tensor | None], query: Tensor, offsets: Tensor, items: int, positions: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return of what was found the gradients of the scores, the rows and the queries' numbers."""
    kept = positions >= 0
    begins = offsets[:-1].clamp(0, items).cummax(0).values  # as kernels read unchecked offsets
    rows = (begins[:, None, None] + positions)[kept]
    asked = torch.arange(query.shape[0] * query.shape[1], device=query.device)
    asked = asked.view(*query.shape[:2], 1).expand_as(positions)[kept]
    grad = grads[0]
    flows = query.new_zeros(len(rows), dtype=torch.float32) if grad is None else grad[kept]
    return flows, rows, asked


def _add_up(table: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    """Return a table's gradient: the sums of values by row, in float32, rounded once."""
    sums = torch.zeros(table.shape, dtype=torch.float32, device=table.device)
    return _accumulate(sums, rows, values).to(table.dtype)


def _accumulate(sums: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    """Add values to rows, in place."""
    if sums.is_cuda:
        return sums.index_put_((rows,), values, accumulate=True)
    return sums.index_add_(0, rows, values)


def dense(
    grads: Sequence[Tensor | None], query: Tensor, keys: Tensor, offsets: Tensor, *rest: Any,
    outputs: Sequence[Tensor], needs: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    """Return the gradients of query and keys: a score's is the other's row."""
    flows, rows, asked = _found(grads, query, offsets, len(keys), outputs[1])
    flat, found = query.flatten(0, 1), []
    if needs[0]:
        values = flows[:, None] * keys[rows].float()
        found.append(_add_up(flat, asked, values).view(query.shape))
    if needs[1]:
        found.append(_add_up(keys, rows, flows[:, None] * flat[asked].float()))
    return found


def _named(
    codes: Tensor, tables: Sequence[Tensor], levels: Sequence[int], groups: Sequence[int],
    hashing: str, packed: bool,
) -> Tensor:  # fmt: skip
    """Return the rows that codes name, [fields, items]."""
    sizes = [len(table) for table in tables]
    return prefix_ngram_keys(codes, levels, sizes, hashing, groups, packed).T


def _named_by_triton(codes: Tensor, *rest: Any) -> Tensor:
    """Return the rows that codes name; a code out of range is unknown, as in the search."""
    from ..kernels import _code_rows

    with torch.cuda.device_of(codes):
        return _code_rows.rows_of(codes, *rest).long()


def codes(
    grads: Sequence[Tensor | None], query: Tensor, named_codes: Tensor, tables: Sequence[Tensor],
    offsets: Tensor, k: int, *rest: Any, outputs: Sequence[Tensor], needs: Sequence[bool],
    name: Callable[..., Tensor] = _named,
) -> list[Tensor]:  # fmt: skip
    """Return the gradients of query and the tables, from the codes of what was found alone."""
    flows, rows, asked = _found(grads, query, offsets, len(named_codes), outputs[1])
    named = name(named_codes[rows], tables, *rest[-4:])
    flat, found = query.flatten(0, 1), []
    if needs[0]:
        sums = torch.zeros(flat.shape, dtype=torch.float32, device=query.device)
        for table, row in zip(tables, named, strict=True):
            known = row >= 0
            values = flows[known, None] * table[row[known]].float()
            _accumulate(sums, asked[known], values)
        found.append(sums.to(query.dtype).view(query.shape))
    for table, row, need in zip(tables, named, needs[2:], strict=False):
        if need:
            known = row >= 0
            values = flows[known, None] * flat[asked[known]].float()
            found.append(_add_up(table, row[known], values))
    return found


triton_codes = partial(codes, name=_named_by_triton)
