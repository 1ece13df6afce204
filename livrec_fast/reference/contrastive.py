"""In-batch contrastive loss with masked negatives, as the formula has it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._formula import wide_dtype
from ._oracle import Oracle, randn

UNSAMPLED = "unsampled_positive"


def in_batch_contrastive(
    query: Tensor,
    key: Tensor,
    temperature: Tensor,
    normalize: bool,
    symmetric: bool,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    group_ids: Tensor | None,
    false_negative_threshold: float | None,
    pair_vectors: Tensor | None,
    keep_pairs: bool,
    keep_products: int,
    log_q: Tensor | None,
    log_q_rule: str,
    valid: Tensor | None,
    extra_keys: Tensor | None,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss_i = logsumexp_j s_ij - mean_p s_ip;  s_ij = <q_i, k_j> / T - log_q_j.

    j: the positives and the unmasked negatives; p: the positives, i itself and those of its group.

    Also what a kernel keeps for its gradient: logsumexp_j s_ij by row (and by column where
    `symmetric`), false negatives as bits, and products of the first rows, -inf where masked or own.

    Vectors are normalised in float32 and rounded once to their dtype; the product is in that dtype
    and all after it in float32 (float64 throughout for float64). With the precision "bf16" they are
    rounded to bfloat16 instead, and their product is in float32. An invalid row is one whose
    negatives are all masked, so its loss and gradient are 0 by themselves.
    """
    batch, wide = len(query), wide_dtype(query.dtype)
    if valid is not None:  # 0 * NaN is NaN: what invalid rows hold must not reach a product
        query, key = query.masked_fill(~valid[:, None], 0), key.masked_fill(~valid[:, None], 0)
    similar = None
    if false_negative_threshold is not None:
        compared = query if pair_vectors is None else pair_vectors
        similar = similar_pairs(compared, batch, valid, false_negative_threshold)
    extras = 0 if extra_keys is None else len(extra_keys)
    positive = positives(query, extras, group_ids, valid)
    masked = negatives_masked(query, extras, query_ids, key_ids, similar, valid)
    negative, left_out = ~masked & ~positive, masked & ~positive
    keys = key if extra_keys is None else torch.cat([key, extra_keys])
    query, keys = (rounded_units(x, normalize, precision) for x in (query, keys))
    product = (query @ keys.T).to(wide).masked_fill(left_out, 0)  # in float16 it may be infinite
    # By rows, so that the gradient of T is summed in one order, whatever the number of threads.
    similarity = product / temperature.to(wide).expand(batch, 1)
    loss, lse = _of_rows(similarity, positive, negative, log_q, log_q_rule, valid)
    if symmetric:
        square = similarity[:, :batch], positive[:, :batch], negative[:, :batch]
        other, sums = _cross_entropy(*square, dim=0)
        loss, lse = (loss + other) / 2, torch.cat([lse[:1], sums, lse[1:]])
    pairs = packed_pairs(similar if keep_pairs else None, product)
    rows = rows_kept(batch, product.shape[1], keep_products)
    kept = (negative | positive).fill_diagonal_(False)[:rows]
    products = product[:rows].detach().float().masked_fill(~kept, -torch.inf)
    return loss, lse.detach(), pairs, products


