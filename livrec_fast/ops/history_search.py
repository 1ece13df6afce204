"""History search: the items of a user's own history that are most like a query."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._checks import (
    FLOATS,
    INTEGERS,
    check_codes,
    check_finite,
    check_offsets,
    check_same,
    check_tensor,
    named_items,
)
from .._dispatch import Op
from ..reference import history_search as reference
from ..reference._formula import wide_dtype

_MOST = 2**31 - 1


def _fake(query: Tensor, k: int) -> tuple[Tensor, Tensor]:
    shape = (*query.shape[:2], k)
    scores = query.new_empty(shape, dtype=wide_dtype(query.dtype))
    return scores, query.new_empty(shape, dtype=torch.int64)


def _check_values(query: Tensor, keys: Tensor, offsets: Tensor, k: int) -> None:
    check_offsets(offsets, len(keys))
    check_finite("query", query)
    check_finite("keys", keys)


def _check_code_values(
    query: Tensor, codes: Tensor, tables: Sequence[Tensor], offsets: Tensor, k: int
) -> None:
    check_offsets(offsets, len(codes))
    check_codes(codes, [len(table) for table in tables], least=-1)
    check_finite("query", query)
    for field, table in enumerate(tables):
        check_finite(f"tables[{field}]", table)


_dense = Op(
    "history_search",
    "(Tensor query, Tensor keys, Tensor offsets, int k) -> (Tensor scores, Tensor positions)",
    fake=lambda query, keys, offsets, k: _fake(query, k),
    reference=reference.history_search,
    check_values=_check_values,
)

_codes = Op(
    "history_search_codes",
    "(Tensor query, Tensor codes, Tensor[] tables, Tensor offsets, int k) "
    "-> (Tensor scores, Tensor positions)",
    fake=lambda query, codes, tables, offsets, k: _fake(query, k),
    reference=reference.history_search_codes,
    check_values=_check_code_values,
)


def history_search(
    query: Tensor, keys: Tensor, offsets: Tensor, k: int, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    r"""Find the k items of each user's own history with the greatest dot product.

    $\mathrm{score}_{ct} = \langle \mathrm{query}_c, \mathrm{key}_t \rangle$; the k greatest over
    the user's rows.

    In PyTorch, per user u, up to the order of ties and to filling::

        rows = slice(offsets[u], offsets[u + 1])
        scores[u], positions[u] = (query[u] @ keys[rows].T).topk(k)

    Args:
        query: [B, C, D] float32, float16, bfloat16 or float64: C candidates for each of B users.
        keys: [T, D], query's dtype: the keys of all histories, one after the other.
        offsets: int64 [B + 1]; user u has the rows offsets[u] .. offsets[u + 1] - 1, oldest first.
        k: how many to find, at least 1; it may exceed every length.
        backend: "auto" or "reference".

    Returns:
        (scores, positions), both [B, C, k], best first: scores in float32 (float64 for float64);
        positions int64, relative to the user's history: they mean row offsets[u] + position.

    Equal scores go to the largest position, that is the most recent item, first; equal rows have
    equal scores. Past the end of a short history the score is -inf and the position -1. B, C and T
    may be 0. Differentiable once, in query and keys, through scores; fill has gradients of 0.

    Numerics: float16 and bfloat16 are widened to float32. The items found are float64's wherever
    the gap to the k-th best exceeds 2 (D + 1) eps |query| |key|, eps = 2^-23; a score is off by
    half that at most. Scores past float32 mean nothing, though positions stay in range. Autocast
    leaves the inputs as they are. The same inputs give the same bits on every run and for any
    number of threads. Workspace of the reference: float32 copies of query and keys, and one array
    of C x D x the longest history; its gradient, of C x D x T.

    Raises:
        TypeError: a wrong type or dtype. ValueError: a wrong shape or device, k < 1, offsets that
        do not start at 0, decrease, or do not end at T, or a row of query or keys that is not
        finite.
        BackendError: the named backend cannot run this.

    Source: Moment&Cross, section 2.4 (general search unit over short videos).

    Example:
        >>> scores, positions = history_search(query, keys, offsets, 100)  # [B, C, 100]
        >>> rows = offsets[:-1, None, None] + positions  # where positions >= 0
    """
    _check_query(query, offsets, k)
    check_tensor("keys", keys, ("T", query.shape[2]), FLOATS)
    check_same("dtype", query=query, keys=keys)
    check_same("device", query=query, keys=keys, offsets=offsets)
    return _dense(query, keys, offsets, k, backend=backend)


def history_search_codes(
    query: Tensor,
    codes: Tensor,
    tables: Sequence[Tensor],
    offsets: Tensor,
    k: int,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    r"""Find the k items of each user's own history with the greatest dot product, from their codes.

    $\mathrm{score}_{ct} = \sum_f \langle \mathrm{query}_c, E_f[c_{tf}] \rangle$; a code of -1 adds
    nothing.

    In PyTorch, without codes of -1, up to the order of ties::

        keys = sum(table[code.long()] for table, code in zip(tables, codes.T))
        scores, positions = history_search(query, keys, offsets, k)

    Args:
        query: [B, C, D] float32, float16, bfloat16 or float64: C candidates for each of B users.
        codes: [T, F] of any integer dtype: the codes of all histories; column f is in [-1, N_f).
        tables: F tensors [N_f, D], query's dtype; N_f >= 1 may differ.
        offsets: int64 [B + 1]; user u has the rows offsets[u] .. offsets[u + 1] - 1, oldest first.
        k: how many to find, at least 1; it may exceed every length.
        backend: "auto" or "reference".

    Returns:
        (scores, positions), both [B, C, k], as history_search.

    Equal scores go to the largest position, that is the most recent item, first; equal codes have
    equal scores. Past the end of a short history the score is -inf and the position -1. B, C and T
    may be 0. Differentiable once, in query and tables, through scores; fill has gradients of 0.

    Numerics: float16 and bfloat16 are widened to float32. The score is the sum, field by field, of
    query's products with the tables, so that keys are never built nor rounded; it is off by at most
    (D + F + 1) eps |query| sum_f |E_f[c_tf]|, eps = 2^-23, and the items found are float64's
    wherever the gap to the k-th best exceeds twice that. Autocast leaves the inputs as they are.
    The same inputs give the same bits on every run; the reference uses torch's matrix products,
    whose bits may change with the number of threads. Workspace of the reference: float32 copies of
    query and tables, and arrays of C x sum N_f and of C x F x the longest history.

    Raises:
        TypeError: a wrong type or dtype. ValueError: a wrong shape or device, k < 1, no table,
        offsets that do not start at 0, decrease, or do not end at T, or a row of query or tables
        that is not finite. IndexError: a code out of range. BackendError: the named backend cannot
        run this.

    Source: Moment&Cross, section 2.4 (general search unit), over LARM's codes.

    Example:
        >>> scores, positions = history_search_codes(query, codes, tables, offsets, 100)
    """
    _check_query(query, offsets, k)
    named = _check_tables(tables, query.shape[2])
    check_tensor("codes", codes, ("T", len(named)), INTEGERS)
    check_same("dtype", query=query, **named)
    check_same("device", query=query, codes=codes, offsets=offsets, **named)
    return _codes(query, codes, list(named.values()), offsets, k, backend=backend)


def _check_query(query: Any, offsets: Any, k: Any) -> None:
    check_tensor("query", query, ("B", "C", "D"), FLOATS)
    if query.shape[2] < 1:
        raise ValueError(f"query: D must be at least 1, got shape {list(query.shape)}")
    check_tensor("offsets", offsets, (query.shape[0] + 1,), (torch.int64,))
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"k: must be an int, got {type(k).__name__}")
    if not 1 <= k <= _MOST:
        raise ValueError(f"k: must be 1 to {_MOST:,}, got {k:,}")


def _check_tables(tables: Any, dim: int) -> dict[str, Tensor]:
    """Check the tables and return them by name."""
    named = named_items("tables", tables)
    for name, table in named.items():
        check_tensor(name, table, ("N", dim), FLOATS)
        if table.shape[0] < 1:
            raise ValueError(f"{name}: needs at least one row, got shape {list(table.shape)}")
    return named
