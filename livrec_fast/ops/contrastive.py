"""In-batch contrastive loss (InfoNCE) with masked false negatives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._checks import FLOATS, check_choice, check_one_dtype, check_same, check_tensor
from .._dispatch import Backend, Op, refuse_wide
from ..reference import contrastive as reference
from ..reference._formula import wide_dtype

_WIDE = (torch.float32, torch.float64)
_REDUCTIONS = ("mean", "sum", "none")
_MOST_KEPT = 16_384  # rows whose false negatives are kept as bits: 32 MiB


def _check_values(
    query: Tensor,
    key: Tensor,
    temperature: Tensor,
    normalize: bool,
    symmetric: bool,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    false_negative_threshold: float | None,
    keep_pairs: bool,
    log_q: Tensor | None,
    valid: Tensor | None,
    extra_keys: Tensor | None,
) -> None:
    value = float(temperature)
    if not 0 < value < float("inf"):
        raise ValueError(f"temperature: must be positive and finite, got {value}")
    if log_q is None:
        return
    bad = ~log_q.isfinite()
    if valid is not None:
        bad[: len(valid)] &= valid
    if bad.any():
        at = int(bad.nonzero()[0])
        raise ValueError(f"log_q: must be finite, got log_q[{at}] = {float(log_q[at])}")


def _fake(
    query: Tensor,
    key: Tensor,
    temperature: Tensor,
    normalize: bool,
    symmetric: bool,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    false_negative_threshold: float | None,
    keep_pairs: bool,
    *rest: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    batch = query.shape[0]
    kept = keep_pairs and false_negative_threshold is not None
    pairs = (batch, (batch + 63) // 64) if kept else (0, 0)
    return (
        query.new_empty((batch,), dtype=wide_dtype(query.dtype)),
        query.new_empty((2 if symmetric else 1, batch), dtype=torch.float64),
        query.new_empty(pairs, dtype=torch.int64),
    )


_op = Op(
    "in_batch_contrastive",
    "(Tensor query, Tensor key, Tensor temperature, bool normalize, bool symmetric, "
    "Tensor? query_ids, Tensor? key_ids, float? false_negative_threshold, bool keep_pairs, "
    "Tensor? log_q, Tensor? valid, Tensor? extra_keys) "
    "-> (Tensor losses, Tensor lse, Tensor pairs)",
    fake=_fake,
    reference=reference.in_batch_contrastive,
    check_values=_check_values,
    backends=(Backend("native", refuse_wide, backward=None),),
    autocast=("query", "key", "extra_keys"),
)


def in_batch_contrastive(
    query: Tensor,
    key: Tensor,
    *,
    temperature: float | Tensor = 0.07,
    normalize: bool = True,
    symmetric: bool = False,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    false_negative_threshold: float | None = None,
    log_q: Tensor | None = None,
    weights: Tensor | None = None,
    valid: Tensor | None = None,
    extra_keys: Tensor | None = None,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    r"""Contrast each query's own key with the other keys of the batch, less the false negatives.

    $\ell_i = \log \sum_{j \notin m_i} e^{s_{ij}} - s_{ii},\quad
    s_{ij} = \langle q_i, k_j \rangle / T - \log Q_j$, with $q, k$ of unit length where `normalize`.

    In PyTorch, without masks::

        logits = F.normalize(query, dim=1) @ F.normalize(torch.cat([key, extra_keys]), dim=1).T
        loss = F.cross_entropy(logits / temperature - log_q, torch.arange(len(query)))

    Args:
        query: [B, D] float32, float16, bfloat16 or float64.
        key: [B, D], query's dtype; key i is the positive of query i, the others are its negatives.
        temperature: T > 0, a float, or a 0-d floating tensor that may want a gradient.
        normalize: divide queries and keys by max(norm, 1e-12), as F.normalize does.
        symmetric: average with the loss of the other direction, where key i picks its query among
            the batch's queries by the same mask; log_q and extra_keys have no part in it.
        query_ids: int64 [B]; key j is no negative of row i where query_ids[j] == query_ids[i].
        key_ids: int64 [B], or [B + E] with ids of the extra keys; likewise where they are equal.
        false_negative_threshold: where the cosine of queries i and j is greater, neither key is a
            negative of the other's row. In float32, whatever `normalize`; it has no gradient.
        log_q: [B] or [B + E] float32 (or float64), the log of each key's sampling probability,
            which every logit loses, the positive's too. [B] means 0 for the extra keys.
        weights: [B] float32 (or float64), not negative.
        valid: bool [B]; False takes row i and key i out, whatever they hold, NaN included.
        extra_keys: [E, D], query's dtype: more negatives for every row, such as a memory queue.
        reduction: "mean" is sum(w_i loss_i) / sum(w_i) over valid rows, or 0 where sum(w_i) is 0;
            "sum" is sum(w_i loss_i); "none" is w_i loss_i, [B].
        backend: "auto", "native" or "reference".

    Returns:
        0-d, or [B] for "none"; float64 for float64 inputs, else float32.

    A mask never hides a row's own positive. A valid row whose negatives are all masked has loss
    and gradient exactly 0 and counts in the mean; an invalid row has both 0 and does not count.
    B = 0 gives a mean of 0; E = 0 is no extra keys. Differentiable once, in query, key, extra_keys,
    log_q, weights and temperature. The gradient of a row of zeros is F.normalize's: finite, but
    1e12 times that of its direction, which float16 cannot hold.

    Numerics: unit vectors are rounded to the inputs' dtype; all after them is in float32, or in
    float64 for float64 inputs (the reference also rounds products to the inputs' dtype: without
    `normalize`, one past 65,504 overflows in float16). A softmax less its greatest logit takes any
    temperature, and a small loss keeps its digits. A cosine within rounding of the threshold may
    fall on either side, for both rows of the pair alike, and as in the gradient. The same inputs
    give the same bits on every run, of the C++ kernel for any number of threads. Autocast casts
    query, key and extra_keys; temperature and log_q stay.

    Workspace: of the C++ kernel 4 D' (2 B + E) bytes, with D' = D rounded up to an odd multiple of
    16, as much again in the gradient, B^2 / 8 bytes of false negatives where B is at most 16,384
    (they are found anew in both passes where it is more), and per thread about 1,024 D + 110,000
    bytes. Of the reference: about five float32 matrices and three boolean ones of B x (B + E), and
    as much again in the gradient. Threads: up to one for every 256 keys, and 32.

    Raises:
        TypeError: a wrong type or dtype. ValueError: a wrong shape, device or reduction, or a
        temperature that is not positive and finite, or a valid row's log_q that is not finite.
        BackendError: the named backend cannot run this.

    Source: FLUID, section 3.1.3 (query-to-item InfoNCE with false-negative masking); LARM, section
    2.2.1 (user and author towers); Moment&Cross, section 2.4 (aligning four searched sequences).

    Example:
        >>> loss = in_batch_contrastive(users, rooms, key_ids=room_ids, temperature=0.05)
        >>> loss.backward()
    """
    check_tensor("query", query, ("B", "D"), FLOATS)
    batch, dim = query.shape
    if dim < 1:
        raise ValueError(f"query: D must be at least 1, got shape {list(query.shape)}")
    check_tensor("key", key, (batch, dim), FLOATS)
    if extra_keys is not None:
        check_tensor("extra_keys", extra_keys, ("E", dim), FLOATS)
    check_one_dtype(query=query, key=key, extra_keys=extra_keys)
    keys = batch + (0 if extra_keys is None else extra_keys.shape[0])
    _check_vector("query_ids", query_ids, (batch,), (torch.int64,))
    _check_vector("key_ids", key_ids, (batch, keys), (torch.int64,))
    _check_vector("log_q", log_q, (batch, keys), _WIDE)
    _check_vector("weights", weights, (batch,), _WIDE)
    _check_vector("valid", valid, (batch,), (torch.bool,))
    _check_flags(normalize, symmetric, false_negative_threshold, reduction)
    scale = _as_tensor(temperature, query)
    check_same(
        "device", query=query, key=key, temperature=scale, query_ids=query_ids, key_ids=key_ids,
        log_q=log_q, weights=weights, valid=valid, extra_keys=extra_keys,
    )  # fmt: skip
    threshold = None if false_negative_threshold is None else float(false_negative_threshold)
    losses, _, _ = _op(
        query, key, scale, normalize, symmetric, query_ids, key_ids, threshold,
        threshold is not None and batch <= _MOST_KEPT, log_q, valid, extra_keys, backend=backend,
    )  # fmt: skip
    return _reduce(losses, weights, valid, reduction)


def _reduce(losses: Tensor, weights: Tensor | None, valid: Tensor | None, reduction: str) -> Tensor:
    """Weigh the losses, which are 0 in invalid rows, and reduce them."""
    if weights is None:
        weights = torch.ones_like(losses) if valid is None else valid.to(losses.dtype)
    elif valid is not None:
        weights = weights.masked_fill(~valid, 0)
    weighted = losses * weights
    if reduction == "none":
        return weighted
    if reduction == "sum":
        return weighted.sum()
    total = weights.sum()
    return weighted.sum() / total.masked_fill(total == 0, 1)


def _check_vector(
    name: str, value: Any, lengths: tuple[int, ...], dtypes: tuple[torch.dtype, ...]
) -> None:
    """Check an optional vector that may have one of several lengths."""
    if value is None:
        return
    check_tensor(name, value, ("B",), dtypes)
    if all(value.shape[0] != length for length in lengths):
        allowed = " or ".join(f"[{length}]" for length in dict.fromkeys(lengths))
        raise ValueError(f"{name}: shape must be {allowed}, got {list(value.shape)}")


def _check_flags(normalize: Any, symmetric: Any, threshold: Any, reduction: Any) -> None:
    for name, flag in (("normalize", normalize), ("symmetric", symmetric)):
        if not isinstance(flag, bool):
            raise TypeError(f"{name}: must be a bool, got {type(flag).__name__}")
    if threshold is not None:
        if isinstance(threshold, bool) or not isinstance(threshold, (int, float)):
            raise TypeError(
                f"false_negative_threshold: must be a float, got {type(threshold).__name__}"
            )
        if threshold != threshold:
            raise ValueError("false_negative_threshold: must be a number, got nan")
    check_choice("reduction", reduction, _REDUCTIONS)


def _as_tensor(temperature: Any, query: Tensor) -> Tensor:
    """Return the temperature as a 0-d tensor; a float is checked here, a tensor's value later."""
    if isinstance(temperature, Tensor):
        check_tensor("temperature", temperature, (), FLOATS)
        return temperature
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)):
        raise TypeError(
            f"temperature: must be a float or a 0-d tensor, got {type(temperature).__name__}"
        )
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature: must be positive and finite, got {temperature}")
    return query.new_full((), temperature, dtype=wide_dtype(query.dtype))
