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
from torch.nn.functional import pad

from ._code_rows import DTYPES, as_argument
from ._code_tiles import finite
from ._target_tiles import ascending, rows_at


@triton.jit
def _weights_at(weights, first, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return a matrix [ROWS, COLUMNS] from `first` on."""
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    return tl.load(weights + first + rows[:, None] * COLUMNS + columns[None, :])


@triton.jit
def _activate(x, units, SIZE: tl.constexpr, WIDTH: tl.constexpr, ACTIVATION: tl.constexpr):
    """Return the activation of x [., WIDTH], and 0 for units from SIZE on.

    units [4, WIDTH]: biases, which x has already, then slopes, gains and shifts.
    """
    unit = tl.arange(0, WIDTH)
    if ACTIVATION == "sigmoid":
        x = tl.sigmoid(x)
    elif ACTIVATION == "relu":
        x = tl.where(x < 0, 0.0, x)
    elif ACTIVATION == "silu":
        x *= tl.sigmoid(x)
    else:
        slope = tl.load(units + WIDTH + unit)[None, :]
        if ACTIVATION == "prelu":
            x = tl.where(x > 0, x, slope * x)
        else:
            gain = tl.load(units + 2 * WIDTH + unit)[None, :]
            gate = tl.sigmoid(gain * x + tl.load(units + 3 * WIDTH + unit)[None, :])
            x = gate * x + slope * (1 - gate) * x
    return tl.where((unit < SIZE)[None, :], x, 0.0)


@triton.jit(do_not_specialize=["C"])
def _attend_by_unit(
    q, k, v, weights, units, bounds, owners, out, C, D: tl.constexpr, DV: tl.constexpr,
    SIZES: tl.constexpr, WIDTHS: tl.constexpr, ACTIVATION: tl.constexpr, SOFTMAX: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Weigh a candidate's history, and add it up; where there is no v, keys are the values.

    weights: A + D, B - D and P, [BLOCK_D, WIDTHS[0]] each, then [WIDTHS[l], WIDTHS[l + 1]] of the
    hidden layers. units: [4, WIDTHS[l]] of each, then the last layer's weights and its bias.
    """
    FIRST: tl.constexpr = WIDTHS[0]
    PART: tl.constexpr = BLOCK_D * FIRST
    LAST: tl.constexpr = WIDTHS[len(WIDTHS) - 1]
    candidate = tl.program_id(0).to(tl.int64)
    if owners is None:
        user = candidate // C
    else:
        user = tl.load(owners + candidate)
    begin = tl.load(bounds + user)
    rows = (tl.load(bounds + user + 1) - begin).to(tl.int32)
    dims, value_dims = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    query = tl.load(q + candidate * D + dims, mask=dims < D, other=0.0).to(tl.float32)[:, None]
    alone = tl.sum(query * _weights_at(weights, 0, BLOCK_D, FIRST), 0)
    alone += tl.load(units + tl.arange(0, FIRST))
    matrix = _weights_at(weights, PART, BLOCK_D, FIRST)
    matrix += query * _weights_at(weights, 2 * PART, BLOCK_D, FIRST)
    peak = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    result = tl.zeros((BLOCK_V,), tl.float32)
    for first in range(0, rows, BLOCK_T):
        left = rows - first
        k_tile = rows_at(k, begin + first, left, 0, BLOCK_T, 1, D, BLOCK_D)
        x = tl.dot(k_tile.to(tl.float32), matrix, input_precision="tf32x3") + alone[None, :]
        x = _activate(x, units, SIZES[0], FIRST, ACTIVATION)
        at = 3 * PART
        own = 4 * FIRST
        for layer in tl.static_range(1, len(WIDTHS)):
            layer_weights = _weights_at(weights, at, WIDTHS[layer - 1], WIDTHS[layer])
            bias = tl.load(units + own + tl.arange(0, WIDTHS[layer]))
            x = tl.dot(x, layer_weights, input_precision="tf32x3") + bias[None, :]
            x = _activate(x, units + own, SIZES[layer], WIDTHS[layer], ACTIVATION)
            at += WIDTHS[layer - 1] * WIDTHS[layer]
            own += 4 * WIDTHS[layer]
        score = tl.sum(x * tl.load(units + own + tl.arange(0, LAST))[None, :], 1)
        score += tl.load(units + own + LAST)
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
    """Return the tile and the widths of hidden layers of `sizes` units."""
    wide = [max(16, triton.next_power_of_2(size)) for size in (d, dv, *sizes)]
    rows = 64 if max(wide) <= 32 else 32 if max(wide) <= 128 else 16
    if triton.knobs.runtime.interpret:  # whose time goes by operations, however many numbers each
        rows = 128
    tile = {"BLOCK_T": rows, "BLOCK_D": wide[0], "BLOCK_V": wide[1]}
    return {**tile, "SIZES": tuple(sizes), "WIDTHS": tuple(wide[2:])}


def _packed(
    d: int, weights: Sequence[Tensor], vectors: Sequence[Sequence[Tensor]], bias: Tensor,
    plan: dict[str, Any],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return all weights and what units have, as kernels read them; vectors: by kind."""
    widths = plan["WIDTHS"]
    a, b, less, times = weights[0].float().split(d)
    tall = [plan["BLOCK_D"]] * 3 + list(widths[:-1])
    wide = [widths[0]] * 3 + list(widths[1:])
    matrices = [a + less, b - less, times, *(weight.float() for weight in weights[1:-1])]
    held = [
        pad(matrix, (0, columns - matrix.shape[1], 0, rows - matrix.shape[0])).flatten()
        for matrix, rows, columns in zip(matrices, tall, wide, strict=True)
    ]
    units = []
    for layer, width in enumerate(widths):
        for kind in vectors:
            one = kind[layer].float() if kind else bias.new_zeros(width, dtype=torch.float32)
            units.append(pad(one, (0, width - len(one))))
    last = weights[-1][:, 0].float()
    units += [pad(last, (0, widths[-1] - len(last))), bias.float()]
    return torch.cat(held), torch.cat(units)


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
        held = _packed(d, weights, (biases, slopes, gains, shifts), biases[-1], plan)
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
    shapes = [(16, 16, (80, 40), "dice"), (64, 64, (128, 64), "sigmoid"), (128, 20, (36,), "prelu"),
              (128, 256, (128,), "silu"), (10, 10, (16,), "relu"),
              (16, 16, (64, 64, 50), "sigmoid")]  # fmt: skip
    for kind in DTYPES.values():
        own = types | dict.fromkeys(("q", "k", "v", "out"), kind)
        for d, dv, sizes, activation in shapes:
            constants = {**_plan(d, dv, sizes), "D": d, "DV": dv, "ACTIVATION": activation}
            constants["SOFTMAX"] = activation != "dice"
            if d == dv:
                constants |= {"v": None, "owners": None}
            yield _attend_by_unit, own, constants, {**_OPTIONS, "matrix": True}
