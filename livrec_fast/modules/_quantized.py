"""Embeddings of codes in 8 bits, for inference."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ._lookup import Lookup


class QuantizedPrefixNgramEmbedding(nn.Module):
    """Tables of int8 with a float32 scale per row: what `quantized()` of an embedding returns.

    Row w becomes round(w / s) with s = max |w| / 127, so that no element is off by more than s / 2.
    The result is float32, and has no gradient.
    """

    def __init__(self, tables: Sequence[Tensor], lookup: Lookup, out_dim: int):
        """Quantise tables, whose codes are looked up by `lookup`."""
        super().__init__()
        self.lookup, self.out_dim = lookup, out_dim
        for level, table in enumerate(tables):
            values, scale = _quantize(table.detach())
            self.register_buffer(f"table_{level}", values)
            self.register_buffer(f"scale_{level}", scale)

    @property
    def tables(self) -> list[Tensor]:
        """The tables, int8 [H_l, d_l]."""
        return [self.get_buffer(f"table_{level}") for level in range(len(self.lookup.levels))]

    @property
    def scales(self) -> list[Tensor]:
        """What a row's integers are multiplied by, float32 [H_l]."""
        return [
            self.get_buffer(f"scale_{level}").float() for level in range(len(self.lookup.levels))
        ]

    def forward(
        self, codes: Tensor, offsets: Tensor | None = None, *, packed: bool = False
    ) -> Tensor:
        """Embed codes as the embedding did."""
        return self.lookup.embed(codes, self.tables, offsets, packed, scales=self.scales)

    def extra_repr(self) -> str:
        """Describe the embedding in `print(module)`."""
        return f"levels={tuple(self.lookup.levels)}, out_dim={self.out_dim}, dtype=int8"


def _quantize(table: Tensor) -> tuple[Tensor, Tensor]:
    wide = table.float()
    scale = wide.abs().amax(1) / 127
    scale = torch.where(scale > 0, scale, 1)
    return (wide / scale[:, None]).round_().clamp_(-127, 127).to(torch.int8), scale
