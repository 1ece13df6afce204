"""A small encoder, and content drawn for it, for the tests of FLUID's encoder."""

import torch

from livrec_fast.systems.fluid.encoder import Encoder
from livrec_fast.systems.fluid.encoder_inputs import Content
from livrec_fast.systems.fluid.encoder_training import Pairs

VISION = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "patch_size": 2, "num_patches": 16,
}  # fmt: skip
LANGUAGE = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "eos_token_id": 39,
    "max_position_embeddings": 128, "initializer_range": 0.3,
}  # fmt: skip
DIM, PATCH = 8, 3 * 2 * 2


def small(seed=0, **vision):
    return Encoder.from_settings({**VISION, **vision}, LANGUAGE, seed=seed, dim=DIM)


def drawn(frames, lengths, seed=0, patches=9, tokens=None):
    """Draw content: rows with so many frames and tokens each, frames of different shapes."""
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.tensor([0, *frames]).cumsum(0)
    total = int(offsets[-1])
    grids = torch.randint(1, 4, (total, 2), generator=generator)
    mask = torch.arange(patches) < grids.prod(1)[:, None]
    token_mask = torch.arange(max(lengths, default=0)) < torch.tensor(lengths)[:, None]
    words = torch.randint(39, token_mask.shape, generator=generator) if tokens is None else tokens
    pixels = torch.randn(total, patches, PATCH, generator=generator) * mask[..., None]
    return Content(words * token_mask, token_mask, pixels, mask, grids, offsets)


class Topics:
    """Pairs of which each has a topic, told by the query's words and by the item's frames."""

    key = "topics"

    def __init__(self, rows=12, topics=6, distinct=True):
        self.rows, self.topics, self.distinct = rows, topics, distinct
        self.looks = torch.randn(topics, 4, PATCH, generator=torch.Generator().manual_seed(9))

    def batch(self, step):
        """Return the pairs of a step."""
        generator = torch.Generator().manual_seed(step)
        topic = torch.randint(self.topics, (self.rows,), generator=generator)
        if self.distinct:
            topic = torch.randperm(self.topics, generator=generator)[: self.rows]
        rows = len(topic)
        everything = torch.ones(rows, 2, dtype=torch.bool)
        queries = Content.of_texts(torch.stack([topic, topic + self.topics], 1), everything)
        noise = torch.randn(rows, 4, PATCH, generator=generator)
        pixels = self.looks[topic] + 0.3 * noise
        words = torch.randint(30, 38, (rows, 2), generator=generator)
        items = Content(
            words, everything, pixels, torch.ones(rows, 4, dtype=torch.bool),
            torch.full((rows, 2), 2), torch.arange(rows + 1),
        )  # fmt: skip
        return Pairs(queries, items)
