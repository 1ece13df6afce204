"""The layers of DIN's attention unit, forth and back, on a tile of pairs.

A candidate's first layer is a matrix for keys, B - D + diag(q) P, and what q alone adds to it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._target_tiles import rows_at


@triton.jit
def weights_at(weights, first, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return a matrix [ROWS, COLUMNS] from `first` on."""
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    return tl.load(weights + first + rows[:, None] * COLUMNS + columns[None, :])


@triton.jit
def again(held, step):
    """Return a pointer as it is, at a step of a loop: what is read there is read in every step.

    Else all layers' weights would be read before the loop, and leave no register in it.
    """
    return held + tl.multiple_of(tl.minimum(step, 0), 16)


@triton.jit
def activate(x, units, SIZE: tl.constexpr, WIDTH: tl.constexpr, ACTIVATION: tl.constexpr):
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


@triton.jit
def _halves(x):
    """Return the columns of x [., 2 n], first half and second half."""
    ROWS: tl.constexpr = x.shape[0]
    HALF: tl.constexpr = x.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(x, (ROWS, 2, HALF)), (0, 2, 1)))


@triton.jit
def _narrowest_product(x, weights, first, query, total, BACK: tl.constexpr, STRIDE: tl.constexpr):
    inner, outer = tl.arange(0, x.shape[1]), tl.arange(0, total.shape[1])
    if BACK:
        at = first + inner[:, None] + outer[None, :] * STRIDE
    else:
        at = first + inner[:, None] * STRIDE + outer[None, :]
    factor = tl.load(weights + at)
    if query is not None:  # rows of the weights are the query's dimensions
        PART: tl.constexpr = total.shape[1] * STRIDE
        factor += tl.load(weights + PART + at) * query[None, :]
    return tl.dot(x, factor, total, input_precision="tf32x3")


@triton.jit
def _narrow_product(x, weights, first, query, total, BACK: tl.constexpr, STRIDE: tl.constexpr):
    if x.shape[1] == 64:
        low, high = _halves(x)
        total = _narrowest_product(low, weights, first, query, total, BACK, STRIDE)
        first += 32 if BACK else 32 * STRIDE
        total = _narrowest_product(high, weights, first, query, total, BACK, STRIDE)
    else:
        total = _narrowest_product(x, weights, first, query, total, BACK, STRIDE)
    return total


@triton.jit
def _product(x, weights, first, query, OUT: tl.constexpr, BACK: tl.constexpr):
    """Return x [., IN] times weights [IN, OUT] from `first` on, or those [OUT, IN] if BACK.

    With a query [OUT], weights are those and, times the query, those that follow them. Tensor cores
    want float32 factors in registers, as two TF32 parts: 32 columns at a time, up to 128.
    """
    IN: tl.constexpr = x.shape[1]
    STRIDE: tl.constexpr = IN if BACK else OUT
    total = tl.zeros((x.shape[0], OUT), tl.float32)
    if IN == 128:
        low, high = _halves(x)
        total = _narrow_product(low, weights, first, query, total, BACK, STRIDE)
        first += 64 if BACK else 64 * STRIDE
        total = _narrow_product(high, weights, first, query, total, BACK, STRIDE)
    else:
        total = _narrow_product(x, weights, first, query, total, BACK, STRIDE)
    return total


@triton.jit
def part_of(q, candidate, part, D: tl.constexpr, BLOCK: tl.constexpr):
    """Return BLOCK of a query's numbers from `part` on."""
    dims = part + tl.arange(0, BLOCK)
    return tl.load(q + candidate * D + dims, mask=dims < D, other=0.0).to(tl.float32)


