"""DIN attention: a small perceptron weighs each item of a history for each candidate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._autograd import recompute_backward
from .._checks import (
    FLOATS,
    check_choice,
    check_offsets,
    check_one_dtype,
    check_same,
    check_tensor,
    named_items,
)
from .._dispatch import Backend, Op, refuse_triton, refuse_wide
from ..reference import din_attention as reference
from . import _attention

_MOST_WEIGHTS = 2**14  # of a Triton kernel, d and h_l rounded up to powers of 2
_NEEDED = {"prelu": ("slopes",), "dice": ("slopes", "gains", "shifts")}


def _fake(q: Tensor, k: Tensor, v: Tensor | None, *rest: object) -> Tensor:
    return q.new_empty((*q.shape[:-1], (k if v is None else v).shape[1]))


def _check_values(q: Tensor, k: Tensor, v: Tensor | None, offsets: Tensor, *rest: Any) -> None:
    check_offsets(offsets, len(k))
    if rest[-1] is not None:
        check_offsets(rest[-1], len(q), "q_offsets")


def _refuse_tiles(
    q: Tensor, k: Tensor, v: Tensor | None, offsets: Tensor, weights: Sequence[Tensor], *rest: Any
) -> str | None:
    if q.dtype == torch.float64:
        return "computes in float32; queries are float64"
    if len(weights) > 4:
        return "unrolls layers: at most 3 hidden ones"
    widths = [q.shape[-1], *(weight.shape[1] for weight in weights[:-1])]
    if max(widths[:-1]) > 128 or widths[-1] > 256:
        return "keeps products in registers: at most d = 128, 128 units, and 256 in the last layer"
    wide = [1 << max(4, (width - 1).bit_length()) for width in widths]
    wide[1:] = [max(32, wide[1]), *(max(64, width) for width in wide[2:])]
    if sum(a * b for a, b in zip(wide[:-1], wide[1:], strict=True)) > _MOST_WEIGHTS:
        return f"shares weights on the chip: d h_1 + h_1 h_2 + ... at most {_MOST_WEIGHTS}"
    if v is not None and v.shape[1] > 256:
        return "keeps rows in registers: dv at most 256"
    return refuse_triton(q)


def _triton(*args: Any) -> Tensor:
    from ..kernels import din_attention as kernels

    return kernels.din_attention(*args)


_recompute = recompute_backward(reference.din_attention)


def _triton_backward(
    grads: Sequence[Tensor | None], *args: Any, outputs: Sequence[Tensor], needs: Sequence[bool]
) -> list[Tensor]:
    from ..kernels import din_attention_gradient as kernels

    sizes = [weight.shape[1] for weight in args[4][:-1]]
    if not kernels.fits(args[0].shape[-1], outputs[0].shape[-1], sizes):
        return _recompute(grads, *args, outputs=outputs, needs=needs)
    return kernels.din_attention_gradient(grads[0], *args, outputs[0], needs)


_op = Op(
    "din_attention",
    "(Tensor q, Tensor k, Tensor? v, Tensor offsets, Tensor[] weights, Tensor[] biases, "
    "Tensor[] slopes, Tensor[] gains, Tensor[] shifts, str activation, bool softmax, "
    "Tensor? q_offsets) -> Tensor",
    fake=_fake,
    reference=reference.din_attention,
    check_values=_check_values,
    backends=(
        Backend("native", refuse_wide, backward=None),
        Backend("triton", _refuse_tiles, _triton, _triton_backward),
    ),
    autocast=("q", "k", "v", "weights", "biases", "slopes", "gains", "shifts"),
)


def din_attention(
    q: Tensor,
    k: Tensor,
    offsets: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    v: Tensor | None = None,
    activation: str = "sigmoid",
    slopes: Sequence[Tensor] | None = None,
    gains: Sequence[Tensor] | None = None,
    shifts: Sequence[Tensor] | None = None,
    softmax: bool = False,
    q_offsets: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    r"""Weigh each user's history for each candidate with DIN's attention unit, and add it up.

    $o_c = \sum_t w_{ct}\, v_t$, where $w_{ct} = \mathrm{MLP}([q_c, k_t, q_c - k_t, q_c \circ k_t])$
    as it is, or its softmax over t; t is over the user's rows, and v is k where none is given.

    In PyTorch, per user, with q [C, d] and k [t, d]::

        a, b = q[:, None].expand(C, t, d), k.expand(C, t, d)
        x = torch.cat([a, b, a - b, a * b], 2)
        for weight, bias in zip(weights[:-1], biases[:-1]):
            x = torch.sigmoid(x @ weight + bias)
        out = (x @ weights[-1] + biases[-1])[..., 0] @ k

    Args:
        q: [B, C, d] float32, float16, bfloat16 or float64: C candidates for each of B users; or
            [Q, d] with q_offsets.
        k: [T, d], q's dtype: the items of all histories, one after the other.
        offsets: int64 [B + 1]; user u has the rows offsets[u] .. offsets[u + 1] - 1.
        weights: one tensor per layer, [4 d, h_1], [h_1, h_2], ..., [h_n, 1], q's dtype, one hidden
            layer or more: the transpose of torch.nn.Linear's weight.
        biases: likewise, [h_1], ..., [h_n], [1].
        v: [T, dv], q's dtype: what is added up, if not k.
        activation: of the hidden layers: "sigmoid", "relu", "silu", "prelu" (x where positive, else
            slope x) or "dice" (g x + (1 - g) slope x, g = sigmoid(gain x + shift)). In Dice as it
            is trained, g is of batch-normalised x: for a batch normalisation at rest give
            gain = weight / sqrt(variance + eps) and shift = bias - mean gain (weight 1 and bias 0
            where it has none). Statistics of the batch itself are not computed.
        slopes: for "prelu" and "dice" only, one tensor per hidden layer, [h_l], q's dtype.
        gains: for "dice" only, likewise.
        shifts: for "dice" only, likewise.
        softmax: normalise the weights over the history.
        q_offsets: int64 [B + 1]; user u has the rows q_offsets[u] .. q_offsets[u + 1] - 1 of q.
        backend: "auto", "native", "triton" (d up to 128, dv 256, 3 hidden layers of up to 128
            units, or 256 in the last, and d h_1 + h_1 h_2 + ... = 16,384, each rounded up to a
            power of 2: d from 16 on, h_1 from 32, the others from 64; past dv = 128 or 64 units in
            a layer its gradient is the reference's) or "reference".

    Returns:
        out, q's shape with dv (d without v) last, q's dtype.

    A history with no rows gives 0 and gradients of 0. B, C and T may be 0. Differentiable once, in
    all floating tensors.

    Numerics: the reference computes the perceptron in q's dtype and the softmax in float32 (float64
    for float64). The C++ kernel computes in float32 whatever q's dtype is, and the first layer as
    ((A + D)^T q + b) + (B - D + diag(q) P)^T k, A, B, D and P the parts of its weights for q, k,
    q - k and q k: a matrix per candidate, a quarter of the products, no pairs; only where q - k
    nearly vanishes and A and B are far smaller than D does this round more. Autocast casts all
    floating tensors. NaN and inf spread as in PyTorch. The same inputs give the same bits on every
    run, the kernel's for any number of threads; the reference uses torch's matrix products, whose
    bits may change with it.

    Workspace of the kernel, in float32: the weights (twice while they are packed); per thread, of
    one history, k twice, v and a number per item, and 16 rows of q, d h_1 numbers and 2 x 32 per
    unit of the widest layer. Its gradient: the weights twice (three times while they are packed);
    per thread, of one user, k four times, v and a number per item twice, q, the gradient of the
    results, 2 d h_1 numbers, 32 (2 n + 3) per unit of the widest of n hidden layers, and sums of
    d h_1 numbers and of the later weights; in 16 parts such sums and 2 d h_1 numbers more; and with
    fewer than 16 users, in as many parts, those of k and v. Without v, values are k. Of the
    reference: for one user at a time C x t x (8 d + twice the layers' widths) numbers, its gradient
    for all users at once. Of the Triton kernels: the weights, padded; of
    the gradient 256 times that at most, as sums of as many programs, and three numbers per
    candidate. Nothing else is padded.

    Raises:
        TypeError: a wrong type or dtype. ValueError: a wrong shape, device, number of layers or
        choice, slopes, gains or shifts that the activation has not or lacks, or offsets that do not
        start at 0, decrease, or do not end at T (q_offsets: at Q). BackendError: the named backend
        cannot run this.

    Source: Deep Interest Network for Click-Through Rate Prediction (2018), section 4.3.

    Example:
        >>> linear = [torch.nn.Linear(*io) for io in ((4 * d, 80), (80, 40), (40, 1))]
        >>> weights, biases = [layer.weight.T for layer in linear], [layer.bias for layer in linear]
        >>> out = din_attention(q, k, offsets, weights, biases)  # [B, C, d]
    """
    _check_inputs(q, k, v, offsets, q_offsets)
    check_choice("activation", activation, reference.ACTIVATIONS)
    if not isinstance(softmax, bool):
        raise TypeError(f"softmax: must be True or False, got {softmax!r}")
    layers = _check_layers(q.shape[-1], weights, biases)
    widths = [weight.shape[1] for weight in list(layers["weights"].values())[:-1]]
    given = {"slopes": slopes, "gains": gains, "shifts": shifts}
    for name, value in given.items():
        layers[name] = _check_units(name, value, activation, widths)
    floats = {name: item for group in layers.values() for name, item in group.items()}
    check_one_dtype(q=q, k=k, v=v, **floats)
    check_same("device", q=q, k=k, v=v, offsets=offsets, q_offsets=q_offsets, **floats)
    lists = [list(group.values()) for group in layers.values()]
    return _op(q, k, v, offsets, *lists, activation, softmax, q_offsets, backend=backend)


def _check_inputs(q: Any, k: Any, v: Any, offsets: Any, q_offsets: Any) -> None:
    """Check candidates, items and what tells users apart."""
    _attention.check_rows("q", q, ("B", "C", "d") if q_offsets is None else ("Q", "d"))
    check_tensor("k", k, ("T", q.shape[-1]), FLOATS)
    if v is not None:
        _attention.check_rows("v", v, (k.shape[0], "dv"))
    _attention.check_users(q, offsets, q_offsets)


def _check_layers(dim: int, weights: Any, biases: Any) -> dict[str, dict[str, Tensor]]:
    """Check that each layer takes what the one before gives, and the last gives one number."""
    found = {"weights": named_items("weights", weights), "biases": named_items("biases", biases)}
    depth = len(found["weights"])
    if depth < 2:
        raise ValueError(f"weights: needs a hidden layer and the last one, got {depth} in all")
    if len(found["biases"]) != depth:
        raise ValueError(f"biases: must be one per layer, {depth}, got {len(found['biases'])}")
    width, pairs = 4 * dim, zip(found["weights"].items(), found["biases"].items(), strict=True)
    for number, ((weight_name, weight), (bias_name, bias)) in enumerate(pairs):
        _attention.check_rows(weight_name, weight, (width, "h" if number + 1 < depth else 1))
        width = weight.shape[1]
        check_tensor(bias_name, bias, (width,), FLOATS)
    return found


def _check_units(name: str, value: Any, activation: str, widths: Sequence[int]) -> dict[str, Any]:
    """Check what an activation needs per unit, and that others are not given it."""
    if name not in _NEEDED.get(activation, ()):
        if value is not None:
            raise ValueError(f"{name}: {activation!r} has none, got {type(value).__name__}")
        return {}
    if value is None:
        raise ValueError(f"{name}: needed with activation={activation!r}, got None")
    found = named_items(name, value)
    if len(found) != len(widths):
        raise ValueError(f"{name}: must be one per hidden layer, {len(widths)}, got {len(found)}")
    for (item_name, item), width in zip(found.items(), widths, strict=True):
        check_tensor(item_name, item, (width,), FLOATS)
    return found
