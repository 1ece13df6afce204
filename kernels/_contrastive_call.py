"""The arguments of the contrastive loss, as its kernels take them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ._code_rows import as_argument
from ._contrastive_tiles import Masks, Side
from ._contrastive_units import side_of


@dataclass(frozen=True)
class Call:
    """The operator's arguments but for those that only name outputs; units are made when asked."""

    query: Tensor
    key: Tensor
    temperature: Tensor
    normalize: bool
    symmetric: bool
    query_ids: Tensor | None = None
    key_ids: Tensor | None = None
    group_ids: Tensor | None = None
    false_negative_threshold: float | None = None
    pair_vectors: Tensor | None = None
    log_q: Tensor | None = None
    log_q_rule: str = "standard"
    valid: Tensor | None = None
    extra_keys: Tensor | None = None
    precision: str = "input"

    def __post_init__(self) -> None:
        """Make tensors contiguous."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                object.__setattr__(self, name, as_argument(value))

    @property
    def pair_rows(self) -> Tensor:
        """The vectors whose cosines are held to the threshold."""
        return self.query if self.pair_vectors is None else self.pair_vectors

    @property
    def unsampled(self) -> bool:
        """Whether the positive is no sample: log_q corrects the negatives alone."""
        return self.log_q is not None and self.log_q_rule == "unsampled_positive"

    @property
    def kept_sums(self) -> int:
        """How many numbers per row the gradient needs of the losses."""
        return 1 + self.symmetric + self.unsampled

    @property
    def masks(self) -> Masks:
        """The masks but for false negatives."""
        return Masks(self.query_ids, self.key_ids, self.group_ids)

    def sides(self) -> tuple[Side, Side]:
        """Return queries and keys."""
        dtype = torch.bfloat16 if self.precision == "bf16" else self.query.dtype
        keys = [self.key] if self.extra_keys is None else [self.key, self.extra_keys]
        queries = side_of([self.query], self.valid, None, self.normalize, dtype)
        return queries, side_of(keys, self.valid, self.log_q, self.normalize, dtype)

    @cached_property
    def shares(self) -> tuple[Tensor | None, Tensor | None]:
        """1 / the number of positives of each row, and of each of the batch's columns."""
        if self.group_ids is None:
            return None, None
        batch, ids = len(self.query), self.group_ids
        rows = _shares(ids[:batch], ids, self.valid)
        return rows, _shares(ids[:batch], ids[:batch], self.valid) if self.symmetric else None


def _shares(own: Tensor, ids: Tensor, valid: Tensor | None) -> Tensor:
    """Return 1 / how many valid rows have each id; the host is not asked."""
    ordered, order = ids.sort()
    counts = ids.new_ones(len(ids))
    if valid is not None:
        counts[: len(valid)] = valid.to(counts.dtype)
    before = torch.nn.functional.pad(counts[order].cumsum(0), (1, 0))
    first, last = (torch.searchsorted(ordered, own, right=right) for right in (False, True))
    return (before[last] - before[first]).clamp(min=1).float().reciprocal()
