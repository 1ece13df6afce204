"""Code attention: target attention over histories that are stored as codes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._checks import check_same
from .._dispatch import Backend, Op, refuse_wide
from ..reference import code_attention as reference
from . import _attention
from ._code_fields import check_fields, refuse_look_ups, refuse_tiles
from ._prefix import check_contents
from .code_attention_gradient import gradient


def _check_values(
    q: Tensor, codes: Tensor, key_tables: Sequence[Tensor], value_tables: Sequence[Tensor],
    offsets: Tensor, bias: Tensor | None, scale: float, levels: Sequence[int],
    groups: Sequence[int], hashing: str, packed: bool,
) -> None:  # fmt: skip
    check_contents(codes, levels, offsets, packed)


def _refuse_cuda(q: Tensor, codes: Tensor, *rest: Any) -> str | None:
    # Triton's reasons, too: where tables are too large for the gradient, that is Triton's
    return refuse_tiles(q, codes, *rest) or refuse_look_ups(2048, q, codes, *rest)


def _backward(
    grads: Sequence[Tensor | None], q: Tensor, codes: Tensor, key_tables: Sequence[Tensor],
    value_tables: Sequence[Tensor], offsets: Tensor, bias: Tensor | None, *rest: Any,
    kernel: str, outputs: Sequence[Tensor], needs: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    """Return the dense gradients that are wanted, of q, the tables and the bias."""
    out, lse = outputs
    grad = torch.zeros_like(out) if grads[0] is None else grads[0]
    given = (q, codes, key_tables, value_tables, offsets, bias, *rest)
    found = _differentiated(kernel, grad, grads[1], *given, out, lse)
    tables = [*key_tables, *value_tables]
    sums = [*zip(found[2::3], found[3::3], strict=True)]
    sums += zip(found[2::3], found[4::3], strict=True)
    every = [found[0], None]
    every += [_dense(*pair, table) for pair, table in zip(sums, tables, strict=True)]
    every += [None] if bias is None else [None, found[1]]
    return [one for one, need in zip(every, needs, strict=True) if need and one is not None]


def _differentiated(kernel: str, *args: Any) -> list[Tensor]:
    """Differentiate by a kernel, or by Triton what the CUDA one has no room for."""
    if kernel == "cuda" and gradient.reasons(*args)["cuda"]:
        kernel = "triton"
    return gradient(*args, backend=kernel)


def _dense(rows: Tensor, sums: Tensor, table: Tensor) -> Tensor:
    """Return a table's gradient, zeros but for the rows that were read, which ascend."""
    if len(rows) == len(table):
        return sums.to(table.dtype)
    made = torch.zeros(table.shape, dtype=table.dtype, device=table.device)
    return made.index_copy_(0, rows, sums.to(table.dtype))


