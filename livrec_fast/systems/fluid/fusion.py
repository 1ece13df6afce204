"""What stands for the candidate: its id, its codes, or both, in one token or in several."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .config import ModelConfig


@dataclass(frozen=True)
class Fusion:
    """One way to show a candidate to the backbone.

    item: what the slot "item" holds: "id", "slice", "room", "concat", "learnable gate", "feature
    gate", "zero", or "" for no such slot. slice: the slice's code has a slot of its own.
    id_back: the id has a further slot. aligned: a loss pulls the slice's token to the id's.
    """

    name: str
    item: str
    slice: bool = False
    id_back: bool = False
    aligned: bool = False

    @property
    def reads_id(self) -> bool:
        """Whether the candidate's room id has any part in the scores."""
        return self.item in _MERGED or self.item == "id" or self.id_back

    @property
    def reads_slice(self) -> bool:
        """Whether the slice's code has."""
        return self.item in _MERGED or self.item == "slice" or self.slice

    @property
    def reads_room(self) -> bool:
        """Whether the room's code has."""
        return self.item == "room"

    @property
    def slots(self) -> tuple[str, ...]:
        """The candidate's slots in the backbone."""
        named = {"item": bool(self.item), "slice": self.slice, "id": self.id_back}
        return tuple(name for name, there in named.items() if there)


_MERGED = ("concat", "learnable gate", "feature gate")

# equations 3-8; "faded" is where stage 2 ends: the id's slot is still there, and empty
FUSIONS = {
    fusion.name: fusion
    for fusion in (
        Fusion("id", "id"),
        Fusion("none", ""),
        Fusion("replace", "slice"),
        Fusion("concat", "concat"),
        Fusion("learnable gate", "learnable gate"),
        Fusion("feature gate", "feature gate"),
        Fusion("em3", "id", slice=True, aligned=True),
        Fusion("late", "id", slice=True),
        Fusion("faded", "zero", slice=True),
        Fusion("fluid", "room", slice=True),
        Fusion("all", "room", slice=True, id_back=True),
    )
}


class Fuse(nn.Module):
    r"""Make the candidate's tokens of g (id), s (slice) and r (room), each [..., D] or None.

    concat: $h = W [g | s]$. Gates: $h = \alpha g + (1 - \alpha) s,\ \alpha = \sigma(f(u))$, a
    number per candidate, with u the id's embedding ("learnable"), or the exposure counters and the
    norm of the id's embedding ("feature").

    Source: FLUID, equations 3-8; LARM, section 2.2.1, for the gates.
    """

    def __init__(self, fusion: Fusion, config: ModelConfig):
        super().__init__()
        self.fusion = fusion
        self.counters = list(config.groups[0])
        if fusion.item == "concat":
            self.join = nn.Linear(2 * config.width, config.width, bias=False)
        elif fusion.item in _MERGED:
            learnable = fusion.item == "learnable gate"
            inputs = config.table_dim if learnable else len(self.counters) + 1
            self.gate = nn.Sequential(
                nn.Linear(inputs, config.width), nn.GELU(), nn.Linear(config.width, 1)
            )

    def forward(
        self, g: Tensor | None, s: Tensor | None, r: Tensor | None, embedding: Tensor | None,
        dense: Tensor,
    ) -> tuple[dict[str, Tensor], Tensor | None]:  # fmt: skip
        """Return the tokens by slot, and the gate's weight of the id [...], if there is a gate.

        embedding: of the id, [..., table_dim], before its projection to g.
        """
        fusion, alpha = self.fusion, None
        made: dict[str, Tensor] = {}
        if fusion.item == "zero":
            assert s is not None
            made["item"] = torch.zeros_like(s)
        elif fusion.item == "concat":
            made["item"] = self.join(torch.cat(_both(g, s), -1))
        elif fusion.item in _MERGED:
            first, second = _both(g, s)
            alpha = self.gate(self._gate_input(embedding, dense)).sigmoid()
            made["item"] = alpha * first + (1 - alpha) * second
        elif fusion.item:
            given = {"id": g, "slice": s, "room": r}[fusion.item]
            assert given is not None
            made["item"] = given
        for slot, token in (("slice", s if fusion.slice else None), ("id", g)):
            if slot in fusion.slots:
                assert token is not None
                made[slot] = token
        return made, None if alpha is None else alpha.squeeze(-1)

    def _gate_input(self, embedding: Tensor | None, dense: Tensor) -> Tensor:
        assert embedding is not None
        if self.fusion.item == "learnable gate":
            return embedding
        norm = embedding.norm(dim=-1, keepdim=True)
        return torch.cat([dense[..., self.counters], norm], -1)


def _both(g: Tensor | None, s: Tensor | None) -> tuple[Tensor, Tensor]:
    assert g is not None and s is not None
    return g, s
