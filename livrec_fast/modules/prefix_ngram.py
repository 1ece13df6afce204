"""Trainable embeddings of semantic codes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate
from operator import mul
from typing import Any, Self

import torch
from torch import Tensor, nn

from .._checks import check_choice, check_levels
from ..ops._prefix import check_key_space
from ..ops.row_update import row_update
from ._fused import fused_lookup
from ._huge_pages import empty_rows
from ._lookup import Lookup
from ._quantized import QuantizedPrefixNgramEmbedding
from ._row_optimizers import RowOptimizer, backend_of_rows, next_step
from ._table_files import Path, assign, check_version, read_tables, write_tables


class _CodeEmbedding(nn.Module):
    """What one embedding, and a pair of them, do with their tables."""

    out_dim: int

    def _parts(self) -> list[PrefixNgramEmbedding]:
        raise NotImplementedError

    def _lookup(self) -> Lookup:
        parts, first = self._parts(), self._parts()[0]
        levels = [size for part in parts for size in part.levels]
        groups = [size for part in parts for size in part.groups]
        return Lookup(levels, groups, first.mode, first.pool, first.hashing, first.backend)

    def _tables(self) -> list[Tensor]:
        return [table for part in self._parts() for table in part.tables]

    def forward(
        self, codes: Tensor, offsets: Tensor | None = None, *, packed: bool = False
    ) -> Tensor:
        """Embed codes [M, L] as [M, out_dim], or pooled by offsets [B + 1] as [B, out_dim].

        packed: codes are what `pack_codes` makes of them, uint8 [M, ceil(bits / 8)].
        """
        parts, tables = self._parts(), self._tables()
        learns = torch.is_grad_enabled() and any(table.requires_grad for table in tables)
        if parts[0].optimizer is not None and learns:
            return fused_lookup(codes, offsets, packed, self._lookup(), list(parts), tables)
        return self._lookup().embed(codes, tables, offsets, packed, sparse=parts[0].sparse)

    def keys(self, codes: Tensor, *, packed: bool = False) -> Tensor:
        """Return the row of every table that codes read, int64 [M, L], -1 where unknown.

        With them the tables can live in another engine, such as TorchRec's or FBGEMM's: column l
        holds the ids of table l.
        """
        return self._lookup().keys(codes, [len(table) for table in self._tables()], packed)

    def quantized(self) -> QuantizedPrefixNgramEmbedding:
        """Return a copy for inference: int8 tables with a float32 scale per row."""
        return QuantizedPrefixNgramEmbedding(self._tables(), self._lookup(), self.out_dim)


class PrefixNgramEmbedding(_CodeEmbedding):
    """Embed codes by their prefixes, with a table per level that is trained.

    Scheme "prefix": level l looks up the first l codes as one key, in min(N_1 ... N_l, max_rows)
    rows; where keys outnumber rows they share them, by `hashing`. Scheme "levelwise", the baseline:
    level l looks up c_l alone, in N_l rows, and an unknown code (-1) adds zeros at its own level
    only.

    Tables start normal with mean 0 and variance 1 / (d_1 + ... + d_L), so that an embedding is
    about one long, in mode "concat" and in mode "sum". On a CPU they lie in huge pages where Linux
    gives them, which makes rows at random quicker to read; `.to()` a dtype takes them out of these.

    With an `optimizer` the backward pass of each lookup updates the rows it read there and then:
    tables get no `.grad`, and nothing of a table's size is allocated. Each lookup is an update of
    its own, also where one backward pass goes through several. In eager mode only; tables whose
    `requires_grad` is False stay as they are. Under DistributedDataParallel the copies would learn
    from their own batches alone and drift apart: do not use it there. Another learning rate:
    `module.optimizer = dataclasses.replace(module.optimizer, lr=...)`.

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
        hashing: str = "modulo",
        sparse: bool = False,
        optimizer: RowOptimizer | None = None,
        version: str | None = None,
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
            hashing: "modulo", "murmur3" or "order_preserving"; see `prefix_ngram_lookup`.
            sparse: gradients of the tables are sparse, as torch.optim.SparseAdam, SGD and Adagrad
                take them. In eager mode only.
            optimizer: None, or `RowSGD`, `RowAdagrad` or `RowwiseAdagrad`, which backward applies.
            version: of the codebooks that the codes are of, `ResidualKMeans.version`, if known.
            dtype: of the tables; torch's default where None.
            device: of the tables.
            backend: of `prefix_ngram_lookup`.
        """
        super().__init__()
        check_choice("scheme", scheme, ("prefix", "levelwise"))
        self.levels = check_key_space(levels) if scheme == "prefix" else check_levels(levels)
        check_choice("mode", mode, ("concat", "sum"))
        check_choice("pool", pool, (None, "sum", "mean"))
        check_choice("hashing", hashing, ("modulo", "murmur3", "order_preserving"))
        if max_rows < 1:
            raise ValueError(f"max_rows: must be at least 1, got {max_rows}")
        _check_optimizer(optimizer, sparse)
        self.dims = _dims(dim, len(self.levels), mode)
        self.max_rows, self.mode, self.scheme, self.pool = max_rows, mode, scheme, pool
        self.hashing, self.sparse, self.optimizer = hashing, sparse, optimizer
        self.version, self.backend = version, backend
        self.out_dim = self.dims[0] if mode == "sum" else sum(self.dims)
        rows: Iterable[int] = self.levels
        self.groups = [1] * len(self.levels)
        if scheme == "prefix":
            rows = (min(keys, max_rows) for keys in accumulate(self.levels, mul))
            self.groups = [len(self.levels)]
        self.tables = nn.ParameterList(
            empty_rows(shape, dtype, device) for shape in zip(rows, self.dims, strict=True)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the tables anew, and forget what an optimiser knew of them."""
        for table in self.tables:
            nn.init.normal_(table, std=sum(self.dims) ** -0.5)
        if self.optimizer is not None:
            device = self.tables[0].device
            self.register_buffer("updates", torch.zeros((), dtype=torch.int64, device=device))
            for level, table in enumerate(self.tables):
                self.register_buffer(f"state_{level}", self.optimizer.new_state(table))

    def _parts(self) -> list[PrefixNgramEmbedding]:
        return [self]

    def apply_gradients(self, found: list[tuple[Tensor, Tensor]]) -> None:
        """Update the tables by the optimiser, given for each some rows and their gradients' sums.

        Rows are distinct, as `prefix_ngram_gradient` returns them.
        """
        if self.optimizer is None:
            raise RuntimeError("optimizer: the embedding was made without one")
        given = zip(self.tables, *next_step(self), found, strict=True)
        for table, state, seed, (rows, sums) in given:
            if table.requires_grad:
                step = {**self.optimizer.step(), "state": state, "seed": seed}
                backend = backend_of_rows(self.backend)
                row_update(table.detach(), rows, sums, **step, backend=backend)
        self.get_buffer("updates").add_(1)

    @torch.no_grad()
    def warm_start_from(self, other: PrefixNgramEmbedding) -> Self:
        """Copy the tables of another embedding of the same codes, such as a slice's for a room's.

        An optimiser's state is not copied: it starts as it is.

        Raises: TypeError: other is no such embedding. ValueError: its levels, dims, rows, scheme,
        hashing or codebooks are not these.

        Source: FLUID, stage 3 of its training.
        """
        if not isinstance(other, PrefixNgramEmbedding):
            raise TypeError(f"other: must be a PrefixNgramEmbedding, got {type(other).__name__}")
        for name in ("levels", "dims", "scheme", "hashing"):
            theirs, ours = getattr(other, name), getattr(self, name)
            if theirs != ours:
                raise ValueError(f"other: its {name} must be {ours!r}, got {theirs!r}")
        check_version("other: its tables", other.version, self.version)
        pairs = list(zip(self.tables, other.tables, strict=True))
        for level, (table, source) in enumerate(pairs):
            if len(table) != len(source):
                raise ValueError(
                    f"other: its tables[{level}] must have {len(table)} rows, got {len(source)}"
                )
        for table, source in pairs:
            table.copy_(source)
        return self

    def save(self, path: Path) -> None:
        """Write tables, settings and an optimiser's state to a safetensors file, whole or not."""
        write_tables(path, self)

    @classmethod
    def load(cls, path: Path, *, version: str | None = None, backend: str = "auto") -> Self:
        """Read what `save` wrote, onto the CPU.

        version: of the codebooks whose codes will be looked up, if known.

        Raises: ValueError where the file is not one of ours, or names codebooks of another version.
        """
        tensors, given = read_tables(path)
        check_version(f"path: the tables of {path}", given["version"], version)
        module = cls(**given, device="meta", backend=backend)
        assign(module, path, tensors)
        return module

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Move and convert as torch does, but keep an optimiser's state in its own dtype."""
        before = {name: state for name, state in self._buffers.items() if state is not None}
        super()._apply(fn, recurse)
        for name, state in before.items():
            now = self.get_buffer(name)
            if now.dtype != state.dtype:
                kept = now.to(state.dtype) if state.is_meta else state.to(now.device)
                self.register_buffer(name, kept)
        return self

    def extra_repr(self) -> str:
        """Describe the embedding in `print(module)`."""
        text = (
            f"levels={tuple(self.levels)}, dims={tuple(self.dims)}, out_dim={self.out_dim}, "
            f"max_rows={self.max_rows}, mode={self.mode!r}, scheme={self.scheme!r}, "
            f"pool={self.pool!r}, hashing={self.hashing!r}"
        )
        return text if self.optimizer is None else f"{text}, optimizer={self.optimizer}"


