"""Training prefix tables: gradients row by row, and a whole step with row-wise Adagrad."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import livrec_fast
from livrec_fast.benchmarking import Absent, Case, Contestant, Options

from . import peers_embedding
from .bench_prefix_ngram import (
    DIM,
    LEVELS,
    Inputs,
    agree_gradients,
    draw,
    label,
    rows,
    shapes,
    sums,
)

RATE = 0.1
WIDTH = DIM * len(LEVELS)


def cases(options: Options) -> Iterator[Case]:
    """Yield the gradients by themselves, and the step."""
    for kind, items in shapes(options):
        yield gradients(kind, items, options)
        yield step(kind, items, options)


def make(kind: str, items: int, options: Options) -> Callable[[], Inputs]:
    """Return what draws codes, tables and the gradient of their lookup."""

    def drawn() -> Inputs:
        grad = torch.randn(items, WIDTH, generator=torch.Generator().manual_seed(2))
        return {**draw(kind, items, options), "grad": grad.to(options.device)}

    return drawn


def gradients(kind: str, items: int, options: Options) -> Case:
    """Make the case of rows and sums from a given gradient."""
    heights, dims = rows(options), [DIM] * len(LEVELS)

    def native(inputs: Inputs) -> Callable[[], Any]:
        given = inputs["grad"], inputs["codes"], LEVELS, heights, dims
        return lambda: livrec_fast.prefix_ngram_gradient(*given, backend="native")

    def in_torch(inputs: Inputs) -> Callable[[], Any]:
        return lambda: unique_sums(inputs["grad"], inputs["codes"], heights)

    def sparse(found: list[Tensor]) -> list[Tensor]:
        return [
            torch.sparse_coo_tensor(
                at[None], values, (height, DIM), is_coalesced=True, check_invariants=False
            )
            for at, values, height in zip(found[::2], found[1::2], heights, strict=True)
        ]

    return Case(
        op="prefix_ngram_gradient",
        label=label(kind, items),
        sizes={"M": items, "levels": list(LEVELS), "d": DIM, "codes": kind},
        dtype=torch.float32,
        make=make(kind, items, options),
        agree=agree_gradients,
        contestants=[
            Contestant("native", native, "ours", sparse),
            Contestant("torch.unique, index_add", in_torch, finish=sparse),
        ],
        bytes=items * (len(LEVELS) + 4 * WIDTH),
        flops=items * WIDTH,
    )


def unique_sums(grad: Tensor, codes: Tensor, heights: list[int]) -> list[Tensor]:
    """Add up gradients per row in torch: rows and sums of each level."""
    found = []
    keys = peers_embedding.table_rows(codes, LEVELS, heights)
    for key, part in zip(keys, grad.split(DIM, 1), strict=True):
        at, place = torch.unique(key, return_inverse=True)
        found += [at, part.new_zeros(len(at), DIM).index_add_(0, place, part)]
    return found


def step(kind: str, items: int, options: Options) -> Case:
    """Make the case of forward, backward and row-wise Adagrad; each has tables of its own."""

    def bags(grad: Tensor, codes: Tensor, tables: list[Tensor]) -> list[Tensor]:
        leaves = [table.detach().requires_grad_() for table in tables]
        out = peers_embedding.bags(codes, leaves, LEVELS, sparse=True)
        found = [one.coalesce() for one in torch.autograd.grad(out, leaves, grad)]
        return [part for one in found for part in (one.indices()[0], one.values())]

    def indexed(grad: Tensor, codes: Tensor, tables: list[Tensor]) -> list[Tensor]:
        peers_embedding.indexed(codes, tables, LEVELS)
        return unique_sums(grad, codes, [len(table) for table in tables])

    found: list[Contestant | Absent] = [
        Contestant("native", fused, "ours"),
        stepping("nn.EmbeddingBag, sparse", bags),
        stepping("torch indexing, unique", indexed),
        peers_embedding.tbe_step(options, RATE),
    ]
    return Case(
        op="prefix_ngram_gradient",
        label=f"{label(kind, items)}, row-wise Adagrad",
        sizes={"M": items, "levels": list(LEVELS), "d": DIM, "codes": kind, "step": True},
        dtype=torch.float32,
        make=make(kind, items, options),
        agree=agree_step,
        contestants=found,
        bytes=items * (len(LEVELS) + 12 * WIDTH),
        flops=items * WIDTH,
        direction="forward+backward+step",
    )


def fused(inputs: Inputs) -> Callable[[], Any]:
    """Train our own module, whose backward pass takes the step."""
    optimizer = livrec_fast.RowwiseAdagrad(RATE, eps=1e-8)
    most = max(len(table) for table in inputs["tables"])
    module = livrec_fast.PrefixNgramEmbedding(
        LEVELS, DIM, max_rows=most, optimizer=optimizer, backend="native"
    )
    tables = [table.detach() for table in module.tables]
    for mine, table in zip(tables, inputs["tables"], strict=True):
        mine.copy_(table)

    def run() -> Any:
        module(inputs["codes"]).backward(inputs["grad"])
        return tables, [getattr(module, f"state_{level}") for level in range(len(LEVELS))]

    return run


def stepping(name: str, gradient: Callable[..., list[Tensor]]) -> Contestant:
    """Return a contestant of rows and sums, whose step is `row_adagrad`."""

    def prepare(inputs: Inputs) -> Callable[[], Any]:
        tables = [table.clone() for table in inputs["tables"]]
        states = [table.new_zeros(len(table)) for table in tables]

        def run() -> Any:
            found = gradient(inputs["grad"], inputs["codes"], tables)
            for table, state, at, total in zip(
                tables, states, found[::2], found[1::2], strict=True
            ):
                peers_embedding.row_adagrad(table, state, at, total, RATE)
            return tables, states

        return run

    return Contestant(name, prepare)


def agree_step(output: tuple[list[Tensor], list[Tensor]], inputs: Inputs) -> None:
    """Hold tables and states after the first step to float64, and all other rows to what they were.

    A first step is the gradient over its own root mean square, so of the order of the rate.
    """
    wanted = sums(inputs)
    for level, (table, state, before) in enumerate(zip(*output, inputs["tables"], strict=True), 1):
        found, total, _ = next(wanted)
        square = total.square().mean(1)
        moved = before[found].double() - RATE * total / (square.sqrt() + 1e-8)[:, None]
        error = float((table.detach()[found] - moved).abs().max())
        assert error < 1e-3 * RATE, f"level {level}: rows are off by {error:.1e}"
        error = float(((state[found] - square).abs() / (square + 1e-6)).max())
        assert error < 1e-3, f"level {level}: states are off by {error:.1e} of themselves"
        others = torch.ones(len(before), dtype=torch.bool).index_fill_(0, found.cpu(), False)
        assert torch.equal(table.detach()[others], before[others]), f"level {level}: others moved"
        assert not state[others].any(), f"level {level}: states of others moved"
