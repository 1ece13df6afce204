"""How the weights of DIN's attention unit lie for its kernels, and the tiles of these."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import cycle, pairwise
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn.functional import pad

from ._code_rows import DTYPES


def tile_of(
    d: int,
    dv: int,
    sizes: Sequence[int],
    rows: dict[int, int],
    least: int = 16,
    least_later: int = 16,
) -> dict[str, Any]:
    """Return the tile and the widths of hidden layers of `sizes` units.

    rows: how many items leave no register short, by the greatest width; least: the smallest width;
    least_later: that of layers after the first, where any width is more than 32. Narrower ones
    leave products no good layout, and spill.
    """
    wide = [max(least, triton.next_power_of_2(size)) for size in (d, dv, *sizes)]
    if max(wide) > 32:
        wide[2:] = [max(32, wide[2]), *(max(least_later, width) for width in wide[3:])]
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
              (128, 128, (64, 64, 50), "dice"), (128, 64, (36,), "prelu"),
              (64, 64, (128, 32), "dice"), (64, 256, (256,), "dice"), (16, 256, (128, 16), "dice"),
              (128, 256, (64, 16, 64), "dice"), (128, 128, (64, 16, 16), "dice"),
              (16, 16, (64, 128, 16), "dice")]  # fmt: skip
    yield from zip(cycle(DTYPES.values()), shapes, strict=False)
