"""What weights of the contrastive loss's gradient need of each softmax, and those of own pairs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._contrastive_call import Call
from ._contrastive_tiles import LN_2, LOG2_E, Side, configs_of, expm1, inverse_of, own_products
from ._contrastive_units import SMALL, small

_OPTIONS = {"num_warps": 2}


@triton.jit
def _slope_of(
    own, flow, gain, lse, shares, shifts, factors, portions, row, to, there,
    inside, GROUPS: tl.constexpr, UNSAMPLED: tl.constexpr,
):  # fmt: skip
    """Write what weights of one direction need, at `to`, and return those of own pairs.

    A weight is factor (exp2(s - shift) - portion), where shifts are rounded and factors make up for
    it; portions are of positives alone. Rows that do not count have a shift of inf. UNSAMPLED: own
    logits are in no sum.
    """
    total = tl.load(lse + row, mask=there, other=float("inf"))
    counts = there & (total != float("inf"))
    total = tl.where(counts, total, 0.0)
    flow = tl.where(counts, flow, 0.0)
    shift = (total * LOG2_E).to(tl.float32)
    mend = tl.exp2(shift.to(tl.float64) - total * LOG2_E)
    tl.store(shifts + to, tl.where(counts, -shift, float("-inf")), mask=inside)
    tl.store(factors + to, (flow * gain * mend).to(tl.float32), mask=inside)
    if UNSAMPLED:
        weight = 0.0 - flow
    else:
        weight = flow * expm1(own - total)
    if GROUPS:
        share = tl.load(shares + row, mask=there, other=1.0).to(tl.float64)
        portion = tl.where(counts, share / mend, 0.0)
        tl.store(portions + to, portion.to(tl.float32), mask=inside)
        weight += flow * (1.0 - share)
    return tl.where(counts, weight, 0.0)


@triton.jit(do_not_specialize=["count", "total"])
def _prepare(
    grad, queries, keys, bias, valid, temperature, gain, lse, shares, column_shares, shifts,
    factors, portions, diagonal, missed, heats, count, total, SYMMETRIC: tl.constexpr,
    GROUPS: tl.constexpr, UNSAMPLED: tl.constexpr, STRIDE: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write [1 or 2, total] shifts, factors and portions, past `count` of rows that do not count.

    diagonal [count]: weights of own pairs, times the gain; heats: those times their logits less
    biases. missed: the gradient of the own key's log_q, but for what sweeps over keys add up.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < total
    there = row < count
    flow = tl.load(grad + row, mask=there, other=0.0).to(tl.float64)
    if valid is not None:
        there &= tl.load(valid + row, mask=there, other=0) != 0
    if SYMMETRIC:
        flow *= 0.5
    more = tl.full((), 1.0, tl.float64)
    if gain is not None:
        more = tl.load(gain).to(tl.float64)
    scaled = own_products(queries, keys, row, there, STRIDE, ROWS, COLUMNS)
    scaled *= inverse_of(temperature)
    log_q = 0.0 - tl.load(bias + row, mask=there, other=0.0).to(tl.float64) * LN_2
    of_row = flow
    if UNSAMPLED:
        of_row *= tl.load(lse + (1 + SYMMETRIC) * count + row, mask=there, other=0.0)
    weight = _slope_of(
        scaled - log_q, of_row, more, lse, shares, shifts, factors, portions, row, row, there,
        inside, GROUPS, UNSAMPLED,
    )  # fmt: skip
    if UNSAMPLED:
        less = tl.where(weight == 0, -1.0, expm1(log_q))
        tl.store(missed + row, 0.0 - weight * tl.exp(log_q) / less, mask=row < count)
    else:
        tl.store(missed + row, 0.0 - weight, mask=row < count)
    if SYMMETRIC:
        weight += _slope_of(
            scaled, flow, more, lse + count, column_shares, shifts, factors, portions,
            row, total + row, there, inside, GROUPS, False,
        )  # fmt: skip
    tl.store(diagonal + row, weight * more, mask=row < count)
    tl.store(heats + row, tl.where(there, weight * more * scaled, 0.0), mask=row < count)


@dataclass(frozen=True)
class Direction:
    """What the weights of a softmax need of each of its rows: [padded]."""

    shift: Tensor | None = None
    factor: Tensor | None = None
    portion: Tensor | None = None


def directions(
    grad: Tensor, lse: Tensor, queries: Side, keys: Side, gain: Tensor | None, call: Call
) -> tuple[Direction, Direction, Tensor]:
    """Return the needs of the softmax of rows, of that of columns, and those of own pairs [3, B].

    The latter are `diagonal`, `missed` and `heats`, in float64.
    """
    batch, total, device = len(grad), len(keys.units), grad.device
    groups = call.group_ids is not None
    shape = (3 if groups else 2, 2 if call.symmetric else 1, total)
    held = torch.empty(shape, dtype=torch.float32, device=device)
    own = torch.empty((3, batch), dtype=torch.float64, device=device)
    kept = [*held, *[None] * (3 - len(held))]
    _prepare[(triton.cdiv(total, small()["ROWS"]),)](
        grad, queries.units, keys.units, keys.bias, call.valid, call.temperature, gain,
        lse.contiguous(), *call.shares, *kept, *own, batch, total, call.symmetric, groups,
        call.unsampled, keys.units.shape[1], **small(), **_OPTIONS,
    )  # fmt: skip
    rows = Direction(*held[:, 0])
    return rows, Direction(*held[:, 1]) if call.symmetric else Direction(), own


def compile_configs() -> Iterator[tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """Yield launches as those above compile: kernel, argument types, constants, options.

    A type ending in ":16" is known to be divisible by 16. "matrix": tensor cores are meant.
    """
    names = ("grad", "bias", "shares", "column_shares", "shifts", "factors", "portions", "gain")
    more = dict.fromkeys(names, "*fp32:16") | {"valid": "*i1", "total": "i32"}
    more |= dict.fromkeys(("lse", "diagonal", "missed", "heats"), "*fp64:16")
    for _, stride, new, types, constants in configs_of():
        groups = "group_ids" not in constants
        if new and stride == (768 if groups else 128):
            own = {**types, **more, "queries": types["own"], "keys": types["own"]}
            shape = {"SYMMETRIC": True, "GROUPS": groups, "STRIDE": stride}
            shape["UNSAMPLED"] = not groups
            yield _prepare, own, {**shape, **SMALL}, {**_OPTIONS, "matrix": False}
