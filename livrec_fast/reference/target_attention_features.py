"""Target attention over item features, as the formula has it: keys and values are products."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import target_attention
from ._oracle import Oracle, randn
from .target_attention import with_rest


def shared_attention(
    q: Tensor, x: Tensor, offsets: Tensor, bias: Tensor | None, scale: float, activation: str,
    q_offsets: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Attend with the rows of x as the keys and the values of every head."""
    rows = by_head(x, q)
    return with_rest(q, rows, rows, offsets, bias, scale, activation, q_offsets)


def target_attention_features(
    q: Tensor, x: Tensor, w_k: Tensor, w_v: Tensor, offsets: Tensor, bias: Tensor | None,
    scale: float, activation: str, q_offsets: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Attend with keys x w_k and values x w_v; also weigh x itself, which kernels' gradients use.

    The weights meet values and features alike: [v, x] are averaged as one.
    """
    k, v = (torch.einsum("tD,Dhd->thd", x, w) for w in (w_k, w_v))
    both = torch.cat([v, by_head(x, q)], 2)
    found, lse, rest = with_rest(q, k, both, offsets, bias, scale, activation, q_offsets)
    parts = found.split([v.shape[2], x.shape[1]], -1)
    out, mixed = (part.clone(memory_format=torch.contiguous_format) for part in parts)
    return out, lse, mixed, rest


def by_head(x: Tensor, q: Tensor) -> Tensor:
    """Return x [T, D] as [T, H, D], the same for all heads of q."""
    return x[:, None].expand(-1, q.shape[-2], -1)


def make_shared_inputs(
    generator: torch.Generator, dtype: torch.dtype, *, D: int, **sizes: int
) -> dict[str, Any]:
    """Draw as for target attention, with one x [T, D] for keys and values."""
    drawn = target_attention.make_inputs(generator, dtype, d=D, dv=D, **sizes)
    k = drawn.pop("k")
    drawn.pop("v")
    return {**drawn, "x": k[:, 0].clone()}


def make_inputs(
    generator: torch.Generator, dtype: torch.dtype, *, d: int, dv: int, **sizes: int
) -> dict[str, Any]:
    """Draw the same with queries of size d, and weights that leave keys and values of x's size."""
    drawn = make_shared_inputs(generator, dtype, **sizes)
    *asking, H, D = drawn["q"].shape
    return {
        **drawn,
        "q": randn(generator, dtype, *asking, H, d),
        "w_k": randn(generator, dtype, D, H, d) * D**-0.5,
        "w_v": randn(generator, dtype, D, H, dv) * D**-0.5,
        "scale": 1.5 * d**-0.5,
    }


_SHARED_SIZES = {
    "B": (0, 5), "C": (0, 5), "L": (0, 40), "H": (1, 3), "D": (1, 20), "bias": (0, 2),
    "activation": (0, 3), "jagged": (0, 1),
}  # fmt: skip
_SIZES = _SHARED_SIZES | {"d": (1, 20), "dv": (1, 20)}
_TYPICAL = {"B": 6, "C": 4, "L": 50, "H": 2, "D": 24, "d": 16, "dv": 12, "bias": 2}
_SHARED = {
    "typical": _TYPICAL | {"D": 16},
    "no users": _TYPICAL | {"B": 0, "bias": 1},
    "no candidates": _TYPICAL | {"C": 0, "bias": 1},
    "empty histories": _TYPICAL | {"L": 0},
    "one of each": dict.fromkeys(_TYPICAL, 1) | {"bias": 0},
    "long": _TYPICAL | {"B": 2, "C": 3, "L": 1500, "H": 1, "bias": 1},
    "many candidates": _TYPICAL | {"B": 2, "C": 70, "L": 90, "D": 64, "bias": 0},
    "jagged candidates": _TYPICAL | {"jagged": 1},
    "no users, jagged": _TYPICAL | {"B": 0, "jagged": 1},
    "logits": _TYPICAL | {"activation": 1},
    "silu": _TYPICAL | {"activation": 2, "jagged": 1},
    "sigmoid": _TYPICAL | {"activation": 3, "bias": 1},
    "silu, long": _TYPICAL | {"B": 2, "L": 1500, "H": 1, "bias": 1, "activation": 2},
}
_CASES = _SHARED | {
    "typical": _TYPICAL,
    "heads wider than features": _TYPICAL | {"D": 5, "d": 9, "dv": 7},
    "heads narrower than features": _TYPICAL | {"D": 100, "d": 4, "dv": 3, "H": 3},
}


def _without_heads(sizes: dict[str, int]) -> dict[str, int]:
    return {name: size for name, size in sizes.items() if name not in ("d", "dv")}


ORACLES = {
    "shared_attention": Oracle(
        shared_attention,
        make_shared_inputs,
        _SHARED_SIZES,
        {name: _without_heads(sizes) for name, sizes in _SHARED.items()},
    ),
    "target_attention_features": Oracle(target_attention_features, make_inputs, _SIZES, _CASES),
}
