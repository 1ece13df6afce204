"""What a history search found, as rows to attend to."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .._checks import check_offsets, check_same, check_tensor


def search_rows(positions: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    r"""List the rows that a history search found, pair by pair of user and candidate.

    Row $\mathrm{offsets}_u + \mathrm{positions}_{ucj}$ for every position that is not fill, in the
    order of the result: a jagged list with one history per pair, ready for attention.

    In PyTorch::

        found = positions >= 0
        rows = (offsets[:-1, None, None] + positions)[found]
        row_offsets = pad(found.sum(2).flatten().cumsum(0), (1, 0))

    Args:
        positions: int64 [B, C, k], as `history_search` and `history_search_codes` return them:
            relative to the user's history, -1 where nothing was found.
        offsets: int64 [B + 1], those of the search.

    Returns:
        (rows, row_offsets): rows int64 [R], into the keys or codes that were searched; row_offsets
        int64 [B * C + 1], pair u * C + c has the rows row_offsets[u * C + c] .. row_offsets[u * C +
        c + 1] - 1, best first.

    A pair that found nothing has no rows, and attention to them gives zeros. B, C and k may be 0.
    Not differentiable: gradients flow through what is gathered. Workspace: 24 bytes per position.
    On a GPU the host waits, as R depends on what was found; `torch.compile` breaks its graph.

    Raises:
        TypeError: a wrong type or dtype. ValueError: a wrong shape or device, or offsets that do
        not start at 0 or decrease. IndexError: a position outside the user's history.

    Source: Moment&Cross, section 2.4 (from the general to the exact search unit).

    Example:
        >>> _, positions = history_search(query, keys, offsets, 100)
        >>> rows, row_offsets = search_rows(positions, offsets)
        >>> out = target_attention(q.reshape(B * C, 1, H, d), k[rows], v[rows], row_offsets)
    """
    check_tensor("positions", positions, ("B", "C", "k"), (torch.int64,))
    check_tensor("offsets", offsets, (positions.shape[0] + 1,), (torch.int64,))
    check_same("device", positions=positions, offsets=offsets)
    check_offsets(offsets, int(offsets[-1]))
    _check_positions(positions, offsets.diff())
    found = positions >= 0
    rows = (offsets[:-1, None, None] + positions)[found]
    return rows, functional.pad(found.sum(2).flatten().cumsum(0), (1, 0))


def _check_positions(positions: Tensor, lengths: Tensor) -> None:
    """Check that positions lie in their histories: others would be rows of another user."""
    bad = (positions < -1) | (positions >= lengths[:, None, None])
    if bad.any():
        u, c, j = bad.nonzero()[0].tolist()
        raise IndexError(
            f"positions: positions[{u}, {c}, {j}] = {int(positions[u, c, j])} is outside "
            f"[-1, {int(lengths[u])})"
        )