class PairedPrefixNgramEmbedding(_CodeEmbedding):
    """Embed a slice's code and its room's in one call: rows of codes are (slice's, room's).

    In mode "concat" the result is `slice(codes[:, :L]) | room(codes[:, L:])`, in mode "sum" their
    sum. The two share mode, pool, hashing, backend, `sparse`, optimiser, dtype and device; levels,
    dims and scheme are each one's own. They can be one and the same embedding, whose tables both
    codes then share. With an optimiser each of the two is updated by itself.

    Source: FLUID, which keeps tables of slices and of rooms apart.

    Example:
        >>> both = PairedPrefixNgramEmbedding(slices, rooms)
        >>> both(torch.cat([slice_codes, room_codes], 1))  # [M, 8] -> [M, 256]
    """

    def __init__(self, slice: PrefixNgramEmbedding, room: PrefixNgramEmbedding):
        """Take two embeddings, which are not copied.

        Raises: ValueError where they differ in what they must share.
        """
        super().__init__()
        for name in ("mode", "pool", "hashing", "backend", "sparse", "optimizer"):
            ours, theirs = getattr(slice, name), getattr(room, name)
            if ours != theirs:
                raise ValueError(
                    f"room: its {name} must be that of slice, {ours!r}, got {theirs!r}"
                )
        if slice.mode == "sum" and slice.out_dim != room.out_dim:
            raise ValueError(
                f"room: mode 'sum' needs the dim of slice, {slice.out_dim}, got {room.out_dim}"
            )
        self.slice, self.room = slice, room
        self.out_dim = slice.out_dim + (0 if slice.mode == "sum" else room.out_dim)

    def _parts(self) -> list[PrefixNgramEmbedding]:
        return [self.slice, self.room]


def _check_optimizer(optimizer: Any, sparse: bool) -> None:
    if optimizer is not None and not isinstance(optimizer, RowOptimizer):
        kind = type(optimizer).__name__
        raise TypeError(f"optimizer: must be a RowSGD, RowAdagrad or RowwiseAdagrad, got {kind}")
    if optimizer is not None and sparse:
        raise ValueError("sparse: tables with an optimizer get no gradients, sparse or not")


def _dims(dim: int | Sequence[int], depth: int, mode: str) -> list[int]:
    dims = [dim] * depth if isinstance(dim, int) else list(dim)
    if len(dims) != depth or min(dims) < 1:
        raise ValueError(f"dim: must be one or {depth} positive ints, got {dim!r}")
    if mode == "sum" and len(set(dims)) > 1:
        raise ValueError(f"dim: mode 'sum' needs one size for all levels, got {dim!r}")
    return dims
