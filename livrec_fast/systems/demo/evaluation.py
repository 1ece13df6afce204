"""Ranking and retrieval on the test blocks, beside baselines that know no user."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch.nn import functional as F

from ...data.movielens import Ratings
from .metrics import auc, gauc, hit_rates
from .model import DemoModel
from .samples import POSITIVE, Batch, Blocks, Split, make_batch

KS = (10, 50, 100)
USERS = 128  # in a batch of the evaluation
SMOOTHING = 10  # ratings of the overall mean that an item's mean starts from

Metrics = dict[str, float]


@torch.no_grad()
def evaluate(
    model: DemoModel,
    ratings: Ratings,
    blocks: Blocks,
    split_time: int,
    size: int,
    device: torch.device,
    on_batch: Callable[[int], None] = lambda blocks: None,
) -> Metrics:
    """Score the candidates and retrieve from all items, for each block from its own history."""
    model.eval()
    every = torch.arange(len(ratings.titles), device=device)
    items = F.normalize(model.items(every), dim=1)
    scores, similarities = [], []
    for begin in range(0, len(blocks), USERS):
        part = blocks.take(np.arange(begin, min(begin + USERS, len(blocks))))
        batch: Batch = make_batch(ratings, part, size).to(device)
        codes = model.codes_of(batch.history)
        scores.append(model.rank(batch, codes)[batch.valid].cpu().numpy())
        users = F.normalize(model.users(batch, codes), dim=1)
        similarities.append((users @ items.T).cpu().numpy())
        on_batch(len(part))
    return {
        **ranking_metrics(np.concatenate(scores), ratings, blocks),
        **retrieval_metrics(np.concatenate(similarities), ratings, blocks, split_time),
    }


def baselines(ratings: Ratings, blocks: Blocks, split: Split) -> Metrics:
    """Rank by the item's mean training rating; retrieve by the number of its training positives."""
    known = ratings.time < split.time
    items, stars = ratings.item[known], ratings.rating[known]
    count = np.bincount(items, minlength=len(ratings.titles))
    total = np.bincount(items, stars, minlength=len(ratings.titles))
    mean = (total + SMOOTHING * stars.mean()) / (count + SMOOTHING)
    popular = positive_counts(ratings, split.time).astype(np.float64)
    shown = np.broadcast_to(popular, (len(blocks), len(popular)))
    return {
        **ranking_metrics(mean[ratings.item[_events(blocks)]], ratings, blocks),
        **retrieval_metrics(shown, ratings, blocks, split.time),
    }


def positive_counts(ratings: Ratings, before: int) -> np.ndarray:
    """Return how often each item was rated positively before a time."""
    liked = (ratings.time < before) & (ratings.rating >= POSITIVE)
    return np.bincount(ratings.item[liked], minlength=len(ratings.titles))


def ranking_metrics(scores: np.ndarray, ratings: Ratings, blocks: Blocks) -> Metrics:
    """Return AUC and GAUC of the blocks' candidates, scored in order."""
    events = _events(blocks)
    labels = ratings.rating[events] >= POSITIVE
    grouped, users = gauc(scores, labels, ratings.user[events])
    return {"AUC": auc(scores, labels), "GAUC": grouped, "GAUC users": users}


def retrieval_metrics(
    scores: np.ndarray, ratings: Ratings, blocks: Blocks, split_time: int
) -> Metrics:
    """Return HR@k of the blocks' positives: of all with a history, and of returning users.

    A returning user has ratings from before the split; the others signed up after it.
    """
    wanted = np.zeros(scores.shape, dtype=bool)
    seen = np.zeros(scores.shape, dtype=bool)
    events, rows = _events(blocks), np.repeat(np.arange(len(blocks)), blocks.last - blocks.first)
    liked = ratings.rating[events] >= POSITIVE
    wanted[rows[liked], ratings.item[events[liked]]] = True
    for row, (begin, end) in enumerate(zip(blocks.begin, blocks.end, strict=True)):
        seen[row, ratings.item[begin:end]] = True
    some = blocks.end > blocks.begin
    returning = some & (ratings.time[blocks.begin] < split_time)
    found = {}
    for name, group in (("", some), (", returning", returning)):
        rates = hit_rates(scores[group], wanted[group], seen[group], KS)
        found.update({f"HR@{k}{name}": rate for k, rate in rates.items()})
    return found


def _events(blocks: Blocks) -> np.ndarray:
    """Return the positions of the blocks' candidates, block by block."""
    lengths = blocks.last - blocks.first
    within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return np.repeat(blocks.first, lengths) + within
