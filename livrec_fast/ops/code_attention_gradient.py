"""The gradients of code attention: dense of the queries and the bias, row by row of the tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._checks import FLOATS, check_same, check_tensor
from .._dispatch import Backend, Op, refuse_wide
from ..reference import code_attention_gradient as reference
from ..reference._formula import wide_dtype
from . import _attention
from ._code_fields import check_fields, refuse_look_ups, refuse_tiles
from ._prefix import check_contents


def _fake(
    grad: Tensor, grad_lse: Tensor | None, q: Tensor, codes: Tensor, key_tables: Sequence[Tensor],
    value_tables: Sequence[Tensor], offsets: Tensor, bias: Tensor | None, *rest: object,
) -> list[Tensor]:  # fmt: skip
    wide = wide_dtype(q.dtype)
    found = [q.new_empty(q.shape), q.new_empty(0 if bias is None else bias.shape, dtype=wide)]
    for key, value in zip(key_tables, value_tables, strict=True):
        count = torch.library.get_ctx().new_dynamic_size()
        found.append(q.new_empty(count, dtype=torch.int64))
        found += [q.new_empty((count, *table.shape[1:]), dtype=wide) for table in (key, value)]
    return found


def _check_values(
    grad: Tensor, grad_lse: Tensor | None, q: Tensor, codes: Tensor, key_tables: Sequence[Tensor],
    value_tables: Sequence[Tensor], offsets: Tensor, bias: Tensor | None, scale: float,
    levels: Sequence[int], groups: Sequence[int], hashing: str, packed: bool, *rest: object,
) -> None:  # fmt: skip
    check_contents(codes, levels, offsets, packed)


def _refuse_native(grad: Tensor, grad_lse: Tensor | None, q: Tensor, *rest: object) -> str | None:
    return refuse_wide(q)


def _refuse_triton(grad: Tensor, grad_lse: Tensor | None, *rest: Any) -> str | None:
    return refuse_tiles(*rest)


def _refuse_cuda(grad: Tensor, grad_lse: Tensor | None, *rest: Any) -> str | None:
    return refuse_look_ups(1024, *rest)


def _triton(grad: Tensor, *rest: Any) -> list[Tensor]:
    from ..kernels import code_attention_gradient

    return code_attention_gradient.code_attention_gradient(grad, *rest)


gradient = Op(
    "code_attention_gradient",
    "(Tensor grad, Tensor? grad_lse, Tensor q, Tensor codes, Tensor[] key_tables, "
    "Tensor[] value_tables, Tensor offsets, Tensor? bias, float scale, int[] levels, int[] groups, "
    "str hashing, bool packed, Tensor out, Tensor lse) -> Tensor[]",
    fake=_fake,
    reference=reference.code_attention_gradient,
    check_values=_check_values,
    backends=(
        Backend("native", _refuse_native),
        Backend("triton", _refuse_triton, _triton),
        Backend("cuda", _refuse_cuda),  # last until it has been timed, as for the attention
    ),
    differentiable=False,
)


def code_attention_gradient(
    grad: Tensor,
    q: Tensor,
    codes: Tensor,
    key_tables: Sequence[Tensor],
    value_tables: Sequence[Tensor],
    offsets: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    grad_lse: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    levels: Sequence[int] | None = None,
    prefix: bool = False,
    groups: Sequence[int] | None = None,
    hashing: str = "modulo",
    packed: bool = False,
    backend: str = "auto",
) -> list[Tensor]:
    r"""Differentiate `code_attention`: add up the gradients of each table row that it read.

    With the weights $P_{ct} = \mathrm{softmax}_t(s\, \langle q_c, k_t \rangle + b_t)$ and gradients
    $g$ of out and $g'$ of lse, $D_{ct} = \langle g_c, v_t \rangle$ and
    $S_{ct} = P_{ct} (D_{ct} - \sum_{t'} P_{ct'} D_{ct'} + g'_c)$:
    $\bar q_c = s \sum_t S_{ct} k_t,\ \bar b_t = \sum_c S_{ct},\ \bar K_f[r] = s \sum S_{ct} q_c,\
    \bar V_f[r] = \sum P_{ct} g_c$, the last two over all c and the t whose field f reads row r.

    In PyTorch, per user and head, q [C, d], k [t, d], v [t, dv], and then per field::

        P, D = (scale * q @ k.T + bias).softmax(1), grad @ v.T
        S = P * (D - (P * D).sum(1, keepdim=True) + grad_lse[:, None])
        grad_q, grad_bias, grad_k, grad_v = scale * S @ k, S.sum(0), scale * S.T @ q, P.T @ grad
        rows, place = torch.unique(row_of_field, return_inverse=True)
        key_sums = torch.zeros(len(rows), d).index_add(0, place, grad_k)

    Args:
        grad: [B, C, H, dv], q's dtype: the gradient of out, of any strides.
        q: as for the attention.
        codes: as for the attention.
        key_tables: as for the attention.
        value_tables: as for the attention.
        offsets: as for the attention.
        out: [B, C, H, dv], q's dtype: what the attention returned for the same arguments. A backend
            may use it or compute it again, as the reference does.
        lse: [B, C, H], float32 (float64 for float64): likewise.
        grad_lse: [B, C, H], lse's dtype: the gradient of lse; None for zeros.
        bias: as for the attention.
        scale: as for the attention.
        levels: as for the attention.
        prefix: as for the attention.
        groups: as for the attention.
        hashing: as for the attention.
        packed: as for the attention.
        backend: "auto", "native", "triton", "cuda" or "reference".

    Returns:
        [grad_q, grad_bias, rows_1, key_sums_1, value_sums_1, rows_2, ...]: grad_q in q's dtype;
        grad_bias in the bias's shape, [0] without one; rows int64 [n_f], ascending and distinct,
        all that the histories read; sums [n_f, H, d] and [n_f, H, dv]. All but rows and grad_q are
        float32 (float64 for float64): what an optimiser needs of a sparse gradient.

    A history that is empty or masked by the bias gets gradients of 0, whatever grad_lse is; the
    rows that it reads are still among rows. B, C and T may be 0. Numerics: keys and values are
    rounded to q's dtype, as the attention rounds them; all else is float32 (float64 for float64),
    and nothing is rounded before it is summed. Autocast leaves all tensors as they are. The same
    inputs give the same bits on every run; the reference uses torch's matrix products, whose bits
    may change with the number of threads. Not differentiable. On a CPU keys and values are not
    rounded, and out only shifts sums. Workspace on a CPU: twice that of the attention, and the sums
    of each field for each of 16 groups of users, those of tables past 4 MB for the rows alone that
    their histories name. Of the reference: keys,
    values and their gradients in full, the keys and values F times more in float32, a float32 copy
    of the tables, and four arrays of C x H x the longest history. Of Triton:
    4 H (d + dv + 1) bytes per row of codes, that of the attention with 2 d + 3 for dv + 2, and a
    sort of each field's rows. "cuda" takes codes that are rows themselves, uint8, int16 or int32,
    1,024 in all fields, and C H up to 256; its workspace is 64 MiB at most of sums by row, or a
    piece's, 8 + 4 H C (d + 3) bytes for each user and each 1,024 rows of codes, or more of them,
    16 H C for each user, and the tables' gradients in full. The numbers of rows depend on the
    codes: on a GPU the host waits for them.

    Raises:
        TypeError: a wrong type or dtype. ValueError: a wrong shape, device, level, choice, offset
        or scale. IndexError: a code out of range. BackendError: the named backend cannot run this.

    Source: LARM, equation 5, differentiated.

    Example:
        >>> out, lse = code_attention(q, codes, keys, values, offsets, return_lse=True)
        >>> found = code_attention_gradient(grad, q, codes, keys, values, offsets, out, lse)
        >>> grad_q, grad_bias, rows, key_sums, value_sums, *other_fields = found
    """
    _attention.check_query(q, offsets)
    fields = check_fields(
        q, codes, key_tables, value_tables, levels, prefix, groups, hashing, packed
    )
    keys, values = list(fields.keys.values()), list(fields.values.values())
    bias = _attention.check_bias(bias, q, codes.shape[0])
    wide = (wide_dtype(q.dtype),)
    for name, value in {"grad": grad, "out": out}.items():
        check_tensor(name, value, (*q.shape[:3], values[0].shape[2]), FLOATS)
    check_tensor("lse", lse, q.shape[:3], wide)
    if grad_lse is not None:
        check_tensor("grad_lse", grad_lse, q.shape[:3], wide)
    check_same("dtype", q=q, **fields.keys, **fields.values, grad=grad, out=out)
    others = {"grad": grad, "grad_lse": grad_lse, "out": out, "lse": lse}
    jagged = {"codes": codes, "offsets": offsets, "bias": bias}
    check_same("device", q=q, **jagged, **fields.keys, **fields.values, **others)
    scale = _attention.resolve_scale(scale, q)
    given = (q, codes, keys, values, offsets, bias, scale, *fields.rows)
    return gradient(grad, grad_lse, *given, out, lse, backend=backend)
