"""Several contrastive losses that share their queries: each by itself, as the formula has it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._formula import wide_dtype
from ._oracle import Oracle, randn
from .contrastive import in_batch_contrastive


def in_batch_contrastive_multi(
    anchor: Tensor,
    keys: Tensor,
    temperatures: Tensor,
    normalize: bool,
    symmetric: bool,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    false_negative_threshold: float | None,
    keep_pairs: bool,
    valid: Tensor | None,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """losses_t = in_batch_contrastive(anchor, keys_t); also what a kernel keeps for its gradient.

    Rows that are not valid in any term are not read; one that some term reads is compared in all.
    """
    if valid is not None:
        anchor = anchor.masked_fill(~valid.any(0)[:, None], 0)

    def at(of_terms: Tensor | None, term: int) -> Tensor | None:
        return None if of_terms is None else of_terms[term]

    terms = [
        in_batch_contrastive(
            anchor, keys[t], temperatures[t], normalize, symmetric, query_ids, at(key_ids, t), None,
            false_negative_threshold, None, keep_pairs, False, None, "standard", at(valid, t), None,
            precision,
        )[:3]
        for t in range(len(keys))
    ]  # fmt: skip
    losses, lse, pairs = zip(*terms, strict=True)
    return torch.stack(losses), torch.stack(lse), pairs[0]


def make_inputs(
    generator: torch.Generator, dtype: torch.dtype, *, B: int, D: int, T: int, temperatures: int
) -> dict[str, Any]:
    """Draw every kind of mask at once. temperatures: 1, one for each term; 0, one for all."""

    def ids(*shape: int) -> Tensor:
        return torch.randint(2 * B + 1, shape, generator=generator)

    wide = wide_dtype(dtype)
    return {
        "anchor": randn(generator, dtype, B, D),
        "keys": randn(generator, dtype, T, B, D),
        "temperature": torch.linspace(0.07, 0.2, T).to(wide)
        if temperatures
        else torch.tensor(0.1, dtype=wide),
        "symmetric": True,
        "query_ids": ids(B),
        "key_ids": ids(T, B),
        "false_negative_threshold": 0.4,
        "weights": torch.rand(T, B, generator=generator, dtype=wide),
        "valid": torch.rand(T, B, generator=generator) < 0.8,
        "reduction": "none",
    }


_SIZES = {"B": (0, 70), "D": (1, 40), "T": (1, 5), "temperatures": (0, 1)}
_CASES = {
    "typical": {"B": 96, "D": 32, "T": 4, "temperatures": 1},
    "one temperature": {"B": 70, "D": 16, "T": 3, "temperatures": 0},
    "no rows": {"B": 0, "D": 8, "T": 2, "temperatures": 0},
    "one row": {"B": 1, "D": 8, "T": 2, "temperatures": 1},
    "one term": {"B": 40, "D": 8, "T": 1, "temperatures": 0},
}
ORACLES = {
    "in_batch_contrastive_multi": Oracle(in_batch_contrastive_multi, make_inputs, _SIZES, _CASES)
}
