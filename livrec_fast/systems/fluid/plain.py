"""The same ranker on what PyTorch has: nn.EmbeddingBag, padding and scaled_dot_product_attention.

To be timed beside it. Parameters are copies, and so are the results, but for rounding.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...modules import CodeTargetAttention, PrefixNgramEmbedding
from .config import TrainConfig
from .ranker import Ranker


class PlainTables(nn.Module):
    """Prefix n-grams: keys by arithmetic, an nn.EmbeddingBag per level; the last row is unknown."""

    def __init__(self, source: PrefixNgramEmbedding):
        super().__init__()
        if source.hashing != "modulo" or source.mode != "concat":
            raise ValueError("source: must hash by modulo and be of mode 'concat'")
        self.levels, self.prefix = source.levels, source.scheme == "prefix"
        self.rows = [len(table) for table in source.tables]
        self.bags = nn.ModuleList(_bag([table]) for table in source.tables)

    def forward(self, codes: Tensor) -> Tensor:
        """Embed codes [M, L] as [M, sum of dims]."""
        key = torch.zeros(len(codes), dtype=torch.int64, device=codes.device)
        unknown = torch.zeros(len(codes), dtype=torch.bool, device=codes.device)
        found = []
        for level, bag in enumerate(self.bags):
            column = codes[:, level].long()
            unknown = (unknown | (column < 0)) if self.prefix else column < 0
            key = key * self.levels[level] + column if self.prefix else column
            rows = self.rows[level]
            found.append(bag(torch.where(unknown, rows, key % rows)[:, None]))
        return torch.cat(found, 1)


class PlainPair(nn.Module):
    """Two such embeddings side by side."""

    def __init__(self, slice: nn.Module, room: nn.Module):
        super().__init__()
        self.parts = [slice, room]

    def forward(self, codes: Tensor) -> Tensor:
        """Embed codes [M, 2 L]."""
        return torch.cat([p(c) for p, c in zip(self.parts, codes.chunk(2, 1), strict=True)], 1)


class PlainHistory(nn.Module):
    """Embed every item of the history, pad to the longest, project, attend."""

    def __init__(self, source: CodeTargetAttention):
        super().__init__()
        self.heads, self.names = source.heads, list(source.rows)
        if source.prefix:
            raise ValueError("source: must look codes up level by level")
        self.bag = _bag([source.table(name) for name in self.names])
        sizes = torch.tensor([0, *source.rows.values()])
        self.register_buffer("first", sizes.cumsum(0)[:-1], persistent=False)
        self.query, self.key = copy.deepcopy(source.query), copy.deepcopy(source.key)
        self.value, self.out = copy.deepcopy(source.value), copy.deepcopy(source.out)

    def embed(self, codes: Tensor, *, authors: Tensor) -> Tensor:
        """Return the candidates' x [M, D]."""
        return self._items(codes, authors, torch.full_like(authors, -1))

    def forward(
        self, candidates: Tensor, codes: Tensor, offsets: Tensor, *, authors: Tensor, gaps: Tensor,
        return_lse: bool = False,
    ) -> Any:  # fmt: skip
        """Attend from candidates [B, C, D]."""
        x = self._items(codes, authors, gaps)
        lengths = offsets.diff()
        longest = max(1, int(lengths.max()))
        owner = torch.repeat_interleave(lengths)
        place = torch.arange(len(x), device=x.device) - offsets[owner]
        padded = x.new_zeros(len(lengths), longest, x.shape[1])
        padded = padded.index_put((owner, place), x)
        real = torch.arange(longest, device=x.device) < lengths[:, None].clamp(min=1)
        q, k, v = (
            layer(rows).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for layer, rows in ((self.query, candidates), (self.key, padded), (self.value, padded))
        )
        mask = real[:, None, None]
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        out = self.out(seen.transpose(1, 2).flatten(2))
        if not return_lse:
            return out
        logits = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5  # which SDPA does not give
        lse = logits.masked_fill(~mask, -torch.inf).logsumexp(3).transpose(1, 2)
        return out, lse

    def _items(self, codes: Tensor, authors: Tensor, gaps: Tensor) -> Tensor:
        fields = torch.cat([authors[:, None], gaps[:, None].long(), codes.long()], 1)
        ids = torch.where(fields < 0, len(self.bag.weight) - 1, fields + self.get_buffer("first"))
        return self.bag(ids)


class PlainOptimizers:
    """AdamW for layers, torch's Adagrad for tables."""

    def __init__(self, model: Ranker, train: TrainConfig):
        history = {id(model.history.attention.bag.weight)}  # type: ignore[union-attr]
        tables = [m.weight for m in model.modules() if isinstance(m, nn.EmbeddingBag)]
        apart = {id(table) for table in tables}
        self.rest = [p for p in model.parameters() if id(p) not in apart]
        self.clip = train.clip
        self.adam = torch.optim.AdamW(
            self.rest, lr=train.rate, weight_decay=train.decay, fused=True
        )
        groups = [
            {"params": [t for t in tables if (id(t) in history) == of_history], "lr": rate}
            for of_history, rate in ((True, train.history_rate), (False, train.table_rate))
        ]
        self.adagrad = torch.optim.Adagrad(groups)

    def zero(self) -> None:
        """Forget the gradients."""
        self.adam.zero_grad(set_to_none=True)
        self.adagrad.zero_grad(set_to_none=True)

    def step(self) -> None:
        """Take a step."""
        torch.nn.utils.clip_grad_norm_(self.rest, self.clip)
        self.adam.step()
        self.adagrad.step()


def plain(model: Ranker) -> Ranker:
    """Return a copy of a ranker with everything of this library taken out of its forward pass."""
    twin = copy.deepcopy(model)
    for token in (twin.user, twin.author, getattr(twin, "room_id", None)):
        if token is not None:
            token.table = PlainTables(token.table)
    twin.history.attention = PlainHistory(twin.history.attention)  # type: ignore[assignment]
    if hasattr(twin, "codes"):
        for name, table in list(twin.codes.tables.items()):
            twin.codes.tables[name] = PlainTables(table)  # type: ignore[arg-type]
        parts: list[Any] = list(twin.codes.tables.values())
        both = PlainPair(parts[0], parts[-1]) if len(twin.codes.project) == 2 else parts[0]
        twin.codes._lookup = lambda: both  # type: ignore[method-assign]
    return twin


def _bag(tables: list[Tensor]) -> nn.EmbeddingBag:
    """Return tables one after the other as one EmbeddingBag that sums; the last row adds zero."""
    weight = torch.cat([*(t.detach() for t in tables), tables[0].new_zeros(1, tables[0].shape[1])])
    return nn.EmbeddingBag.from_pretrained(
        weight, freeze=False, mode="sum", sparse=True, padding_idx=len(weight) - 1
    )
