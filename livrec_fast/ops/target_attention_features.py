"""Target attention over item features: neither keys nor values are made, item by item."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._autograd import plain_torch
from .._checks import FLOATS, check_offsets, check_one_dtype, check_same, check_tensor
from .._dispatch import Backend, Op, refuse_wide
from ..reference import target_attention_features as reference
from ..reference._formula import wide_dtype
from . import _attention

_BLOCK = 64


def _check_values(
    q: Tensor, x: Tensor, offsets: Tensor, bias: Tensor | None, scale: float, activation: str,
    q_offsets: Tensor | None,
) -> None:  # fmt: skip
    check_offsets(offsets, len(x))
    if q_offsets is not None:
        check_offsets(q_offsets, len(q), "q_offsets")


def _fake(
    q: Tensor, x: Tensor, offsets: Tensor, bias: Tensor | None, scale: float, activation: str,
    q_offsets: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _attention.fake_with_rest(q, x.shape[1], activation)


def _triton(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    from ..kernels import target_attention as kernels

    return kernels.shared_attention(*args)


def _triton_backward(
    grads: Sequence[Tensor | None], *args: Any, outputs: Sequence[Tensor], needs: Sequence[bool]
) -> list[Tensor]:
    from ..kernels import target_attention_gradient as kernels

    return kernels.shared_attention_gradient(grads, *args, outputs[0], needs)


_shared = Op(
    "shared_attention",
    "(Tensor q, Tensor x, Tensor offsets, Tensor? bias, float scale, str activation, "
    "Tensor? q_offsets) -> (Tensor out, Tensor lse, Tensor rest)",
    fake=_fake,
    reference=reference.shared_attention,
    check_values=_check_values,
    backends=(
        Backend("native", refuse_wide, backward=None),
        Backend("triton", _attention.refuse_tiles, _triton, _triton_backward),
    ),
    autocast=("q", "x"),
)


def _projected(values: Tensor, weight: Tensor) -> Tensor:
    """Return values [..., H, n] times weight [H, n, m], head by head: [..., H, m]."""
    found = torch.bmm(values.flatten(0, -3).transpose(0, 1), weight).transpose(0, 1)
    return found.contiguous().view(*values.shape[:-1], weight.shape[2])


def _outer(a: Tensor, b: Tensor) -> Tensor:
    """Return the gradient of a weight [D, H, n] from a [..., H, D] and b [..., H, n].

    In blocks of rows: long sums are cut by libraries as they have threads, and bits would change.
    """
    total = a.new_zeros(a.shape[-2], a.shape[-1], b.shape[-1], dtype=wide_dtype(a.dtype))
    many = (t.flatten(0, -3).split(64 * _BLOCK) for t in (a, b))
    for pair in zip(*many, strict=True):
        left, right = (
            F.pad(rows, (0, 0, 0, 0, 0, -len(rows) % _BLOCK))
            .view(-(-len(rows) // _BLOCK), _BLOCK, *rows.shape[1:])
            .transpose(1, 2)
            for rows in pair
        )
        total += (left.transpose(2, 3) @ right).sum(0, dtype=total.dtype)
    return total.transpose(0, 1).to(a.dtype).contiguous()


def _factored(
    q: Tensor, x: Tensor, w_k: Tensor, w_v: Tensor, *rest: Any, kernel: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attend with q w_k^T over the rows of x, and turn what they average to into values."""
    with plain_torch(q.device), torch.no_grad():
        asking = _projected(q, w_k.permute(1, 2, 0))
        mixed, lse, lost = _shared.operator(kernel)(asking, x, *rest)
        return _projected(mixed, w_v.transpose(0, 1)), lse, mixed, lost


