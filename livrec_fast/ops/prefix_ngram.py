"""Prefix n-gram embedding: codes to vectors, a table per prefix length."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .._checks import FLOATS, check_same, check_tensor, named_items
from .._dispatch import Backend, Op, refuse_native, refuse_triton
from ..reference import prefix_ngram as reference
from ._prefix import check_arguments, check_contents, check_pooling, check_tables
from .prefix_ngram_gradient import gradient

# The operator's arguments but for tables: everything that says which rows of them are read.
_SCHEMA = (
    "(Tensor codes, Tensor[] tables, int[] levels, str mode, Tensor? offsets, str? pool, "
    "str hashing, int[] groups, bool packed, Tensor[] scales) -> Tensor"
)


def _fake(
    codes: Tensor,
    tables: Sequence[Tensor],
    levels: Sequence[int],
    mode: str,
    offsets: Tensor | None,
    *rest: object,
) -> Tensor:
    rows = codes.shape[0] if offsets is None else offsets.shape[0] - 1
    dims = [table.shape[1] for table in tables]
    dtype = torch.float32 if tables[0].dtype == torch.int8 else tables[0].dtype
    return tables[0].new_empty((rows, dims[0] if mode == "sum" else sum(dims)), dtype=dtype)


def _check_values(
    codes: Tensor, tables: Sequence[Tensor], levels: Sequence[int], mode: str,
    offsets: Tensor | None, pool: str | None, hashing: str, groups: Sequence[int], packed: bool,
    scales: Sequence[Tensor],
) -> None:  # fmt: skip
    check_contents(codes, levels, offsets, packed)


def _refuse_native(codes: Tensor, tables: Sequence[Tensor], *rest: object) -> str | None:
    if tables[0].dtype == torch.float64:
        return "computes in float32; tables are float64"
    return refuse_native(codes)


def _refuse_triton(
    codes: Tensor, tables: Sequence[Tensor], levels: Sequence[int], *rest: object
) -> str | None:
    if tables[0].dtype == torch.float64:
        return "computes in float32; tables are float64"
    if len(levels) > 8:
        return "takes each table as an argument: at most 8 levels"
    return refuse_triton(codes)


def _triton(codes: Tensor, *rest: Any) -> Tensor:
    from ..kernels import prefix_ngram

    return prefix_ngram.prefix_ngram_lookup(codes, *rest)


def _backward(
    grads: Sequence[Tensor | None],
    codes: Tensor,
    tables: Sequence[Tensor],
    levels: Sequence[int],
    mode: str,
    offsets: Tensor | None,
    pool: str | None,
    hashing: str,
    groups: Sequence[int],
    packed: bool,
    scales: Sequence[Tensor],
    *,
    outputs: Sequence[Tensor],
    needs: Sequence[bool],
    backend: str = "auto",
) -> list[Tensor]:
    """Return the dense gradients of the tables that want one."""
    wanted = needs[1 : 1 + len(tables)]
    if grads[0] is None:
        return [torch.zeros_like(t) for t, need in zip(tables, wanted, strict=True) if need]
    rows, dims = [len(table) for table in tables], [table.shape[1] for table in tables]
    rest = (mode, offsets, pool, hashing, groups, packed)
    sums = gradient(grads[0], codes, levels, rows, dims, *rest, backend=backend)
    found = []
    for table, need, at, values in zip(tables, wanted, sums[::2], sums[1::2], strict=True):
        if need:
            dense = torch.zeros(table.shape, dtype=table.dtype, device=table.device)
            found.append(dense.index_copy_(0, at, values.to(table.dtype)))
    return found


_op = Op(
    "prefix_ngram_lookup",
    _SCHEMA,
    fake=_fake,
    reference=reference.prefix_ngram_lookup,
    check_values=_check_values,
    backends=(
        Backend("native", _refuse_native, backward=_backward),
        Backend("triton", _refuse_triton, _triton, partial(_backward, backend="triton")),
    ),
)


class _Sparse(torch.autograd.Function):
    """The lookup with sparse gradients of the tables, which torch's operators cannot return."""

    @staticmethod
    def forward(ctx: Any, backend: str, codes: Tensor, rest: Sequence[Any], *tables: Tensor) -> Any:
        ctx.codes, ctx.rest, ctx.backend = codes, rest, backend
        ctx.shapes, ctx.dtype = [table.shape for table in tables], tables[0].dtype
        return _op(codes, list(tables), *rest, [], backend=backend)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        levels, *rest = ctx.rest
        rows, dims = [list(sizes) for sizes in zip(*ctx.shapes, strict=True)]
        found = gradient(grad, ctx.codes, levels, rows, dims, *rest, backend=ctx.backend)
        sparse = [
            torch.sparse_coo_tensor(
                at[None], values.to(ctx.dtype), shape, is_coalesced=True, check_invariants=False
            )
            for at, values, shape in zip(found[::2], found[1::2], ctx.shapes, strict=True)
        ]
        return (None, None, None, *sparse)


