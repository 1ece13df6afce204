"""Codes packed into bits for logs and caches, and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._checks import INTEGERS, check_codes, check_levels, check_tensor
from .._dispatch import Op
from ..reference import pack_codes as reference

_MOST = 2**31  # what the greatest dtype of codes, int32, holds


def _check_packed(packed: Tensor, levels: Sequence[int]) -> None:
    """Check that every value is a code. Sizes that are powers of two leave no other values."""
    if all(size & (size - 1) == 0 for size in levels):
        return
    codes = reference.unpack_codes(packed, levels).long()
    bad = (codes >= torch.tensor(levels, device=codes.device)).nonzero()
    if len(bad):
        row, level = bad[0].tolist()
        raise IndexError(
            f"packed: row {row} holds {int(codes[row, level])} at level {level}, outside "
            f"[0, {levels[level]})"
        )


_pack = Op(
    "pack_codes",
    "(Tensor codes, int[] levels) -> Tensor",
    fake=lambda codes, levels: codes.new_empty(
        (codes.shape[0], reference.packed_bytes(levels)), dtype=torch.uint8
    ),
    reference=reference.pack_codes,
    check_values=check_codes,
    differentiable=False,
)

_unpack = Op(
    "unpack_codes",
    "(Tensor packed, int[] levels) -> Tensor",
    fake=lambda packed, levels: packed.new_empty(
        (packed.shape[0], len(levels)), dtype=reference.code_dtype(max(levels))
    ),
    reference=reference.unpack_codes,
    check_values=_check_packed,
    differentiable=False,
)


def pack_codes(codes: Tensor, levels: Sequence[int], *, backend: str = "auto") -> Tensor:
    r"""Pack the codes of each row into the fewest bits that their levels allow.

    $\text{row} = \sum_l c_l 2^{s_l},\quad s_l = \sum_{k<l} w_k,\quad w_l = \lceil\log_2 N_l\rceil$,
    written as $\lceil \sum_l w_l / 8 \rceil$ bytes, the lowest first.

    In PyTorch, where a row fits in 63 bits::

        widths = torch.tensor([(n - 1).bit_length() for n in levels])
        row = (codes.long() << widths.cumsum(0) - widths).sum(1)
        packed = (row[:, None] >> 8 * torch.arange(n_bytes) & 255).to(torch.uint8)

    Args:
        codes: [M, L] integers, column l in [0, N_l).
        levels: (N_1, ..., N_L), 1 <= N_l <= 2^31. (512, 256, 128) and (64,) * 4 take 24 bits,
            three bytes.
        backend: "auto" or "reference".

    Returns:
        uint8 [M, ceil(bits / 8)]; the bits left over in the last byte are 0. A row may take any
        number of bits. A level of one codeword takes none. M = 0 gives no rows.

    The layout is that of faiss' ResidualQuantizer. Exact and deterministic. Not differentiable.
    Workspace: O(M L) integers.

    Raises:
        TypeError: a wrong type or dtype. ValueError: a wrong shape or level. IndexError: a code out
        of range.

    Source: LARM, section 2.3 (codes of 512, 256 and 128 clusters, logged in three bytes).

    Example:
        >>> packed = pack_codes(codes, (512, 256, 128))  # [M, 3]
    """
    sizes = check_levels(levels, most=_MOST)
    check_tensor("codes", codes, ("M", len(sizes)), INTEGERS)
    return _pack(codes, sizes, backend=backend)


def unpack_codes(packed: Tensor, levels: Sequence[int], *, backend: str = "auto") -> Tensor:
    r"""Unpack what `pack_codes` packed: $c_l = \lfloor \text{row} / 2^{s_l} \rfloor \bmod 2^{w_l}$.

    In PyTorch, where a row fits in 63 bits::

        row = (packed.long() << 8 * torch.arange(packed.shape[1])).sum(1)
        codes = row[:, None] >> widths.cumsum(0) - widths & (1 << widths) - 1

    Args:
        packed: uint8 [M, ceil(bits / 8)]; the bits left over in the last byte are not looked at.
        levels: (N_1, ..., N_L), 1 <= N_l <= 2^31, as packed.
        backend: "auto" or "reference".

    Returns:
        codes [M, L]: uint8 where every N_l <= 256, else int16 where every N_l <= 32,768, else
        int32. M = 0 gives [0, L].

    Exact and deterministic. Not differentiable. Workspace: O(M L) integers.

    Raises:
        TypeError: a wrong type or dtype. ValueError: a wrong shape or level. IndexError: a value of
        N_l or more, which bytes packed for other levels can hold where N_l is not a power of two.

    Source: LARM, section 2.3 (codes of 512, 256 and 128 clusters, logged in three bytes).

    Example:
        >>> codes = unpack_codes(packed, (512, 256, 128))  # [M, 3]
    """
    sizes = check_levels(levels, most=_MOST)
    check_tensor("packed", packed, ("M", reference.packed_bytes(sizes)), (torch.uint8,))
    return _unpack(packed, sizes, backend=backend)
