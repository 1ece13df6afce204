"""Histories as jagged rows, in whatever form they come: jagged, padded, nested or torchrec's."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from .._checks import FLOATS, INTEGERS, check_same, check_tensor

_FORMS = (
    "a tensor [T, dim] with offsets or lengths, a padded one [B, L, dim], a nested tensor of "
    "layout torch.jagged, or a JaggedTensor"
)


class Jagged(NamedTuple):
    """Rows of all histories, one after the other.

    values: [T, dim]. offsets: int64 [B + 1]. shape: (B, L), if they came padded. kept: bool [B, L],
    which of these rows are items, if not all. dense: values has the others still, as zeros.
    """

    values: Tensor
    offsets: Tensor
    shape: tuple[int, int] | None = None
    kept: Tensor | None = None
    dense: bool = False

    def logits_bias(self, bias: Any, heads: int) -> Tensor | None:
        """Check a bias, [T] or [B, L], each with heads behind or not; bring it to the values."""
        if bias is None:
            return self._hidden() if self.dense else None
        rows = self.shape or (self.values.shape[0],)
        per_head = isinstance(bias, Tensor) and bias.dim() > len(rows)
        check_tensor("bias", bias, (*rows, heads) if per_head else rows, FLOATS)
        check_same("device", history=self.values, bias=bias)
        flat = bias if self.shape is None else bias.flatten(0, 1)
        if self.kept is None:
            return flat
        kept = self.kept.flatten()
        if not self.dense:
            return flat[kept]
        return flat.masked_fill(~(kept[:, None] if per_head else kept), -torch.inf)

    def _hidden(self) -> Tensor:
        assert self.kept is not None
        zeros = torch.zeros(self.values.shape[0], device=self.values.device)
        return zeros.masked_fill(~self.kept.flatten(), -torch.inf)


def as_jagged(
    name: str, rows: Any, dim: int, offsets: Any = None, lengths: Any = None, mask: Any = None
) -> Jagged:
    """Return rows as one tensor [T, dim] and offsets, and check their types and shapes.

    Padding is dropped on a CPU in eager mode; under torch.compile and on a GPU, where the number
    of rows left is not known without waiting, it stays as zeros for a bias of -inf to take out.
    """
    given = {"offsets": offsets, "lengths": lengths, "mask": mask}
    named = [key for key, value in given.items() if value is not None]
    if (parts := _parts(name, rows)) is not None:
        if named:
            raise ValueError(f"{named[0]}: {name} is jagged and brings its own; give none")
        rows, offsets = parts
    elif len(named) > 1:
        raise ValueError(f"{named[1]}: give one of offsets, lengths and mask; got {named[0]} too")
    if rows.dim() == 3 and offsets is None:
        return _padded(name, rows, dim, lengths, mask)
    check_tensor(name, rows, ("T", dim), FLOATS)
    if mask is not None:
        raise ValueError(f"mask: needs {name} [B, L, {dim}], got shape {list(rows.shape)}")
    if lengths is not None:
        check_tensor("lengths", lengths, ("B",), INTEGERS)
        offsets = functional.pad(lengths.cumsum(0), (1, 0))
    if offsets is None:
        raise ValueError(f"{name}: a jagged tensor {list(rows.shape)} needs offsets or lengths")
    check_tensor("offsets", offsets, ("B + 1",), (torch.int64, torch.int32))
    check_same("device", **{name: rows, "offsets": offsets})
    return Jagged(rows, offsets.long())


def _parts(name: str, rows: Any) -> tuple[Tensor, Tensor] | None:
    """Return values and offsets of what has both as methods, or None of a plain tensor."""
    if isinstance(rows, Tensor):
        if not rows.is_nested:
            return None
        if rows.layout != torch.jagged:
            raise TypeError(f"{name}: a nested tensor must have layout torch.jagged")
        nested: Any = rows
        if nested.dim() != 3 or nested._ragged_idx != 1:
            raise ValueError(f"{name}: nested shape must be [B, jagged, dim], got {nested.shape}")
        found = nested.values(), nested.offsets()
        return found if nested.lengths() is None else _without_holes(*found, nested.lengths())
    if not all(callable(getattr(rows, part, None)) for part in ("values", "offsets")):
        raise TypeError(f"{name}: must be {_FORMS}; got {type(rows).__name__}")
    keys = getattr(rows, "keys", None)
    if callable(keys) and len(keys()) != 1:
        raise ValueError(f"{name}: must have one key, got {list(keys())}; take one by its name")
    return rows.values(), rows.offsets()


def _without_holes(values: Tensor, starts: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Gather the rows that `torch.nested.narrow` left; its own contiguous() has no gradient."""
    offsets = functional.pad(lengths.cumsum(0), (1, 0))
    steps = (starts[:-1] - offsets[:-1]).repeat_interleave(lengths)
    return values[steps + torch.arange(len(steps), device=values.device)], offsets


def _padded(name: str, rows: Tensor, dim: int, lengths: Any, mask: Any) -> Jagged:
    check_tensor(name, rows, ("B", "L", dim), FLOATS)
    B, L = rows.shape[:2]
    if lengths is not None:
        check_tensor("lengths", lengths, (B,), INTEGERS)
        check_same("device", **{name: rows, "lengths": lengths})
        bad = lengths[(lengths < 0) | (lengths > L)] if may_wait(rows) else lengths[:0]
        if len(bad):
            raise ValueError(f"lengths: must be 0 to L = {L}, got {int(bad[0])}")
        mask = torch.arange(L, device=rows.device) < lengths[:, None]
    steps = L * torch.arange(B + 1, device=rows.device)
    if mask is None:
        return Jagged(rows.flatten(0, 1), steps, (B, L))
    check_tensor("mask", mask, (B, L), (torch.bool,))
    check_same("device", **{name: rows, "mask": mask})
    if may_wait(rows):
        ends = functional.pad(mask.sum(1).cumsum(0), (1, 0))
        kept = mask.flatten().nonzero()[:, 0]  # the gradient of rows[mask] takes far longer
        return Jagged(rows.flatten(0, 1).index_select(0, kept), ends, (B, L), mask)
    zeroed = rows.masked_fill(~mask[:, :, None], 0)  # what padding holds may be NaN
    return Jagged(zeroed.flatten(0, 1), steps, (B, L), mask, dense=True)


def may_wait(rows: Tensor) -> bool:
    """Tell whether the number of rows may be asked for: cheap, and no break of a graph."""
    return rows.device.type == "cpu" and not torch.compiler.is_compiling()
