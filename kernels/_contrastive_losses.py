"""Losses of the contrastive loss from the sums that programs left, row by row in float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._code_tiles import finite
from ._contrastive_call import Call
from ._contrastive_tiles import LN_2, Side, configs_of, expm1, inverse_of, own_products
from ._contrastive_units import SMALL, SMALL_OPTIONS, small


@triton.jit
def _softplus(x):
    """Return log(1 + exp(x)) with all its digits, in float64."""
    small = tl.exp(-tl.abs(x))
    more = 1.0 + small
    rounded = tl.where(more == 1.0, 1.0, more - 1.0)  # what is left of `small`
    return tl.where(x > 0, x, 0.0) + tl.where(more == 1.0, small, tl.log(more) * (small / rounded))


@triton.jit
def _log_sum(peaks, sums, row, there, count, splits, ROWS: tl.constexpr):
    """Put runs together: return the log of their sum, and whether there is nothing in it."""
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for split in range(0, splits):
        at = tl.cast(split, tl.int64) * count + row
        peak_of = tl.load(peaks + at, mask=there, other=float("-inf"))
        top = tl.maximum(peak, peak_of)
        shift = finite(top)
        more = tl.load(sums + at, mask=there, other=0.0)
        total = total * tl.exp2(peak - shift) + more * tl.exp2(peak_of - shift)
        peak = top
    dead = total == 0  # a NaN is not
    return peak.to(tl.float64) * LN_2 + tl.log(tl.where(dead, 1.0, total).to(tl.float64)), dead


@triton.jit
def _loss_of(
    own, peaks, sums, pulls, rivals, shares, row, there, count, splits, GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Return losses and logsumexps, the latter inf where groups leave nothing.

    own: the logits of own pairs, in natural units.
    """
    rest, dead = _log_sum(peaks, sums, row, there, count, splits, ROWS)
    above = tl.where(dead, 0.0, _softplus(rest - own))
    loss, lse = above, own + above
    if GROUPS:
        pull = tl.zeros((ROWS,), tl.float64)
        rival = tl.full((ROWS,), float("-inf"), tl.float32)
        for split in range(0, splits):
            at = tl.cast(split, tl.int64) * count + row
            pull += tl.load(pulls + at, mask=there, other=0.0).to(tl.float64) * LN_2
            rival = tl.maximum(rival, tl.load(rivals + at, mask=there, other=float("-inf")))
        share = tl.load(shares + row, mask=there, other=1.0).to(tl.float64)
        none = (rival == float("-inf")) & (rest == rest)  # a NaN is one
        loss = tl.where(share == 1.0, above, lse - (own + pull) * share)
        loss = tl.where(none, 0.0, loss)
        lse = tl.where(none, float("inf"), lse)
    return loss, lse


@triton.jit
def _unsampled_loss_of(
    own, log_q, peaks, sums, counts, row, there, count, splits, ROWS: tl.constexpr
):
    """Return losses, logsumexps of negatives, inf where there are none, and losses' weights.

    own: the logits of own pairs before log_q, in natural units.
    """
    rest, dead = _log_sum(peaks, sums, row, there, count, splits, ROWS)
    negatives = tl.zeros((ROWS,), tl.float64)
    for split in range(0, splits):
        at = tl.cast(split, tl.int64) * count + row
        negatives += tl.load(counts + at, mask=there, other=0.0).to(tl.float64)
    dead |= negatives == 0
    odds = rest + tl.log(0.0 - expm1(tl.where(there, log_q, -1.0))) - own
    weight = 1.0 / (1.0 + tl.exp(tl.log(tl.where(dead, 1.0, negatives)) - odds))
    weight = tl.where(dead, 0.0, weight)
    return tl.where(dead, 0.0, weight * odds), tl.where(dead, float("inf"), rest), weight


