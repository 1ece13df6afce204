"""What else trains by in-batch negatives: torch's cross entropies over all B x B logits.

`F.linear_cross_entropy` computes logits in chunks, as it chooses by default; it has no masks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from livrec_fast.benchmarking import Absent, Contestant, Options

from . import peers
from .peers import Inputs, Run

Loss = Callable[[Tensor, Tensor], Tensor]
_INFINITY = float("inf")


def cross_entropy(
    query: Tensor, key: Tensor, temperature: float, threshold: float | None, symmetric: bool
) -> Tensor:
    """Compute the loss as torch has it, masked logits -inf."""
    query, key = (F.normalize(x.float(), dim=1).to(x.dtype) for x in (query, key))
    logits = (query @ key.T).float() / temperature
    if threshold is not None:
        similar = (query.detach() @ query.detach().T > threshold).fill_diagonal_(False)
        logits = logits.masked_fill(similar, -_INFINITY)
    own = torch.arange(len(query), device=query.device)
    loss = F.cross_entropy(logits, own)
    return (loss + F.cross_entropy(logits.T, own)) / 2 if symmetric else loss


def linear_cross_entropy(query: Tensor, key: Tensor, temperature: float) -> Tensor:
    """Compute the loss with keys as the weight of a linear layer."""
    own = torch.arange(len(query), device=query.device)
    query, key = F.normalize(query, dim=1) / temperature, F.normalize(key, dim=1)
    return F.linear_cross_entropy(query, key, own, options=torch.nn.LinearCrossEntropyOptions())


def training(loss: Loss, inputs: Inputs, with_gradients: bool) -> Run:
    """Return a run: the loss, or with the gradients of query and key."""
    query, key = (inputs[n].detach().requires_grad_(with_gradients) for n in ("query", "key"))

    def run() -> Any:
        found = loss(query, key)
        return [found, *torch.autograd.grad(found, (query, key))] if with_gradients else [found]

    return run


def contestants(
    options: Options,
    with_gradients: bool,
    temperature: float,
    threshold: float | None,
    symmetric: bool,
    dtype: torch.dtype,
) -> Iterator[Contestant | Absent]:
    """Yield all peers of a case."""

    def plain(query: Tensor, key: Tensor) -> Tensor:
        return cross_entropy(query, key, temperature, threshold, symmetric)

    def compiled(inputs: Inputs) -> Run:
        function = torch.compile(peers.fresh(cross_entropy), dynamic=False, fullgraph=True)
        settings = (temperature, threshold, symmetric)
        run = training(lambda q, k: function(q, k, *settings), inputs, with_gradients)
        run()
        return run

    def chunked(inputs: Inputs) -> Run:
        return training(
            lambda q, k: linear_cross_entropy(q, k, temperature), inputs, with_gradients
        )

    yield Contestant("torch eager, plain", lambda given: training(plain, given, with_gradients))
    if peers._lacks_compiler(options):
        yield Absent("torch.compile", "torch.compile needs a C++ compiler on a CPU")
    else:
        yield Contestant("torch.compile", compiled)
    if threshold is not None or symmetric or dtype != torch.float32:
        reason = "F.linear_cross_entropy: one way, without masks, all of it in the inputs' dtype"
        yield Absent("F.linear_cross_entropy", reason)
    elif not hasattr(F, "linear_cross_entropy"):
        yield Absent("F.linear_cross_entropy", "this torch has no F.linear_cross_entropy")
    else:
        yield Contestant("F.linear_cross_entropy", chunked)