def _triton(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    from ..kernels import code_attention

    return code_attention.code_attention(q, *rest)


_op = Op(
    "code_attention",
    "(Tensor q, Tensor codes, Tensor[] key_tables, Tensor[] value_tables, Tensor offsets, "
    "Tensor? bias, float scale, int[] levels, int[] groups, str hashing, bool packed) "
    "-> (Tensor out, Tensor lse)",
    fake=lambda q, codes, key_tables, value_tables, *rest: _attention.fake(
        q, value_tables[0].shape[2]
    ),
    reference=reference.code_attention,
    check_values=_check_values,
    backends=(
        Backend("native", refuse_wide, backward=None),
        Backend("triton", refuse_tiles, _triton, partial(_backward, kernel="triton")),
        # last on a GPU until it has been timed there: it has run on an emulated one only
        Backend("cuda", _refuse_cuda, backward=partial(_backward, kernel="cuda")),
    ),
    autocast=("q", "key_tables", "value_tables"),
)


class _Sparse(torch.autograd.Function):
    """The attention with sparse gradients of the tables, which torch's operators cannot return."""

    @staticmethod
    def forward(
        ctx: Any, backend: str, rest: Sequence[Any], q: Tensor, codes: Tensor, offsets: Tensor,
        bias: Tensor | None, *tables: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        keys, values = tables[: len(tables) // 2], tables[len(tables) // 2 :]
        out, lse = _op(q, codes, list(keys), list(values), offsets, bias, *rest, backend=backend)
        ctx.backend, ctx.rest = backend, rest
        ctx.save_for_backward(q, codes, offsets, bias, out, lse, *tables)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
        q, codes, offsets, bias, out, lse, *tables = ctx.saved_tensors
        if grad is None:
            grad = torch.zeros_like(out)
        cast = [table.to(out.dtype) for table in tables]  # as autocast did
        keys, values = cast[: len(cast) // 2], cast[len(cast) // 2 :]
        given = (q.to(out.dtype), codes, keys, values, offsets, bias, *ctx.rest)
        found = _differentiated(ctx.backend, grad, grad_lse, *given, out, lse)
        grad_bias = None if bias is None else found[1]
        sums = [*zip(found[2::3], found[3::3], strict=True)]
        sums += zip(found[2::3], found[4::3], strict=True)
        sparse = [_coo(*pair, table) for pair, table in zip(sums, tables, strict=True)]
        every = (None, None, found[0].to(q.dtype), None, None, grad_bias, *sparse)
        needed = zip(every, ctx.needs_input_grad, strict=True)
        return tuple(each if need else None for each, need in needed)


def _coo(rows: Tensor, sums: Tensor, table: Tensor) -> Tensor:
    """Return a table's gradient as a sparse tensor of the rows that were read."""
    return torch.sparse_coo_tensor(
        rows[None], sums.to(table.dtype), table.shape, is_coalesced=True, check_invariants=False
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
    levels: Sequence[int] | None = None,
    prefix: bool = False,
    groups: Sequence[int] | None = None,
    hashing: str = "modulo",
    packed: bool = False,
    sparse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Attend to each user's history, whose keys and values are sums of rows that its codes name.

    $o_c = \sum_t \mathrm{softmax}_t(s\, \langle q_c, k_t \rangle + b_t)\, v_t$ with
    $k_t = \sum_f K_f[r_f(c_t)],\ v_t = \sum_f V_f[r_f(c_t)]$, where $r_f(c_t)$ is the code $c_{tf}$
    itself or, in a group of prefixes, the row of its first codes up to f, as `prefix_ngram_keys`
    gives it; a code of -1 adds nothing.

    In PyTorch, without codes of -1, where every code is its own row::

        k = sum(table[code.long()] for table, code in zip(key_tables, codes.T))
        v = sum(table[code.long()] for table, code in zip(value_tables, codes.T))
        out = target_attention(q, k, v, offsets, bias=bias, scale=scale)

    Args:
        q: [B, C, H, d] float32, float16, bfloat16 or float64: C candidates for each of B users.
        codes: [T, F] of any integer dtype: the codes of all histories; column f is in [-1, N_f).
            Or, packed, what `pack_codes` makes of them.
        key_tables: F tensors [R_f, H, d], q's dtype; R_f >= 1 may differ.
        value_tables: F tensors [R_f, H, dv], q's dtype; dv may differ from d.
        offsets: int64 [B + 1]; user u has the rows offsets[u] .. offsets[u + 1] - 1.
        bias: [T] or [T, H], q's dtype or float32, added to the logits of every candidate of the
            row's user. -inf takes the row out; a row of codes that are all -1 stays in, with key 0.
        scale: s, a finite float; d ** -0.5 by default.
        return_lse: return lse too.
        levels: (N_1, ..., N_F), the ranges of the codes; None, R_f each. Needed with packed, prefix
            and groups. A table with fewer rows than its field has keys shares them by hashing.
        prefix: the fields are the prefixes of one code: one group of all of them.
        groups: how many fields each code has, such as (1, 1, 3) for an author, a time gap and the
            prefixes of a three-level code: keys begin anew with each, and field f of a group reads
            the row of the group's first codes up to f, of which an unknown one silences all deeper
            fields of the group. None: every field by itself, unless prefix is set.
        hashing: "modulo", "murmur3" or "order_preserving", as for `prefix_ngram_lookup`.
        packed: codes are uint8 [T, ceil(bits / 8)] of `pack_codes`.
        sparse: gradients of the tables are coalesced sparse COO tensors of the rows that were read,
            not dense ones. In eager mode only.
        backend: "auto", "native", "triton", "cuda" or "reference".

    Returns:
        out [B, C, H, dv] in q's dtype, or (out, lse) with lse [B, C, H] in natural logarithm,
        float32 (float64 for float64).

    A history with no rows, or with none left by the bias, gives out = 0, lse = -inf and gradients
    of 0. B, C and T may be 0. Differentiable once, in q, every table and bias, through out and lse.

    Numerics: the reference sums a row's key in float32 and rounds it to q's dtype, then does as
    target_attention; gradients of tables are summed in float32 (float64 for float64) and rounded
    once; sparse ones are those of `code_attention_gradient`. Autocast casts q and the tables, not
    the bias. The same inputs give the same bits on every run; the reference uses torch's matrix
    products, whose bits may change with the number of threads. On a CPU keys and values are never
    built nor rounded: a softmax term is a product of exponentials taken per table row, or where
    these would lose terms above about 2^-80 of the rest, the exponential of an item's own logit
    (csrc/code_attention.h); terms below 2^-126 of the greatest count as 0. Workspace on a CPU, per
    thread, of the rows n that a user's history names in all fields: 4 n (H (d + dv) + 256) bytes
    and 8 F + 4 per item of the longest history (16 F + 4 where codes are packed or prefixes, 72
    more where a table has more than 8 times as many rows), and the bias once more; with fewer than
    8 users 1,024 n per 2,048 items of it. Of the reference: the keys and values in full, F times as
    much in float32, a float32 copy of the tables, and F int64 per row, besides that of
    target_attention. On a GPU: 4 F bytes per row, and 4 H C (dv + 2) bytes for each user and each
    256 rows, or more of them where there are many; a code out of range counts as unknown, and the
    host does not wait. Triton takes at most 8 fields, and d and dv up to 128 in float32 and 256 in
    16 bits; float32 is multiplied as three TF32 products. "cuda", which "auto" does not take where
    Triton can run, keeps logits and weights of table rows in shared memory: it takes codes that are
    rows themselves, uint8, int16 or int32, 2,048 in all fields, and C H up to 256; its workspace is
    8 + 4 H C (dv + 2) bytes for each user and each 1,024 rows of codes, or more of them. Its
    gradient is that of `code_attention_gradient` by "cuda" up to 1,024 rows, else by "triton".

    Raises:
        TypeError: a wrong type or dtype. ValueError: a wrong shape or device, no table, a wrong
        level, group or choice, offsets that do not start at 0, decrease, or do not end at T, or a
        scale that is not finite. IndexError: a code out of range. BackendError: the named backend
        cannot run this.

    Source: LARM, section 2.3 and equation 5 (codes of live slices in ranking); FLUID, section 3.2,
    and equations 1-2 (prefixes).

    Example:
        >>> out = code_attention(q, codes, key_tables, value_tables, offsets)  # [B, C, H, dv]
    """
    _attention.check_query(q, offsets)
    fields = check_fields(
        q, codes, key_tables, value_tables, levels, prefix, groups, hashing, packed
    )
    bias = _attention.check_bias(bias, q, codes.shape[0])
    jagged = {"codes": codes, "offsets": offsets, "bias": bias}
    check_same("device", q=q, **jagged, **fields.keys, **fields.values)
    keys, values = list(fields.keys.values()), list(fields.values.values())
    rest = (_attention.resolve_scale(scale, q), *fields.rows)
    if sparse and torch.is_grad_enabled() and any(t.requires_grad for t in [*keys, *values]):
        out, lse = _Sparse.apply(backend, rest, q, codes, offsets, bias, *keys, *values)
    else:
        out, lse = _op(q, codes, keys, values, offsets, bias, *rest, backend=backend)
    return (out, lse) if return_lse else out
