"""Target attention over item features: from features and weights to the attended values."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import livrec_fast
from livrec_fast.benchmarking import Case, Options, ours

from . import peers, peers_features
from .agreement import Close
from .bench_code_attention import streams
from .bench_target_attention import draw_offsets
from .peers import Inputs
from .peers_features import LEAVES

HEADS, DIM, FEATURES, USERS, ITEMS = 4, 16, 64, 16, 10_000


def cases(options: Options) -> Iterator[Case]:
    """Yield the cases, each as a forward pass and with gradients."""
    for training in (False, True):
        make = partial(case, options=options, training=training)
        if options.quick:
            yield make("jagged", USERS // 2, ITEMS // 10, 8)
            continue
        for items in (ITEMS // 5, ITEMS):
            for candidates in (1, 8, 32):
                yield make("alike", USERS, items, candidates)
        yield make("jagged", USERS, ITEMS, 8)
        if streams():
            yield make("real", USERS, 0, 8)


def case(
    kind: str, users: int, items: int, candidates: int, options: Options, training: bool
) -> Case:
    """Make one case: all compute the output, or the gradients of queries, features and weights."""
    offsets = draw_offsets(kind, users, items)
    total = int(offsets[-1])

    def make() -> Inputs:
        generator = torch.Generator().manual_seed(1)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(options.device)

        made = {
            "q": normal(users, candidates, HEADS, DIM),
            "x": normal(total, FEATURES),
            "w_k": normal(FEATURES, HEADS, DIM) * FEATURES**-0.5,
            "w_v": normal(FEATURES, HEADS, DIM) * FEATURES**-0.5,
            "offsets": offsets.to(options.device),
        }
        return made | {"grad": normal(users, candidates, HEADS, DIM)} if training else made

    function = gradients if training else livrec_fast.target_attention_features
    length = {"alike": f"T {items:,}", "jagged": f"T 0 to {items:,}", "real": "T real"}[kind]
    sizes = {"B": users, "C": candidates, "T": items or None, "D": FEATURES, "as": kind}
    return Case(
        op="target_attention_features",
        label=f"D {FEATURES}, H {HEADS}, d {DIM}, B {users}, {length}, C {candidates}",
        sizes={**sizes, "H": HEADS, "d": DIM},
        dtype=torch.float32,
        make=make,
        agree=Close(partial(formula, function)),
        contestants=[
            *ours(function, options),
            peers.eager(partial(function, backend="reference")),
            *peers_features.contestants(options),
        ],
        bytes=4 * FEATURES * total * (3 if training else 1),
        flops=4 * total * candidates * HEADS * FEATURES * (7 if training else 2) // 2,
        direction="forward+backward" if training else "forward",
        long=total * candidates * (4 if training else 1) > USERS * ITEMS * 64,
    )


def gradients(*, grad: Tensor, offsets: Tensor, backend: str, **given: Tensor) -> list[Tensor]:
    """Return the gradients of queries, features and weights."""
    leaves = [given[name].detach().requires_grad_() for name in LEAVES]
    out = livrec_fast.target_attention_features(*leaves, offsets, backend=backend)
    return list(torch.autograd.grad(out, leaves, grad))


def formula(function: Any, inputs: Inputs) -> list[Tensor]:
    """Compute the output or the gradients by the reference."""
    found = function(**inputs, backend="reference")
    return [found] if isinstance(found, Tensor) else found
