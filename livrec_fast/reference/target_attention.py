"""Target attention over jagged histories, as the formula has it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._formula import per_user, wide_dtype
from ._oracle import Oracle, randn, random_offsets

ACTIVATIONS = ("softmax", "none", "silu", "sigmoid")
_ELEMENTWISE = {"none": lambda logits: logits, "silu": F.silu, "sigmoid": torch.sigmoid}


def target_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    scale: float,
    activation: str = "softmax",
    q_offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend from each user's candidates, q [B, C, H, d], to that user's rows of k and v.

    With q_offsets candidates are jagged, too: q [Q, H, d]. lse is empty but for softmax.
    """
    bias = bias_by_head(bias, k)
    asking = q if q_offsets is None else per_user(q, q_offsets)
    rows = (per_user(values, offsets) for values in (k, v, bias))
    users = zip(asking, *rows, strict=True)
    pairs = [attend(*user, scale, activation) for user in users]  # type: ignore[call-arg]
    join = torch.stack if q_offsets is None else torch.cat
    wide = wide_dtype(q.dtype)
    if not pairs:  # B = 0 has no first user to tell the shapes
        out, lse = q.new_zeros(*q.shape[:-1], v.shape[2]), q.new_zeros(q.shape[:-1], dtype=wide)
    else:
        out, lse = (join(results) for results in zip(*pairs, strict=True))
    return out.contiguous(), lse if activation == "softmax" else q.new_zeros(0, dtype=wide)


