"""History search by faiss's exact search, user by user: a baseline behind the same call."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._checks import FLOATS, check_finite, check_offsets, check_same, check_tensor
from ..ops import _search_mask
from ..reference._search_mask import kept


def history_search_faiss(
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
) -> tuple[Tensor, Tensor]:
    """Find the k items of each user's own history with the greatest dot product, by faiss.

    What `livrec_fast.history_search` computes, with `faiss.knn` over each user's rows: exact, in
    float32, without an index, as histories are many and short-lived.

    Args:
        query: [B, C, D] float32, float16 or bfloat16, on the CPU.
        keys: [T, D], query's dtype.
        offsets: int64 [B + 1].
        k: how many to find.
        item_ids: [T], with query_ids: this and what follows as in `history_search`.
        query_ids: which id an item must have.
        item_bits: [T], with required_bits.
        required_bits: which bits an item must have.
        item_times: [T], with since, until or both.
        since: the least time an item may have.
        until: the time before which an item must be.

    Returns:
        (scores, positions), both [B, C, k], best first; float32 and int64, filled with -inf and -1.

    Equal scores, as faiss rounds them, go to the most recent item first, also where the k-th is one
    of them: where faiss finds more than k such, more are asked for until one differs. With masks,
    each candidate searches a copy of the rows that they leave, as faiss has one selection of rows
    for all queries of a call. No gradients. Threads are faiss's: `faiss.omp_set_num_threads`.

    Raises:
        ImportError: faiss is not installed. TypeError, ValueError: as `history_search`; float64 and
        GPU tensors are refused, too.

    Source: faiss, https://github.com/facebookresearch/faiss.

    Example:
        >>> scores, positions = history_search_faiss(query, keys, offsets, 100)
    """
    faiss = _import()
    _search_mask.check_query(query, offsets, k)
    check_tensor("keys", keys, ("T", query.shape[2]), FLOATS)
    check_same("dtype", query=query, keys=keys)
    check_same("device", query=query, keys=keys, offsets=offsets)
    if query.dtype == torch.float64:
        raise TypeError("query: faiss computes in float32; got float64")
    if query.device.type != "cpu":
        raise ValueError(f"query: faiss reads CPU tensors, got one on {query.device}")
    masks = _search_mask.check_masks(
        query, len(keys), item_ids, query_ids, item_bits, required_bits, item_times, since, until
    )
    check_offsets(offsets, len(keys))
    check_finite("query", query)
    check_finite("keys", keys)
    scores = torch.full((*query.shape[:2], k), -torch.inf)
    positions = torch.full(scores.shape, -1)
    wanted, rows = (tensor.detach().float().contiguous().numpy() for tensor in (query, keys))
    left = kept(query, offsets, *masks) if any(mask is not None for mask in masks) else None
    for user, (first, last) in enumerate(pairwise(offsets.tolist())):
        found = scores[user].numpy(), positions[user].numpy()
        if left is None:
            _search(faiss, wanted[user], rows[first:last], np.arange(last - first), *found)
            continue
        for candidate, may in enumerate(next(left)):
            one = slice(candidate, candidate + 1)
            at = may.nonzero()[:, 0].numpy()
            _search(faiss, wanted[user, one], rows[first:last][at], at, *(f[one] for f in found))
    return scores, positions


def _search(
    faiss: Any, query: Any, rows: Any, at: Any, scores: Any, positions: Any
) -> None:  # fmt: skip
    """Search rows, whose positions are `at`, and write what was found."""
    count = min(scores.shape[1], len(rows))
    if not count or not len(query):
        return
    asked = min(count + 1, len(rows))
    while True:
        best, ids = faiss.knn(query, rows, asked, metric=faiss.METRIC_INNER_PRODUCT)
        tied = best[:, -1] == best[:, count - 1]  # as may be the next, which was not asked for
        if asked == len(rows) or not tied.any():
            break
        asked = min(2 * asked, len(rows))
    order = np.lexsort((-ids, -best))[:, :count]
    scores[:, :count] = np.take_along_axis(best, order, 1)
    positions[:, :count] = at[np.take_along_axis(ids, order, 1)]


def _import() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise ImportError("faiss is needed: pip install 'livrec-fast[bench]'") from error
    return faiss
