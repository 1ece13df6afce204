"""The layers of DIN's attention unit, forth and back, on a tile of pairs, and how weights lie.

A candidate's first layer is a matrix for keys, B - D + diag(q) P, and what q alone adds to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import cycle, pairwise
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from ._code_rows import DTYPES
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
    x = _activate(x, units, SIZES[0], WIDTHS[0], ACTIVATION)
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
        x = _activate(x, units + own, SIZES[layer], WIDTHS[layer], ACTIVATION)
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
        entering = _activate(raw[layer], units + own, SIZES[layer], WIDTHS[layer], ACTIVATION)
        own += 4 * WIDTHS[layer]
    last = tl.sum(slope[:, None] * entering, 0)
    own = add_to(unit_sums, own, last[None, :])
    tl.store(unit_sums + own, tl.load(unit_sums + own) + tl.sum(slope, 0))


def tile_of(
    d: int, dv: int, sizes: Sequence[int], rows: dict[int, int], least: int = 16
) -> dict[str, Any]:
    """Return the tile and the widths of hidden layers of `sizes` units.

    rows: how many items leave no register short, by the greatest width; least: the smallest width.
    """
    wide = [max(least, triton.next_power_of_2(size)) for size in (d, dv, *sizes)]
    items = next(many for width, many in rows.items() if max(wide) <= width)
    if triton.knobs.runtime.interpret:  # whose time goes by operations, however many numbers each
        items = 128
    tile = {"BLOCK_T": items, "BLOCK_D": wide[0], "BLOCK_V": wide[1]}
    return {**tile, "SIZES": tuple(sizes), "WIDTHS": tuple(wide[2:])}


def _shapes(tile: dict[str, Any]) -> list[tuple[int, int]]:
    """Return the shapes of the matrices that kernels read, one after the other."""
    widths = tile["WIDTHS"]
    return [(tile["BLOCK_D"], widths[0])] * 3 + list(pairwise(widths))


def packed(
    d: int, weights: Sequence[Tensor], vectors: Sequence[Sequence[Tensor]], bias: Tensor,
    tile: dict[str, Any],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return all weights and what units have, as kernels read them; vectors: by kind.

    Weights are A + D, B - D and P, [BLOCK_D, WIDTHS[0]] each, then [WIDTHS[l], WIDTHS[l + 1]] of
    the hidden layers. Units: [4, WIDTHS[l]] of each, then the last layer's weights and its bias.
    """
    a, b, less, times = weights[0].float().split(d)
    matrices = [a + less, b - less, times, *(weight.float() for weight in weights[1:-1])]
    held = [
        pad(matrix, (0, columns - matrix.shape[1], 0, rows - matrix.shape[0])).flatten()
        for matrix, (rows, columns) in zip(matrices, _shapes(tile), strict=True)
    ]
    widths, units = tile["WIDTHS"], []
    for layer, width in enumerate(widths):
        for kind in vectors:
            one = kind[layer].float() if kind else bias.new_zeros(width, dtype=torch.float32)
            units.append(pad(one, (0, width - len(one))))
    last = weights[-1][:, 0].float()
    units += [pad(last, (0, widths[-1] - len(last))), bias.float()]
    return torch.cat(held), torch.cat(units)


def unpacked(
    d: int, matrices: Tensor, units: Tensor, tile: dict[str, Any]
) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Return the gradients of all weights, and of the four kinds of vectors: what `packed` took.

    matrices, units: sums laid out as `packed` lays them out, but for the first three matrices:
    those of q e, k e and q k e over pairs, e the gradient of what enters the first layer's units;
    after them comes one more of their size, which is nobody's gradient.
    """
    shapes, sizes, widths = _shapes(tile), tile["SIZES"], tile["WIDTHS"]
    shapes.insert(3, shapes[0])
    pieces = matrices.split([rows * columns for rows, columns in shapes])
    tall, wide = [d] * 4 + list(sizes[:-1]), [sizes[0]] * 4 + list(sizes[1:])
    a, b, times, _, *rest = (
        piece.view(shape)[:rows, :columns]
        for piece, shape, rows, columns in zip(pieces, shapes, tall, wide, strict=True)
    )
    lengths = [width for width in widths for _ in range(4)]
    *vectors, last, bias = units.split([*lengths, widths[-1], 1])
    weights = [torch.cat([a, b, a - b, times]), *rest, last[: sizes[-1], None]]
    kinds = [[vectors[4 * at + kind][:size] for at, size in enumerate(sizes)] for kind in range(4)]
    kinds[0].append(bias)
    return weights, kinds


def configs_of() -> Iterator[tuple[str, tuple[int, int, tuple[int, ...], str]]]:
    """Yield types of rows, and d, dv, sizes and activation: shapes that try tiles.

    Rows are float32 once they are read: a shape tells for all types.
    """
    shapes = [(16, 16, (80, 40), "dice"), (64, 64, (128, 64), "sigmoid"), (128, 20, (36,), "prelu"),
              (128, 256, (128,), "silu"), (10, 10, (16,), "relu"),
              (16, 16, (64, 64, 50), "sigmoid"), (64, 64, (64, 40), "dice"),
              (128, 128, (64, 64, 50), "dice"), (128, 64, (36,), "prelu")]  # fmt: skip
    yield from zip(cycle(DTYPES.values()), shapes, strict=False)
