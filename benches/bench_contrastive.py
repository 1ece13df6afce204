"""The in-batch contrastive loss: its value, and with the gradients of queries and keys."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import livrec_fast
from livrec_fast.benchmarking import Absent, Case, Contestant, Options, ours

from . import peers, peers_contrastive, peers_contrastive_gpu
from .agreement import Close

DIM, TEMPERATURE, THRESHOLD, BLOCK = 128, 0.07, 0.9, 1_024
MOST_AT_ONCE = 8_192  # rows that the reference, whose memory is B x B, is asked for
MOST_IN_FULL = 32_768  # rows whose gradients are all compared; of more, those of SOME
SOME, SCORES = 512, 2**24
Inputs = dict[str, Any]


def cases(options: Options) -> Iterator[Case]:
    """Yield the cases: plain, with false negatives masked, both ways, in bfloat16."""
    if options.quick:
        yield case(512, options, training=True)
        yield case(512, options, training=True, threshold=THRESHOLD)
        return
    for rows in (4_096, 8_192):
        yield case(rows, options, training=False)
    for rows in (512, 4_096, 8_192):
        yield case(rows, options, training=True)
        if rows > 512:
            yield case(rows, options, training=True, threshold=THRESHOLD)
            yield case(rows, options, training=True, symmetric=True)
    for rows in (4_096, 8_192):
        yield case(rows, options, training=True, dtype=torch.bfloat16)
    for rows in (16_384, 32_768, 65_536):
        yield case(rows, options, training=True)


def case(
    rows: int,
    options: Options,
    *,
    training: bool,
    threshold: float | None = None,
    symmetric: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Case:
    """Make one case. A query and its key are alike, as in training that has got somewhere."""

    def make() -> Inputs:
        generator = torch.Generator().manual_seed(1)
        both = torch.randn(rows, DIM, generator=generator)
        query, key = (both + torch.randn(rows, DIM, generator=generator) for _ in range(2))
        query[::8] = query[1::8] + 0.1 * query[::8]  # no cosine is near the threshold
        return {n: x.to(options.device, dtype) for n, x in (("query", query), ("key", key))}

    def loss(query: Tensor, key: Tensor, backend: str, keep_products: bool) -> Tensor:
        return livrec_fast.in_batch_contrastive(
            query, key, temperature=TEMPERATURE, false_negative_threshold=threshold,
            symmetric=symmetric, keep_products=keep_products, backend=backend,
        )  # fmt: skip

    def function(
        *, query: Tensor, key: Tensor, backend: str, keep_products: bool = False
    ) -> list[Tensor]:
        given, how = {"query": query, "key": key}, {"keep_products": keep_products}
        return peers_contrastive.training(partial(loss, backend=backend, **how), given, training)()

    def keeping(inputs: Inputs) -> Any:
        return partial(function, **inputs, backend="native", keep_products=True)

    settings = (training, TEMPERATURE, threshold, symmetric)
    setting = peers_contrastive.Setting(rows, *settings, dtype)
    agree = Close(partial(formula, function, *settings))
    if rows > MOST_IN_FULL:
        assert training and threshold is None and not symmetric, "some gradients: of the plain loss"
        agree = Close(partial(some_gradients, TEMPERATURE), pick=pick_some)
    large = peers_contrastive.too_large(options, rows**2, 18)
    reference = partial(function, backend="reference")
    keeps = training and options.device == "cpu" and rows <= MOST_AT_ONCE
    shown = [f"D {DIM}, B {rows:,}", *(["masked"] if threshold else [])]
    return Case(
        op="in_batch_contrastive",
        label=", ".join([*shown, *(["symmetric"] if symmetric else [])]),
        sizes={"B": rows, "D": DIM, "masked": threshold is not None, "symmetric": symmetric},
        dtype=dtype,
        make=make,
        agree=agree,
        contestants=[
            *ours(function, options),
            *([Contestant("native, products kept", keeping, "ours")] if keeps else []),
            Absent("torch eager", large, "reference") if large else peers.eager(reference),
            *peers_contrastive.contestants(setting, options),
            *peers_contrastive_gpu.contestants(setting, options, agree),
        ],
        bytes=2 * rows * DIM * (2 if dtype == torch.bfloat16 else 4) * (3 if training else 1),
        flops=2 * rows * rows * DIM * (4 if training else 1),
        direction="forward+backward" if training else "forward",
        long=rows > 4_096,
    )


def formula(
    function: Any,
    training: bool,
    temperature: float,
    threshold: float | None,
    symmetric: bool,
    inputs: Inputs,
) -> list[Tensor]:
    """Compute by the reference; in float64, or of many rows, block by block of the rows."""
    if inputs["query"].dtype != torch.float64 and len(inputs["query"]) <= MOST_AT_ONCE:
        found: list[Tensor] = function(**inputs, backend="reference")
        return found
    leaves = [inputs[name].detach().requires_grad_() for name in ("query", "key")]
    units = [F.normalize(x, dim=1) for x in leaves]
    cut = [x.detach().requires_grad_() for x in units]
    total = inputs["query"].new_zeros(())
    ways = [(cut[0], cut[1]), (cut[1], cut[0])] if symmetric else [(cut[0], cut[1])]
    for anchor, other in ways:
        for rows in torch.arange(len(anchor)).split(BLOCK):
            logits = anchor[rows] @ other.T / temperature
            if threshold is not None:
                similar = (cut[0].detach()[rows] @ cut[0].detach().T) > threshold
                similar[torch.arange(len(rows)), rows] = False
                logits = logits.masked_fill(similar, -float("inf"))
            loss = F.cross_entropy(logits, rows, reduction="sum") / len(anchor) / len(ways)
            total += loss.detach()
            loss.backward()
    if not training:
        return [total]
    return [total, *torch.autograd.grad(units, leaves, [x.grad for x in cut])]


def some_of(rows: int) -> Tensor:
    """Return the numbers of the rows whose gradients are compared where there are many."""
    return torch.linspace(0, rows - 1, SOME, dtype=torch.float64).long()


def pick_some(found: list[Tensor]) -> list[Tensor]:
    """Return the loss, and gradients of some rows."""
    return [found[0], *(grad[some_of(len(grad)).to(grad.device)] for grad in found[1:])]


def some_gradients(temperature: float, inputs: Inputs) -> list[Tensor]:
    """Compute the loss, and gradients of some rows, from every row's logsumexp.

    No logit is above 1 / T, so that exponentials less that need no greatest logit.
    """
    given = [inputs[name] for name in ("query", "key")]
    query, key = units = [F.normalize(x, dim=1) for x in given]
    sums = [
        (some @ key.T).sub_(1).div_(temperature).exp_().sum(1)
        for some in query.split(max(1, SCORES // len(key)))
    ]
    lse = torch.cat(sums).log() + 1 / temperature
    found = [(lse - (query * key).sum(1) / temperature).mean()]
    rows = some_of(len(query)).to(query.device)
    for x, own, other, shifts in (
        (given[0], *units, lse[rows, None]),
        (given[1], *reversed(units), lse),
    ):
        weights = (own[rows] @ other.T / temperature - shifts).exp_()
        weights[torch.arange(len(rows)), rows] -= 1
        leaf = x[rows].detach().requires_grad_()
        slope = weights @ other / temperature / len(x)
        found += torch.autograd.grad(F.normalize(leaf, dim=1), leaf, slope)
    return found
