"""How each row of a table is trained: stages over periods of the log, shared where they agree."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from .config import ModelConfig
from .fusion import FUSIONS

TEST = 5  # the period after the split; 0 is the base's training, 1 to 4 follow it


@dataclass(frozen=True)
class Stage:
    """A model of one fusion, trained through consecutive periods.

    fade: the id is phased out meanwhile. warm_room: the room's tables start as the slice's are.
    """

    name: str
    fusion: str
    periods: tuple[int, ...]
    fade: bool = False
    warm_room: bool = False


@dataclass(frozen=True)
class Row:
    """A row of a table: a chain of stages, each going on from the one before.

    changes: settings of the model that differ in this row. kept: the last stage's model is kept.
    """

    name: str
    stages: tuple[Stage, ...]
    changes: Mapping[str, Any] = field(default_factory=dict)
    kept: bool = False

    def config(self, config: ModelConfig, stage: Stage) -> ModelConfig:
        """Return the settings of one stage's model, without what has no part in it.

        So stages of different rows that are the same are known to be.
        """
        fusion, wanted = FUSIONS[stage.fusion], replace(config, **self.changes)
        if not (fusion.reads_slice or fusion.reads_room):
            wanted = replace(wanted, scheme=config.scheme, match=config.match)
        if not (fusion.reads_slice and fusion.reads_room):
            wanted = replace(wanted, shared=config.shared)
        return wanted


BASE = Stage("base", "id", (0,))
SLICE = Stage("stage 1", "late", (1,))
FADE = Stage("stage 2", "late", (2,), fade=True)
ROOM = Stage("stage 3", "fluid", (3,), warm_room=True)
ONWARDS = (1, 2, 3, 4, TEST)


def _from_base(name: str, fusion: str) -> Row:
    """Go on from the base with one thing changed, for as long as every other row is trained."""
    return Row(name, (BASE, Stage(fusion, fusion, ONWARDS)))


def _fluid(name: str, kept: bool = False, **changes: Any) -> Row:
    """Go through the three stages, then on with the stream."""
    return Row(name, (BASE, SLICE, FADE, ROOM, Stage("stream", "fluid", (4, TEST))), changes, kept)


ROWS = {
    row.name: row
    for row in (
        _from_base("base", "id"),
        _from_base("-ID", "none"),
        Row("+slice", (BASE, SLICE, Stage("stage 1 on", "late", (2, 3, 4, TEST)))),
        _fluid("FLUID", kept=True),
        _fluid("level-wise", scheme="levelwise"),
        _fluid("shared", shared=True),
        _from_base("replace", "replace"),
        _from_base("concat", "concat"),
        _from_base("learnable gate", "learnable gate"),
        _from_base("feature gate", "feature gate"),
        _from_base("EM3", "em3"),
        Row("naive joint", (Stage("naive", "all", (0, *ONWARDS)),)),
        Row("stage 2", (BASE, SLICE, FADE, Stage("stage 2 on", "faded", (3, 4, TEST)))),
        Row("ID added back", (BASE, SLICE, FADE, ROOM, Stage("ID back", "all", (4, TEST)))),
    )
}
