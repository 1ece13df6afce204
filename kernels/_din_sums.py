"""What DIN's gradients add up for each candidate: softmaxes, and the sums of a program."""

from __future__ import annotations

import triton
import triton.language as tl

from ._code_tiles import finite
from ._din_layers import activate, again, enter, logits, part_of, weights_at
from ._target_tiles import rows_at


@triton.jit
def add_to(sums, first, tile):
    """Add a matrix to the sums from `first` on, and return where those after it begin."""
    COLUMNS: tl.constexpr = tile.shape[1]
    rows, columns = tl.arange(0, tile.shape[0]), tl.arange(0, COLUMNS)
    at = sums + first + rows[:, None] * COLUMNS + columns[None, :]
    tl.store(at, tl.load(at) + tile)
    return first + tile.shape[0] * COLUMNS


@triton.jit
def add_up(
    weight_sums, unit_sums, slope, raw, found, rest, units, BLOCK_D: tl.constexpr,
    SIZES: tl.constexpr, WIDTHS: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Add a tile's gradients of all but the first layer's weights to the sums of a program.

    raw: as `logits` returns it; found, rest: as `back_through_layers` does. Sums lie as `unpacked`
    takes them; in registers there is no room for them, nor for activations since they were made.
    """
    at = 4 * BLOCK_D * WIDTHS[0]
    own = 0
    entering = raw[0]  # of the layer after; the first one's sums are none of these
    for layer in tl.static_range(len(WIDTHS)):
        flow = found[layer]
        if layer > 0:
            at = add_to(weight_sums, at, tl.dot(tl.trans(entering), flow, input_precision="tf32x3"))
        add_to(unit_sums, own, tl.sum(flow, 0)[None, :])
        for kind in tl.static_range(len(rest[layer])):
            to = own + (kind + 1) * WIDTHS[layer]
            add_to(unit_sums, to, tl.sum(rest[layer][kind], 0)[None, :])
        entering = activate(raw[layer], units + own, SIZES[layer], WIDTHS[layer], ACTIVATION)
        own += 4 * WIDTHS[layer]
    last = tl.sum(slope[:, None] * entering, 0)
    own = add_to(unit_sums, own, last[None, :])
    tl.store(unit_sums + own, tl.load(unit_sums + own) + tl.sum(slope, 0))


@triton.jit
def softmax_of(
    q, k, v, candidate, alone, flow, base, weights, units, begin, rows, D: tl.constexpr,
    DV: tl.constexpr, SIZES: tl.constexpr, WIDTHS: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Return a history's greatest logit, 1 / the sum of exponentials less it, and the mean.

    That of <flow, v>, flow the gradient of the result; sums are of what it is more than `base`, so
    that they lose nothing to a part that all rows have in common. No history: inf, 0 and base.
    """
    peak = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    excess = tl.full((), 0.0, tl.float32)
    for first in range(0, rows, BLOCK_T):
        left = rows - first
        here = again(weights, first)
        x = enter(k, begin + first, left, q, candidate, alone, here, D, BLOCK_T, BLOCK_D, WIDTHS[0])
        score, _ = logits(x, here, units, SIZES, WIDTHS, ACTIVATION, BLOCK_D, True)
        values = k if v is None else v
        v_tile = rows_at(values, begin + first, left, 0, BLOCK_T, 1, DV, BLOCK_V)
        above = tl.sum(v_tile.to(tl.float32) * flow[None, :], 1) - base
        score = tl.where(tl.arange(0, BLOCK_T) < left, score, float("-inf"))
        top = tl.maximum(peak, tl.max(score, 0))
        shift = finite(top)
        score, old = tl.exp(score - shift), tl.exp(peak - shift)
        total = total * old + tl.sum(score, 0)
        excess = excess * old + tl.sum(score * above, 0)
        peak = top
    dead = total == 0  # a NaN is not
    inverse = tl.where(dead, 0.0, 1.0 / tl.where(dead, 1.0, total))
    return tl.where(dead, float("inf"), peak), inverse, base + excess * inverse


@triton.jit
def end_candidate(
    q, candidate, entered, weights, sums, grad_q, D: tl.constexpr, BLOCK_D: tl.constexpr,
    FIRST: tl.constexpr,
):  # fmt: skip
    """Write the gradient of a query, and add that of the first layer's weights to its sums.

    entered: the sum of flow, the gradient of what enters the first layer's units. After the three
    sums of the program stands that of keys times flow, of this candidate: it is cleared.
    """
    SIZE: tl.constexpr = BLOCK_D * FIRST
    rows, units = tl.arange(0, 32), tl.arange(0, FIRST)
    for part in range(0, BLOCK_D, 32):
        at = part * FIRST
        own = sums + 3 * SIZE + at + rows[:, None] * FIRST + units[None, :]
        outer = tl.load(own)
        tl.store(own, tl.zeros_like(outer))
        found = entered[None, :] * weights_at(weights, at, 32, FIRST)
        found += outer * weights_at(weights, 2 * SIZE + at, 32, FIRST)
        dims = part + rows
        value = tl.sum(found, 1).to(grad_q.dtype.element_ty)
        tl.store(grad_q + candidate * D + dims, value, mask=dims < D)
        query = part_of(q, candidate, part, D, 32)[:, None]
        add_to(sums, at, query * entered[None, :])
        add_to(sums, SIZE + at, outer)
        add_to(sums, 2 * SIZE + at, query * outer)