def _check_scales(scales: Sequence[Tensor] | None, tables: dict[str, Tensor]) -> list[Tensor]:
    first = next(iter(tables.values()))
    if scales is None:
        if first.dtype == torch.int8:
            raise ValueError("scales: int8 tables need them, got None")
        return []
    if first.dtype != torch.int8:
        raise ValueError(f"scales: go with int8 tables only, tables are {str(first.dtype)[6:]}")
    named = named_items("scales", scales)
    if len(named) != len(tables):
        raise ValueError(f"scales: must be one per table, {len(tables)}, got {len(named)}")
    for (name, scale), table in zip(named.items(), tables.values(), strict=True):
        check_tensor(name, scale, (table.shape[0],), (torch.float32,))
        check_same("device", **{"tables[0]": first, name: scale})
    return list(named.values())


def prefix_ngram_lookup(
    codes: Tensor,
    tables: Sequence[Tensor],
    levels: Sequence[int],
    *,
    mode: str = "concat",
    offsets: Tensor | None = None,
    pool: str | None = None,
    hashing: str = "modulo",
    groups: Sequence[int] | None = None,
    packed: bool = False,
    scales: Sequence[Tensor] | None = None,
    sparse: bool = False,
    backend: str = "auto",
) -> Tensor:
    r"""Embed each row of codes by its prefixes: level l looks up the first l codes as one key.

    $k_1 = c_1,\quad k_l = k_{l-1} N_l + c_l,\quad e = E_1(k_1) \| E_2(k_2) \| ... \| E_L(k_L)$, or
    the sum of them; $E_l(k)$ is row $k$ of table l, or a hash of $k$ where the table has fewer rows
    than $N_1 ... N_l$.

    In PyTorch, starting from key = 0 and parts = []::

        for code, size, table in zip(codes.T, levels, tables):
            key = key * size + code.long()
            parts.append(table[key % len(table)])

    Args:
        codes: [M, L] integers, column l in [-1, N_l). -1 is an unknown code: that level and all
            deeper ones of its group add zeros. Or, packed, what `pack_codes` makes of them.
        tables: L tensors [H_l, d_l] of one floating dtype, H_l and d_l at least 1; in mode "sum"
            all d_l are equal. Or int8, with scales.
        levels: (N_1, ..., N_L), whose product in each group is at most 2^63 - 1. Keys are int64.
        mode: "concat" or "sum".
        offsets: int64 [B + 1], with pool: items offsets[b] to offsets[b + 1] - 1 are history b.
        pool: None, or with offsets "sum" or "mean" over the items of a history; the mean divides by
            their number, unknown ones included.
        hashing: of levels whose table is too small for all K = N_1 ... N_l keys: "modulo", k mod H;
            "murmur3", MurmurHash3 of (k, 0), its halves combined by xor, mod H, all unsigned, as
            FBGEMM's zero-collision hash has it (k = 1, 2 and H = 1000 give
            125 and 258); "order_preserving", floor(k floor(2^64 H / K) / 2^64).
        groups: how many levels each code has where rows hold several, such as (4, 4) for those of
            a slice and of its room: keys begin anew with each. None means one code of all levels;
            (1, 1, ..., 1) looks every level up by itself.
        packed: codes are uint8 [M, ceil(bits / 8)] of `pack_codes`.
        scales: L tensors [H_l] float32, for tables of int8: a row is scale times its integers. The
            result is float32, and has no gradient.
        sparse: gradients of the tables are coalesced sparse COO tensors of the rows looked up, not
            dense ones. In eager mode only.
        backend: "auto", "native", "triton" or "reference".

    Returns:
        [M, d_1 + ... + d_L] or [M, d] of the tables' dtype; pooled, B rows instead of M. An empty
        history gives zeros; M = 0 without pooling gives no rows.

    Differentiable in the tables, by one sort of the codes for all levels. Numerics: sums of float16
    and bfloat16, gradients included, are taken in float32 and rounded once. Autocast leaves the
    tables as they are. Deterministic for any thread count. Workspace on a CPU: 1,024 L bytes and a
    row of the result per thread; of the gradient, that of `prefix_ngram_gradient` and the sums of
    the rows looked up, and nothing of a table's size but the dense gradients themselves. On a GPU:
    none, and a code out of range counts as unknown; of the gradient, that of
    `prefix_ngram_gradient`, for which the host waits as it says. Triton compiles for the levels and
    the shapes of the tables, of at most 8 levels. Of the reference: float32 copies of the rows that
    are looked up, O(M sum d_l), and O(M L) integers.

    Raises:
        TypeError: a wrong type or dtype. ValueError: a wrong shape, level, choice or offset.
        IndexError: a code out of range.

    Source: FLUID, equations 1-2, after Zheng et al. 2025, "Enhancing Embedding Representation
    Stability in Recommendation Systems with Semantic ID".

    Example:
        >>> e = prefix_ngram_lookup(codes, [coarse, fine], (64, 64))  # [M, d_1 + d_2]
    """
    sizes, parts = check_arguments(codes, levels, mode, hashing, groups, packed)
    named = check_tables(tables, len(sizes), mode, (*FLOATS, torch.int8))
    factors = _check_scales(scales, named)
    check_pooling(offsets, pool)
    check_same("device", codes=codes, offsets=offsets, **named)
    found, rest = list(named.values()), (sizes, mode, offsets, pool, hashing, parts, packed)
    if sparse and torch.is_grad_enabled() and any(table.requires_grad for table in found):
        return _Sparse.apply(backend, codes, rest, *found)
    return _op(codes, found, *rest, factors, backend=backend)
