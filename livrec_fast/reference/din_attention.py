"""DIN's attention unit over jagged histories, as the formula has it: pairs, a perceptron, a sum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._formula import per_user, wide_dtype
from ._oracle import Oracle, randn, random_offsets

ACTIVATIONS = ("sigmoid", "relu", "silu", "prelu", "dice")


class Layers(NamedTuple):
    """The unit's layers: weights [in, out] and biases [out] of all, the rest of the hidden ones."""

    weights: Sequence[Tensor]
    biases: Sequence[Tensor]
    activation: str
    slopes: Sequence[Tensor]
    gains: Sequence[Tensor]
    shifts: Sequence[Tensor]


def din_attention(
    q: Tensor, k: Tensor, v: Tensor | None, offsets: Tensor, weights: Sequence[Tensor],
    biases: Sequence[Tensor], slopes: Sequence[Tensor], gains: Sequence[Tensor],
    shifts: Sequence[Tensor], activation: str, softmax: bool, q_offsets: Tensor | None,
) -> Tensor:  # fmt: skip
    """Weigh each user's rows of v, or of k without one, for each of that user's candidates."""
    layers = Layers(weights, biases, activation, slopes, gains, shifts)
    v = k if v is None else v
    asking = q if q_offsets is None else per_user(q, q_offsets)
    users = zip(asking, per_user(k, offsets), per_user(v, offsets), strict=True)
    found = [attend(*user, layers, softmax) for user in users]
    if not found:  # B = 0 has no first user to tell the shape
        return q.new_zeros(*q.shape[:-1], v.shape[1])
    return (torch.stack if q_offsets is None else torch.cat)(found)


def attend(q: Tensor, k: Tensor, v: Tensor, layers: Layers, softmax: bool) -> Tensor:
    """Give out_c = sum_t w_ct v_t over one history, w the logits or their softmax.

    q [C, d], k [t, d], v [t, dv] -> out [C, dv]. The perceptron is in q's dtype, the softmax in
    float32 (float64 for float64). A history with no items gives 0.
    """
    logits = unit(q, k, layers)
    weights = logits.to(wide_dtype(q.dtype)).softmax(1).to(v.dtype) if softmax else logits
    return weights @ v


def unit(q: Tensor, k: Tensor, layers: Layers) -> Tensor:
    """Return the logits [C, t]: a perceptron of [q, k, q - k, q * k] for each pair."""
    shape = len(q), len(k), q.shape[1]
    a, b = q[:, None].expand(shape), k[None].expand(shape)
    x = torch.cat([a, b, a - b, a * b], 2)
    *hidden, last = zip(layers.weights, layers.biases, strict=True)
    for number, (weight, bias) in enumerate(hidden):
        x = activate(x @ weight + bias, layers, number)
    return (x @ last[0] + last[1])[..., 0]


def activate(x: Tensor, layers: Layers, number: int) -> Tensor:
    """Return the activation of x, what enters the units of a hidden layer."""
    match layers.activation:
        case "sigmoid":
            return torch.sigmoid(x)
        case "relu":
            return F.relu(x)
        case "silu":
            return F.silu(x)
        case "prelu":
            return torch.where(x > 0, x, layers.slopes[number] * x)
    gate = torch.sigmoid(layers.gains[number] * x + layers.shifts[number])
    return gate * x + layers.slopes[number] * (1 - gate) * x


def make_inputs(
    generator: torch.Generator,
    dtype: torch.dtype,
    *,
    B: int,
    C: int,
    L: int,
    d: int,
    dv: int,
    h: int,
    layers: int,
    activation: int,
    softmax: int,
    jagged: int,
) -> dict[str, Any]:
    """Draw histories of at most L rows and a unit with `layers` hidden layers of h, h - 3, ....

    dv: 0 for no values; jagged: 1 for candidates of any number, at most C. Logits vary by about 1.
    """
    offsets = random_offsets(generator, B, L)
    T = int(offsets[-1])
    q_offsets = random_offsets(generator, B, C) if jagged else None
    shape = (B, C, d) if q_offsets is None else (int(q_offsets[-1]), d)
    widths = [4 * d, *(max(1, h - 3 * number) for number in range(layers)), 1]
    pairs = list(zip(widths[:-1], widths[1:], strict=True))
    kind = ACTIVATIONS[activation]
    drawn = {
        "q": randn(generator, dtype, *shape),
        "k": randn(generator, dtype, T, d),
        "v": randn(generator, dtype, T, dv) if dv else None,
        "offsets": offsets,
        "weights": [2 * randn(generator, dtype, *pair) * pair[0] ** -0.5 for pair in pairs],
        "biases": [randn(generator, dtype, width) for width in widths[1:]],
    }
    if kind in ("prelu", "dice"):
        drawn["slopes"] = [randn(generator, dtype, width) / 4 for width in widths[1:-1]]
    if kind == "dice":
        drawn["gains"] = [randn(generator, dtype, width) / 4 + 1 for width in widths[1:-1]]
        drawn["shifts"] = [randn(generator, dtype, width) for width in widths[1:-1]]
    return {**drawn, "activation": kind, "softmax": bool(softmax), "q_offsets": q_offsets}


_SIZES = {
    "B": (0, 5), "C": (0, 9), "L": (0, 50), "d": (1, 20), "dv": (0, 20), "h": (1, 20),
    "layers": (1, 3), "activation": (0, 4), "softmax": (0, 1), "jagged": (0, 1),
}  # fmt: skip
_TYPICAL = {
    "B": 5, "C": 4, "L": 40, "d": 16, "dv": 0, "h": 20, "layers": 2, "activation": 0, "softmax": 0,
    "jagged": 0,
}  # fmt: skip
_CASES: dict[str, dict[str, int]] = {
    "typical": _TYPICAL,
    "no users": _TYPICAL | {"B": 0, "dv": 3},
    "no users, jagged": _TYPICAL | {"B": 0, "jagged": 1},
    "no candidates": _TYPICAL | {"C": 0, "softmax": 1},
    "no candidates, jagged": _TYPICAL | {"C": 0, "jagged": 1},
    "empty histories": _TYPICAL | {"L": 0, "softmax": 1},
    "one of each": dict.fromkeys(_TYPICAL, 1) | {"activation": 0},
    "softmax of jagged candidates": _TYPICAL | {"softmax": 1, "jagged": 1, "C": 9, "dv": 24},
    "relu": _TYPICAL | {"activation": 1, "L": 20, "softmax": 1},
    "silu, values": _TYPICAL | {"activation": 2, "layers": 1, "dv": 7, "d": 7, "h": 33},
    "prelu": _TYPICAL | {"activation": 3, "layers": 3, "jagged": 1, "L": 20},
    "dice": _TYPICAL | {"activation": 4, "dv": 5},
    "dice, softmax": _TYPICAL | {"activation": 4, "softmax": 1, "layers": 1, "h": 5},
    "long": _TYPICAL | {"B": 2, "L": 700, "C": 2},
    "many users": _TYPICAL | {"B": 20, "C": 2, "L": 9, "dv": 3, "softmax": 1},
    "many candidates": _TYPICAL | {"B": 2, "C": 35, "d": 32, "h": 40},
}
ORACLES = {"din_attention": Oracle(din_attention, make_inputs, _SIZES, _CASES)}
