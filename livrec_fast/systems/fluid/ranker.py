"""The ranker: tokens of user, author, candidate, counters and history, a backbone, task heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...modules import PrefixNgramEmbedding
from ...ops.contrastive import in_batch_contrastive
from .backbone import Backbone
from .config import ModelConfig, Sizes, TrainConfig
from .fusion import FUSIONS, Fuse
from .heads import TaskHeads, task_loss
from .tokens import CodeTokens, DenseTokens, HistoryTokens, IdToken, row_rule

if TYPE_CHECKING:
    from ...logs.batches import Batch


@dataclass(frozen=True)
class Output:
    """What a forward pass gives.

    logits: [N, C, K]. extra: the losses of routers and of the alignment. gate: the weight of the
    id [N, C], if a gate gives one. id_norm: of the id's embedding [N, C], if it is read.
    """

    logits: Tensor
    extra: Tensor
    gate: Tensor | None
    id_norm: Tensor | None


class Ranker(nn.Module):
    """A token-based ranker of live rooms by one of the FUSIONS.

    Models of fusions that do not read the id ("none", "replace", "faded", "fluid") have no table of
    rooms, and `batch.room` is not looked at. The dense features may count a room's events: an
    exposure counter tells how often a room was shown, and nothing of which room it is.

    Example:
        >>> ranker = Ranker("fluid", ModelConfig(), Sizes(users, rooms, authors), TrainConfig())
        >>> ranker(batch).logits  # [N, C, K]
    """

    def __init__(
        self, fusion: str, config: ModelConfig, sizes: Sizes, train: TrainConfig,
        codebooks: Sequence[Tensor] | None = None,
    ):  # fmt: skip
        """Make the tables and layers; `codebooks` [N, dim], a level each, start the history's."""
        super().__init__()
        self.fusion, self.config, self.sizes = FUSIONS[fusion], config, sizes
        rule = row_rule(train)
        self.user = IdToken(sizes.users, config, rule)
        self.author = IdToken(sizes.authors, config, rule)
        if self.fusion.reads_id:
            self.room_id = IdToken(sizes.rooms, config, rule)
        if self.fusion.reads_slice or self.fusion.reads_room:
            self.codes = CodeTokens(self.fusion, config, rule)
        self.fuse = Fuse(self.fusion, config)
        self.dense = DenseTokens(config, sizes)
        self.history = HistoryTokens(self.fusion, config, sizes, codebooks)
        self.slots = ["user", "author", *self.history.slots, *self.dense.slots, *self.fusion.slots]
        self.backbone = Backbone(self.slots, config)
        self.heads = TaskHeads(self.slots, sizes.tasks, config)

    def forward(self, batch: Batch, id_scale: float | Tensor = 1.0) -> Output:
        """Score the candidates of each request.

        id_scale: what g is multiplied by in stage 2, a number or [N, C].
        """
        shape = batch.author.shape
        dense = self.dense.standardise(batch.dense)
        tokens, traced = self._candidate(batch, dense, id_scale)
        tokens |= {
            "user": self.user(batch.user)[:, None].expand(*shape, -1),
            "author": self.author(batch.author),
            **self.history(batch),
            **self.dense(dense),
        }
        x = torch.stack([tokens[slot] for slot in self.slots], 2).flatten(0, 1)
        x, extra = self.backbone(x)
        logits = self.heads(x).unflatten(0, shape)
        if self.fusion.aligned:
            extra = extra + self.config.alignment * self._alignment(tokens, batch.room)
        return Output(logits, extra, *traced)

    def loss(self, output: Output, batch: Batch) -> Tensor:
        """Return the tasks' loss and the extra ones."""
        return task_loss(output.logits, batch.labels, batch.mask) + output.extra

    def sparse_tables(self) -> dict[str, nn.Parameter]:
        """Return the tables whose gradients are sparse, by name."""
        named = self.history.attention.tables.named_parameters()
        return {f"history.attention.tables.{name}": table for name, table in named}

    def rest(self) -> dict[str, nn.Parameter]:
        """Return all parameters that are in no table."""
        apart = {id(table) for table in self.sparse_tables().values()}
        for part in self.modules():
            if isinstance(part, PrefixNgramEmbedding):
                apart |= {id(table) for table in part.tables}
        return {name: p for name, p in self.named_parameters() if id(p) not in apart}

    @torch.no_grad()
    def take_over(self, state: dict[str, Tensor]) -> list[str]:
        """Load what another ranker's state has in common with this one; return what is new.

        The heads hear nothing of a new slot at first, so as not to lose what they have learned.
        """
        own = self.state_dict()
        self.load_state_dict({k: v for k, v in state.items() if k in own}, strict=False)
        fresh = [name for name in own if name not in state]
        for name in fresh:
            if name.startswith("heads.join."):
                own[name].zero_()
        return fresh

    def _candidate(
        self, batch: Batch, dense: Tensor, id_scale: float | Tensor
    ) -> tuple[dict[str, Tensor], tuple[Tensor | None, Tensor | None]]:
        """Return the candidate's tokens, and the gate's weights and the id's norms."""
        g = embedding = norm = None
        if self.fusion.reads_id:
            embedding = self.room_id.rows(batch.room)
            norm = embedding.detach().norm(dim=-1)
            scale: Any = id_scale[..., None] if isinstance(id_scale, Tensor) else id_scale
            g = self.room_id.project(embedding) * scale
        codes: dict[str, Tensor] = {}
        if hasattr(self, "codes"):
            codes = self.codes(batch.slice_codes, batch.room_codes)
        made, gate = self.fuse(g, codes.get("slice"), codes.get("room"), embedding, dense)
        return made, (None if gate is None else gate.detach(), norm)

    def _alignment(self, tokens: dict[str, Tensor], room: Tensor) -> Tensor:
        """Return the symmetric contrastive loss between the slice's and the id's tokens."""
        return in_batch_contrastive(
            tokens["slice"].flatten(0, 1), tokens["item"].flatten(0, 1), symmetric=True,
            temperature=self.config.temperature, key_ids=room.flatten(),
            backend=self.config.backend,
        )  # fmt: skip
