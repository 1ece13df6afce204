"""What the ops of prefix n-grams check alike."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from .._checks import (
    INTEGERS,
    check_choice,
    check_codes,
    check_levels,
    check_offsets,
    check_same,
    check_tensor,
    named_items,
)
from ..reference.pack_codes import packed_bytes, unpack_codes
from ..reference.prefix_ngram import groups_of


def check_key_space(levels: Sequence[int]) -> list[int]:
    """Check codebook sizes whose keys, up to N_1 ... N_L - 1, fit in int64."""
    sizes = check_levels(levels)
    _check_product(sizes)
    return sizes


def _check_product(sizes: list[int]) -> None:
    if prod(sizes) > 2**63 - 1:
        raise ValueError(f"levels: their product must be at most 2^63 - 1, got {sizes!r}")


def check_arguments(
    codes: Any, levels: Sequence[int], mode: str, hashing: str, groups: Sequence[int] | None,
    packed: bool, items: str = "M",
) -> tuple[list[int], list[int]]:  # fmt: skip
    """Check what says how codes become rows; return levels and groups as lists.

    items: what the op calls the number of rows of codes.
    """
    sizes = check_levels(levels)
    parts = [len(sizes)] if groups is None else list(groups)
    if any(not isinstance(part, int) or part < 1 for part in parts) or sum(parts) != len(sizes):
        raise ValueError(
            f"groups: must be positive ints that add up to the {len(sizes)} levels, got {groups!r}"
        )
    for part in groups_of(sizes, parts):
        _check_product(sizes[part])
    check_choice("mode", mode, ("concat", "sum"))
    check_choice("hashing", hashing, ("modulo", "murmur3", "order_preserving"))
    if packed:
        check_tensor("codes", codes, (items, packed_bytes(sizes)), (torch.uint8,))
    else:
        check_tensor("codes", codes, (items, len(sizes)), INTEGERS)
    return sizes, parts


def check_tables(
    tables: Any, depth: int, mode: str, dtypes: Sequence[torch.dtype]
) -> dict[str, Tensor]:
    """Check a table per level, of one dtype; return them by name."""
    named = named_items("tables", tables)
    if len(named) != depth:
        raise ValueError(f"tables: must be one per level, {depth}, got {len(named)}")
    dims: list[int] = []
    for level, (name, table) in enumerate(named.items(), 1):
        check_tensor(name, table, (f"H_{level}", f"d_{level}"), dtypes)
        if table.shape[0] < 1 or table.shape[1] < 1:
            raise ValueError(f"{name}: must have a row and a column, got {list(table.shape)}")
        dims.append(table.shape[1])
        if mode == "sum" and dims[-1] != dims[0]:
            raise ValueError(
                f"{name}: mode 'sum' needs one d, that of tables[0], {dims[0]}, got {dims[-1]}"
            )
    check_same("dtype", **named)
    return named


def check_pooling(offsets: Tensor | None, pool: str | None) -> None:
    check_choice("pool", pool, (None, "sum", "mean"))
    if offsets is None and pool is not None:
        raise ValueError(f"pool: needs offsets, got pool={pool!r} and no offsets")
    if offsets is not None:
        check_tensor("offsets", offsets, ("B + 1",), (torch.int64,))
        if pool is None:
            raise ValueError("offsets: need pool='sum' or pool='mean', got no pool")
        if offsets.shape[0] < 1:
            raise ValueError("offsets: must have at least one element, got none")


def check_contents(
    codes: Tensor, levels: Sequence[int], offsets: Tensor | None, packed: bool
) -> None:
    """Check the contents of codes and offsets."""
    if offsets is not None:
        check_offsets(offsets, codes.shape[0])
    check_codes(unpack_codes(codes, levels) if packed else codes, levels, least=-1)
