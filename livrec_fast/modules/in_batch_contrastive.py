"""The in-batch contrastive loss as a module: its temperature, a queue, negatives of all ranks."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import FLOATS, check_choice, check_one_dtype, check_same, check_tensor
from ..ops import _contrastive as checks
from ..ops.contrastive import in_batch_contrastive
from . import _contrastive_ranks as over_ranks
from ._contrastive_ranks import Group
from ._key_rows import KeyRows, arguments, divide, joined
from .cross_batch_queue import CrossBatchQueue


class InBatchContrastive(nn.Module):
    r"""`in_batch_contrastive` with a temperature of its own, a queue, and negatives of all ranks.

    The temperature is $T = e^\tau$ with $\tau$ the parameter `log_temperature`, 0-d, so that it
    stays positive; CLIP's logit_scale is $-\tau$. Keep it out of weight decay, which draws T to 1.

    Queue: the keys that a `CrossBatchQueue` holds are further negatives of every row; in training
    mode each call then pushes the batch's valid keys, with what the queue keeps of them. What the
    queue does not keep cannot mask: its keys then have no ids, log_q 0 and no pair vectors.

    Ranks: with ranks="gathered", the loss is that of one process on the joined batch: B, and E,
    are the ranks' together, each rank with its own number of rows, which may be 0. The ids,
    groups, log_q and pair vectors of the keys travel with them; invalid rows stay at home. Reduced
    by "mean" or "sum", the value is that of the joined batch, equal on all ranks, and its gradient
    on one rank is the ranks' number times that rank's share, so that the mean of the ranks'
    gradients, which DistributedDataParallel takes, is the joined batch's; where gradients are
    summed instead, divide the loss by the number of ranks. By "none", a rank has the losses of its
    own rows, and the gradient is that of what the ranks make of theirs, added up. The gradient of
    log_temperature is the mean over the ranks on every rank, averaged again or not. A queue is
    pushed the keys of all ranks, in their order, and stays the same on each.

    Each rank computes its own rows: of logits B_rank x (B + E), never made at once, and as many for
    `symmetric`, which takes a second call with queries and keys changing places. Memory: the keys
    of the other ranks (and their queries, for `symmetric`), and while they travel twice as much
    again. Collectives: two small ones and one of all rows, padded to the rank that has the most;
    one in the backward pass, of the gradients alone, in the keys' dtype. All ranks must call
    forward and backward alike; what travels must have the same dtypes, widths and requires_grad.
    An error raised on one rank leaves the others waiting until the process group's timeout. The
    same inputs give the same bits: gradients are added in the order of the ranks. Where
    torch.distributed has not been started, the one process is all ranks.

    Works under autocast, under DistributedDataParallel (with broadcast_buffers=False, the queue is
    not sent at each step) and under torch.compile, where the queue and the exchange between ranks
    break the graph. What else it computes is `in_batch_contrastive`'s: numerics, bits, workspace.

    Source: CLIP, Radford et al. 2021 (learned temperature, clamped; both directions over all
    ranks); MoCo, He et al. 2020, and XBM, Wang et al. 2020 (negatives of past batches).

    Example:
        >>> criterion = InBatchContrastive(temperature_range=(0.01, None), symmetric=True)
        >>> loss = criterion(users, rooms, key_ids=room_ids)
        >>> loss.backward()
    """

    def __init__(
        self,
        *,
        temperature: float = 0.07,
        learnable: bool = True,
        temperature_range: tuple[float | None, float | None] | None = None,
        normalize: bool = True,
        symmetric: bool = False,
        false_negative_threshold: float | None = None,
        log_q_rule: str = "standard",
        precision: str | None = None,
        keep_products: bool = False,
        reduction: str = "mean",
        queue: CrossBatchQueue | None = None,
        ranks: str = "own",
        group: Any = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        backend: str = "auto",
    ):
        """Set the loss up.

        Args:
            temperature: T > 0 to start with.
            learnable: T wants a gradient.
            temperature_range: the least and the greatest T, None for no limit; CLIP's are (0.01,
                None). In training mode each call first puts the parameter back into it, so that
                a step beyond is undone, and the gradient at a limit is that of the formula.
            normalize: as of the op, as are the next five.
            symmetric: average with the loss of keys that pick their query.
            false_negative_threshold: of the cosine of pair vectors.
            log_q_rule: "standard" or "unsampled_positive".
            precision: None or "bf16".
            keep_products: as of the op.
            reduction: "mean", "sum" or "none".
            queue: of past keys, which becomes part of this module.
            ranks: "own", the negatives of this process, or "gathered", those of all ranks.
            group: the ranks' process group; torch's default one where None.
            dtype: of log_temperature; float32 where None.
            device: of log_temperature.
            backend: of the op.

        Raises: TypeError, ValueError: what is wrong with which setting.
        """
        super().__init__()
        self._range = checks.log_range(temperature, temperature_range)
        checks.check_flags(
            learnable=learnable, normalize=normalize, symmetric=symmetric,
            keep_products=keep_products,
        )  # fmt: skip
        checks.check_threshold(false_negative_threshold)
        check_choice("log_q_rule", log_q_rule, checks.RULES)
        check_choice("precision", precision, checks.PRECISIONS)
        check_choice("reduction", reduction, checks.REDUCTIONS)
        check_choice("ranks", ranks, ("own", "gathered"))
        if queue is not None and not isinstance(queue, CrossBatchQueue):
            raise TypeError(f"queue: must be a CrossBatchQueue, got {type(queue).__name__}")
        self.normalize, self.symmetric = normalize, symmetric
        self.false_negative_threshold = false_negative_threshold
        self.log_q_rule, self.precision, self.reduction = log_q_rule, precision, reduction
        self.keep_products = keep_products
        self.queue, self.ranks, self.group, self.backend = queue, ranks, group, backend
        start = torch.tensor(math.log(temperature), dtype=dtype or torch.float32, device=device)
        self.log_temperature = nn.Parameter(start, requires_grad=learnable)

    @property
    def temperature(self) -> Tensor:
        """T, 0-d, within its range."""
        return self.log_temperature.clamp(*self._range).exp()

    def forward(
        self, query: Tensor, key: Tensor, *, query_ids: Tensor | None = None,
        key_ids: Tensor | None = None, group_ids: Tensor | None = None,
        pair_vectors: Tensor | None = None, log_q: Tensor | None = None,
        weights: Tensor | None = None, valid: Tensor | None = None,
        extra_keys: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Return the loss, as `in_batch_contrastive` does; B and E are this rank's.

        Args:
            query: [B, D] float32, float16, bfloat16 or float64.
            key: [B, D], query's dtype.
            query_ids: int64 [B] or [B + E].
            key_ids: int64 [B] or [B + E].
            group_ids: int64 [B] or [B + E].
            pair_vectors: [B, P] or [B + E, P]; query where None.
            log_q: [B] or [B + E] float32 or float64.
            weights: [B] float32 or float64, not negative.
            valid: bool [B].
            extra_keys: [E, D], query's dtype; with ranks="gathered", negatives of all ranks' rows.

        Returns:
            0-d, or [B] where the reduction is "none"; float64 for float64 inputs, else float32.

        Raises:
            TypeError, ValueError, BackendError: as `in_batch_contrastive`, which names the
            argument. ValueError: the ranks bring different things, or a queue that keeps what is
            not given.
        """
        temperature = self._temperature()
        group = Group.of(self.group) if self.ranks == "gathered" else Group(None, 1, 0)
        known: dict[str, Any] = {
            "key_ids": key_ids, "query_ids": query_ids, "group_ids": group_ids,
            "log_q": log_q, "pair_vectors": pair_vectors,
        }  # fmt: skip
        rows: dict[str, Any] = {"weights": weights, "valid": valid}
        if self.queue is None and group.size == 1:
            given = {name: value for name, value in known.items() if value is not None}
            whole = {"extra_keys": extra_keys, **rows, **given}
            return self._loss(query, key, temperature, **self._whole, **whole)
        _check(query, key, extra_keys, rows, known)
        own, extra = divide(key, extra_keys, known)
        more = [] if extra is None else [extra]
        if group.size > 1:
            return self._over_ranks(group, query, own, more, temperature, **rows)
        if self._queues_pair_vectors():
            own = _with_pair_vectors(own, query)
        given = arguments(own, [*more, *self._past()], self.false_negative_threshold)
        loss = self._loss(query, key, temperature, **self._whole, **rows, **given)
        self._push(own if valid is None else own.take(valid))
        return loss

    def _over_ranks(
        self, group: Group, query: Tensor, own: KeyRows, extra: list[KeyRows],
        temperature: Tensor, weights: Tensor | None, valid: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Compute this rank's rows against the keys of all ranks."""
        threshold, past = self.false_negative_threshold, self._past()
        needed = threshold is not None or self._queues_pair_vectors()
        default = needed and own.pair_vectors is None
        rows = slice(None) if valid is None else valid
        own = _with_pair_vectors(own, query) if default else own
        sent, queries = own.take(rows), query[rows] if self.symmetric else None
        near = over_ranks.gather(group, sent, queries, extra, temperature, default)
        losses = self._loss(
            query, own.keys, near.temperature, rule=self.log_q_rule, valid=valid,
            **arguments(own, [near.keys, *near.extra, *extra, *past], threshold),
        )  # fmt: skip
        if near.queries is not None:
            turned = _turned(near.keys, near.queries)
            known = arguments(_turned(own, query), [turned], threshold)
            column = self._loss(own.keys, query, near.temperature, valid=valid, **known)
            losses = (losses + column) / 2
        parts = near.keys.take(slice(near.before)), sent, near.keys.take(slice(near.before, None))
        self._push(joined(parts))
        return over_ranks.reduce(group, losses, weights, valid, self.reduction)

    @property
    def _whole(self) -> dict[str, Any]:
        """The settings of a call that computes everything."""
        return {"rule": self.log_q_rule, "symmetric": self.symmetric, "reduction": self.reduction}

    def _loss(
        self, query: Tensor, key: Tensor, temperature: Tensor, *, rule: str = "standard",
        reduction: str = "none", **given: Any,
    ) -> Tensor:  # fmt: skip
        """Call the op with what this module is set to."""
        if rule != "standard":
            given["log_q_rule"] = rule
        if self.precision is not None:
            given["precision"] = self.precision
        return in_batch_contrastive(
            query, key, temperature=temperature, normalize=self.normalize, reduction=reduction,
            false_negative_threshold=self.false_negative_threshold,
            keep_products=self.keep_products, backend=self.backend, **given,
        )  # fmt: skip

    def _temperature(self) -> Tensor:
        """Return T with its gradient; in training, put the parameter back into its range."""
        if not self.training:
            return self.temperature
        if self._range != checks.ENDLESS:
            with torch.no_grad():
                self.log_temperature.clamp_(*self._range)
        return self.log_temperature.exp()  # keeps no input that the next call may change

    def _past(self) -> list[KeyRows]:
        return [] if self.queue is None else [self.queue.rows()]

    def _queues_pair_vectors(self) -> bool:
        return self.queue is not None and "pair_vectors" in self.queue.fields

    def _push(self, rows: KeyRows) -> None:
        if self.queue is not None and self.training:
            known = rows.known()
            kept = {name: known[name] for name in self.queue.fields if name in known}
            self.queue.push(rows.keys, **kept)

    def extra_repr(self) -> str:
        """Describe the module in `print(module)`."""
        return (
            f"temperature={float(self.temperature.detach()):.4g}, normalize={self.normalize}, "
            f"symmetric={self.symmetric}, reduction={self.reduction!r}, ranks={self.ranks!r}, "
            f"false_negative_threshold={self.false_negative_threshold}"
        )


def _check(
    query: Any, key: Any, extra_keys: Any, rows: dict[str, Any], known: dict[str, Any]
) -> None:
    """Check what the op does not see as it was given."""
    check_tensor("query", query, ("B", "D"), FLOATS)
    check_tensor("key", key, tuple(query.shape), FLOATS)
    if extra_keys is not None:
        check_tensor("extra_keys", extra_keys, ("E", key.shape[1]), FLOATS)
    check_one_dtype(query=query, key=key, extra_keys=extra_keys)
    for name, dtypes in (("weights", checks.WIDE), ("valid", (torch.bool,))):
        if rows[name] is not None:
            check_tensor(name, rows[name], (query.shape[0],), dtypes)
    given = {name: t for name, t in (known | rows).items() if isinstance(t, Tensor)}
    check_same("device", query=query, key=key, extra_keys=extra_keys, **given)


def _with_pair_vectors(own: KeyRows, query: Tensor) -> KeyRows:
    """Name the pair vectors that the op takes by default."""
    return own._replace(pair_vectors=query.detach()) if own.pair_vectors is None else own


def _turned(rows: KeyRows, queries: Tensor) -> KeyRows:
    """Make queries the keys, for keys to pick from; logQ is of keys, and has no part."""
    return rows._replace(keys=queries, key_ids=rows.query_ids, query_ids=rows.key_ids, log_q=None)
