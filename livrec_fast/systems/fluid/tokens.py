"""Prime tokens: what the backbone gets of ids, codes, counters and the history."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...modules import (
    CodeTargetAttention,
    PairedPrefixNgramEmbedding,
    PrefixNgramEmbedding,
    RowAdagrad,
    RowwiseAdagrad,
)
from .config import ModelConfig, Sizes, TrainConfig
from .fusion import Fusion

if TYPE_CHECKING:
    from ...logs.batches import Batch

_LENGTHS = {"author": 0.5, "gap": 0.05, "code_0": 1.0}  # of the history's new rows, without scale


def row_rule(train: TrainConfig, history: bool = False) -> RowAdagrad | RowwiseAdagrad:
    """Return the optimiser of the history's tables, or of all others."""
    kind = RowwiseAdagrad if train.rule == "rowwise_adagrad" else RowAdagrad
    return kind(train.history_rate if history else train.table_rate)


def make_table(config: ModelConfig, levels: Any, optimizer: Any, scheme: str = "prefix") -> Any:
    """Make an embedding whose backward pass updates it, and whose rows start short."""
    table = PrefixNgramEmbedding(
        levels, config.table_dim, max_rows=max(config.max_rows, levels[0]), scheme=scheme,
        optimizer=optimizer, backend=config.backend,
    )  # fmt: skip
    shrink(table.tables, config.start)
    return table


@torch.no_grad()
def shrink(tables: Any, factor: float) -> None:
    """Scale tables."""
    for table in tables:
        table.mul_(factor)


class IdToken(nn.Module):
    """A token of an id: a row of a table, projected."""

    def __init__(self, count: int, config: ModelConfig, optimizer: Any):
        super().__init__()
        self.table = make_table(config, (count,), optimizer)
        self.project = nn.Linear(config.table_dim, config.width, bias=False)

    def rows(self, ids: Tensor) -> Tensor:
        """Return the embeddings of ids [...], [..., table_dim]."""
        return self.table(ids.reshape(-1, 1)).view(*ids.shape, -1)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the tokens of ids [...], [..., D]."""
        return self.project(self.rows(ids))


class CodeTokens(nn.Module):
    """The tokens s of a slice's code and r of its room's, each from tables of its own, or shared.

    Before a room's first slice is complete, its token is a learned one. Both tables are read in one
    call.

    Source: FLUID, sections 3.3 and 3.4.1.
    """

    def __init__(self, fusion: Fusion, config: ModelConfig, optimizer: Any):
        super().__init__()
        dim = config.table_dim * len(config.levels)
        names = [n for n, u in (("slice", fusion.reads_slice), ("room", fusion.reads_room)) if u]
        shared = config.shared and len(names) == 2
        levels = list(config.levels)
        self.tables = nn.ModuleDict(
            {
                name: make_table(config, levels, optimizer, config.scheme)
                for name in (names[:1] if shared else names)
            }
        )
        self.project = nn.ModuleDict(
            {name: nn.Linear(dim, config.width, bias=False) for name in names}
        )
        self.unknown = nn.ParameterDict(
            {name: nn.Parameter(torch.zeros(config.width)) for name in names}
        )

    def forward(self, slices: Tensor, rooms: Tensor) -> dict[str, Tensor]:
        """Return the tokens, of codes [..., L], by name, [..., D]."""
        given = {"slice": slices, "room": rooms}
        names = list(self.project)
        codes = [given[name].reshape(-1, slices.shape[-1]) for name in names]
        rows = self._lookup()(torch.cat(codes, 1)).chunk(len(names), 1)
        made = {}
        for (name, project), code, row in zip(self.project.items(), codes, rows, strict=True):
            known = torch.where(code[:, :1] >= 0, project(row), self.unknown[name])
            made[name] = known.view(*slices.shape[:-1], -1)
        return made

    def _lookup(self) -> Any:
        tables: list[Any] = list(self.tables.values())
        if len(self.project) == 1:
            return tables[0]
        return PairedPrefixNgramEmbedding(tables[0], tables[-1])  # shared: one and the same

    @torch.no_grad()
    def warm_start_room(self) -> None:
        """Let the room's tables and projection start as the slice's are (stage 3)."""
        if "room" in self.tables:
            room: Any = self.tables["room"]
            room.warm_start_from(self.tables["slice"])
        self.project["room"].load_state_dict(self.project["slice"].state_dict())
        self.unknown["room"].copy_(self.unknown["slice"])


class DenseTokens(nn.Module):
    """A token per group of dense features, which are standardised, concatenated and projected."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, config: ModelConfig, sizes: Sizes):
        super().__init__()
        self.groups = [list(group) for group in config.groups]
        self.register_buffer("mean", torch.zeros(sizes.features))
        self.register_buffer("deviation", torch.ones(sizes.features))
        self.project = nn.ModuleList(_two_layers(len(group), config.width) for group in self.groups)

    @property
    def slots(self) -> list[str]:
        """The slots' names."""
        return [f"dense_{at}" for at in range(len(self.groups))]

    def standardise(self, dense: Tensor) -> Tensor:
        """Return features [..., F] of mean 0 and deviation 1."""
        return (dense - self.mean) / self.deviation

    def forward(self, standardised: Tensor) -> dict[str, Tensor]:
        """Return the tokens [..., D] by slot."""
        parts = zip(self.slots, self.groups, self.project, strict=True)
        return {slot: project(standardised[..., group]) for slot, group, project in parts}


