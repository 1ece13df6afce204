"""DIN's attention unit in Triton: pairs are made in registers, a tile of items at a time.

A program has one candidate. The first layer is factorised, as q and k enter it linearly but for
their product: its matrix B - D + diag(q) P and what q alone adds are made once, and a tile of items
then goes through all layers and is weighed before the next one comes.

Floors. Products: 2 d h_1 operations for each pair in the first layer, a quarter of what pairs would
take, and 2 h_l h_l+1 in those after it, as three TF32 ones. From memory: keys and values once for
each candidate, the second time from a cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._code_rows import as_argument
from ._code_tiles import finite
from ._din_layers import logits, weights_at
from ._din_packing import configs_of, packed, tile_of
from ._target_tiles import ascending, rows_at


@triton.jit
def _first_layer(query, weights, units, BLOCK_D: tl.constexpr, FIRST: tl.constexpr):
    """Return a candidate's matrix [BLOCK_D, FIRST], and what its query [BLOCK_D, 1] alone adds."""
    PART: tl.constexpr = BLOCK_D * FIRST
    alone = tl.sum(query * weights_at(weights, 0, BLOCK_D, FIRST), 0)
    alone += tl.load(units + tl.arange(0, FIRST))
    matrix = weights_at(weights, PART, BLOCK_D, FIRST)
    return matrix + query * weights_at(weights, 2 * PART, BLOCK_D, FIRST), alone


@triton.jit(do_not_specialize=["C"])
def _attend_by_unit(
    q, k, v, weights, units, bounds, owners, out, C, D: tl.constexpr, DV: tl.constexpr,
    SIZES: tl.constexpr, WIDTHS: tl.constexpr, ACTIVATION: tl.constexpr, SOFTMAX: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Weigh a candidate's history, and add it up; where there is no v, keys are the values.

    weights, units: as `packed` returns them.
    """
    candidate = tl.program_id(0).to(tl.int64)
    if owners is None:
        user = candidate // C
    else:
        user = tl.load(owners + candidate)
    begin = tl.load(bounds + user)
    rows = (tl.load(bounds + user + 1) - begin).to(tl.int32)
    dims, value_dims = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    query = tl.load(q + candidate * D + dims, mask=dims < D, other=0.0).to(tl.float32)[:, None]
    matrix, alone = _first_layer(query, weights, units, BLOCK_D, WIDTHS[0])
    peak = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    result = tl.zeros((BLOCK_V,), tl.float32)
    for first in range(0, rows, BLOCK_T):
        left = rows - first
        k_tile = rows_at(k, begin + first, left, 0, BLOCK_T, 1, D, BLOCK_D)
        x = tl.dot(k_tile.to(tl.float32), matrix, input_precision="tf32x3") + alone[None, :]
        score, _ = logits(x, weights, units, SIZES, WIDTHS, ACTIVATION, BLOCK_D, False)
        there = tl.arange(0, BLOCK_T) < left
        if v is None:
            v_tile = k_tile
        else:
            v_tile = rows_at(v, begin + first, left, 0, BLOCK_T, 1, DV, BLOCK_V)
        if SOFTMAX:
            score = tl.where(there, score, float("-inf"))
            top = tl.maximum(peak, tl.max(score, 0))
            shift = finite(top)
            score = tl.exp(score - shift)
            old = tl.exp(peak - shift)
            total = total * old + tl.sum(score, 0)
            result = result * old
            peak = top
        else:
            score = tl.where(there, score, 0.0)
        result += tl.sum(score[:, None] * v_tile.to(tl.float32), 0)
    if SOFTMAX:
        result /= tl.where(total == 0, 1.0, total)
    to = out + candidate * DV + value_dims
    tl.store(to, result.to(out.dtype.element_ty), mask=value_dims < DV)


_OPTIONS = {"num_warps": 8, "num_stages": 1}  # weights of a layer fill the shared memory


def _plan(d: int, dv: int, sizes: Sequence[int]) -> dict[str, Any]:
    return tile_of(d, dv, sizes, {32: 64, 64: 32, 1024: 16}, least_later=64)


def din_attention(
    q: Tensor, k: Tensor, v: Tensor | None, offsets: Tensor, weights: Sequence[Tensor],
    biases: Sequence[Tensor], slopes: Sequence[Tensor], gains: Sequence[Tensor],
    shifts: Sequence[Tensor], activation: str, softmax: bool, q_offsets: Tensor | None,
) -> Tensor:  # fmt: skip
    """Return what torch's operator `livrec::din_attention` does.

    The host is not asked: offsets that do not ascend from 0 to the end are made to.
    """
    d, dv = q.shape[-1], (k if v is None else v).shape[1]
    out = q.new_empty((*q.shape[:-1], dv))
    if not out.numel() or len(offsets) < 2:
        return out.zero_()
    plan = _plan(d, dv, [weight.shape[1] for weight in weights[:-1]])
    with torch.cuda.device_of(q):
        bounds, owners, C = ascending(offsets, len(k)), None, q.shape[1]
        if q_offsets is not None:
            every = torch.arange(len(q), device=q.device)
            owners = torch.searchsorted(ascending(q_offsets, len(q))[1:], every, right=True)
        held = packed(d, weights, (biases, slopes, gains, shifts), biases[-1], plan)
        _attend_by_unit[(out.numel() // dv,)](
            as_argument(q), as_argument(k), None if v is None else as_argument(v), *held, bounds,
            owners, out, C, D=d, DV=dv, ACTIVATION=activation, SOFTMAX=softmax, **plan, **_OPTIONS,
        )  # fmt: skip
    return out


def compile_configs() -> Iterator[tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """Yield launches as those above compile: kernel, argument types, constants, options.

    A type ending in ":16" is known to be divisible by 16. "matrix": tensor cores are meant.
    """
    types = {"weights": "*fp32:16", "units": "*fp32:16", "C": "i32"}
    types |= dict.fromkeys(("bounds", "owners"), "*i64:16")
    for kind, (d, dv, sizes, activation) in configs_of():
        own = types | dict.fromkeys(("q", "k", "v", "out"), kind)
        constants = {**_plan(d, dv, sizes), "D": d, "DV": dv, "ACTIVATION": activation}
        constants["SOFTMAX"] = activation != "dice"
        if d == dv:
            constants |= {"v": None, "owners": None}
        yield _attend_by_unit, own, constants, {**_OPTIONS, "matrix": True}
