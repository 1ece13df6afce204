"""How codes become rows of tables, as the modules of prefix n-grams share it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.autograd.graph import increment_version

from .._dispatch import BackendError
from ..ops.prefix_ngram import prefix_ngram_lookup
from ..ops.prefix_ngram_gradient import prefix_ngram_gradient
from ..ops.prefix_ngram_keys import prefix_ngram_keys
from ..ops.prefix_ngram_update import update


@dataclass(frozen=True)
class Lookup:
    """The settings of `prefix_ngram_lookup` that a module fixes."""

    levels: list[int]
    groups: list[int]
    mode: str
    pool: str | None
    hashing: str
    backend: str

    def embed(
        self, codes: Tensor, tables: Sequence[Tensor], offsets: Tensor | None, packed: bool,
        **more: Any,
    ) -> Tensor:  # fmt: skip
        """Look codes up, in one call for all levels."""
        given = self._given(offsets, packed)
        return prefix_ngram_lookup(codes, list(tables), self.levels, **given, **more)

    def gradient(
        self, grad: Tensor, codes: Tensor, tables: Sequence[Tensor], offsets: Tensor | None,
        packed: bool,
    ) -> list[tuple[Tensor, Tensor]]:  # fmt: skip
        """Return per table the rows that codes read, and the sums of their gradients."""
        rows, dims = [len(table) for table in tables], [table.shape[1] for table in tables]
        given = self._given(offsets, packed)
        found = prefix_ngram_gradient(grad, codes, self.levels, rows, dims, **given)
        return list(zip(found[::2], found[1::2], strict=True))

    def update(
        self, grad: Tensor, codes: Tensor, tables: list[Tensor], offsets: Tensor | None,
        packed: bool, states: list[Tensor], seeds: list[int], *, rule: str, lr: float,
        eps: float = 1e-8,
    ) -> None:  # fmt: skip
        """Take a step of an optimiser on the rows that codes read, in one pass over grad.

        What a lookup and a module have checked is not checked again.
        """
        how = (self.mode, offsets, self.pool, self.hashing, self.groups, packed)
        step = (rule, lr, eps, seeds)
        given = (tables, states, grad.detach(), codes, self.levels)
        update(*given, *how, *step, backend=self.backend)
        increment_version(tables)  # graphs that saved one must not use it now

    def updates_in_one_pass(self, grad: Tensor, codes: Tensor, tables: Sequence[Tensor]) -> bool:
        """Tell whether `update` is more than `gradient` and `row_update` one after the other."""
        args: list[Any] = [tables, [], grad, codes, self.levels]
        try:
            chosen = update.choose(args, self.backend)
        except BackendError:  # the backend has no such op
            return False
        apart = len({table.data_ptr() for table in tables}) == len(tables)
        return chosen == "native" and apart

    def keys(self, codes: Tensor, rows: Sequence[int], packed: bool) -> Tensor:
        """Return which of the tables' rows codes read."""
        return prefix_ngram_keys(
            codes, self.levels, rows, hashing=self.hashing, groups=self.groups, packed=packed
        )

    def _given(self, offsets: Tensor | None, packed: bool) -> dict[str, Any]:
        return {
            "mode": self.mode,
            "offsets": offsets,
            "pool": self.pool,
            "hashing": self.hashing,
            "groups": self.groups,
            "packed": packed,
            "backend": self.backend,
        }
