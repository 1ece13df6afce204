"""Steps of optimisers on rows of a table, against torch's indexing and torch's own optimiser."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import livrec_fast
from livrec_fast.benchmarking import Case, Contestant, Options

from . import peers_embedding

HEIGHT, DIM, RATE, EPS = 1 << 20, 32, 0.1, 1e-8
Inputs = dict[str, Any]


def cases(options: Options) -> Iterator[Case]:
    """Yield both Adagrads, for as many rows as 65,536 items read of a large table."""
    count = 6_144 if options.quick else 61_440
    for rule in ("rowwise_adagrad", "adagrad"):
        yield case(rule, count, options)


def case(rule: str, count: int, options: Options) -> Case:
    """Make the case of one rule; each contestant has a table of its own."""
    rowwise = rule == "rowwise_adagrad"

    def make() -> Inputs:
        generator = torch.Generator().manual_seed(0)
        made = {
            "table": torch.randn(HEIGHT, DIM, generator=generator),
            "rows": torch.randperm(HEIGHT, generator=generator)[:count].sort()[0],
            "sums": torch.randn(count, DIM, generator=generator),
        }
        return {name: tensor.to(options.device) for name, tensor in made.items()}

    def native(inputs: Inputs) -> Callable[[], Any]:
        table = inputs["table"].clone()
        state = table.new_zeros(HEIGHT if rowwise else (HEIGHT, DIM))
        given = {**inputs, "table": table, "state": state, "lr": RATE, "eps": EPS, "rule": rule}

        def run() -> Any:
            livrec_fast.row_update(**given, backend="native")
            return table

        return run

    def agree(output: Any, inputs: Inputs) -> None:
        sums = inputs["sums"].double()
        squares = sums.square().mean(1, keepdim=True) if rowwise else sums.square()
        hold(output.detach(), inputs, sums / (squares.sqrt() + EPS))

    peer = Contestant("torch indexing", indexing) if rowwise else Contestant("torch.optim", optim)
    words = 3 * DIM + (2 if rowwise else 2 * DIM)
    return Case(
        op="row_update",
        label=f"{rule}, {count:,} of {HEIGHT:,} rows, d {DIM}",
        sizes={"n": count, "H": HEIGHT, "d": DIM, "rule": rule},
        dtype=torch.float32,
        make=make,
        agree=agree,
        contestants=[Contestant("native", native, "ours"), peer],
        bytes=count * (8 + 4 * words),
        flops=count * DIM * 4,
    )


def indexing(inputs: Inputs) -> Callable[[], Any]:
    """Take the row-wise step by torch's indexing."""
    table = inputs["table"].clone()
    state = table.new_zeros(HEIGHT)

    def run() -> Any:
        peers_embedding.row_adagrad(table, state, inputs["rows"], inputs["sums"], RATE)
        return table

    return run


def optim(inputs: Inputs) -> Callable[[], Any]:
    """Take Adagrad's step by torch.optim, for a sparse gradient that is coalesced."""
    table = inputs["table"].clone().requires_grad_()
    optimizer = torch.optim.Adagrad([table], lr=RATE, eps=EPS)
    table.grad = torch.sparse_coo_tensor(
        inputs["rows"][None], inputs["sums"], table.shape, is_coalesced=True
    )

    def run() -> Any:
        optimizer.step()
        return table

    return run


def hold(table: Tensor, inputs: Inputs, steps: Tensor) -> None:
    """Hold a table to a first step, rows that move and others; it is of the order of the rate."""
    before, rows = inputs["table"], inputs["rows"]
    error = float(((before[rows].double() - table[rows]) / RATE - steps).abs().max())
    assert error < 1e-4, f"steps are off by {error:.1e} of the rate"
    others = torch.ones(HEIGHT, dtype=torch.bool).index_fill(0, rows.cpu(), False)
    assert torch.equal(table[others], before[others]), "others moved"