@triton.jit(do_not_specialize=["count", "splits", "column_splits"])
def _finish_losses(
    queries, keys, bias, valid, temperature, shares, peaks, sums, pulls, rivals, counts,
    column_shares, column_peaks, column_sums, column_pulls, column_rivals, losses, lse, count,
    splits, column_splits, SYMMETRIC: tl.constexpr, GROUPS: tl.constexpr, STRIDE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write losses [count] and logsumexps [1 or 2, count], those of columns after those of rows.

    Where the positive is no sample (there are `counts`), then also weights of rows' losses.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < count
    there = inside
    if valid is not None:
        there &= tl.load(valid + row, mask=there, other=0) != 0
    scaled = own_products(queries, keys, row, there, STRIDE, ROWS, COLUMNS)
    scaled *= inverse_of(temperature)
    log_q = 0.0 - tl.load(bias + row, mask=there, other=0.0).to(tl.float64) * LN_2
    if counts is None:
        loss, sum_of = _loss_of(
            scaled - log_q, peaks, sums, pulls, rivals, shares, row, there, count, splits, GROUPS,
            ROWS,
        )  # fmt: skip
    else:
        loss, sum_of, weight = _unsampled_loss_of(
            scaled, log_q, peaks, sums, counts, row, there, count, splits, ROWS
        )
        to = lse + (1 + SYMMETRIC) * count + row
        tl.store(to, tl.where(there, weight, 0.0), mask=inside)
    tl.store(lse + row, tl.where(there, sum_of, 0.0), mask=inside)
    if SYMMETRIC:
        other, sum_of = _loss_of(
            scaled, column_peaks, column_sums, column_pulls, column_rivals, column_shares, row,
            there, count, column_splits, GROUPS, ROWS,
        )  # fmt: skip
        tl.store(lse + count + row, tl.where(there, sum_of, 0.0), mask=inside)
        loss = (loss + other) / 2
    tl.store(losses + row, tl.where(there, loss, 0.0).to(tl.float32), mask=inside)


def finish(
    queries: Side, keys: Side, call: Call, of_rows: list[Tensor | None], splits: int,
    of_columns: list[Tensor | None], column_splits: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return losses and what gradients need, as the operator does, from peaks, sums and so on."""
    batch, device = len(call.query), call.query.device
    losses = torch.empty(batch, dtype=torch.float32, device=device)
    lse = torch.empty((call.kept_sums, batch), dtype=torch.float64, device=device)
    shares, column_shares = call.shares
    *of_columns, _ = of_columns
    _finish_losses[(triton.cdiv(batch, small()["ROWS"]),)](
        queries.units, keys.units, keys.bias, call.valid, call.temperature, shares, *of_rows,
        column_shares, *of_columns, losses, lse, batch, splits, column_splits, call.symmetric,
        call.group_ids is not None, queries.units.shape[1], **small(), **SMALL_OPTIONS,
    )  # fmt: skip
    return losses, lse


def compile_configs() -> Iterator[tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """Yield launches as those above compile: kernel, argument types, constants, options.

    A type ending in ":16" is known to be divisible by 16. "matrix": tensor cores are meant.
    """
    sides = ("peaks", "sums", "pulls", "rivals", "shares")
    floats = dict.fromkeys((*sides, *(f"column_{name}" for name in sides)), "*fp32:16")
    floats |= {"valid": "*i1", "losses": "*fp32:16", "lse": "*fp64:16", "column_splits": "i32"}
    floats |= dict.fromkeys(("counts", "bias"), "*fp32:16")
    for _, stride, new, types, constants in configs_of():
        groups = "group_ids" not in constants
        if not new or stride != (768 if groups else 128):
            continue
        own = {**types, **floats, "queries": types["own"], "keys": types["own"]}
        shape = {"SYMMETRIC": True, "GROUPS": groups, "STRIDE": stride, **SMALL}
        if groups:
            shape["counts"] = None
        yield _finish_losses, own, shape, {**SMALL_OPTIONS, "matrix": False}