class HistoryTokens(nn.Module):
    r"""What a candidate finds in its user's history: $W [o | o \odot V x]$, and the match m.

    The candidate's x, of its author and its slice's code if the fusion reads that, is made by the
    tables of the history's items, and o is what its attention returns. The match
    $m = \log \mathrm{mean}_t \exp \langle q, k_t \rangle$, a token of its own where codes are read,
    tells how much of the history is like the candidate, which a mean weighted by softmax cannot.

    Tables of codes start as the codewords, so that the match starts as one of what was shown;
    authors and gaps start small. The history knows rooms by their codes only. Its tables' gradients
    are sparse.
    """

    def __init__(
        self, fusion: Fusion, config: ModelConfig, sizes: Sizes, codebooks: Sequence[Tensor] | None
    ):
        super().__init__()
        self.matching = fusion.reads_slice and config.match
        self.slots = ["history", "match"] if self.matching else ["history"]
        dim = config.width if codebooks is None else codebooks[0].shape[1]
        self.attention = CodeTargetAttention(
            dim, 1, levels=config.levels, prefix=config.history_prefix, head_dim=dim,
            value_dim=config.width, max_rows=config.max_rows, authors=sizes.authors,
            gap_buckets=sizes.gaps, sparse=True, backend=config.backend,
        )  # fmt: skip
        self.join = nn.Linear(2 * config.width, config.width)
        if self.matching:
            self.matched = _two_layers(1, config.width)
        self._start(config.likeness, codebooks)

    @torch.no_grad()
    def _start(self, likeness: float, codebooks: Sequence[Tensor] | None) -> None:
        """Let x of length 1 match itself by 1 / likeness; tables and layers share the scale."""
        attention, dim = self.attention, self.attention.dim
        scale = (dim**0.5 / likeness) ** 0.25
        for name in attention.rows:
            nn.init.normal_(attention.table(name), std=scale * _LENGTHS.get(name, 0.5) / dim**0.5)
        for level, book in enumerate(codebooks or ()):
            attention.table(f"code_{level}").copy_(scale * book)
        for layer in (attention.query, attention.key):
            layer.weight.copy_(scale * torch.eye(dim))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return the tokens [N, C, D] by slot."""
        codes = batch.slice_codes if self.matching else torch.full_like(batch.slice_codes, -1)
        x = self.attention.embed(codes.flatten(0, 1), authors=batch.author.flatten())
        x = x.unflatten(0, batch.author.shape)
        found, total = self.attention(
            x, batch.history_codes, batch.offsets, authors=batch.history_author,
            gaps=batch.history_gap, return_lse=True,
        )  # fmt: skip
        made = {"history": self.join(torch.cat([found, found * self.attention.value(x)], 2))}
        if self.matching:
            length = batch.offsets.diff()[:, None, None]
            match = torch.where(length > 0, total - length.clamp(min=1).log(), 0)
            made["match"] = self.matched(match)
        return made


def _two_layers(inputs: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, width), nn.GELU(), nn.Linear(width, width))
