"""Prefix n-gram embedding: codes to vectors, a table per prefix length."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from .._checks import (
    FLOATS,
    INTEGERS,
    check_choice,
    check_codes,
    check_levels,
    check_offsets,
    check_same,
    check_tensor,
    named_items,
)
from .._dispatch import Op
from ..reference import prefix_ngram as reference


def _fake(
    codes: Tensor,
    tables: Sequence[Tensor],
    levels: Sequence[int],
    mode: str,
    offsets: Tensor | None,
    pool: str | None,
    hashing: str,
) -> Tensor:
    rows = codes.shape[0] if offsets is None else offsets.shape[0] - 1
    dims = [table.shape[1] for table in tables]
    return tables[0].new_empty((rows, dims[0] if mode == "sum" else sum(dims)))


def _check_values(
    codes: Tensor,
    tables: Sequence[Tensor],
    levels: Sequence[int],
    mode: str,
    offsets: Tensor | None,
    pool: str | None,
    hashing: str,
) -> None:
    if offsets is not None:
        check_offsets(offsets, codes.shape[0])
    check_codes(codes, levels, least=-1)


_op = Op(
    "prefix_ngram_lookup",
    "(Tensor codes, Tensor[] tables, int[] levels, str mode, Tensor? offsets, str? pool, "
    "str hashing) -> Tensor",
    fake=_fake,
    reference=reference.prefix_ngram_lookup,
    check_values=_check_values,
)


def check_key_space(levels: Sequence[int]) -> list[int]:
    """Check codebook sizes whose keys, up to N_1 ... N_L - 1, fit in int64."""
    sizes = check_levels(levels)
    if prod(sizes) > 2**63 - 1:
        raise ValueError(f"levels: their product must be at most 2^63 - 1, got {levels!r}")
    return sizes


def _check_tables(tables: Sequence[Tensor], depth: int, mode: str) -> dict[str, Tensor]:
    named = named_items("tables", tables)
    if len(named) != depth:
        raise ValueError(f"tables: must be one per level, {depth}, got {len(named)}")
    dims: list[int] = []
    for level, (name, table) in enumerate(named.items(), 1):
        check_tensor(name, table, (f"H_{level}", f"d_{level}"), FLOATS)
        if table.shape[0] < 1 or table.shape[1] < 1:
            raise ValueError(f"{name}: must have a row and a column, got {list(table.shape)}")
        dims.append(table.shape[1])
        if mode == "sum" and dims[-1] != dims[0]:
            raise ValueError(
                f"{name}: mode 'sum' needs one d, that of tables[0], {dims[0]}, got {dims[-1]}"
            )
    check_same("dtype", **named)
    return named


def _check_pooling(offsets: Tensor | None, pool: str | None) -> None:
    check_choice("pool", pool, (None, "sum", "mean"))
    if offsets is None and pool is not None:
        raise ValueError(f"pool: needs offsets, got pool={pool!r} and no offsets")
    if offsets is not None:
        check_tensor("offsets", offsets, ("B + 1",), (torch.int64,))
        if pool is None:
            raise ValueError("offsets: need pool='sum' or pool='mean', got no pool")
        if offsets.shape[0] < 1:
            raise ValueError("offsets: must have at least one element, got none")


def prefix_ngram_lookup(
    codes: Tensor,
    tables: Sequence[Tensor],
    levels: Sequence[int],
    *,
    mode: str = "concat",
    offsets: Tensor | None = None,
    pool: str | None = None,
    hashing: str = "modulo",
    backend: str = "auto",
) -> Tensor:
    r"""Embed each row of codes by its prefixes: level l looks up the first l codes as one key.

    $k_1 = c_1,\quad k_l = k_{l-1} N_l + c_l,\quad e = E_1(k_1) \| E_2(k_2) \| ... \| E_L(k_L)$, or
    the sum of them; $E_l(k)$ is row $k$ of table l, or $k \bmod H_l$ where the table has fewer rows
    than $N_1 ... N_l$.

    In PyTorch, starting from key = 0 and parts = []::

        for code, size, table in zip(codes.T, levels, tables):
            key = key * size + code.long()
            parts.append(table[key % len(table)])

    Args:
        codes: [M, L] integers, column l in [-1, N_l). -1 is an unknown code: that level and all
            deeper ones add zeros.
        tables: L tensors [H_l, d_l] of one floating dtype, H_l and d_l at least 1; in mode "sum"
            all d_l are equal.
        levels: (N_1, ..., N_L), whose product is at most 2^63 - 1. Keys are int64.
        mode: "concat" or "sum".
        offsets: int64 [B + 1], with pool: items offsets[b] to offsets[b + 1] - 1 are history b.
        pool: None, or with offsets "sum" or "mean" over the items of a history; the mean divides by
            their number, unknown ones included.
        hashing: "modulo" (rows of a smaller table are shared; keys are never negative).
        backend: "auto" or "reference".

    Returns:
        [M, d_1 + ... + d_L] or [M, d] of the tables' dtype; pooled, B rows instead of M. An empty
        history gives zeros; M = 0 without pooling gives no rows.

    Differentiable in the tables; gradients are dense. Numerics: sums of float16 and bfloat16,
    gradients included, are taken in float32 and rounded once. Autocast leaves the tables as they
    are. Deterministic for any thread count. Workspace: float32 copies of the rows that are looked
    up, O(M sum d_l), and O(M L) integers.

    Raises:
        TypeError: a wrong type or dtype. ValueError: a wrong shape, level, choice or offset.
        IndexError: a code out of range.

    Source: FLUID, equations 1-2, after Zheng et al. 2025, "Enhancing Embedding Representation
    Stability in Recommendation Systems with Semantic ID".

    Example:
        >>> e = prefix_ngram_lookup(codes, [coarse, fine], (64, 64))  # [M, d_1 + d_2]
    """
    sizes = check_key_space(levels)
    check_choice("mode", mode, ("concat", "sum"))
    check_choice("hashing", hashing, ("modulo",))
    check_tensor("codes", codes, ("M", len(sizes)), INTEGERS)
    named = _check_tables(tables, len(sizes), mode)
    _check_pooling(offsets, pool)
    check_same("device", codes=codes, offsets=offsets, **named)
    return _op(codes, list(named.values()), sizes, mode, offsets, pool, hashing, backend=backend)
