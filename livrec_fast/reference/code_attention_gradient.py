"""The gradients of code attention, as the formula has them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ._formula import wide_dtype
from ._oracle import Oracle, randn
from .code_attention import CASES, SIZES, code_attention, decode, make_inputs
from .prefix_ngram_keys import prefix_ngram_keys
from .target_attention import bias_by_head, logits_of, softmax_of


def code_attention_gradient(
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    codes: Tensor,
    key_tables: Sequence[Tensor],
    value_tables: Sequence[Tensor],
    offsets: Tensor,
    bias: Tensor | None,
    scale: float,
    levels: Sequence[int],
    groups: Sequence[int],
    hashing: str,
    packed: bool,
    out: Tensor,
    lse: Tensor,
) -> list[Tensor]:
    """Return grad_q, grad_bias, then rows and the sums of keys' and values' gradients per field.

    Keys and values are rounded to q's dtype, as the attention met them; all else is wide. `out` and
    `lse` are what the attention returned: kernels may use them, the formula computes them again.
    """
    wide = wide_dtype(q.dtype)
    sizes = [len(table) for table in key_tables]
    rows = prefix_ngram_keys(codes, levels, sizes, hashing, groups, packed)
    k, v = decode(rows, key_tables).to(wide), decode(rows, value_tables).to(wide)
    q_, grad, bias_ = q.to(wide), grad.to(wide), bias_by_head(bias, k)
    grad_lse = torch.zeros_like(lse) if grad_lse is None else grad_lse
    grad_q, grad_k, grad_v = (t.new_zeros(t.shape) for t in (q_, k, v))
    grad_bias = k.new_zeros(k.shape[:2])
    for user, (start, end) in enumerate(pairwise(offsets.tolist())):
        its = slice(start, end)
        grad_q[user], grad_k[its], grad_v[its], grad_bias[its] = attend_gradient(
            q_[user], k[its], v[its], bias_[its], grad[user], grad_lse[user], scale
        )
    sums = [item for row in rows.T for item in sums_of(row, grad_k, grad_v)]
    return [grad_q.to(q.dtype), bias_shaped(grad_bias, bias), *sums]


def attend_gradient(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, grad: Tensor, grad_lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q [C, H, d], k [t, H, d], v [t, H, dv] and the bias [t, H].

    With weights P and dP = grad v^T, the logits get dS = P (dP - sum_t P dP + grad_lse); nothing
    where the history is empty or masked.
    """
    weights, empty = softmax_of(logits_of(q, k, bias, scale))
    into_weights = torch.einsum("chv,thv->cht", grad, v)
    # not <grad, out>: out is rounded, by which the sum over t would miss 0
    mean = (weights * into_weights).sum(2, keepdim=True)
    into_logits = weights * (into_weights - mean + grad_lse[..., None])
    into_logits = into_logits.masked_fill(empty, 0)
    return (
        scale * torch.einsum("cht,thd->chd", into_logits, k),
        scale * torch.einsum("cht,chd->thd", into_logits, q),
        torch.einsum("cht,chv->thv", weights, grad),
        into_logits.sum(0).T,
    )


def sums_of(row: Tensor, grad_k: Tensor, grad_v: Tensor) -> list[Tensor]:
    """Return the table rows that occur, ascending, and the sums of both gradients over each."""
    found, place = torch.unique(row[row >= 0], return_inverse=True)
    sums = [grad.new_zeros(len(found), *grad.shape[1:]) for grad in (grad_k, grad_v)]
    pairs = zip(sums, (grad_k, grad_v), strict=True)
    return [found, *(total.index_add(0, place, grad[row >= 0]) for total, grad in pairs)]


def bias_shaped(grad: Tensor, bias: Tensor | None) -> Tensor:
    """Return the gradient [T, H] in the bias's shape; [0] for none."""
    if bias is None:
        return grad.new_zeros(0)
    return grad.sum(1) if bias.dim() == 1 else grad


def make_gradient_inputs(
    generator: torch.Generator, dtype: torch.dtype, **sizes: int
) -> dict[str, Any]:
    """Draw the inputs of an attention, attend, and draw gradients; of lse only with a bias."""
    inputs = make_inputs(generator, dtype, **sizes)
    del inputs["return_lse"]
    wide, count, bias = wide_dtype(dtype), len(inputs["key_tables"]), inputs["bias"]
    levels = inputs["levels"] or [len(table) for table in inputs["key_tables"]]
    groups = inputs["groups"] or ([count] if inputs["prefix"] else [1] * count)
    names = ("q", "codes", "key_tables", "value_tables", "offsets", "scale", "hashing", "packed")
    given = {name: inputs[name] for name in names} | {"levels": levels, "groups": groups}
    out, lse = code_attention(**given, bias=None if bias is None else bias.to(wide))
    grad = randn(generator, dtype, *out.shape)
    grad_lse = None if bias is None else randn(generator, wide, *lse.shape)
    return {"grad": grad, "grad_lse": grad_lse, "out": out, "lse": lse, **inputs}


ORACLES = {
    "code_attention_gradient": Oracle(code_attention_gradient, make_gradient_inputs, SIZES, CASES)
}
