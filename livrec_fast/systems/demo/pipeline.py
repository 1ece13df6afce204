"""The demo from data to results, without any output of its own."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from ...data.movielens import Ratings
from ...data.word_vectors import WordVectors
from .evaluation import Metrics, baselines, evaluate, positive_counts
from .items import Items, make_items
from .model import DemoModel, Shape
from .samples import Blocks, Split, chronological_split, training_batches
from .training import Agreement, Run, Trainer, compare, train

BACKENDS = ("reference", "auto")
LEVELS = (512, 256, 128)

# Relative, of the losses at each step. Rounding of 1e-7 grows to 1e-5 in the ranking loss over 800
# steps. It moves the contrastive loss by up to 3e-4 in steps where the cosine of two users lies so
# near the false-negative threshold that rounding decides whether they mask each other.
TOLERANCE = {"ranking": 2e-4, "contrast": 2e-3}

# (stage, total units) opens a progress bar; the function it returns advances it by some units.
Progress = Callable[[str, int], Callable[[int], None]]


@dataclass(frozen=True)
class Settings:
    """What a run of the demo does.

    users: blocks in a batch. candidates: ratings in a block, at most. test_blocks: sampled for the
    evaluation.
    """

    steps: int
    test_blocks: int
    seed: int = 0
    device: torch.device = torch.device("cpu")
    users: int = 64
    candidates: int = 16
    train_share: float = 0.8
    learning_rate: float = 5e-3
    shape: Shape = Shape()


@dataclass(frozen=True)
class Results:
    """All that the report shows."""

    settings: Settings
    ratings: Ratings
    split: Split
    tested: Blocks
    items: Items
    runs: dict[str, Run]
    baselines: Metrics
    agreement: Agreement
    seconds: dict[str, float]


def run(ratings: Ratings, words: WordVectors, settings: Settings, progress: Progress) -> Results:
    """Make codes, train twice from one seed, evaluate both runs, compare them."""
    clock = _Stages()
    device = settings.device
    advance = progress("codebooks", 2)
    items = make_items(ratings, words, LEVELS, settings.seed, device, on_fit=lambda: advance(1))
    clock.lap("codebooks")
    split = chronological_split(ratings, settings.train_share, settings.candidates)
    tested = _sample(split.test, settings.test_blocks, settings.seed)
    trainers = [
        Trainer(
            _new_model(items, ratings, split, backend, settings),
            device, settings.learning_rate, settings.steps,
        )
        for backend in BACKENDS
    ]  # fmt: skip
    batches = training_batches(
        ratings, split.train, settings.candidates,
        users=settings.users, steps=settings.steps, seed=settings.seed,
    )  # fmt: skip
    train(trainers, batches, progress("training, both", settings.steps))
    clock.lap("training")
    runs = {trainer.run.backend: trainer.run for trainer in trainers}
    for trainer in trainers:
        trainer.run.metrics = evaluate(
            trainer.model, ratings, tested, split.time, settings.candidates, device,
            progress(f"evaluation, {trainer.run.backend}", len(tested)),
        )  # fmt: skip
    clock.lap("evaluation")
    return Results(
        settings,
        ratings,
        split,
        tested,
        items,
        runs,
        baselines(ratings, tested, split),
        compare(runs["reference"], runs["auto"], TOLERANCE),
        clock.seconds,
    )


def _new_model(
    items: Items, ratings: Ratings, split: Split, backend: str, settings: Settings
) -> DemoModel:
    """Make the model from the seed: the same parameters for either backend."""
    liked = positive_counts(ratings, split.time) + 1.0
    log_q = torch.from_numpy(np.log(liked / liked.sum())).float().to(settings.device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = DemoModel(
            items.vectors, items.packed, items.codebooks, log_q, settings.shape, backend
        )
    return model.to(settings.device)


def _sample(blocks: Blocks, most: int, seed: int) -> Blocks:
    chosen = np.random.default_rng(seed).permutation(len(blocks))[:most]
    return blocks.take(np.sort(chosen))


class _Stages:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        """Record the time since the lap before under `stage`."""
        now = time.perf_counter()
        self.seconds[stage], self._last = now - self._last, now