def with_rest(q: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Attend, and say what lse lost to rounding: kernels' gradients use it, here it is 0."""
    out, lse = target_attention(q, *args)
    return out, lse, torch.zeros_like(lse)


def bias_by_head(bias: Tensor | None, k: Tensor) -> Tensor:
    """Return the bias as [T, H], or [T, 1] where it is one for all heads; zeros for none."""
    if bias is None:
        return k.new_zeros(len(k), 1)
    return bias[:, None] if bias.dim() == 1 else bias


def logits_of(q: Tensor, k: Tensor, bias: Tensor, scale: float) -> Tensor:
    """Return scale * q k^T + bias of one user: [C, H, t]."""
    return scale * torch.einsum("chd,thd->cht", q, k) + bias.T


def softmax_of(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weights of logits [C, H, t], 0 where all are -inf, and where [C, H, 1] that is."""
    empty = (logits == -torch.inf).all(2, keepdim=True)
    # softmax of nothing but -inf has NaN gradients
    return logits.masked_fill(empty, 0).softmax(2).masked_fill(empty, 0), empty


def shifted_logsumexp(logits: Tensor) -> Tensor:
    """Return the log of the sum of exponentials of logits [C, H, t], with gradients at any size.

    Its gradient is exp(logits - logsumexp), of which logits of 10^4 leave three digits in float32,
    unless they are shifted first.
    """
    if logits.shape[2] == 0:
        return logits.logsumexp(2)
    peak = logits.detach().amax(2, keepdim=True)
    peak = peak.masked_fill(~peak.isfinite(), 0)
    return (logits - peak).logsumexp(2) + peak[..., 0]


def attend(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float, activation: str = "softmax"
) -> tuple[Tensor, Tensor]:
    """Give out = weights v, weights = softmax(scale * q k^T + bias), over one history, and lse.

    q [C, H, d], k [t, H, d], v [t, H, dv], bias [t, H or 1] -> out [C, H, dv] and lse [C, H], the
    log of the softmax's denominator. Logits and weights are float32 (float64 for float64); the
    weights meet v in v's dtype. A history with no items, or with none whose bias is above -inf,
    gives 0 and -inf, with gradients of 0. Other activations weigh each item by itself, 0 where the
    bias is -inf, and have no denominator.
    """
    wide = wide_dtype(q.dtype)
    logits = logits_of(q.to(wide), k.to(wide), bias.to(wide), scale)
    if activation == "softmax":
        weights, empty = softmax_of(logits)
        lse = shifted_logsumexp(logits.masked_fill(empty, 0))
        lse = lse.masked_fill(empty[..., 0], -torch.inf)
    else:
        gone = bias.T == -torch.inf
        weights = _ELEMENTWISE[activation](logits.masked_fill(gone, 0)).masked_fill(gone, 0)
        lse = logits.new_zeros(logits.shape[:2])
    return torch.einsum("cht,thv->chv", weights.to(v.dtype), v), lse


def draw_bias(
    generator: torch.Generator, dtype: torch.dtype, T: int, H: int, kind: int
) -> Tensor | None:
    """Draw no bias (kind 0), one per row (kind 1), or one per row and head (kind 2)."""
    shape = (None, (T,), (T, H))[kind]
    return None if shape is None else randn(generator, dtype, *shape)


def make_inputs(
    generator: torch.Generator,
    dtype: torch.dtype,
    *,
    B: int,
    C: int,
    L: int,
    H: int,
    d: int,
    dv: int,
    bias: int,
    activation: int = 0,
    jagged: int = 0,
) -> dict[str, Any]:
    """Draw histories of at most L rows; logits have a standard deviation of about 1.5.

    activation: its place in ACTIVATIONS. jagged: 1, at most C candidates per user; 0, C each.
    """
    offsets = random_offsets(generator, B, L)
    T = int(offsets[-1])
    q_offsets = random_offsets(generator, B, C) if jagged else None
    asking = (B, C) if q_offsets is None else (int(q_offsets[-1]),)
    return {
        "q": randn(generator, dtype, *asking, H, d),
        "k": randn(generator, dtype, T, H, d),
        "v": randn(generator, dtype, T, H, dv),
        "offsets": offsets,
        "bias": draw_bias(generator, dtype, T, H, bias),
        "scale": 1.5 * d**-0.5,
        "activation": ACTIVATIONS[activation],
        "q_offsets": q_offsets,
        "return_lse": activation == 0,
    }


_SIZES = {
    "B": (0, 5), "C": (0, 5), "L": (0, 40), "H": (1, 3), "d": (1, 20), "dv": (1, 20),
    "bias": (0, 2), "activation": (0, 3), "jagged": (0, 1),
}  # fmt: skip
_TYPICAL = {"B": 6, "C": 4, "L": 50, "H": 2, "d": 16, "dv": 24, "bias": 2}
_CASES = {
    "typical": _TYPICAL,
    "no users": {"B": 0, "C": 3, "L": 5, "H": 2, "d": 8, "dv": 8, "bias": 1},
    "no candidates": {"B": 3, "C": 0, "L": 5, "H": 2, "d": 8, "dv": 8, "bias": 1},
    "empty histories": {"B": 3, "C": 2, "L": 0, "H": 2, "d": 8, "dv": 8, "bias": 2},
    "one of each": {"B": 1, "C": 1, "L": 1, "H": 1, "d": 1, "dv": 1, "bias": 0},
    "long": {"B": 2, "C": 3, "L": 1500, "H": 1, "d": 32, "dv": 32, "bias": 1},
    "many candidates": {"B": 2, "C": 70, "L": 90, "H": 2, "d": 64, "dv": 64, "bias": 0},
    "jagged candidates": _TYPICAL | {"jagged": 1},
    "no users, jagged": _TYPICAL | {"B": 0, "jagged": 1},
    "logits": _TYPICAL | {"activation": 1},
    "silu": _TYPICAL | {"activation": 2, "jagged": 1},
    "sigmoid": _TYPICAL | {"activation": 3, "bias": 1},
    "silu, long": {
        "B": 2, "C": 3, "L": 1500, "H": 1, "d": 32, "dv": 32, "bias": 1, "activation": 2
    },
}  # fmt: skip
ORACLES = {"target_attention": Oracle(with_rest, make_inputs, _SIZES, _CASES)}