def _factored_backward(
    grads: Sequence[Tensor | None], q: Tensor, x: Tensor, w_k: Tensor, w_v: Tensor, offsets: Tensor,
    bias: Tensor | None, *rest: Any, outputs: Sequence[Tensor], needs: Sequence[bool], kernel: str,
) -> list[Tensor]:  # fmt: skip
    """Differentiate the two products; between them the kernel differentiates itself."""
    out, lse, mixed, lost = outputs
    with plain_torch(q.device), torch.no_grad():
        grad = torch.zeros_like(out) if grads[0] is None else grads[0]
        flow = _projected(grad, w_v.permute(1, 2, 0))
        if grads[2] is not None:
            flow = flow + grads[2]
        asking = _projected(q, w_k.permute(1, 2, 0))
        wants_query = needs[0] or needs[2]
        kernel_needs = [wants_query, needs[1], False, *needs[5:]]
        backward = getattr(torch.ops.livrec.shared_attention_backward, kernel)
        given = (asking, x, offsets, bias, *rest)
        found = iter(backward([flow, grads[1], None], *given, [mixed, lse, lost], kernel_needs))
        grad_asking = next(found) if wants_query else asking
        made: list[Callable[[], Tensor]] = [
            lambda: _projected(grad_asking, w_k.transpose(0, 1)),
            lambda: next(found),
            lambda: _outer(grad_asking, q),
            lambda: _outer(mixed, grad),
            *[lambda: next(found)] * (len(needs) - 4),
        ]
        return [make() for make, need in zip(made, needs, strict=True) if need]


def _backend(shared: Backend) -> Backend:
    """Return what a kernel of shared attention makes of features; it refuses by x and q's type."""

    def refuse(q: Tensor, x: Tensor, w_k: Tensor, w_v: Tensor, *rest: Any) -> str | None:
        return shared.refuse(q, x, *rest)

    run = partial(_factored, kernel=shared.name)
    return Backend(shared.name, refuse, run, partial(_factored_backward, kernel=shared.name))


