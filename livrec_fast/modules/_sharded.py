"""Embeddings of codes whose tables are spread over ranks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._lookup import Lookup
from .prefix_ngram import PairedPrefixNgramEmbedding, PrefixNgramEmbedding, _CodeEmbedding


class ShardedPrefixNgramEmbedding(nn.Module):
    """An embedding of codes with every table's rows spread over a mesh; see `shard_rows`."""

    def __init__(self, module: _CodeEmbedding, mesh: Any):
        """Spread the tables; those of the mesh's first rank count."""
        from torch.distributed.tensor import Shard, distribute_tensor

        super().__init__()
        self.lookup, self.mesh, self.out_dim = module._lookup(), mesh, module.out_dim
        self.rows = [len(table) for table in module._tables()]
        self.tables = nn.ParameterList(
            nn.Parameter(
                distribute_tensor(table.detach(), mesh, [Shard(0)]),
                requires_grad=table.requires_grad,
            )
            for table in module._tables()
        )

    def forward(
        self, codes: Tensor, offsets: Tensor | None = None, *, packed: bool = False
    ) -> Tensor:
        """Embed codes, the same on all ranks, as the embedding did; the result is on all ranks."""
        from torch.distributed.tensor import DTensor, Partial, Replicate

        rows = self._own(self.keys(codes, packed=packed))
        tables = [_at_least_a_row(table.to_local()) for table in self.tables]
        levelwise = self._levelwise([len(table) for table in tables])
        part = levelwise.embed(rows, tables, offsets, packed=False)
        spread = DTensor.from_local(part, self.mesh, [Partial()], run_check=False)
        return spread.redistribute(placements=[Replicate()]).to_local()

    def keys(self, codes: Tensor, *, packed: bool = False) -> Tensor:
        """Return the row of every whole table that codes read, int64 [M, L], -1 where unknown."""
        return self.lookup.keys(codes, self.rows, packed)

    def _own(self, rows: Tensor) -> Tensor:
        """Number the rows of this rank from 0, and make those of others -1."""
        rank, ranks = self.mesh.get_local_rank(), self.mesh.size()
        most = torch.tensor([-(-count // ranks) for count in self.rows], device=rows.device)
        local = rows - rank * most
        return torch.where((rows >= 0) & (local >= 0) & (local < most), local, -1)

    def _levelwise(self, sizes: list[int]) -> Lookup:
        return replace(self.lookup, levels=sizes, groups=[1] * len(sizes))


def _at_least_a_row(table: Tensor) -> Tensor:
    """Pad the table of a rank that keeps none of its rows; no code leads to the new one."""
    return table if len(table) else F.pad(table, (0, 0, 0, 1))


def shard_rows(
    module: PrefixNgramEmbedding | PairedPrefixNgramEmbedding, mesh: Any
) -> ShardedPrefixNgramEmbedding:
    """Spread the rows of an embedding's tables over the ranks of a mesh.

    Rank r keeps rows r ceil(H / R) to (r + 1) ceil(H / R) - 1 of a table of H rows. A lookup finds
    the rows of all codes, reads and pools those that this rank keeps by one call of
    `prefix_ngram_lookup`, and adds up the results of the ranks: one all-reduce of [M, out_dim], or
    of [B, out_dim] where histories are pooled, and none in the backward pass.

    The tables are DTensors, which torch itself brings: torch.optim updates them and
    torch.distributed.checkpoint saves them as they are. For TorchRec's planner and its exchange of
    ids between ranks, give the `keys` of the embedding to its tables instead.

    Args:
        module: a `PrefixNgramEmbedding` or `PairedPrefixNgramEmbedding` with neither an optimizer
            nor sparse gradients. It is left as it is; tables of the mesh's first rank are taken.
        mesh: a one-dimensional torch.distributed.device_mesh.DeviceMesh. All its ranks call with
            the same codes, as under tensor parallelism, and take the same loss of the result.

    Returns:
        A module called as the embedding is. Its results equal the embedding's but for the order of
        sums: exactly so in mode "concat" without pooling. Gradients are DTensors, sharded alike.

    Raises: TypeError: module is no such embedding. ValueError: it has an optimizer or sparse
    gradients, or the mesh has several dimensions.

    Example:
        >>> mesh = init_device_mesh("cpu", (2,))
        >>> sharded = shard_rows(embedding, mesh)
    """
    if not isinstance(module, _CodeEmbedding):
        raise TypeError(f"module: must be an embedding of codes, got {type(module).__name__}")
    if any(part.optimizer is not None or part.sparse for part in module._parts()):
        raise ValueError("module: must have no optimizer and no sparse gradients to be sharded")
    if len({id(part) for part in module._parts()}) < len(module._parts()):
        raise ValueError("module: must be a pair of two embeddings to be sharded, got one twice")
    if mesh.ndim != 1:
        raise ValueError(f"mesh: must have one dimension, got {mesh.ndim}")
    return ShardedPrefixNgramEmbedding(module, mesh)
