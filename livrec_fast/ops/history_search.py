"""History search: the items of a user's own history that are most like a query."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._checks import FLOATS, check_finite, check_offsets, check_same, check_tensor
from .._dispatch import Backend, Op, refuse_wide
from ..reference import history_search as reference
from ..reference._formula import wide_dtype
from . import _search_gradients, _search_mask
from ._code_fields import check_rows
from ._prefix import check_contents


def _fake(query: Tensor, rows: object, offsets: Tensor, k: int, *rest: object) -> Any:
    shape = (*query.shape[:2], k)
    scores = query.new_empty(shape, dtype=wide_dtype(query.dtype))
    return scores, query.new_empty(shape, dtype=torch.int64)


def _check_values(query: Tensor, keys: Tensor, offsets: Tensor, *rest: object) -> None:
    check_offsets(offsets, len(keys))
    check_finite("query", query)
    check_finite("keys", keys)


def _check_code_values(
    query: Tensor, codes: Tensor, tables: Sequence[Tensor], offsets: Tensor, *rest: Any
) -> None:
    *_, levels, groups, hashing, packed = rest
    check_contents(codes, levels, offsets, packed)
    check_finite("query", query)
    for field, table in enumerate(tables):
        check_finite(f"tables[{field}]", table)


def _triton(query: Tensor, keys: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    from ..kernels import history_search

    return history_search.history_search(query, keys, *rest)


def _triton_codes(query: Tensor, codes: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    from ..kernels import history_search

    return history_search.history_search_codes(query, codes, *rest)


_dense = Op(
    "history_search",
    f"(Tensor query, Tensor keys, Tensor offsets, int k, {_search_mask.SCHEMA}) "
    "-> (Tensor scores, Tensor positions)",
    fake=_fake,
    reference=reference.history_search,
    check_values=_check_values,
    backends=(
        Backend("native", refuse_wide, backward=_search_gradients.dense),
        Backend("triton", _search_mask.refuse_lists, _triton, _search_gradients.dense),
    ),
)

_codes = Op(
    "history_search_codes",
    "(Tensor query, Tensor codes, Tensor[] tables, Tensor offsets, int k, "
    f"{_search_mask.SCHEMA}, int[] levels, int[] groups, str hashing, bool packed) "
    "-> (Tensor scores, Tensor positions)",
    fake=lambda query, codes, tables, *rest: _fake(query, codes, *rest),
    reference=reference.history_search_codes,
    check_values=_check_code_values,
    backends=(
        Backend("native", refuse_wide, backward=_search_gradients.codes),
        Backend(
            "triton", _search_mask.refuse_code_lists, _triton_codes, _search_gradients.triton_codes
        ),
    ),
)


def history_search(
    query: Tensor,
    keys: Tensor,
    offsets: Tensor,
    k: int,
    *,
    item_ids: Tensor | None = None,
    query_ids: Tensor | None = None,
    item_bits: Tensor | None = None,
    required_bits: int | Tensor | None = None,
    item_times: Tensor | None = None,
    since: int | Tensor | None = None,
    until: int | Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    r"""Find the k items of each user's own history with the greatest dot product.

    $\mathrm{score}_{ct} = \langle \mathrm{query}_c, \mathrm{key}_t \rangle$; the k greatest over
    those of the user's rows that the masks leave.

    In PyTorch, per user u, up to the order of ties and to filling::

        rows = slice(offsets[u], offsets[u + 1])
        may = item_ids[rows] == query_ids[u, :, None]
        may &= item_bits[rows] & required_bits[u, :, None] == required_bits[u, :, None]
        may &= (item_times[rows] >= since[u, :, None]) & (item_times[rows] < until[u, :, None])
        scores[u], positions[u] = (query[u] @ keys[rows].T).masked_fill(~may, -inf).topk(k)

    Args:
        query: [B, C, D] float32, float16, bfloat16 or float64: C candidates for each of B users.
        keys: [T, D], query's dtype: the keys of all histories, one after the other.
        offsets: int64 [B + 1]; user u has the rows offsets[u] .. offsets[u + 1] - 1, oldest first.
        k: how many to find, at least 1; it may exceed every length.
        item_ids: [T] of any integer dtype, with query_ids: only items whose id is the candidate's
            are found, such as those of its author. An id of -1, on either side, is unknown and
            equals nothing; other negative ids are ids.
        query_ids: [B, C] of any integer dtype, with item_ids.
        item_bits: [T] of any integer dtype, with required_bits: only items that have every
            required bit are found, such as the long-viewed ones. Bits are those of int64, to which
            signed dtypes extend their sign.
        required_bits: an int, or [B, C] of any integer dtype; 0 requires nothing.
        item_times: [T] of any integer dtype, with since, until or both: only items with
            since <= time < until are found. Times are in any unit and need not be in order.
        since: None, an int, or [B, C] of any integer dtype.
        until: None, an int, or [B, C] of any integer dtype.
        backend: "auto", "native", "triton" or "reference".

    Returns:
        (scores, positions), both [B, C, k], best first: scores in float32 (float64 for float64);
        positions int64, relative to the user's whole history: they mean row offsets[u] + position.
        `search_rows` lists those rows for attention.

    Equal scores go to the largest position, that is the most recent item, first; equal rows have
    equal scores. So a query of zeros finds the latest k items, and with masks the latest k of an
    author, of a behaviour or of a window. Masked items are as absent. Where fewer than k items are
    left, the score is -inf and the position -1. B, C and T may be 0. Differentiable once, in query
    and keys, through scores; fill and masked items have gradients of 0.

    Numerics: float16 and bfloat16 are widened to float32. The items found are float64's wherever
    the gap to the k-th best exceeds 2 (D + 1) eps |query| |key|, eps = 2^-23; a score is off by
    half that at most. Scores past float32 mean nothing, though positions stay in range. Autocast
    leaves the inputs as they are. The same inputs give the same bits on every run and for any
    number of threads. Workspace: 8 B C bytes for each query_ids, required_bits, since or until that
    is not int64 [B, C]. On a CPU: C (40 min(k, T) + 9,000) bytes for each of at most two parts per
    thread. On a GPU: 8 C k bytes for each of B + T / 1,024 pieces; offsets are cut off at T, what
    is not finite means nothing, and the host does not wait. Triton takes k up to 1,024. Of the
    reference: float32 copies of query and keys, one array of C x D x the longest history, and a few
    of C x that history; its gradient, of C x D x T.

    Raises:
        TypeError: a wrong type or dtype. ValueError: a wrong shape or device, k < 1, offsets that
        do not start at 0, decrease, or do not end at T, a row of query or keys that is not finite,
        masked or not, one of a mask's arguments without the other, or an int past int64.
        BackendError: the named backend cannot run this.

    Source: Moment&Cross, section 2.4: its five general search units (latest, by dot product twice,
    of the same author, latest long-viewed) are calls of this.

    Example:
        >>> scores, positions = history_search(query, keys, offsets, 100)  # [B, C, 100]
        >>> _, latest = history_search(torch.zeros_like(query), keys, offsets, 100)
        >>> _, same = history_search(
        ...     query, keys, offsets, 100, item_ids=author_of_item, query_ids=author_of_candidate
        ... )
    """
    _search_mask.check_query(query, offsets, k)
    check_tensor("keys", keys, ("T", query.shape[2]), FLOATS)
    check_same("dtype", query=query, keys=keys)
    check_same("device", query=query, keys=keys, offsets=offsets)
    masks = _search_mask.check_masks(
        query,
        keys.shape[0],
        item_ids,
        query_ids,
        item_bits,
        required_bits,
        item_times,
        since,
        until,
    )
    return _dense(query, keys, offsets, k, *masks, backend=backend)


def history_search_codes(
    query: Tensor,
    codes: Tensor,
    tables: Sequence[Tensor],
    offsets: Tensor,
    k: int,
    *,
    item_ids: Tensor | None = None,
    query_ids: Tensor | None = None,
    item_bits: Tensor | None = None,
    required_bits: int | Tensor | None = None,
    item_times: Tensor | None = None,
    since: int | Tensor | None = None,
    until: int | Tensor | None = None,
    levels: Sequence[int] | None = None,
    prefix: bool = False,
    groups: Sequence[int] | None = None,
    hashing: str = "modulo",
    packed: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    r"""Find the k items of each user's own history with the greatest dot product, from their codes.

    $\mathrm{score}_{ct} = \sum_f \langle \mathrm{query}_c, E_f[r_f(c_t)] \rangle$, where $r_f(c_t)$
    is the code $c_{tf}$ itself or, in a group of prefixes, the row of its first codes up to f, as
    `prefix_ngram_keys` gives it; a code of -1 adds nothing.

    In PyTorch, without codes of -1, where every code is its own row, up to the order of ties::

        keys = sum(table[code.long()] for table, code in zip(tables, codes.T))
        scores, positions = history_search(query, keys, offsets, k)

    Args:
        query: [B, C, D] float32, float16, bfloat16 or float64: C candidates for each of B users.
        codes: [T, F] of any integer dtype: the codes of all histories; column f is in [-1, N_f).
            Or, packed, what `pack_codes` makes of them.
        tables: F tensors [R_f, D], query's dtype; R_f >= 1 may differ.
        offsets: int64 [B + 1]; user u has the rows offsets[u] .. offsets[u + 1] - 1, oldest first.
        k: how many to find, at least 1; it may exceed every length.
        item_ids: [T], with query_ids [B, C]: this and what follows as in history_search.
        query_ids: which id an item must have.
        item_bits: [T], with required_bits.
        required_bits: which bits an item must have.
        item_times: [T], with since, until or both.
        since: the least time an item may have.
        until: the time before which an item must be.
        levels: (N_1, ..., N_F), the ranges of the codes; None, R_f each. This and what follows as
            in `code_attention`: needed with packed, prefix and groups.
        prefix: the fields are the prefixes of one code.
        groups: how many fields each code has; None: every field by itself, unless prefix is set.
        hashing: "modulo", "murmur3" or "order_preserving", where a table has too few rows.
        packed: codes are uint8 [T, ceil(bits / 8)] of `pack_codes`.
        backend: "auto", "native", "triton" or "reference".

    Returns:
        (scores, positions), both [B, C, k], as history_search.

    Equal scores go to the largest position, that is the most recent item, first; equal codes have
    equal scores, and a query of zeros finds the latest. Masked items are as absent. Where fewer
    than k items are left, the score is -inf and the position -1. B, C and T may be 0.
    Differentiable once, in query and tables, through scores; fill and masked items have gradients
    of 0.

    Numerics: float16 and bfloat16 are widened to float32. The score is the sum, field by field, of
    query's products with the tables, or with Triton the product with their rows' sum in float32;
    keys are never kept nor rounded further. It is off by at most (D + F + 1) eps |query| sum_f
    |E_f[r_f]|, eps = 2^-23, and the items found are float64's wherever the gap to the k-th best
    exceeds twice that. Autocast leaves the inputs as they are.
    The same inputs give the same bits on every run; the reference uses torch's matrix products,
    whose bits may change with the number of threads. Workspace: 8 B C bytes for each query_ids,
    required_bits, since or until that is not int64 [B, C]. On a CPU: that of history_search, and
    4 n (D + 64) bytes per thread for the n rows that a history names. On a GPU: that of
    history_search, whose limits hold, and 4 F bytes per item; a code out of range is unknown, and
    Triton takes at most 8 fields. Of the reference: float32 copies of query and tables, F int64 per
    item, arrays of C x sum R_f and of C x F x the longest history.

    Raises:
        TypeError: a wrong type or dtype. ValueError: a wrong shape or device, k < 1, no table, a
        wrong level, group or choice, offsets that do not start at 0, decrease, or do not end at T,
        a row of query or tables that is not finite, one of a mask's arguments without the other, or
        an int past int64. IndexError: a code out of range, masked or not. BackendError: the named
        backend cannot run this.

    Source: Moment&Cross, section 2.4 (general search units), over LARM's codes; FLUID, equations
    1-2 (prefixes).

    Example:
        >>> scores, positions = history_search_codes(query, codes, tables, offsets, 100)
    """
    _search_mask.check_query(query, offsets, k)
    named = _search_mask.check_tables(tables, query.shape[2])
    found = list(named.values())
    rows = check_rows(codes, found, levels, prefix, groups, hashing, packed)
    check_same("dtype", query=query, **named)
    check_same("device", query=query, codes=codes, offsets=offsets, **named)
    masks = _search_mask.check_masks(
        query,
        codes.shape[0],
        item_ids,
        query_ids,
        item_bits,
        required_bits,
        item_times,
        since,
        until,
    )
    return _codes(query, codes, found, offsets, k, *masks, *rows, backend=backend)