def _features_fake(
    q: Tensor, x: Tensor, w_k: Tensor, w_v: Tensor, offsets: Tensor, bias: Tensor | None,
    scale: float, activation: str, q_offsets: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    out, lse, rest = _attention.fake_with_rest(q, w_v.shape[2], activation)
    return out, lse, q.new_empty((*q.shape[:-1], x.shape[1])), rest


_features = Op(
    "target_attention_features",
    "(Tensor q, Tensor x, Tensor w_k, Tensor w_v, Tensor offsets, Tensor? bias, float scale, "
    "str activation, Tensor? q_offsets) -> (Tensor out, Tensor lse, Tensor mixed, Tensor rest)",
    fake=_features_fake,
    reference=reference.target_attention_features,
    check_values=lambda q, x, w_k, w_v, *rest: _check_values(q, x, *rest),
    backends=[_backend(backend) for backend in _shared.backends if backend.name != "reference"],
    autocast=("q", "x", "w_k", "w_v"),
)


def shared_attention(
    q: Tensor,
    x: Tensor,
    offsets: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float | None = None,
    activation: str = "softmax",
    q_offsets: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Attend over rows that are the keys and the values of every head.

    $o_c = \sum_t \mathrm{softmax}_t(s\, \langle q_c, x_t \rangle + b_t)\, x_t$, as
    `target_attention` with $k_t = v_t = x_t$ in every head, and its other activations.

    In PyTorch::

        rows = x[:, None].expand(-1, H, -1)
        out = target_attention(q, rows, rows, offsets, bias=bias, scale=scale)

    Args:
        q: [B, C, H, D] float32, float16, bfloat16 or float64; or, with q_offsets, [Q, H, D].
        x: [T, D], q's dtype: the rows of all histories, one after the other.
        offsets: int64 [B + 1]; user u has the rows offsets[u] .. offsets[u + 1] - 1.
        bias: as for target_attention.
        scale: s, a finite float; D ** -0.5 by default.
        activation: as for target_attention.
        q_offsets: as for target_attention.
        return_lse: return lse too; with the softmax only.
        backend: "auto", "native", "triton" (D up to 256) or "reference".

    Returns:
        out of q's shape and dtype, or (out, lse) with lse [B, C, H] or [Q, H], as for
        target_attention.

    Empty and masked histories, numerics and gradients (of q, x and bias) are those of
    target_attention; so is the workspace of the reference.

    Raises:
        TypeError: a wrong type or dtype. ValueError: a wrong shape, device, offset, scale or
        activation. BackendError: the named backend cannot run this.

    Source: Shazeer, Fast Transformer Decoding: One Write-Head is All You Need (2019), with keys
    that are values.

    Example:
        >>> interest = shared_attention(q, item_features, offsets)  # [B, C, H, D]
    """
    _attention.check_query(q, offsets, q_offsets)
    _attention.check_activation(activation, return_lse)
    check_tensor("x", x, ("T", q.shape[-1]), FLOATS)
    check_one_dtype(q=q, x=x)
    bias = _attention.check_bias(bias, q, x.shape[0])
    check_same("device", q=q, x=x, offsets=offsets, bias=bias)
    scale = _attention.resolve_scale(scale, q)
    out, lse, _ = _shared(q, x, offsets, bias, scale, activation, q_offsets, backend=backend)
    return (out, lse) if return_lse else out


def target_attention_features(
    q: Tensor,
    x: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    offsets: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float | None = None,
    activation: str = "softmax",
    q_offsets: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Attend from candidates to histories whose keys and values are products of item features.

    $o_c = \sum_t w_{ct}\, W_V^\top x_t$ with $w_{ct} = \mathrm{softmax}_t(s\, \langle q_c,
    W_K^\top x_t \rangle + b_t)$, head by head, as `target_attention` of $k_t = W_K^\top x_t$ and
    $v_t = W_V^\top x_t$. As $\langle q, W_K^\top x \rangle = \langle W_K q, x \rangle$ and weights
    pass through $W_V$, kernels take $W_K q_c$ once per candidate, attend over x alone
    (`shared_attention`) and multiply what they get by $W_V$: keys and values are never made.

    In PyTorch::

        k, v = (torch.einsum("tD,Dhd->thd", x, w) for w in (w_k, w_v))
        out = target_attention(q, k, v, offsets, bias=bias, scale=scale)

    Args:
        q: [B, C, H, d] float32, float16, bfloat16 or float64; or, with q_offsets, [Q, H, d].
        x: [T, D], q's dtype: the features of all items, one after the other, for all heads.
        w_k: [D, H, d], q's dtype.
        w_v: [D, H, dv], q's dtype.
        offsets: int64 [B + 1]; user u has the rows offsets[u] .. offsets[u + 1] - 1.
        bias: as for target_attention.
        scale: s, a finite float; d ** -0.5 by default.
        activation: as for target_attention.
        q_offsets: as for target_attention.
        return_lse: return lse too; with the softmax only.
        backend: as for shared_attention.

    Returns:
        out [B, C, H, dv] or [Q, H, dv] in q's dtype, or (out, lse), as for target_attention.

    When it pays: per user and head, for C candidates and t items, kernels multiply and add
    C (2 t D + D (d + dv)) times, keys and values C t (d + dv) + t D (d + dv) times. Past about
    C = D (d + dv) / (2 D - d - dv) candidates per user, such as 21 for D = 64 and d = dv = 16, and
    where T x H x (d + dv) numbers are no burden, `target_attention` of products has less to do.

    Empty and masked histories are as for target_attention. Differentiable once, in q, x, w_k, w_v
    and bias, through out and lse. Numerics: as for target_attention; the reference rounds keys and
    values to q's dtype, kernels round W_K q and the average of x instead. Workspace of the
    reference: T x H x (d + 2 dv + 2 D) numbers, and that of target_attention. Nothing is padded.

    Raises:
        TypeError: a wrong type or dtype. ValueError: a wrong shape, device, offset, scale or
        activation. BackendError: the named backend cannot run this.

    Source: Moment&Cross, section 2.4, with its projections of keys and values in reverse order.

    Example:
        >>> out = target_attention_features(q, x, w_k, w_v, offsets)  # [B, C, H, dv]
    """
    _attention.check_query(q, offsets, q_offsets)
    _attention.check_activation(activation, return_lse)
    _attention.check_rows("x", x, ("T", "D"))
    check_tensor("w_k", w_k, (x.shape[1], *q.shape[-2:]), FLOATS)
    _attention.check_rows("w_v", w_v, (x.shape[1], q.shape[-2], "dv"))
    check_one_dtype(q=q, x=x, w_k=w_k, w_v=w_v)
    bias = _attention.check_bias(bias, q, x.shape[0])
    check_same("device", q=q, x=x, w_k=w_k, w_v=w_v, offsets=offsets, bias=bias)
    rest = (bias, _attention.resolve_scale(scale, q), activation, q_offsets)
    out, lse, *_ = _features(q, x, w_k, w_v, offsets, *rest, backend=backend)
    return (out, lse) if return_lse else out