def _of_rows(
    similarity: Tensor,
    positive: Tensor,
    negative: Tensor,
    log_q: Tensor | None,
    rule: str,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return the loss of each row, corrected by log_q, and what is kept for the gradient."""
    if log_q is None:
        return _cross_entropy(similarity, positive, negative, dim=1)
    log_q = _of_all_keys(log_q, similarity.shape[1], valid).to(similarity.dtype)
    if rule == UNSAMPLED:
        return _of_unsampled(similarity, negative, log_q, valid)
    return _cross_entropy(similarity - log_q, positive, negative, dim=1)


def _cross_entropy(
    logits: Tensor, positive: Tensor, negative: Tensor, dim: int
) -> tuple[Tensor, Tensor]:
    """Return logsumexp - mean_p s_ip along `dim` and, in float64, logsumexp.

    Where there is no negative the loss is 0, and logsumexp infinite unless s_ii is all of it. A
    softmax over the diagonal alone gives exactly 0.
    """
    logs = logits.masked_fill(~(positive | negative), -torch.inf).log_softmax(dim)
    count, some = positive.sum(dim), negative.any(dim)
    loss = 0 - logs.masked_fill(~positive, 0).sum(dim) / count
    lse = logits.diagonal().double() - logs.diagonal().double()
    lse = lse.masked_fill(~some & (count > 1), torch.inf)
    return loss.masked_fill(~some, 0), lse[None]


def _of_unsampled(
    similarity: Tensor, negative: Tensor, log_q: Tensor, valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    """w_i (log sum_j exp(s_ij - log(Q_j / (1 - Q_i))) - s_ii) over the negatives j alone.

    w_i = 1 - P_i is a constant, where P_i = exp(s_ii) / (exp(s_ii) + that sum / n_i) estimates the
    full softmax of the positive from n_i negatives. For the gradient: the logsumexp by log Q_j
    alone, and w_i.
    """
    own = similarity.diagonal()
    own_log_q = log_q[: len(own)]
    if valid is not None:
        own_log_q = own_log_q.masked_fill(~valid, -torch.inf)  # it has no loss: Q_i is anything
    some, count = negative.any(1), negative.sum(1).clamp(min=1).to(own.dtype)
    corrected = (similarity - log_q).masked_fill(~negative & some[:, None], -torch.inf)
    lse = corrected.logsumexp(1)
    odds = lse + (-own_log_q.exp()).log1p() - own
    weight = (odds - count.log()).sigmoid().masked_fill(~some, 0).detach()
    return weight * odds, torch.stack([lse.double(), weight.double()])


def _of_all_keys(log_q: Tensor, keys: int, valid: Tensor | None) -> Tensor:
    """Extend log_q with zeros for extra keys that it leaves out, and for invalid rows."""
    log_q = F.pad(log_q, (0, keys - len(log_q)))
    if valid is not None:
        log_q = log_q.masked_fill(F.pad(~valid, (0, keys - len(valid))), 0)
    return log_q


def rounded_units(vectors: Tensor, normalize: bool, precision: str) -> Tensor:
    """Return unit vectors (or the given ones) as they enter the products."""
    wide, lowered = wide_dtype(vectors.dtype), vectors.dtype
    if precision == "bf16" and wide != torch.float64:
        lowered = torch.bfloat16
    unit = F.normalize(vectors.to(wide), dim=1) if normalize else vectors
    unit = unit.to(lowered)
    return unit.to(wide) if precision == "bf16" else unit


def positives(query: Tensor, extras: int, group_ids: Tensor | None, valid: Tensor | None) -> Tensor:
    """Return bool [B, B + E]: which keys are positives of which row; the diagonal always."""
    batch, keys = len(query), len(query) + extras
    own = torch.eye(batch, keys, dtype=torch.bool, device=query.device)
    if group_ids is None:
        return own
    same = group_ids[:batch, None] == group_ids
    if valid is not None:
        same = same & valid[:, None] & F.pad(valid, (0, len(group_ids) - batch), value=True)
    return own | F.pad(same, (0, keys - len(group_ids)))


def negatives_masked(
    query: Tensor,
    extras: int,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    similar: Tensor | None,
    valid: Tensor | None,
) -> Tensor:
    """Return bool [B, B + E]: which keys are no negatives of which row."""
    batch = len(query)
    masked = torch.zeros(batch, batch + extras, dtype=torch.bool, device=query.device)
    for ids in (query_ids, key_ids):
        if ids is not None:
            same = ids[:batch, None] == ids
            masked = masked | F.pad(same, (0, batch + extras - len(ids)))
    if similar is not None:
        masked = masked | F.pad(similar, (0, batch + extras - similar.shape[1]))
    if valid is not None:
        masked = masked | ~valid[:, None] | F.pad(~valid, (0, extras))
    return masked


def similar_pairs(vectors: Tensor, batch: int, valid: Tensor | None, threshold: float) -> Tensor:
    """Return bool [B, count]: which vectors have a cosine above the threshold with which row's."""
    vectors = vectors.detach()
    if valid is not None:
        vectors = vectors.masked_fill(F.pad(~valid, (0, len(vectors) - batch))[:, None], 0)
    unit = F.normalize(vectors.to(wide_dtype(vectors.dtype)), dim=1)
    similar = unit[:batch] @ unit.T > threshold
    square = similar[:, :batch]  # rounding must not drop half of a pair
    return torch.cat([square | square.T, similar[:, batch:]], dim=1)


def packed_pairs(pairs: Tensor | None, like: Tensor) -> Tensor:
    """Pack bool [B, C] into the bits of int64 [B, ceil(C / 64)], the first the lowest."""
    if pairs is None:
        return like.new_empty((0, 0), dtype=torch.int64)
    words = F.pad(pairs, (0, -pairs.shape[1] % 64)).unflatten(1, (-1, 64))
    return (words << torch.arange(64, device=like.device)).sum(2)


def rows_kept(rows: int, keys: int, products: int) -> int:
    """Return of how many rows products are kept, where at most so many products are."""
    return rows if rows * keys <= products else products // keys


def make_inputs(
    generator: torch.Generator,
    dtype: torch.dtype,
    *,
    B: int,
    D: int,
    E: int,
    P: int = 0,
    groups: int = 0,
    rule: int = 0,
    bf16: int = 0,
) -> dict[str, Any]:
    """Draw every kind of mask and correction at once, both directions, one loss per row.

    P: the width of pair_vectors, 0 for none. groups: 1, ids of groups; then the rule is 0, the
    standard one. rule: 1, the unsampled positive's. bf16: 1, that precision.
    """

    def ids(count: int, most: int = 2 * B + 1) -> Tensor:
        return torch.randint(most, (count,), generator=generator)

    wide = wide_dtype(dtype)
    inputs: dict[str, Any] = {
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
    if P > 0:
        inputs |= {"pair_vectors": randn(generator, dtype, B + E, P), "query_ids": ids(B + E)}
    if groups:
        inputs["group_ids"] = ids(B + E, B // 3 + 1)
    elif rule:
        inputs |= {"log_q_rule": UNSAMPLED, "log_q": -inputs["log_q"].abs() - 0.01}
    return inputs | ({"precision": "bf16"} if bf16 else {})


_SIZES = {
    "B": (0, 70), "D": (1, 40), "E": (0, 20), "P": (0, 9),
    "groups": (0, 1), "rule": (0, 1), "bf16": (0, 1),
}  # fmt: skip
_CASES = {
    "typical": {"B": 96, "D": 32, "E": 24},
    "groups": {"B": 96, "D": 32, "E": 24, "groups": 1},
    "pair vectors": {"B": 70, "D": 16, "E": 24, "P": 5},
    "unsampled positive": {"B": 96, "D": 32, "E": 24, "rule": 1},
    "bf16": {"B": 96, "D": 32, "E": 24, "bf16": 1},
    "no rows": {"B": 0, "D": 8, "E": 4},
    "no rows and no extra keys": {"B": 0, "D": 8, "E": 0},
    "one row": {"B": 1, "D": 8, "E": 0},
    "one row with extra keys": {"B": 1, "D": 8, "E": 3, "P": 2},
    "one row of several positives": {"B": 1, "D": 8, "E": 3, "groups": 1},
    "one dimension": {"B": 5, "D": 1, "E": 2},
    "no extra keys": {"B": 40, "D": 16, "E": 0},
}
ORACLES = {"in_batch_contrastive": Oracle(in_batch_contrastive, make_inputs, _SIZES, _CASES)}
