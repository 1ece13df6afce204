"""Target attention: candidates attend to their user's own history, of any length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._checks import FLOATS, check_offsets, check_one_dtype, check_same, check_tensor
from .._dispatch import Backend, Op, refuse_triton, refuse_wide
from ..reference import target_attention as reference
from . import _attention


def _fake(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, bias: Tensor | None, scale: float,
    activation: str, q_offsets: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _attention.fake_with_rest(q, v.shape[2], activation)


def _check_values(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, bias: Tensor | None, scale: float,
    activation: str, q_offsets: Tensor | None,
) -> None:  # fmt: skip
    check_offsets(offsets, len(k))
    if q_offsets is not None:
        check_offsets(q_offsets, len(q), "q_offsets")


def _refuse_tiles(q: Tensor, k: Tensor, v: Tensor, *rest: object) -> str | None:
    if q.dtype == torch.float64:
        return "computes in float32; queries are float64"
    if max(q.shape[-1], v.shape[2]) > 256:
        return "keeps rows in registers: d and dv at most 256"
    return refuse_triton(q)


def _triton(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    from ..kernels import target_attention

    out, lse = target_attention.target_attention(q, *rest)
    return out, lse, torch.zeros_like(lse)  # its gradient sums weights anew


def _triton_backward(
    grads: Sequence[Tensor | None], *args: Any, outputs: Sequence[Tensor], needs: Sequence[bool]
) -> list[Tensor]:
    from ..kernels import target_attention_gradient as kernels

    out, lse, _ = outputs
    grad = torch.zeros_like(out) if grads[0] is None else grads[0]
    grad_lse = grads[1] if args[6] == "softmax" else None
    return kernels.target_attention_gradient(grad, grad_lse, *args, out, lse, needs)


_op = Op(
    "target_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor offsets, Tensor? bias, float scale, str activation, "
    "Tensor? q_offsets) -> (Tensor out, Tensor lse, Tensor rest)",
    fake=_fake,
    reference=reference.with_rest,
    check_values=_check_values,
    backends=(
        Backend("native", refuse_wide, backward=None),
        Backend("triton", _refuse_tiles, _triton, _triton_backward),
    ),
    autocast=("q", "k", "v"),
)


def target_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float | None = None,
    activation: str = "softmax",
    q_offsets: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Attend from each user's candidates to that user's history, head by head.

    $o_c = \sum_t \mathrm{softmax}_t(s\, \langle q_c, k_t \rangle + b_t)\, v_t$, with $t$ over the
    user's rows, and $\mathrm{lse}_c = \log \sum_t \exp(s\, \langle q_c, k_t \rangle + b_t)$. Other
    activations weigh every row by itself: the logit, its SiLU or its sigmoid, and nothing divides.

    In PyTorch, per user u, with a bias [T, H]::

        rows = slice(offsets[u], offsets[u + 1])
        logits = scale * torch.einsum("chd,thd->cht", q[u], k[rows]) + bias[rows].T
        out[u] = torch.einsum("cht,thv->chv", logits.softmax(2), v[rows])

    Args:
        q: [B, C, H, d] float32, float16, bfloat16 or float64: C candidates for each of B users. Or,
            with q_offsets, [Q, H, d]: those of all users, one after the other.
        k: [T, H, d], q's dtype: the keys of all histories, one after the other.
        v: [T, H, dv], q's dtype; dv may differ from d.
        offsets: int64 [B + 1]; user u has the rows offsets[u] .. offsets[u + 1] - 1.
        bias: [T] or [T, H], q's dtype or float32, added to the logits of every candidate of the
            row's user (such as a time gap or a log count). -inf takes the row out.
        scale: s, a finite float; d ** -0.5 by default.
        activation: "softmax", "none" (DIN without its normalisation), "silu" (as in HSTU, whose
            division by the length is left to the caller) or "sigmoid".
        q_offsets: int64 [B + 1]; user u has the candidates q_offsets[u] .. q_offsets[u + 1] - 1.
        return_lse: return lse too; with the softmax only.
        backend: "auto", "native", "triton" or "reference".

    Returns:
        out [B, C, H, dv] in q's dtype, or (out, lse) with lse [B, C, H] in natural logarithm,
        float32 (float64 for float64). With q_offsets, [Q, H, dv] and [Q, H].

    A history with no rows, or with none left by the bias, gives out = 0, lse = -inf and gradients
    of 0. B, C and T may be 0. Differentiable once, in q, k, v and bias, through out and lse.

    Numerics: logits and softmax are in float32 (float64 for float64) and stable, as the greatest
    logit is subtracted; the reference rounds weights to v's dtype before they meet v, and so does
    the C++ kernel in bfloat16 on processors with AVX512-BF16, where d and dv are multiples of 16
    (it rounds the gradients of logits, too, and weights below 2^-126 of the greatest are 0); the
    others keep them in float32. NaN and inf in q, k and v spread as in PyTorch. Autocast casts q, k
    and v, not the bias. The same inputs give the same bits on every run and, on a CPU, for any
    number of threads (the reference uses torch's matrix products, whose bits may change with it).
    Nothing is padded. Workspace on a CPU: for every 1,024 rows of a history that it begins (2,048
    for more than 256 candidates, and so on), 4 C H (dv + 2) bytes and in the gradient 4 C H (2 d +
    4), with d and dv rounded up to 16; per thread 4 C H (d + 2 dv), about 1,000 (d + dv + H) +
    16,384 bytes, of 16-bit inputs 4 C H (d + dv) and up to 139,264 more, and with AVX-512, of up to
    16 candidates or a multiple of them, 128 H ceil(C / 16) (d + dv + 8) + 512 (d + dv) + 40,960
    more. Of the reference: a few float32 arrays of C x H x the longest history; its gradient, of C
    x H x T.

    Raises:
        TypeError: a wrong type or dtype. ValueError: a wrong shape or device, offsets that do not
        start at 0, decrease, or do not end at T (or Q), a scale that is not finite, an unknown
        activation, or lse asked of another activation than the softmax.
        BackendError: the named backend cannot run this.

    Source: Moment&Cross, section 2.4 (target attention over searched behaviours); LARM, equation 5;
    DIN, section 4.3 (weights without normalisation); HSTU, equation 2 (SiLU).

    Example:
        >>> out = target_attention(q, k, v, offsets, bias=-time_gap)  # [B, C, H, dv]
    """
    _attention.check_query(q, offsets, q_offsets)
    _attention.check_activation(activation, return_lse)
    check_tensor("k", k, ("T", *q.shape[-2:]), FLOATS)
    _attention.check_rows("v", v, (k.shape[0], q.shape[-2], "dv"))
    check_one_dtype(q=q, k=k, v=v)
    bias = _attention.check_bias(bias, q, k.shape[0])
    check_same("device", q=q, k=k, v=v, offsets=offsets, bias=bias)
    scale = _attention.resolve_scale(scale, q)
    out, lse, _ = _op(q, k, v, offsets, bias, scale, activation, q_offsets, backend=backend)
    return (out, lse) if return_lse else out
