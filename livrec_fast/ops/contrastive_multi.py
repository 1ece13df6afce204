"""Several in-batch contrastive losses that share their queries."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._checks import (
    FLOATS,
    check_choice,
    check_one_dtype,
    check_same,
    check_tensor,
    named_items,
)
from .._dispatch import Backend, Op, refuse_wide
from ..reference import contrastive_multi as reference
from ..reference._formula import wide_dtype
from . import _contrastive as checks


def _check_values(anchor: Tensor, keys: Tensor, temperatures: Tensor, *rest: object) -> None:
    for temperature in temperatures:
        checks.check_temperature(temperature)


def _fake(
    anchor: Tensor,
    keys: Tensor,
    temperatures: Tensor,
    normalize: bool,
    symmetric: bool,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    false_negative_threshold: float | None,
    keep_pairs: bool,
    *rest: object,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, terms = anchor.shape[0], keys.shape[0]
    pairs = checks.kept_shape(batch, batch, false_negative_threshold, keep_pairs)
    return (
        anchor.new_empty((terms, batch), dtype=wide_dtype(anchor.dtype)),
        anchor.new_empty((terms, 1 + symmetric, batch), dtype=torch.float64),
        anchor.new_empty(pairs, dtype=torch.int64),
    )


_op = Op(
    "in_batch_contrastive_multi",
    "(Tensor anchor, Tensor keys, Tensor temperatures, bool normalize, bool symmetric, "
    "Tensor? query_ids, Tensor? key_ids, float? false_negative_threshold, bool keep_pairs, "
    "Tensor? valid, str precision) -> (Tensor losses, Tensor lse, Tensor pairs)",
    fake=_fake,
    reference=reference.in_batch_contrastive_multi,
    check_values=_check_values,
    backends=(Backend("native", refuse_wide, backward=None),),
    autocast=("anchor", "keys"),
)


def in_batch_contrastive_multi(
    anchor: Tensor,
    keys: Tensor | list[Tensor] | tuple[Tensor, ...],
    *,
    temperature: float | Tensor = 0.07,
    normalize: bool = True,
    symmetric: bool = False,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    false_negative_threshold: float | None = None,
    weights: Tensor | None = None,
    valid: Tensor | None = None,
    precision: str | None = None,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    r"""Contrast the same queries with several batches of keys, a loss for each.

    $L_t = \mathrm{in\_batch\_contrastive}(a, k_t)$, each over its own batch alone.

    In PyTorch::

        losses = torch.stack([in_batch_contrastive(anchor, key) for key in keys])

    Args:
        anchor: [B, D] float32, float16, bfloat16 or float64: the queries of every term.
        keys: [T, B, D], or a list of T tensors [B, D], anchor's dtype; key i of each term is the
            positive of row i.
        temperature: a float, or a 0-d floating tensor, of all terms; or [T], one each.
        normalize: of all terms, as in `in_batch_contrastive`.
        symmetric: likewise.
        query_ids: int64 [B], likewise.
        false_negative_threshold: likewise; false negatives are found once.
        precision: likewise.
        key_ids: int64 [T, B], of each term's keys.
        weights: [B] or [T, B] float32 (or float64), not negative.
        valid: bool [B] or [T, B]; False takes a row out of that term. An anchor that some term
            reads must be finite.
        reduction: "mean" and "sum" over the rows of each term, "none" for every row.
        backend: "auto", "native" or "reference".

    Returns:
        [T], or [T, B] for "none"; float64 for float64 inputs, else float32. Add them up, weighted.

    Masks, empty batches, numerics and determinism are those of `in_batch_contrastive`.

    The C++ kernel goes over the anchor once for all terms: unit vectors, equal query_ids and false
    negatives are found once, and the anchor's gradient is added up in one buffer. What a term costs
    by itself remains: four products of B x B x D, to which a threshold adds half a one for all
    terms together, or two where the pairs are too many to be kept. Four terms execute, of the
    instructions of four single losses (D 128, counted at B 512): 0.97 without a threshold, which is
    hardly less, 0.84 with one, and 0.75 with pairs found anew in both passes.

    Workspace: of the C++ kernel that of `in_batch_contrastive` for the anchor, and for each term
    4 D' B bytes for its keys, as much again in the gradient, and 512 D per thread; in the gradient
    4 D' B more for the anchor (D' as there). Of the reference: that of T single losses. A list of
    keys is copied.

    Raises:
        TypeError: a wrong type or dtype. ValueError: a wrong shape, device or choice, no terms, or
        a temperature that is not positive and finite. BackendError: the named backend cannot run
        this.

    Source: Moment&Cross, section 2.4 (the mixed sequence against four searched ones).

    Example:
        >>> losses = in_batch_contrastive_multi(mixed, [clicks, gifts, comments, follows])
        >>> losses.sum().backward()
    """
    check_tensor("anchor", anchor, ("B", "D"), FLOATS)
    if anchor.shape[1] < 1:
        raise ValueError(f"anchor: D must be at least 1, got shape {list(anchor.shape)}")
    stacked = _stacked(keys, anchor)
    terms, batch = stacked.shape[:2]
    check_one_dtype(anchor=anchor, keys=stacked)
    checks.check_vector("query_ids", query_ids, (batch,), (torch.int64,))
    if key_ids is not None:
        check_tensor("key_ids", key_ids, (terms, batch), (torch.int64,))
    weights = _of_terms("weights", weights, terms, batch, checks.WIDE)
    valid = _of_terms("valid", valid, terms, batch, (torch.bool,))
    checks.check_flags(normalize=normalize, symmetric=symmetric)
    threshold = checks.check_threshold(false_negative_threshold)
    lowered = checks.precision_of(precision)
    check_choice("reduction", reduction, checks.REDUCTIONS)
    temperatures = _temperatures(temperature, anchor, terms)
    check_same(
        "device", anchor=anchor, keys=stacked, temperature=temperatures, query_ids=query_ids,
        key_ids=key_ids, weights=weights, valid=valid,
    )  # fmt: skip
    kept = threshold is not None and checks.keeps_pairs(batch, batch)
    losses, _, _ = _op(
        anchor, stacked, temperatures, normalize, symmetric, query_ids, key_ids, threshold, kept,
        valid, lowered, backend=backend,
    )  # fmt: skip
    return checks.reduce(losses, weights, valid, reduction)


def _stacked(keys: Any, anchor: Tensor) -> Tensor:
    """Check the keys, and return them as [T, B, D]."""
    batch, dim = anchor.shape
    if isinstance(keys, Tensor):
        check_tensor("keys", keys, ("T", batch, dim), FLOATS)
        if keys.shape[0] < 1:
            raise ValueError(f"keys: at least one term is needed, got shape {list(keys.shape)}")
        return keys
    items = named_items("keys", keys)
    for name, key in items.items():
        check_tensor(name, key, (batch, dim), FLOATS)
    check_one_dtype(anchor=anchor, **items)
    check_same("device", anchor=anchor, **items)
    return torch.stack([key.to(anchor.dtype) for key in items.values()])


def _of_terms(
    name: str, value: Any, terms: int, batch: int, dtypes: tuple[torch.dtype, ...]
) -> Tensor | None:
    """Check what all terms share, or each has, and return it as [T, B]."""
    if value is None:
        return None
    shared = isinstance(value, Tensor) and value.dim() == 1
    check_tensor(name, value, (batch,) if shared else (terms, batch), dtypes)
    return value.expand(terms, batch)


def _temperatures(temperature: Any, anchor: Tensor, terms: int) -> Tensor:
    """Check one temperature or one for each term, and return them in the wide dtype, [T]."""
    if isinstance(temperature, Tensor) and temperature.dim() == 1:
        check_tensor("temperature", temperature, (terms,), FLOATS)
    else:
        temperature = checks.as_tensor(temperature, anchor)
    return temperature.to(wide_dtype(anchor.dtype)).expand(terms)
