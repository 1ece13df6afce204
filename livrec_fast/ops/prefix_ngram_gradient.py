"""The gradients of a prefix n-gram embedding, row by row of its tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._checks import FLOATS, check_same, check_tensor
from .._dispatch import Backend, Op, refuse_native, refuse_triton
from ..reference import prefix_ngram_gradient as reference
from ._prefix import check_arguments, check_contents, check_pooling


def refuse_sorting(levels: Sequence[int]) -> str | None:
    """Say why codes of these levels cannot be sorted by the C++ kernels, or None."""
    if sum((size - 1).bit_length() for size in levels) > 63 or len(levels) > 63:  # of all groups
        return "sorts codes side by side: at most 63 bits of them"
    return None


def _refuse_native(grad: Tensor, codes: Tensor, levels: Sequence[int], *rest: object) -> str | None:
    if grad.dtype == torch.float64:
        return "computes in float32; grad is float64"
    return refuse_sorting(levels) or refuse_native(codes)


def _refuse_triton(grad: Tensor, codes: Tensor, levels: Sequence[int], *rest: object) -> str | None:
    if grad.dtype == torch.float64:
        return "computes in float32; grad is float64"
    if len(levels) > 63:
        return "is compiled level by level: at most 63 of them"
    return refuse_triton(codes)


def _triton(grad: Tensor, *rest: Any) -> list[Tensor]:
    from ..kernels import prefix_ngram_gradient

    return prefix_ngram_gradient.prefix_ngram_gradient(grad, *rest)


def _fake(
    grad: Tensor, codes: Tensor, levels: Sequence[int], rows: Sequence[int], dims: Sequence[int],
    *rest: object,
) -> list[Tensor]:  # fmt: skip
    wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
    out = []
    for dim in dims:
        count = torch.library.get_ctx().new_dynamic_size()
        out.append(grad.new_empty(count, dtype=torch.int64))
        out.append(grad.new_empty((count, dim), dtype=wide))
    return out


def _check_values(
    grad: Tensor, codes: Tensor, levels: Sequence[int], rows: Sequence[int], dims: Sequence[int],
    mode: str, offsets: Tensor | None, pool: str | None, hashing: str, groups: Sequence[int],
    packed: bool,
) -> None:  # fmt: skip
    check_contents(codes, levels, offsets, packed)


gradient = Op(
    "prefix_ngram_gradient",
    "(Tensor grad, Tensor codes, int[] levels, int[] rows, int[] dims, str mode, Tensor? offsets, "
    "str? pool, str hashing, int[] groups, bool packed) -> Tensor[]",
    fake=_fake,
    reference=reference.prefix_ngram_gradient,
    check_values=_check_values,
    backends=(Backend("native", _refuse_native), Backend("triton", _refuse_triton, _triton)),
    differentiable=False,
)


def prefix_ngram_gradient(
    grad: Tensor,
    codes: Tensor,
    levels: Sequence[int],
    rows: Sequence[int],
    dims: Sequence[int],
    *,
    mode: str = "concat",
    offsets: Tensor | None = None,
    pool: str | None = None,
    hashing: str = "modulo",
    groups: Sequence[int] | None = None,
    packed: bool = False,
    backend: str = "auto",
) -> list[Tensor]:
    r"""Add up the gradients of each table row that `prefix_ngram_lookup` read.

    $G_l[h] = \sum_{i : h_l(k_{il}) = h} g_{il}$ for the rows h that occur, ascending.

    In PyTorch, per level::

        rows, place = torch.unique(table_rows(keys[:, level]), return_inverse=True)
        sums = torch.zeros(len(rows), dim).index_add(0, place, grad_of_level)

    Args:
        grad: the gradient of the lookup's result, [M, width] or pooled [B, width]; float32,
            float16, bfloat16 or float64, of any strides.
        codes: as for the lookup.
        levels: as for the lookup.
        rows: (H_1, ..., H_L), the rows of the tables.
        dims: (d_1, ..., d_L), their columns.
        mode: as for the lookup.
        offsets: as for the lookup.
        pool: as for the lookup.
        hashing: as for the lookup.
        groups: as for the lookup.
        packed: as for the lookup.
        backend: "auto", "native", "triton" or "reference".

    Returns:
        [rows_1, sums_1, rows_2, sums_2, ...]: rows int64 [n_l], ascending and distinct; sums
        float32 [n_l, d_l] (float64 for float64). What an optimiser needs of a sparse gradient.

    Each item's gradient is read once. Deterministic for any thread count. Autocast leaves grad as
    it is. Not differentiable. Workspace on a CPU: about 40 + 8 L bytes per item, and the sums of
    prefixes that share a row of a hashed table; nothing of a table's size. On a GPU: about 60 bytes
    per item for the sort, and per level twice the sums of its prefixes. The numbers of rows depend
    on the codes, and a GPU's host must know them to return them: as with `torch.unique`, it waits,
    a few times per level.

    Raises: as the lookup.

    Source: FLUID, equations 1-2; one sort for all levels, as keys are hierarchical.

    Example:
        >>> rows, sums, *deeper = prefix_ngram_gradient(grad, codes, (64, 64), (64, 4096), (32, 32))
    """
    sizes, parts = check_arguments(codes, levels, mode, hashing, groups, packed)
    for name, values in {"rows": rows, "dims": dims}.items():
        whole = all(isinstance(value, int) and value > 0 for value in values)
        if len(values) != len(sizes) or not whole:
            raise ValueError(f"{name}: must be one positive int per level, got {values!r}")
    if mode == "sum" and len(set(dims)) > 1:
        raise ValueError(f"dims: mode 'sum' needs one d for all levels, got {dims!r}")
    check_pooling(offsets, pool)
    count = codes.shape[0] if offsets is None else offsets.shape[0] - 1
    check_tensor("grad", grad, (count, dims[0] if mode == "sum" else sum(dims)), FLOATS)
    check_same("device", grad=grad, codes=codes, offsets=offsets)
    rest = (sizes, list(rows), list(dims), mode, offsets, pool, hashing, parts, packed)
    return gradient(grad, codes, *rest, backend=backend)
