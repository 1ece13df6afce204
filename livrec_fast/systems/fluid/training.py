"""Training through the stages of a row, with checkpoints that resume to the same numbers."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from ...benchmarking._clock import kept_memory
from . import checkpoints
from .config import ModelConfig, Sizes, TrainConfig
from .heads import task_loss
from .optimizers import Optimizers
from .ranker import Output, Ranker
from .recipes import TEST, Row, Stage

if TYPE_CHECKING:
    from ...logs.batches import Batch

OnStep = Callable[[int], None]


class Material(Protocol):
    """What training reads. `key` names the data: the same key, the same batches."""

    key: str
    sizes: Sizes
    mean: Tensor
    deviation: Tensor
    codebooks: Sequence[Tensor] | None

    def steps(self, period: int) -> int:
        """Return how many batches a period has."""

    def batch(self, period: int, step: int) -> Batch:
        """Return one of them; they are in the order of time."""

    def times(self, period: int, step: int) -> tuple[int, int, int]:
        """Return when a batch's first and last request come, and by when its labels are known."""


SCORE, LEARN, CLICKS, REST = "score", "learn", "clicks", "rest"


class Move(NamedTuple):
    """What is done with a batch: it is scored, or learned from, whole or in two parts."""

    what: str
    period: int
    at: int


@dataclass(frozen=True)
class Settings:
    """What all rows of a table share."""

    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()


class Trainer:
    """A stage's model, its optimisers, and how far they have come.

    All that a step does follows from the seed and the step's number, so that a run that was stopped
    and resumed ends where another would have.
    """

    def __init__(self, model: Ranker, stage: Stage, train: TrainConfig, data: Material, seed: int):
        self.model, self.stage, self.train, self.data = model, stage, train, data
        self.optimizers, self.seed, self.done = Optimizers(model, train), seed, 0
        self.trace: dict[str, list[Tensor]] = defaultdict(list)
        self.plan = moves(data, stage, train.stream)

    def state(self) -> dict[str, Tensor]:
        """Return model, optimisers and what was noted so far."""
        kept = {f"model.{name}": t for name, t in self.model.state_dict().items()}
        kept |= self.optimizers.state()
        return kept | {f"trace.{name}": torch.cat(parts) for name, parts in self.trace.items()}

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint of this stage."""
        tensors, facts = checkpoints.read(path)
        self.model.load_state_dict(checkpoints.part(tensors, "model."))
        self.optimizers.load(tensors)
        self.done = facts["done"]
        for name, tensor in checkpoints.part(tensors, "trace.").items():
            self.trace[name] = [tensor]

    def follow(self, path: Path) -> list[str]:
        """Start from the end of the stage before; return the names of what is new."""
        tensors, _ = checkpoints.read(path)
        fresh = self.model.take_over(checkpoints.part(tensors, "model."))
        self.optimizers.load(tensors)
        if self.stage.warm_room:
            self.model.codes.warm_start_room()
        return fresh

    def run(self, checkpoint: Path, on_step: OnStep = lambda done: None) -> None:
        """Train to the stage's end, with a checkpoint every so many steps."""
        self.model.train()
        with kept_memory():  # each step wants what the one before has freed
            while self.done < len(self.plan):
                self.step(self.plan[self.done])
                self.done += 1
                if self.done % self.train.save_every == 0 and self.done < len(self.plan):
                    checkpoints.write(checkpoint, self.state(), done=self.done)
                on_step(1)

    def step(self, move: Move) -> None:
        """Score a batch and note that, or learn from it."""
        batch = self.data.batch(move.period, move.at)
        with torch.set_grad_enabled(move.what != SCORE):
            output = self.model(batch, self._id_scale(move.at, batch))
        if move.what == SCORE:
            self._note(output)
            return
        loss = self._loss(output, batch, move.what)
        self.optimizers.zero()
        loss.backward()
        self.optimizers.step()
        self.trace["loss"].append(loss.detach()[None])

    def _loss(self, output: Output, batch: Batch, what: str) -> Tensor:
        """Return the loss by all labels, by what a request itself tells, or by the rest of them.

        Which room was entered is known at once; that another one will not be entered soon, for
        which some candidates are masked, is not.
        """
        if what == LEARN:
            return self.model.loss(output, batch)
        part = batch.mask.clone()
        if what == REST:
            part[..., 0] = False
            return task_loss(output.logits, batch.labels, part, counted=batch.mask)
        part[..., 1:] = False
        part[..., 0] = batch.room != batch.room[:, :1]  # the others fill up
        part[:, 0, 0] = True
        return task_loss(output.logits, batch.labels, part) + output.extra

    def _note(self, output: Output) -> None:
        self.trace["logits"].append(output.logits.detach().clone())
        for name in ("gate", "id_norm"):
            value = getattr(output, name)
            if value is not None:
                self.trace[name].append(value.clone())

    def _id_scale(self, at: int, batch: Batch) -> float | Tensor:
        """Return what is left of the id at this step of the period."""
        if not self.stage.fade:
            return 1.0
        steps = max(1, round(self.train.fade_share * self.data.steps(self.stage.periods[0])))
        left = max(0.0, 1 - (at + 1) / steps)
        if self.train.fade == "linear":
            return left
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + at)
        return (torch.rand(batch.author.shape, generator=generator) < left).float()


