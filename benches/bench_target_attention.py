"""Target attention over dense histories: the attended values, and all gradients."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import livrec_fast
from livrec_fast.benchmarking import Case, Options, ours

from . import peers, peers_attention_gpu, peers_target_attention
from .agreement import Close
from .bench_code_attention import real_histories, streams

HEADS, DIM, USERS, ITEMS = 4, 16, 16, 10_000
Inputs = dict[str, Any]


def draw_offsets(kind: str, users: int, items: int) -> Tensor:
    """Return offsets of histories as long, of 0 to `items` rows, or of real lengths."""
    if kind == "alike":
        return torch.arange(users + 1) * items
    lengths = torch.randint(items + 1, (users,), generator=torch.Generator().manual_seed(0))
    if kind == "real":
        lengths = torch.tensor([len(codes) for codes in real_histories()])
    return torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])


def cases(options: Options) -> Iterator[Case]:
    """Yield the cases, each as a forward pass and with gradients."""
    for training in (False, True):
        make = partial(case, options=options, training=training)
        if options.quick:
            yield make("jagged", USERS // 2, ITEMS // 10, 8)
            continue
        for candidates in (1, 8, 32, 256):
            yield make("alike", USERS, ITEMS, candidates)
        for candidates in (1, 8):
            yield make("alike", USERS, ITEMS, candidates, dtype=torch.bfloat16)
        yield make("alike", 64, 500, 8)
        yield make("alike", USERS, ITEMS // 4, 8, dim=64)
        if options.device == "cuda":  # varlen_attn and ffpa-attn take 16 bits alone
            yield make("alike", USERS, ITEMS // 4, 8, dtype=torch.bfloat16, dim=64)
            yield make("jagged", USERS, ITEMS, 8, dtype=torch.bfloat16)
            yield make("alike", USERS, ITEMS // 16, 8, dtype=torch.bfloat16, dim=256)
        yield make("jagged", USERS, ITEMS, 8)
        if streams():
            yield make("real", USERS, 0, 8)


def case(
    kind: str,
    users: int,
    items: int,
    candidates: int,
    options: Options,
    training: bool,
    dtype: torch.dtype = torch.float32,
    dim: int = DIM,
) -> Case:
    """Make one case: all compute the output, or the gradients of queries, keys and values."""
    offsets = draw_offsets(kind, users, items)
    total = int(offsets[-1])

    def make() -> Inputs:
        generator = torch.Generator().manual_seed(1)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(options.device, dtype)

        made = {
            "q": normal(users, candidates, HEADS, dim),
            "k": normal(total, HEADS, dim),
            "v": normal(total, HEADS, dim),
            "offsets": offsets.to(options.device),
        }
        return made | {"grad": normal(users, candidates, HEADS, dim)} if training else made

    function = gradients if training else livrec_fast.target_attention
    agree = Close(partial(formula, function))
    rough = partial(agree, times=8)
    size = 2 if dtype == torch.bfloat16 else 4
    length = {"alike": f"T {items:,}", "jagged": f"T 0 to {items:,}", "real": "T real"}[kind]
    return Case(
        op="target_attention",
        label=f"H {HEADS}, d {dim}, B {users}, {length}, C {candidates}",
        sizes={"B": users, "C": candidates, "T": items or None, "H": HEADS, "d": dim, "as": kind},
        dtype=dtype,
        make=make,
        agree=agree,
        contestants=[
            *ours(function, options),
            peers.eager(partial(function, backend="reference")),
            *peers_target_attention.contestants(options, training, rough),
            *peers_attention_gpu.contestants(options, dtype, dim, rough),
        ],
        # keys and values are read once, and with gradients once more and theirs are written
        bytes=2 * size * HEADS * dim * total * (3 if training else 1),
        flops=4 * total * candidates * HEADS * dim * (7 if training else 2) // 2,
        direction="forward+backward" if training else "forward",
        long=total * candidates * (4 if training else 1) > USERS * ITEMS * 128,
    )


def gradients(*, grad: Tensor, offsets: Tensor, backend: str, **given: Tensor) -> list[Tensor]:
    """Return the gradients of q, k and v."""
    leaves = [given[name].detach().requires_grad_() for name in ("q", "k", "v")]
    out = livrec_fast.target_attention(*leaves, offsets, backend=backend)
    return list(torch.autograd.grad(out, leaves, grad))


def formula(function: Any, inputs: Inputs) -> list[Tensor]:
    """Compute the output or the gradients by the reference."""
    found = function(**inputs, backend="reference")
    return [found] if isinstance(found, Tensor) else found