@triton.jit
def enter(
    k, first, count, q, candidate, alone, weights, D: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """Return what enters the first layer's units for keys from `first` on, 32 columns at a time."""
    total = tl.zeros((BLOCK_T, FIRST), tl.float32)
    for part in range(0, BLOCK_D, 32):
        tile = rows_at(k, first, count, 0, BLOCK_T, 1, D, 32, part)
        at = (BLOCK_D + part) * FIRST
        matrix = weights_at(weights, at, 32, FIRST)
        query = part_of(q, candidate, part, D, 32)[:, None]
        matrix += query * weights_at(weights, at + BLOCK_D * FIRST, 32, FIRST)
        total = tl.dot(tile.to(tl.float32), matrix, total, input_precision="tf32x3")
    return total + alone[None, :]


@triton.jit
def back_to_keys(flow, weights, query, BLOCK_D: tl.constexpr):
    """Return the gradient of keys from that of what enters the first layer's units."""
    return _product(flow, weights, BLOCK_D * flow.shape[1], query, BLOCK_D, True)


@triton.jit
def alone_of(
    q, candidate, weights, units, D: tl.constexpr, BLOCK_D: tl.constexpr, FIRST: tl.constexpr
):
    """Return what a query alone adds to what enters the first layer's units."""
    alone = tl.load(units + tl.arange(0, FIRST))
    for part in range(0, BLOCK_D, 32):
        query = part_of(q, candidate, part, D, 32)[:, None]
        alone += tl.sum(query * weights_at(weights, part * FIRST, 32, FIRST), 0)
    return alone


@triton.jit
def logits(
    x, weights, units, SIZES: tl.constexpr, WIDTHS: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_D: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """Return logits from what enters the first layer's units, and what enters those of each layer.

    The latter is a tuple, a tile [., WIDTHS[l]] for each hidden layer. NARROW: as `_product`
    multiplies.
    """
    raw = (x,)
    x = activate(x, units, SIZES[0], WIDTHS[0], ACTIVATION)
    at = 3 * BLOCK_D * WIDTHS[0]
    own = 4 * WIDTHS[0]
    for layer in tl.static_range(1, len(WIDTHS)):
        bias = tl.load(units + own + tl.arange(0, WIDTHS[layer]))
        if NARROW:
            x = _product(x, weights, at, None, WIDTHS[layer], False)
        else:
            layer_weights = weights_at(weights, at, WIDTHS[layer - 1], WIDTHS[layer])
            x = tl.dot(x, layer_weights, input_precision="tf32x3")
        x += bias[None, :]
        raw = raw + (x,)
        x = activate(x, units + own, SIZES[layer], WIDTHS[layer], ACTIVATION)
        at += WIDTHS[layer - 1] * WIDTHS[layer]
        own += 4 * WIDTHS[layer]
    LAST: tl.constexpr = WIDTHS[len(WIDTHS) - 1]
    score = tl.sum(x * tl.load(units + own + tl.arange(0, LAST))[None, :], 1)
    return score + tl.load(units + own + LAST), raw


@triton.jit
def _steepness(raw, grad, units, WIDTH: tl.constexpr, ACTIVATION: tl.constexpr):
    """Return the gradient of what enters units from that of what leaves them, for each pair.

    And of their slopes, gains and shifts, as a tuple of those that the activation has.
    """
    unit = tl.arange(0, WIDTH)
    more = ()
    if ACTIVATION == "sigmoid":
        gate = tl.sigmoid(raw)
        grad *= gate * (1 - gate)
    elif ACTIVATION == "relu":
        grad = tl.where(raw <= 0, 0.0, grad)
    elif ACTIVATION == "silu":
        gate = tl.sigmoid(raw)
        grad *= gate * (1 + raw * (1 - gate))
    else:
        slope = tl.load(units + WIDTH + unit)[None, :]
        if ACTIVATION == "prelu":
            more = (tl.where(raw > 0, 0.0, grad * raw),)
            grad = tl.where(raw > 0, grad, slope * grad)
        else:
            gain = tl.load(units + 2 * WIDTH + unit)[None, :]
            gate = tl.sigmoid(gain * raw + tl.load(units + 3 * WIDTH + unit)[None, :])
            moved = grad * raw * (1 - slope) * gate * (1 - gate)
            more = (grad * raw * (1 - gate), moved * raw, moved)
            grad = grad * (gate + slope * (1 - gate)) + gain * moved
    return grad, more


@triton.jit
def back_through_layers(
    slope, raw, weights, units, BLOCK_D: tl.constexpr, WIDTHS: tl.constexpr,
    ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Return gradients of what enters the units of each layer, from those of logits.

    And for each layer what `_steepness` returns after it. raw: as `logits` returns it.
    """
    at = 3 * BLOCK_D * WIDTHS[0]
    own = 4 * WIDTHS[0]
    for layer in tl.static_range(1, len(WIDTHS)):
        at += WIDTHS[layer - 1] * WIDTHS[layer]
        own += 4 * WIDTHS[layer]
    LAST: tl.constexpr = WIDTHS[len(WIDTHS) - 1]
    grad = slope[:, None] * tl.load(units + own + tl.arange(0, LAST))[None, :]
    found, rest = (), ()
    for layer in tl.static_range(len(WIDTHS) - 1, -1, -1):
        own -= 4 * WIDTHS[layer]
        grad, more = _steepness(raw[layer], grad, units + own, WIDTHS[layer], ACTIVATION)
        found, rest = (grad,) + found, (more,) + rest
        if layer > 0:
            at -= WIDTHS[layer - 1] * WIDTHS[layer]
            grad = _product(grad, weights, at, None, WIDTHS[layer - 1], True)
    return found, rest
