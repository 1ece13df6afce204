"""The rows that a prefix n-gram embedding reads, for tables kept elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._dispatch import Op
from ..reference import prefix_ngram_keys as reference
from ._prefix import check_arguments, check_contents


def _fake(codes: Tensor, levels: Sequence[int], *rest: object) -> Tensor:
    return codes.new_empty((codes.shape[0], len(levels)), dtype=torch.int64)


def _check_values(
    codes: Tensor, levels: Sequence[int], rows: Sequence[int], hashing: str, groups: Sequence[int],
    packed: bool,
) -> None:  # fmt: skip
    check_contents(codes, levels, None, packed)


_op = Op(
    "prefix_ngram_keys",
    "(Tensor codes, int[] levels, int[] rows, str hashing, int[] groups, bool packed) -> Tensor",
    fake=_fake,
    reference=reference.prefix_ngram_keys,
    check_values=_check_values,
    differentiable=False,
)


def prefix_ngram_keys(
    codes: Tensor,
    levels: Sequence[int],
    rows: Sequence[int],
    *,
    hashing: str = "modulo",
    groups: Sequence[int] | None = None,
    packed: bool = False,
    backend: str = "auto",
) -> Tensor:
    r"""Return the table row that `prefix_ngram_lookup` reads at every level.

    $h_l(k_l)$ with $k_1 = c_1,\quad k_l = k_{l-1} N_l + c_l$.

    In PyTorch, starting from key = 0 and found = []::

        for code, size, count in zip(codes.T, levels, rows):
            key = key * size + code.long()
            found.append(key % count)

    Args:
        codes: as for the lookup.
        levels: as for the lookup.
        rows: (H_1, ..., H_L), the rows of the tables.
        hashing: as for the lookup.
        groups: as for the lookup.
        packed: as for the lookup.
        backend: "auto" or "reference".

    Returns:
        int64 [M, L]: column l in [0, H_l), or -1 where the code of that level, or an earlier one of
        its group, is unknown. What TorchRec's and FBGEMM's tables take as ids, -1 left out.

    Deterministic. Not differentiable. Workspace: O(M L) integers.

    Raises:
        TypeError: a wrong type or dtype. ValueError: a wrong shape, level or choice. IndexError: a
        code out of range.

    Source: FLUID, equations 1-2.

    Example:
        >>> ids = prefix_ngram_keys(codes, (64, 64), (64, 1000))  # [M, 2]
    """
    sizes, parts = check_arguments(codes, levels, "concat", hashing, groups, packed)
    if len(rows) != len(sizes) or any(not isinstance(n, int) or n < 1 for n in rows):
        raise ValueError(f"rows: must be one positive int per level, got {rows!r}")
    return _op(codes, sizes, list(rows), hashing, parts, packed, backend=backend)
