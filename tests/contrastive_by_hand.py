"""The contrastive loss with every mask and correction, from its definition, as dense matrices."""

import torch
import torch.nn.functional as F


def losses_by_hand(
    query, key, *, temperature, normalize=True, symmetric=False, query_ids=None, key_ids=None,
    group_ids=None, false_negative_threshold=None, pair_vectors=None, log_q=None,
    log_q_rule="standard", valid=None, extra_keys=None,
):  # fmt: skip
    """Return the losses of all rows; differentiable by torch's own autograd."""
    batch = len(query)
    keys = key if extra_keys is None else torch.cat([key, extra_keys])
    valid = torch.ones(batch, dtype=torch.bool) if valid is None else valid
    alive = torch.cat([valid, torch.ones(len(keys) - batch, dtype=torch.bool)])
    both = valid[:, None] & alive
    own = torch.eye(batch, len(keys), dtype=torch.bool)
    positive = own | (_equal(group_ids, batch, len(keys)) & both)
    masked = _equal(query_ids, batch, len(keys)) | _equal(key_ids, batch, len(keys)) | ~both
    if false_negative_threshold is not None:
        vectors = F.normalize((query if pair_vectors is None else pair_vectors).detach(), dim=1)
        similar = vectors[:batch] @ vectors.T > false_negative_threshold
        masked[:, : len(vectors)] |= similar
    negative = ~positive & ~masked
    if normalize:
        query, keys = F.normalize(query, dim=1), F.normalize(keys, dim=1)
    logits = query @ keys.T / temperature
    log_q = 0 * logits[0] if log_q is None else F.pad(log_q, (0, len(keys) - len(log_q)))
    if log_q_rule == "standard":
        losses = _rows(logits - log_q, positive, negative)
    else:
        losses = _of_unsampled(logits, log_q, negative)
    if symmetric:
        square = (matrix[:, :batch].T for matrix in (logits, positive, negative))
        losses = (losses + _rows(*square)) / 2
    return losses


def loss_by_hand(query, key, *, weights=None, valid=None, reduction="mean", **options):
    """Return the reduced loss."""
    losses = losses_by_hand(query, key, valid=valid, **options)
    weights = torch.ones_like(losses) if weights is None else weights
    if valid is not None:
        weights = torch.where(valid, weights, 0)
    if reduction == "none":
        return losses * weights
    total = (losses * weights).sum()
    mass = weights.sum()
    return total / torch.where(mass == 0, 1, mass) if reduction == "mean" else total


def _equal(ids, rows, columns):
    """Tell which key shares the id of which row's."""
    equal = torch.zeros(rows, columns, dtype=torch.bool)
    if ids is not None:
        equal[:, : len(ids)] = ids[:rows, None] == ids
    return equal


def _rows(logits, positive, negative):
    """log of the sum over positives and negatives, less the mean of the positives."""
    some = negative.any(1)
    shown = logits.masked_fill(~(positive | negative), -torch.inf)
    mean = (logits * positive).sum(1) / positive.sum(1)
    return torch.where(some, shown.logsumexp(1) - mean, 0)


def _of_unsampled(logits, log_q, negative):
    """Negatives lose log(Q_j / (1 - Q_i)), the positive nothing; rows weigh 1 - P(positive)."""
    batch, some = len(logits), negative.any(1)
    own = logits.diagonal()
    shown = logits - log_q + torch.log(1 - log_q[:batch].exp())[:, None]
    shown = shown.masked_fill(~negative, -torch.inf)
    mass = torch.where(some, shown.logsumexp(1), 0)
    count = negative.sum(1).clamp(min=1)
    weight = 1 - 1 / (1 + (mass - own).exp() / count)
    return torch.where(some, weight.detach() * (mass - own), 0)
