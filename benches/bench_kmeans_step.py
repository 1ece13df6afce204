"""One step of k-means: nearest codewords, and the sums and counts of their rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import livrec_fast
from livrec_fast.benchmarking import Absent, Case, Contestant, Options, ours
from livrec_fast.reference.kmeans_step import quanta_of
from livrec_fast.reference.residual_kmeans import code_dtype

from . import peers, peers_gpu, peers_step
from .agreement import Codes

SHAPES = [(64, 128, 500_000), (512, 256, 100_000), (8192, 256, 100_000)]


def cases(options: Options) -> Iterator[Case]:
    """Yield one case per shape."""
    for size, dim, rows in SHAPES[:2] if options.quick else SHAPES:
        yield step(size, dim, rows // 10 if options.quick else rows, options)


def step(size: int, dim: int, rows: int, options: Options) -> Case:
    """Make the case of one shape."""

    def make() -> dict[str, Any]:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(options.device)

        return {"x": draw(rows, dim), "codebook": draw(size, dim)}

    formula = peers_step.step_by_index_add
    flops = 2 * rows * dim * size
    return Case(
        op="kmeans_step",
        label=f"N {size}, d {dim}, M {rows:,}",
        sizes={"M": rows, "D": dim, "N": size},
        dtype=torch.float32,
        make=make,
        agree=Agreement(),
        contestants=[
            *our_steps(options),
            peers.eager(formula),
            *([] if options.quick else torch_compile(options, whole=size < 8192)),
            peers_step.eager_in_blocks(options),
            peers_step.faiss_step(options),
            peers_step.superkmeans_step(options),
            peers_gpu.flash_step(options),
        ],
        bytes=4 * (rows * dim + rows + 2 * size * dim),
        flops=flops,
        long=flops >= 4 * 10**11,
    )


def torch_compile(options: Options, whole: bool) -> list[Contestant | Absent]:
    """Return what takes tens of seconds to compile; `whole`: for all rows at once, too."""
    formula = peers_step.step_by_index_add
    at_once = peers.compiled(formula, options, autotuned=False) if whole else []
    return [*at_once, peers.compiled_in_blocks(formula, options, peers_step.added)]


def our_steps(options: Options) -> Iterator[Contestant]:
    """Yield our op as a fit calls it, with the quanta of its first look at the rows; then alone."""

    def told_apart(output: Any) -> tuple[Tensor, Tensor, Tensor]:
        return output.codes, output.sums, output.mass

    def with_quanta(contestant: Contestant) -> Contestant:
        def prepare(inputs: dict[str, Any]) -> peers.Run:
            quanta = quanta_of(inputs["x"], inputs["codebook"], None)
            return contestant.prepare({**inputs, "quanta": quanta})

        return replace(contestant, prepare=prepare, finish=told_apart)

    members = ours(livrec_fast.kmeans_step, options)
    yield from map(with_quanta, members)
    for alone in members[:1]:
        yield replace(alone, name=f"{alone.name}, finding quanta", finish=told_apart)


class Agreement:
    """Codes by the exactness rule; sums and mass as these very codes have them."""

    def __init__(self) -> None:
        self._codes = Codes()

    def __call__(self, output: Sequence[Tensor], inputs: dict[str, Any]) -> None:
        """Raise AssertionError where something is wrong; float32 sums may err as such sums do."""
        codes, sums, mass = output
        x, book = inputs["x"], inputs["codebook"]
        column = codes.to(code_dtype(len(book)))[:, None]
        self._codes(column, {"x": x, "codebooks": [book]})
        exact, size = (torch.zeros_like(book, dtype=torch.float64) for _ in range(2))
        for rows, code in zip(x.split(65_536), codes.long().split(65_536), strict=True):
            exact.index_add_(0, code, rows.double())
            size.index_add_(0, code, rows.double().abs())
        count = codes.long().bincount(minlength=len(book))
        assert mass.long().equal(count), "mass: not the number of rows"
        eps = torch.finfo(torch.float32).eps
        wrong = (sums - exact).abs() - eps * count.double().sqrt()[:, None] * (1 + size)
        assert (wrong <= 0).all(), f"sums: off by {wrong.max():.3g} more than rounding explains"
