"""A two-tower retriever and a ranker that know items by codes, content and popularity: no ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ... import (
    code_attention,
    history_search_codes,
    in_batch_contrastive,
    majority_vote,
    prefix_ngram_lookup,
    unpack_codes,
)
from ...modules import PrefixNgramEmbedding
from .samples import Batch

STARS = 5


@dataclass(frozen=True)
class Shape:
    """Widths of the model; `dim` is per code level, `nearest` counts the searched history items."""

    dim: int = 16
    heads: int = 2
    head_dim: int = 16
    hidden: int = 128
    tower: int = 64
    nearest: int = 16
    max_rows: int = 65536
    false_negative: float = 0.995


class CodeHistory(nn.Module):
    """Attention over a history of codes and stars: a table of keys and one of values per column."""

    def __init__(self, sizes: Sequence[int], heads: int, dim: int, backend: str):
        super().__init__()
        self.backend = backend

        def tables() -> nn.ParameterList:
            return nn.ParameterList(0.1 * torch.randn(size, heads, dim) for size in sizes)

        self.keys, self.values = tables(), tables()

    def forward(self, query: Tensor, columns: Tensor, offsets: Tensor) -> Tensor:
        """Attend from query [B, C, H, d] to columns [T, F]; returns [B, C, H d]."""
        found = code_attention(
            query, columns, list(self.keys), list(self.values), offsets, backend=self.backend
        )
        assert isinstance(found, Tensor)  # a pair only where return_lse is asked for
        return found.flatten(2)


class TwoTower(nn.Module):
    """User vectors from histories, item vectors from codes and contents."""

    def __init__(
        self, shape: Shape, codes_dim: int, content_dim: int, sizes: Sequence[int], backend: str
    ):
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, 1, shape.heads, shape.head_dim))
        self.history = CodeHistory(sizes, shape.heads, shape.head_dim, backend)
        read = shape.heads * shape.head_dim
        self.user = _mlp(2 * codes_dim + read, shape.hidden, shape.tower)
        self.item = _mlp(codes_dim + content_dim, shape.hidden, shape.tower)
        self.log_temperature = nn.Parameter(torch.tensor(0.1).log())


class Ranker(nn.Module):
    """A score of each candidate, given the whole history."""

    def __init__(
        self, shape: Shape, codes_dim: int, content_dim: int, sizes: Sequence[int], backend: str
    ):
        super().__init__()
        self.heads = shape.heads
        read = shape.heads * shape.head_dim
        self.content = nn.Linear(content_dim, shape.dim)
        self.query = nn.Linear(codes_dim + shape.dim, read)
        self.history = CodeHistory(sizes, shape.heads, shape.head_dim, backend)
        self.score = _mlp(codes_dim + shape.dim + 2 * read + 3, shape.hidden, 1)

    def forward(
        self,
        codes: Tensor,
        content: Tensor,
        columns: Tensor,
        extra: Tensor,
        offsets: Tensor,
    ) -> Tensor:
        """Score candidates [B, C] by their codes, content and extra features, [B, C, *] each."""
        item = torch.cat([codes, self.content(content)], 2)
        query = self.query(item)
        found = self.history(query.unflatten(2, (self.heads, -1)), columns, offsets)
        return self.score(torch.cat([item, found, found * query, extra], 2)).squeeze(2)


class DemoModel(nn.Module):
    """Both models over one prefix n-gram embedding of the items' codes.

    content: [n, D] frozen item vectors. packed: uint8 [n, bytes] their codes. codebooks: what codes
    stand for. log_q: [n] log of an item's share of the training positives. backend: of every op.
    """

    features: Tensor
    packed: Tensor
    log_q: Tensor

    def __init__(
        self,
        content: Tensor,
        packed: Tensor,
        codebooks: Sequence[Tensor],
        log_q: Tensor,
        shape: Shape,
        backend: str,
    ):
        super().__init__()
        self.shape, self.backend = shape, backend
        self.levels = [len(book) for book in codebooks]
        sizes = [*self.levels, STARS]
        self.embedding = PrefixNgramEmbedding(
            self.levels, shape.dim, max_rows=shape.max_rows, backend=backend
        )
        codes_dim = shape.dim * len(self.levels)
        self.two_tower = TwoTower(shape, codes_dim, content.shape[1] + 1, sizes, backend)
        self.ranker = Ranker(shape, codes_dim, content.shape[1] + 1, sizes, backend)
        for table in self.embedding.tables:
            nn.init.normal_(table, std=0.01)  # so that a code never seen in training says little
        popularity = (log_q - log_q.mean()) / log_q.std().clamp(min=1e-6)
        features = torch.cat([content, popularity[:, None]], 1)
        for name, value in (("features", features), ("packed", packed), ("log_q", log_q)):
            self.register_buffer(name, value)
        for level, book in enumerate(codebooks):
            self.register_buffer(f"codebook_{level}", book)

    def codes_of(self, items: Tensor) -> Tensor:
        """Return the codes of items, [len(items), L]: three bytes an item are all that is read."""
        return unpack_codes(self.packed[items], self.levels, backend=self.backend)

    def items(self, items: Tensor) -> Tensor:
        """Return item vectors of the two-tower, [len(items), tower]."""
        embedded = self.embedding(self.codes_of(items))
        return self.two_tower.item(torch.cat([embedded, self.features[items]], 1))

    def users(self, batch: Batch, codes: Tensor) -> Tensor:
        """Return user vectors of the two-tower, [B, tower]: from the history and its liked part."""
        liked = codes.long().masked_fill((batch.stars < STARS - 2)[:, None], -1)
        pooled = prefix_ngram_lookup(
            liked, list(self.embedding.tables), self.levels, offsets=batch.offsets, pool="mean",
            backend=self.backend,
        )  # fmt: skip
        voted = majority_vote(liked, batch.offsets, self.levels, rule="path", backend=self.backend)
        query = self.two_tower.query.expand(len(pooled), -1, -1, -1).contiguous()
        read = self.two_tower.history(query, self.columns(batch, codes), batch.offsets)
        favourite = self.embedding(voted)
        seen = torch.cat([pooled, favourite, read.squeeze(1)], 1)
        # normalised, as else untrained users are all alike and mask each other as false negatives
        return self.two_tower.user(F.layer_norm(seen, seen.shape[1:]))

    @staticmethod
    def columns(batch: Batch, codes: Tensor) -> Tensor:
        """Return what attention reads of a history: its codes and its stars, [T, L + 1]."""
        return torch.cat([codes.long(), batch.stars[:, None]], 1)

    def contrast(self, batch: Batch, codes: Tensor) -> Tensor:
        """Return the contrastive loss of the batch's positives against each other."""
        user, slot = (batch.valid & (batch.labels > 0)).nonzero(as_tuple=True)
        items = batch.candidates[user, slot]
        return in_batch_contrastive(
            self.users(batch, codes)[user],
            self.items(items),
            temperature=self.two_tower.log_temperature.exp(),
            query_ids=user,
            key_ids=items,
            false_negative_threshold=self.shape.false_negative,
            log_q=self.log_q[items],
            backend=self.backend,
        )

    def rank(self, batch: Batch, codes: Tensor) -> Tensor:
        """Return the ranker's logits, [B, C]."""
        items = batch.candidates
        embedded = self.embedding(self.codes_of(items.flatten()))
        return self.ranker(
            embedded.unflatten(0, items.shape),
            self.features[items],
            self.columns(batch, codes),
            self.history_features(batch, codes),
            batch.offsets,
        )

    @torch.no_grad()
    def history_features(self, batch: Batch, codes: Tensor) -> Tensor:
        """Return [B, C, 3]: mean stars of the most similar history items and of all; the length.

        Similarity is the candidate's content times the vector that the history item's codes stand
        for. Stars are centred at 2.6 (of 0 to 4), their mean over all ratings; no history gives 0.
        """
        books = [self.get_buffer(f"codebook_{level}") for level in range(len(self.levels))]
        query = self.features[batch.candidates][..., :-1].contiguous()
        _, at = history_search_codes(
            query, codes, books, batch.offsets, self.shape.nearest, backend=self.backend
        )
        stars = F.pad(batch.stars.float() - 2.6, (0, 1))
        found = at >= 0
        nearest = torch.where(found, stars[at + batch.offsets[:-1, None, None] * found], 0).sum(2)
        nearest = nearest / found.sum(2).clamp(min=1)
        count = batch.offsets.diff()
        owner = torch.repeat_interleave(count)
        total = torch.zeros(len(count), device=stars.device).index_add(0, owner, stars[:-1])
        overall = torch.stack([total / count.clamp(min=1), count.add(1).log() / 4], 1)
        return torch.cat([nearest[..., None], overall[:, None].expand(*nearest.shape, 2)], 2)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the ranking loss and the contrastive loss."""
        codes = self.codes_of(batch.history)
        logits = self.rank(batch, codes)
        ranking = F.binary_cross_entropy_with_logits(logits[batch.valid], batch.labels[batch.valid])
        return ranking, self.contrast(batch, codes)


def _mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.GELU(), nn.Linear(hidden, outputs))
