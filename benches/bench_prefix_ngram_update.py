"""Row-wise Adagrad on prefix tables from the gradient of their lookup, in one pass and in two."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import livrec_fast
from livrec_fast.benchmarking import Case, Contestant, Options

from . import peers_embedding
from .bench_prefix_ngram import DIM, LEVELS, Inputs, label, shapes
from .bench_prefix_ngram_gradient import RATE, WIDTH, agree_step, make, unique_sums

RULE = "rowwise_adagrad"
Step = Callable[[Inputs, list[Tensor], list[Tensor]], None]


def cases(options: Options) -> Iterator[Case]:
    """Yield a case per distribution and number of items."""
    for kind, items in shapes(options):
        yield case(kind, items, options)


def case(kind: str, items: int, options: Options) -> Case:
    """Make a case; each contestant has tables of its own."""
    return Case(
        op="prefix_ngram_update",
        label=label(kind, items),
        sizes={"M": items, "levels": list(LEVELS), "d": DIM, "codes": kind, "rule": RULE},
        dtype=torch.float32,
        make=make(kind, items, options),
        agree=agree_step,
        contestants=[
            stepping("native", in_one_pass, "ours"),
            stepping("gradient, row_update", in_two, "ours"),
            stepping("torch.unique, index_add", in_torch),
        ],
        bytes=items * (len(LEVELS) + 12 * WIDTH),
        flops=items * WIDTH,
    )


def stepping(name: str, step: Step, kind: Any = "peer") -> Contestant:
    """Return a contestant that takes its step on tables and states of its own."""

    def prepare(inputs: Inputs) -> Callable[[], Any]:
        tables = [table.clone() for table in inputs["tables"]]
        states = [table.new_zeros(len(table)) for table in tables]

        def run() -> Any:
            step(inputs, tables, states)
            return tables, states

        return run

    return Contestant(name, prepare, kind)


def in_one_pass(inputs: Inputs, tables: list[Tensor], states: list[Tensor]) -> None:
    """Update by the op."""
    livrec_fast.prefix_ngram_update(
        tables, inputs["grad"], inputs["codes"], LEVELS, rule=RULE, lr=RATE, states=states,
        backend="native",
    )  # fmt: skip


def in_two(inputs: Inputs, tables: list[Tensor], states: list[Tensor]) -> None:
    """Update by the two ops that it stands for."""
    heights = [len(table) for table in tables]
    given = inputs["grad"], inputs["codes"], LEVELS, heights, [DIM] * len(LEVELS)
    found = livrec_fast.prefix_ngram_gradient(*given, backend="native")
    for table, state, at, sums in zip(tables, states, found[::2], found[1::2], strict=True):
        livrec_fast.row_update(table, at, sums, rule=RULE, lr=RATE, state=state, backend="native")


def in_torch(inputs: Inputs, tables: list[Tensor], states: list[Tensor]) -> None:
    """Update with torch alone."""
    found = unique_sums(inputs["grad"], inputs["codes"], [len(table) for table in tables])
    for table, state, at, sums in zip(tables, states, found[::2], found[1::2], strict=True):
        peers_embedding.row_adagrad(table, state, at, sums, RATE)
