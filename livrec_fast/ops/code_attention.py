"""Code attention: target attention over histories that are stored as codes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .._checks import (
    FLOATS,
    INTEGERS,
    check_codes,
    check_offsets,
    check_one_dtype,
    check_same,
    check_tensor,
    named_items,
)
from .._dispatch import Op
from ..reference import code_attention as reference
from . import _attention


def _check_values(
    q: Tensor,
    codes: Tensor,
    key_tables: Sequence[Tensor],
    value_tables: Sequence[Tensor],
    offsets: Tensor,
    bias: Tensor | None,
    scale: float,
) -> None:
    check_offsets(offsets, len(codes))
    check_codes(codes, [len(table) for table in key_tables], least=-1)


_op = Op(
    "code_attention",
    "(Tensor q, Tensor codes, Tensor[] key_tables, Tensor[] value_tables, Tensor offsets, "
    "Tensor? bias, float scale) -> (Tensor out, Tensor lse)",
    fake=lambda q, codes, key_tables, value_tables, offsets, bias, scale: _attention.fake(
        q, value_tables[0].shape[2]
    ),
    reference=reference.code_attention,
    check_values=_check_values,
    autocast=("q", "key_tables", "value_tables"),
)


def code_attention(
    q: Tensor,
    codes: Tensor,
    key_tables: Sequence[Tensor],
    value_tables: Sequence[Tensor],
    offsets: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Attend to each user's history, whose keys and values are sums of rows that its codes name.

    $o_c = \sum_t \mathrm{softmax}_t(s\, \langle q_c, k_t \rangle + b_t)\, v_t$ with
    $k_t = \sum_f K_f[c_{tf}],\ v_t = \sum_f V_f[c_{tf}]$; a code of -1 adds nothing.

    In PyTorch, without codes of -1::

        k = sum(table[code.long()] for table, code in zip(key_tables, codes.T))
        v = sum(table[code.long()] for table, code in zip(value_tables, codes.T))
        out = target_attention(q, k, v, offsets, bias=bias, scale=scale)

    Args:
        q: [B, C, H, d] float32, float16, bfloat16 or float64: C candidates for each of B users.
        codes: [T, F] of any integer dtype: the codes of all histories; column f is in [-1, N_f).
        key_tables: F tensors [N_f, H, d], q's dtype; N_f >= 1 may differ.
        value_tables: F tensors [N_f, H, dv], q's dtype; dv may differ from d.
        offsets: int64 [B + 1]; user u has the rows offsets[u] .. offsets[u + 1] - 1.
        bias: [T] or [T, H], q's dtype or float32, added to the logits of every candidate of the
            row's user. -inf takes the row out; a row of codes that are all -1 stays in, with key 0.
        scale: s, a finite float; d ** -0.5 by default.
        return_lse: return lse too.
        backend: "auto" or "reference".

    Returns:
        out [B, C, H, dv] in q's dtype, or (out, lse) with lse [B, C, H] in natural logarithm,
        float32 (float64 for float64).

    A history with no rows, or with none left by the bias, gives out = 0, lse = -inf and gradients
    of 0. B, C and T may be 0. Differentiable once, in q, every table and bias, through out and lse.

    Numerics: the reference sums a row's key in float32 and rounds it to q's dtype, then does as
    target_attention; gradients of tables are summed in float32 (float64 for float64) and rounded
    once. Autocast casts q and the tables, not the bias. The same inputs give the same bits on every
    run; the reference uses torch's matrix products, whose bits may change with the number of
    threads. Workspace of the reference: the keys and values in full, and F times as much in
    float32, besides that of target_attention.

    Raises:
        TypeError: a wrong type or dtype. ValueError: a wrong shape or device, no table, offsets
        that do not start at 0, decrease, or do not end at T, or a scale that is not finite.
        IndexError: a code out of range. BackendError: the named backend cannot run this.

    Source: LARM, section 2.3 and equation 5 (codes of live slices in ranking); FLUID, section 3.2.

    Example:
        >>> out = code_attention(q, codes, key_tables, value_tables, offsets)  # [B, C, H, dv]
    """
    _attention.check_query(q, offsets)
    keys, values = _check_tables(q, key_tables, value_tables)
    check_tensor("codes", codes, ("T", len(keys)), INTEGERS)
    bias = _attention.check_bias(bias, q, codes.shape[0])
    check_same("device", q=q, codes=codes, offsets=offsets, bias=bias, **keys, **values)
    scale = _attention.resolve_scale(scale, q)
    out, lse = _op(
        q, codes, list(keys.values()), list(values.values()), offsets, bias, scale, backend=backend
    )
    return (out, lse) if return_lse else out


def _check_tables(
    q: Tensor, key_tables: Any, value_tables: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Check the tables against q and each other, and return them by name."""
    keys, values = named_items("key_tables", key_tables), named_items("value_tables", value_tables)
    if len(keys) != len(values):
        raise ValueError(
            f"value_tables: must be as many as key_tables, {len(keys)}, got {len(values)}"
        )
    heads, dim = q.shape[2:]
    dv: int | str = "dv"  # until the first table tells
    for (key_name, key), (value_name, value) in zip(keys.items(), values.items(), strict=True):
        check_tensor(key_name, key, ("N", heads, dim), FLOATS)
        if key.shape[0] < 1:
            raise ValueError(f"{key_name}: needs at least one row, got shape {list(key.shape)}")
        check_tensor(value_name, value, (key.shape[0], heads, dv), FLOATS)
        dv = value.shape[2]
        if value.shape[2] < 1:
            raise ValueError(f"{value_name}: dv must be at least 1, got shape {list(value.shape)}")
    check_one_dtype(q=q, **keys, **values)
    return keys, values
