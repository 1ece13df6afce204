"""In-batch contrastive loss with masked negatives, as the formula has it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._formula import wide_dtype
from ._oracle import Oracle, randn


def in_batch_contrastive(
    query: Tensor,
    key: Tensor,
    temperature: Tensor,
    normalize: bool,
    symmetric: bool,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    false_negative_threshold: float | None,
    keep_pairs: bool,
    log_q: Tensor | None,
    valid: Tensor | None,
    extra_keys: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """loss_i = logsumexp_j s_ij - s_ii over the unmasked j;  s_ij = <q_i, k_j> / T - log_q_j.

    Also what a kernel keeps for its gradient: logsumexp_j s_ij by row (and by column where
    `symmetric`), and false negatives as bits.

    Vectors are normalised in float32 and rounded once to their dtype; the product is in that dtype
    and all after it in float32 (float64 throughout for float64). An invalid row is one whose
    negatives are all masked, so its loss and gradient are 0 by themselves.
    """
    wide = wide_dtype(query.dtype)
    if valid is not None:  # 0 * NaN is NaN: what invalid rows hold must not reach a product
        query = query.masked_fill(~valid[:, None], 0)
        key = key.masked_fill(~valid[:, None], 0)
    similar = None
    if false_negative_threshold is not None:
        similar = similar_pairs(query, false_negative_threshold)
    extras = 0 if extra_keys is None else len(extra_keys)
    masked = negatives_masked(query, extras, query_ids, key_ids, similar, valid)
    keys = key if extra_keys is None else torch.cat([key, extra_keys])
    if normalize:
        query = F.normalize(query.to(wide), dim=1).to(query.dtype)
        keys = F.normalize(keys.to(wide), dim=1).to(keys.dtype)
    product = (query @ keys.T).to(wide).masked_fill(masked, 0)  # a float16 product may be infinite
    # By rows, so that the gradient of T is summed in one order, whatever the number of threads.
    similarity = product / temperature.to(wide).expand(len(query), 1)
    logits = similarity if log_q is None else similarity - _of_all_keys(log_q, keys, valid).to(wide)
    loss, lse = _cross_entropy(logits, masked, dim=1)
    sums = [lse]
    if symmetric:
        batch = len(query)
        other, lse = _cross_entropy(similarity[:, :batch], masked[:, :batch], dim=0)
        loss = (loss + other) / 2
        sums.append(lse)
    return loss, torch.stack(sums).detach(), packed_pairs(similar if keep_pairs else None, query)


def _cross_entropy(logits: Tensor, masked: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Return logsumexp - s_ii along `dim` and, in float64, logsumexp.

    A softmax over the diagonal alone gives exactly 0.
    """
    loss = 0 - logits.masked_fill(masked, -torch.inf).log_softmax(dim).diagonal()
    return loss, logits.diagonal().double() + loss.double()


def _of_all_keys(log_q: Tensor, keys: Tensor, valid: Tensor | None) -> Tensor:
    """Extend log_q with zeros for extra keys that it leaves out, and for invalid rows."""
    log_q = F.pad(log_q, (0, len(keys) - len(log_q)))
    if valid is not None:
        log_q = log_q.masked_fill(F.pad(~valid, (0, len(keys) - len(valid))), 0)
    return log_q


def negatives_masked(
    query: Tensor,
    extras: int,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    similar: Tensor | None,
    valid: Tensor | None,
) -> Tensor:
    """Return bool [B, B + E]: which keys are no negatives of which row; never the diagonal."""
    batch = len(query)
    pairs = torch.zeros(batch, batch, dtype=torch.bool, device=query.device)
    if query_ids is not None:
        pairs = pairs | (query_ids[:, None] == query_ids)
    if similar is not None:
        pairs = pairs | similar
    if valid is not None:
        pairs = pairs | ~valid[:, None] | ~valid
    masked = F.pad(pairs, (0, extras))
    if valid is not None:
        masked = masked | ~valid[:, None]
    if key_ids is not None:
        same = key_ids[:batch, None] == key_ids
        masked = masked | F.pad(same, (0, batch + extras - len(key_ids)))
    return masked & ~torch.eye(batch, batch + extras, dtype=torch.bool, device=query.device)


def similar_pairs(query: Tensor, threshold: float) -> Tensor:
    """Return bool [B, B]: which queries have a cosine above the threshold."""
    unit = F.normalize(query.detach().to(wide_dtype(query.dtype)), dim=1)
    similar = unit @ unit.T > threshold
    return similar | similar.T  # rounding must not drop half of a pair


def packed_pairs(pairs: Tensor | None, query: Tensor) -> Tensor:
    """Pack bool [B, B] into the bits of int64 [B, ceil(B / 64)], the first the lowest."""
    if pairs is None:
        return query.new_empty((0, 0), dtype=torch.int64)
    words = F.pad(pairs, (0, -len(pairs) % 64)).unflatten(1, (-1, 64))
    return (words << torch.arange(64, device=query.device)).sum(2)


def make_inputs(
    generator: torch.Generator, dtype: torch.dtype, *, B: int, D: int, E: int
) -> dict[str, Any]:
    """Draw every kind of mask and correction at once, both directions, one loss per row."""

    def ids(count: int) -> Tensor:
        return torch.randint(2 * B + 1, (count,), generator=generator)

    wide = wide_dtype(dtype)
    return {
        "query": randn(generator, dtype, B, D),
        "key": randn(generator, dtype, B, D),
        "temperature": torch.tensor(0.07, dtype=wide),
        "normalize": True,
        "symmetric": True,
        "query_ids": ids(B),
        "key_ids": ids(B + E),
        "false_negative_threshold": 0.6,
        "log_q": randn(generator, wide, B + E),
        "weights": torch.rand(B, generator=generator, dtype=wide),
        "valid": torch.rand(B, generator=generator) < 0.9,
        "extra_keys": randn(generator, dtype, E, D),
        "reduction": "none",
    }


_SIZES = {"B": (0, 70), "D": (1, 40), "E": (0, 20)}
_CASES = {
    "typical": {"B": 96, "D": 32, "E": 24},
    "no rows": {"B": 0, "D": 8, "E": 4},
    "no rows and no extra keys": {"B": 0, "D": 8, "E": 0},
    "one row": {"B": 1, "D": 8, "E": 0},
    "one row with extra keys": {"B": 1, "D": 8, "E": 3},
    "one dimension": {"B": 5, "D": 1, "E": 2},
    "no extra keys": {"B": 40, "D": 16, "E": 0},
}
ORACLES = {"in_batch_contrastive": Oracle(in_batch_contrastive, make_inputs, _SIZES, _CASES)}