def moves(data: Material, stage: Stage, stream: bool) -> list[Move]:
    """Return the moves of a stage, in the order in which they can be made as time goes by.

    Batches of the test period are scored when their first request comes. A batch whose labels are
    all known by the first of these is learned from whole, any other in two parts: of the clicks,
    after its last request, and of the rest, when that is known, before which others are scored.
    """
    start = data.times(TEST, 0)[0] if data.steps(TEST) else None
    found = []
    for period in stage.periods:
        for at in range(data.steps(period)):
            first, last, known = data.times(period, at)
            if period == TEST:
                found.append((first, 0, Move(SCORE, period, at)))
            if start is None or known < start:
                found.append((last, 1, Move(LEARN, period, at)))
            elif period != TEST or stream:
                found.append((last, 1, Move(CLICKS, period, at)))
                found.append((known, 1, Move(REST, period, at)))
    if TEST not in stage.periods:  # it is over before
        found = [one for one in found if start is None or one[0] < start]
    return [move for _, _, move in sorted(found, key=lambda one: one[:2])]


def stage_key(data: Material, row: Row, depth: int, settings: Settings, seed: int) -> str:
    """Name the first `depth` stages of a row: equal names, equal numbers."""
    train = {k: v for k, v in asdict(settings.train).items() if k != "save_every"}
    chain = [(asdict(s), asdict(row.config(settings.model, s))) for s in row.stages[:depth]]
    for stage, _ in chain:
        del stage["name"]
    text = json.dumps([data.key, seed, train, chain], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def new_trainer(
    data: Material, row: Row, depth: int, settings: Settings, seed: int, before: Path | None
) -> Trainer:
    """Make the trainer of a row's stage number `depth`, from 1 on, at its first step."""
    stage = row.stages[depth - 1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1_000 * seed + depth)
        config = row.config(settings.model, stage)
        model = Ranker(stage.fusion, config, data.sizes, settings.train, data.codebooks)
    model.dense.mean.copy_(data.mean)
    model.dense.deviation.copy_(data.deviation)
    trainer = Trainer(model, stage, settings.train, data, seed)
    if before is not None:
        trainer.follow(before)
    return trainer


def train_row(
    data: Material,
    row: Row,
    settings: Settings,
    seed: int,
    folder: Path,
    on_step: OnStep = lambda done: None,
) -> Path:
    """Train all stages of a row that are not yet done; return the file with what was noted.

    Each stage has a file of its own, named by its key: the stages that rows share are trained once.
    A stage that was cut short goes on from its last checkpoint.
    """
    before: Path | None = None
    for depth in range(1, len(row.stages) + 1):
        key = stage_key(data, row, depth, settings, seed)
        paths = {kind: folder / f"{key}.{kind}.safetensors" for kind in ("part", "model", "trace")}
        last = depth == len(row.stages)
        if not (paths["trace"].exists() and (last or paths["model"].exists())):
            trainer = new_trainer(data, row, depth, settings, seed, before)
            if paths["part"].exists():
                trainer.resume(paths["part"])
                on_step(trainer.done)
            trainer.run(paths["part"], on_step)
            _finish(trainer, paths, keep=not last or row.kept, row=row.name, seed=seed)
        else:
            on_step(stage_steps(data, row.stages[depth - 1 : depth], settings.train.stream))
        before = paths["model"]
    return paths["trace"]


def _finish(trainer: Trainer, paths: dict[str, Path], keep: bool, **facts: int | str) -> None:
    """Write the stage's model, if another will go on from it, and what was noted."""
    state, stage = trainer.state(), trainer.stage.name
    if keep:
        whole = {name: t for name, t in state.items() if not name.startswith("trace.")}
        checkpoints.write(paths["model"], whole, stage=stage, done=trainer.done, **facts)
    checkpoints.write(paths["trace"], checkpoints.part(state, "trace."), stage=stage, **facts)
    paths["part"].unlink(missing_ok=True)


def stage_steps(data: Material, stages: Sequence[Stage], stream: bool = True) -> int:
    """Return how many moves stages have."""
    return sum(len(moves(data, stage, stream)) for stage in stages)
