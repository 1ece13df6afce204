"""Trainable embeddings of semantic codes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate
from operator import mul

import torch
from torch import Tensor, nn

from .._checks import INTEGERS, check_choice, check_levels, check_tensor
from ..ops.prefix_ngram import check_key_space, prefix_ngram_lookup


class PrefixNgramEmbedding(nn.Module):
    """Embed codes by their prefixes, with a table per level that is trained.

    Scheme "prefix": level l looks up the first l codes as one key, in min(N_1 ... N_l, max_rows)
    rows; where keys outnumber rows they share them, modulo. Scheme "levelwise", the baseline: level
    l looks up c_l alone, in N_l rows, and an unknown code (-1) adds zeros at its own level only.

    Tables start normal with mean 0 and variance 1 / (d_1 + ... + d_L), so that an embedding is
    about one long, in mode "concat" and in mode "sum".

    Source: FLUID, equations 1-2 (prefix) and section 3.3 (level-wise).

    Example:
        >>> slices = PrefixNgramEmbedding((64, 64, 64, 64), 32)
        >>> slices(codes)  # codes [M, 4] -> [M, 128]
    """

    def __init__(
        self,
        levels: Sequence[int],
        dim: int | Sequence[int],
        *,
        max_rows: int = 1 << 20,
        mode: str = "concat",
        scheme: str = "prefix",
        pool: str | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        backend: str = "auto",
    ):
        """Make the tables.

        Args:
            levels: (N_1, ..., N_L), the sizes of the codebooks.
            dim: d of every level, or one d per level; in mode "sum" they are equal.
            max_rows: the most rows of a table, for scheme "prefix".
            mode: "concat" or "sum" over the levels.
            scheme: "prefix" or "levelwise".
            pool: None, or "sum" or "mean" over the items of a history; forward then needs offsets.
            dtype: of the tables; torch's default where None.
            device: of the tables.
            backend: of `prefix_ngram_lookup`.
        """
        super().__init__()
        check_choice("scheme", scheme, ("prefix", "levelwise"))
        self.levels = check_key_space(levels) if scheme == "prefix" else check_levels(levels)
        check_choice("mode", mode, ("concat", "sum"))
        check_choice("pool", pool, (None, "sum", "mean"))
        if max_rows < 1:
            raise ValueError(f"max_rows: must be at least 1, got {max_rows}")
        self.dims = _dims(dim, len(self.levels), mode)
        self.max_rows, self.mode, self.scheme, self.pool = max_rows, mode, scheme, pool
        self.backend = backend
        self.out_dim = self.dims[0] if mode == "sum" else sum(self.dims)
        rows: Iterable[int] = self.levels
        if scheme == "prefix":
            rows = (min(keys, max_rows) for keys in accumulate(self.levels, mul))
        self.tables = nn.ParameterList(
            torch.empty(shape, dtype=dtype, device=device)
            for shape in zip(rows, self.dims, strict=True)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the tables anew."""
        for table in self.tables:
            nn.init.normal_(table, std=sum(self.dims) ** -0.5)

    def forward(self, codes: Tensor, offsets: Tensor | None = None) -> Tensor:
        """Embed codes [M, L] as [M, out_dim], or pooled by offsets [B + 1] as [B, out_dim]."""
        check_tensor("codes", codes, ("M", len(self.levels)), INTEGERS)
        tables = list(self.tables)
        if self.scheme == "prefix":
            return self._lookup(codes, tables, self.levels, offsets)
        parts = [
            self._lookup(codes[:, level : level + 1], [table], [size], offsets)
            for level, (table, size) in enumerate(zip(tables, self.levels, strict=True))
        ]
        return torch.cat(parts, 1) if self.mode == "concat" else torch.stack(parts).sum(0)

    def _lookup(
        self, codes: Tensor, tables: list[Tensor], levels: list[int], offsets: Tensor | None
    ) -> Tensor:
        return prefix_ngram_lookup(
            codes,
            tables,
            levels,
            mode=self.mode,
            offsets=offsets,
            pool=self.pool,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """Describe the embedding in `print(module)`."""
        return (
            f"levels={tuple(self.levels)}, dims={tuple(self.dims)}, out_dim={self.out_dim}, "
            f"max_rows={self.max_rows}, mode={self.mode!r}, scheme={self.scheme!r}, "
            f"pool={self.pool!r}"
        )


def _dims(dim: int | Sequence[int], depth: int, mode: str) -> list[int]:
    dims = [dim] * depth if isinstance(dim, int) else list(dim)
    if len(dims) != depth or min(dims) < 1:
        raise ValueError(f"dim: must be one or {depth} positive ints, got {dim!r}")
    if mode == "sum" and len(set(dims)) > 1:
        raise ValueError(f"dim: mode 'sum' needs one size for all levels, got {dim!r}")
    return dims
