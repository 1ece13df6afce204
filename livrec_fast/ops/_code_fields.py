"""What the ops over codes check alike: tables, and how codes name their rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._checks import FLOATS, check_levels, check_one_dtype, check_tensor, named_items
from .._dispatch import refuse_cuda, refuse_triton
from ._prefix import check_arguments


class Fields(NamedTuple):
    """Checked fields: their tables by name, and the operator's arguments on how codes name rows."""

    keys: dict[str, Tensor]
    values: dict[str, Tensor]
    rows: tuple[list[int], list[int], str, bool]


def refuse_tiles(
    q: Tensor, codes: Tensor, key_tables: Sequence[Tensor], value_tables: Sequence[Tensor],
    *rest: object,
) -> str | None:  # fmt: skip
    """Say why the Triton kernels cannot take these queries and tables, or None."""
    if q.dtype == torch.float64:
        return "computes in float32; queries are float64"
    if len(key_tables) > 8:
        return "takes each table as an argument: at most 8 fields"
    most = 128 if q.dtype == torch.float32 else 256
    if q.shape[3] > most or value_tables[0].shape[2] > most:
        return "keeps rows in registers: d and dv at most 128 in float32, 256 in 16 bits"
    return refuse_triton(q)


def refuse_look_ups(
    most: int, q: Tensor, codes: Tensor, key_tables: Sequence[Tensor],
    value_tables: Sequence[Tensor], offsets: Tensor, bias: Tensor | None, scale: float,
    levels: Sequence[int], groups: Sequence[int], hashing: str, packed: bool, *rest: object,
) -> str | None:  # fmt: skip
    """Say why the CUDA kernels, which take `most` rows of tables, cannot take these, or None."""
    if reason := refuse_cuda(q):
        return reason
    if q.dtype == torch.float64:
        return "computes in float32; queries are float64"
    if len(key_tables) > 8 or max(q.shape[3], value_tables[0].shape[2]) > 256:
        return "takes at most 8 fields, and d and dv up to 256"
    if packed or codes.dtype not in (torch.uint8, torch.int16, torch.int32):
        return "takes codes of uint8, int16 or int32, not packed"
    tables = zip(key_tables, levels, strict=True)
    if any(group != 1 for group in groups) or any(len(t) < level for t, level in tables):
        return "takes codes that are rows of their tables: no groups, no hashing"
    if sum(levels) + len(levels) > most:
        return f"looks up in shared memory: at most {most:,} rows in all fields, one more in each"
    if q.shape[1] * q.shape[2] > 256:
        return "looks up column by column: at most 256 candidates times heads"
    return None


def check_fields(
    q: Tensor, codes: Any, key_tables: Any, value_tables: Any, levels: Sequence[int] | None,
    prefix: bool, groups: Sequence[int] | None, hashing: str, packed: bool,
) -> Fields:  # fmt: skip
    """Check codes and tables against q and each other, and resolve levels and groups."""
    keys, values = _check_tables(q, key_tables, value_tables)
    rows = check_rows(codes, list(keys.values()), levels, prefix, groups, hashing, packed)
    return Fields(keys, values, rows)


def check_rows(
    codes: Any, tables: Sequence[Tensor], levels: Sequence[int] | None, prefix: bool,
    groups: Sequence[int] | None, hashing: str, packed: bool,
) -> tuple[list[int], list[int], str, bool]:  # fmt: skip
    """Check how codes name rows of a field's table each; return the operators' arguments on it."""
    for name, flag in {"prefix": prefix, "packed": packed}.items():
        if not isinstance(flag, bool):
            raise TypeError(f"{name}: must be True or False, got {flag!r}")
    if prefix and groups is not None:
        raise ValueError(
            f"groups: prefix=True means one group of all levels; give one of them, groups for "
            f"several codes, got prefix=True and groups={groups!r}"
        )
    if levels is None:
        for name, given in {"packed": packed, "prefix": prefix, "groups": groups}.items():
            if given:
                raise ValueError(f"levels: needed with {name}={given!r}, got None")
        levels = [table.shape[0] for table in tables]
    elif len(check_levels(levels)) != len(tables):
        raise ValueError(f"levels: must be one per table, {len(tables)}, got {len(levels)}")
    depth = len(levels)
    if groups is None:
        groups = [depth] if prefix else [1] * depth
    sizes, parts = check_arguments(codes, levels, "sum", hashing, groups, packed, "T")
    return sizes, parts, hashing, packed


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
        rows = key.shape[0]
        if rows < 1:
            raise ValueError(f"{key_name}: needs at least one row, got shape {list(key.shape)}")
        check_tensor(value_name, value, (rows, heads, dv), FLOATS)
        if dv == "dv" and (dv := value.shape[2]) < 1:
            raise ValueError(f"{value_name}: dv must be at least 1, got shape {list(value.shape)}")
    check_one_dtype(q=q, **keys, **values)
    return keys, values
