"""Training the encoder in two stages on pairs of queries and items, with checkpoints."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...modules import InBatchContrastive
from . import checkpoints
from .encoder import Encoder
from .encoder_inputs import Content

ALIGN, JOINT = "align", "joint"
TRAINED = {
    ALIGN: ("projector", "output"),
    JOINT: ("vision", "projector", "language", "output"),
}
_KIND, _ADAM = "encoder training", ("step", "exp_avg", "exp_avg_sq")


class Pairs(NamedTuple):
    """A batch: query i was answered by item i. item_ids: int64 [B], where an item may recur."""

    queries: Content
    items: Content
    item_ids: Tensor | None = None


class PairFeed(Protocol):
    """What training reads. `key` names the data: the same key, the same batches."""

    key: str

    def batch(self, step: int) -> Pairs:
        """Return the pairs of a step, of live rooms and short videos mixed."""


@dataclass(frozen=True)
class EncoderTrainConfig:
    """Training of the encoder.

    align_steps: of stage 1, in which only the projector and the output are trained; 0 trains all
    in a single stage. joint_steps: of stage 2, in which everything is. align_rate, joint_rate: of
    AdamW, the second one smaller. warmup: steps over which each stage's rate rises to its value.
    decay: of matrices. clip: the greatest norm of the gradient. temperature, learned in both
    stages within temperature_range. threshold: of the cosine of two queries, above which neither
    one's item is a negative of the other; None masks nothing. symmetric: items pick their queries,
    too. autocast: compute in bfloat16 what torch's autocast does. seed: of dropout, where models
    have it. save_every: steps between checkpoints.
    """

    align_steps: int = 2000
    joint_steps: int = 10_000
    align_rate: float = 1e-3
    joint_rate: float = 1e-5
    warmup: int = 100
    decay: float = 0.01
    clip: float = 1.0
    temperature: float = 0.05
    temperature_range: tuple[float | None, float | None] = (0.01, None)
    threshold: float | None = 0.9
    symmetric: bool = False
    autocast: bool = False
    seed: int = 0
    save_every: int = 500

    def __post_init__(self) -> None:
        """Check the counts and rates."""
        for name in ("align_steps", "joint_steps", "warmup"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: must not be negative, got {getattr(self, name)}")
        for name in ("align_rate", "joint_rate", "clip", "save_every"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: must be positive, got {getattr(self, name)}")
        if self.align_steps and self.joint_rate > self.align_rate:
            raise ValueError(
                f"joint_rate: must be at most align_rate={self.align_rate}, got {self.joint_rate}"
            )

    @property
    def steps(self) -> int:
        """Of both stages."""
        return self.align_steps + self.joint_steps

    def stage(self, step: int) -> str:
        """Return the stage of a step."""
        return ALIGN if step < self.align_steps else JOINT

    def rate(self, step: int) -> float:
        """Return the rate of a step."""
        align = self.stage(step) == ALIGN
        at = step if align else step - self.align_steps
        return (self.align_rate if align else self.joint_rate) * min(
            1, (at + 1) / (self.warmup + 1)
        )


def set_stage(encoder: Encoder, stage: str) -> None:
    """Let gradients reach the parts that a stage trains, and none else; those go to eval mode."""
    for name, part in encoder.named_children():
        trained = name in TRAINED[stage]
        part.requires_grad_(trained).train(trained)


class EncoderTrainer:
    r"""Trains an encoder so that queries find the items that answered them.

    The loss is `in_batch_contrastive` of the vectors of queries and items, with the other items of
    the batch as negatives, less those of queries alike (`threshold`) and of equal `item_ids`.

    All that a step does follows from the settings, the data and the step's number, so that a run
    that was stopped and resumed ends with the bits of an uninterrupted one, on the same device and
    number of threads. `trace` notes of each step the loss, the temperature, the recall at 1 in the
    batch and the share of negatives masked as too much alike. Where that share is near 1, as with a
    language model whose vectors of all texts are alike, nothing can be learned: raise `threshold`.

    Source: FLUID, section 3.1.3.

    Example:
        >>> trainer = EncoderTrainer(encoder, feed, EncoderTrainConfig(joint_steps=5000))
        >>> if path.exists():
        ...     trainer.resume(path)
        >>> trainer.run(path)
        >>> encoder.save(folder / "encoder.safetensors")
    """

    def __init__(self, encoder: Encoder, feed: PairFeed, train: EncoderTrainConfig):
        """Start before the first step; the encoder is trained in place."""
        self.encoder, self.feed, self.train = encoder, feed, train
        self.criterion = InBatchContrastive(
            temperature=train.temperature, temperature_range=train.temperature_range,
            false_negative_threshold=train.threshold, symmetric=train.symmetric,
        ).to(encoder.output.weight.device)  # fmt: skip
        self.done, self.trace = 0, defaultdict[str, list[Tensor]](list)
        self._enter(train.stage(0))

    @property
    def key(self) -> str:
        """Name the run by its data, its settings and the encoder's shape."""
        shapes = {name: list(t.shape) for name, t in self.encoder.state_dict().items()}
        train = {k: v for k, v in asdict(self.train).items() if k != "save_every"}
        text = json.dumps([self.feed.key, train, shapes], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def run(
        self,
        checkpoint: Path | None = None,
        on_step: Callable[[int], None] = lambda done: None,
        *,
        until: int | None = None,
    ) -> None:
        """Train to the end, or until so many steps are done.

        checkpoint: a file written every `save_every` steps and at the end; None writes none.
        on_step: is told of each step, 1 at a time.
        """
        last = self.train.steps if until is None else min(until, self.train.steps)
        set_stage(self.encoder, self.stage)
        while self.done < last:
            self.step()
            due = self.done % self.train.save_every == 0 or self.done == last
            if checkpoint is not None and due:
                self.save(checkpoint)
            on_step(1)

    def step(self) -> None:
        """Learn from the next batch."""
        if self.stage != self.train.stage(self.done):
            self._enter(self.train.stage(self.done))
        for group in self.adam.param_groups:
            group["lr"] = self.train.rate(self.done)
        self.adam.zero_grad(set_to_none=True)
        self._loss(self.feed.batch(self.done)).backward()
        nn.utils.clip_grad_norm_(self._trained().values(), self.train.clip)
        self.adam.step()
        self.done += 1

    def save(self, path: Path) -> None:
        """Write a checkpoint: the encoder, the loss, AdamW and what was noted."""
        kept = {f"model.{name}": tensor for name, tensor in self._modules().state_dict().items()}
        for name, parameter in self._trained().items():
            for part, tensor in self.adam.state.get(parameter, {}).items():
                kept[f"adam.{part}.{name}"] = tensor
        kept |= {f"trace.{name}": torch.stack(values) for name, values in self.trace.items()}
        checkpoints.write(path, kept, kind=_KIND, key=self.key, done=self.done, stage=self.stage)

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint. Raises: ValueError where it is none of a run like this one."""
        tensors, facts = checkpoints.read(path)
        if facts.get("kind") != _KIND:
            raise ValueError(f"path: {path} is no checkpoint of the encoder's training")
        if facts["key"] != self.key:
            raise ValueError(
                f"path: {path} is of other data, settings or models (run {facts['key']}, this is "
                f"{self.key})"
            )
        self._modules().load_state_dict(checkpoints.part(tensors, "model."))
        self._enter(facts["stage"])
        self.done = facts["done"]
        device = self.encoder.output.weight.device
        for name, parameter in self._trained().items():
            found = {part: tensors.get(f"adam.{part}.{name}") for part in _ADAM}
            if all(tensor is not None for tensor in found.values()):
                self.adam.state[parameter] = {
                    part: t.to(device) for part, t in found.items() if t is not None
                }
        for name, tensor in checkpoints.part(tensors, "trace.").items():
            self.trace[name] = list(tensor)

    def _enter(self, stage: str) -> None:
        """Begin a stage, with a new optimiser."""
        self.stage = stage
        set_stage(self.encoder, stage)
        self.criterion.train()
        matrices = [p for p in self._trained().values() if p.dim() > 1]
        others = [p for p in self._trained().values() if p.dim() <= 1]
        self.adam = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": self.train.decay},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=self.train.rate(self.train.align_steps if stage == JOINT else 0), fused=True,
        )  # fmt: skip

    def _loss(self, pairs: Pairs) -> Tensor:
        """Return the loss of a batch, and note it."""
        device = self.encoder.output.weight.device
        ids = None if pairs.item_ids is None else pairs.item_ids.to(device)
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(1_000_003 * self.train.seed + self.done)
            with torch.autocast(device.type, torch.bfloat16, enabled=self.train.autocast):
                queries = self.encoder(pairs.queries.to(device))
                items = self.encoder(pairs.items.to(device))
        temperature = self.criterion.temperature.detach().clone()
        loss: Tensor = self.criterion(queries, items, key_ids=ids)
        noted = {"loss": loss.detach(), "temperature": temperature}
        noted["masked"] = alike(queries.detach(), self.train.threshold)
        noted["recall"] = torch.tensor(recall(queries.detach(), items.detach(), 1, ids))
        for name, value in noted.items():
            self.trace[name].append(value.float().cpu())
        if self.done == 0 and len(queries) > 1 and bool(noted["masked"] == 1):
            warnings.warn("threshold: all negatives of the first batch are masked", stacklevel=4)
        return loss

    def _modules(self) -> nn.ModuleDict:
        return nn.ModuleDict({"encoder": self.encoder, "criterion": self.criterion})

    def _trained(self) -> dict[str, nn.Parameter]:
        """Return what the stage trains; the temperature belongs to the loss, in both."""
        named = self._modules().named_parameters()
        return {name: parameter for name, parameter in named if parameter.requires_grad}


def alike(queries: Tensor, threshold: float | None) -> Tensor:
    """Return the share of pairs of different rows whose cosine is greater than the threshold."""
    rows = len(queries)
    if threshold is None or rows < 2:
        return torch.zeros(())
    unit = F.normalize(queries.float(), dim=1)
    near = (unit @ unit.T > threshold).fill_diagonal_(False)
    return near.sum() / (rows * (rows - 1))


def recall(
    queries: Tensor, keys: Tensor, at: int, key_ids: Tensor | None = None, *, rows: int = 1024
) -> float:
    """Return the share of queries [M, D] whose own key [M, D] is among the `at` of greatest cosine.

    Keys as near as the own one come before it, unless they are of its id. With queries and keys
    changing places, it is the recall of items that look for their queries. rows: at a time.
    """
    if not len(queries):
        return 0.0
    unit, other = (F.normalize(t.float(), dim=1) for t in (queries, keys))
    found = 0
    for first in range(0, len(unit), rows):
        part = torch.arange(first, min(first + rows, len(unit)), device=unit.device)
        scores = unit[part] @ other.T
        ahead = scores >= scores.gather(1, part[:, None])
        same = part[:, None] == torch.arange(len(other), device=unit.device)
        if key_ids is not None:
            same |= key_ids[part][:, None] == key_ids
        found += int(((ahead & ~same).sum(1) < at).sum())
    return found / len(unit)
