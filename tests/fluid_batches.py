"""Batches made by hand for the tests of FLUID, of random ids and codes."""

from types import SimpleNamespace

import torch

from livrec_fast.systems.fluid.config import ModelConfig, Sizes, TrainConfig

LEVELS = (4, 4, 4)
SIZES = Sizes(users=20, rooms=30, authors=10, gaps=8)
MODEL = ModelConfig(
    levels=LEVELS, width=8, table_dim=4, max_rows=40, hidden=8, tower=4, experts=2, start=1.0
)
TRAIN = TrainConfig(requests=8, length=10, save_every=2)


def make_batch(seed=0, requests=6, candidates=4, most=9):
    """Draw a batch; candidate 0 is clicked, some codes are unknown, one history is empty."""
    generator = torch.Generator().manual_seed(seed)

    def draw(high, *shape, low=0):
        return torch.randint(low, high, shape, generator=generator)

    lengths = draw(most, requests)
    lengths[0] = 0
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    total, grid, depth = int(offsets[-1]), (requests, candidates), len(LEVELS)
    slices, rooms = (draw(4, *grid, depth).to(torch.int16) for _ in range(2))
    slices[1, 0] = rooms[1, 0] = -1
    labels = torch.zeros(*grid, SIZES.tasks)
    labels[:, 0] = draw(2, requests, SIZES.tasks).float()
    labels[:, 0, 0] = 1
    mask = torch.ones(*grid, SIZES.tasks, dtype=torch.bool)
    mask[:, :, 2] = draw(2, *grid) > 0
    return SimpleNamespace(
        user=draw(SIZES.users, requests),
        room=draw(SIZES.rooms, *grid),
        author=draw(SIZES.authors, *grid),
        slice_codes=slices,
        room_codes=rooms,
        dense=torch.randn(*grid, SIZES.features, generator=generator),
        age_s=torch.rand(*grid, generator=generator) * 3600,
        offsets=offsets,
        history_author=draw(SIZES.authors, total),
        history_codes=draw(4, total, depth, low=-1).to(torch.int16),
        history_gap=draw(SIZES.gaps, total).to(torch.uint8),
        history_kind=draw(3, total).to(torch.uint8),
        labels=labels,
        mask=mask,
        new_room=draw(2, *grid) > 0,
        ts=torch.arange(requests),
    )


class HandMade:
    """What training reads, of batches made by hand: a click follows from the slice's first code."""

    key = "hand-made"
    sizes = SIZES
    mean, deviation = torch.zeros(SIZES.features), torch.ones(SIZES.features)
    codebooks = None

    def __init__(self, steps=3, requests=6, wait=15):
        self.count, self.requests, self.wait = steps, requests, wait

    def steps(self, period):
        """Return how many batches a period has."""
        return self.count

    def times(self, period, step):
        """Return when a batch begins, ten after the one before, when it ends and is known."""
        first = 10 * (period * self.count + step)
        return first, first + 9, first + 9 + self.wait

    def batch(self, period, step):
        """Return one of them."""
        made = make_batch(100 * period + step + 1, self.requests)
        made.labels[..., 0] = (made.slice_codes[..., 0] == 1).float()
        return made
