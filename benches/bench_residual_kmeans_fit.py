"""Residual k-means: the fit of the codebooks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from livrec_fast import ResidualKMeans
from livrec_fast.benchmarking import Case, Contestant, Options

from . import peers_fit, peers_gpu
from .agreement import squared_error
from .peers import Inputs, Run
from .peers_step import nearest, step_by_index_add

LEVELS, DIM, ROWS, ITERATIONS = (64, 64, 64, 64), 128, 500_000, 20
_BACKENDS = {"cpu": ("native",), "cuda": ("cuda", "triton")}


def cases(options: Options) -> Iterator[Case]:
    """Yield the fit."""
    yield fit(ROWS // 10 if options.quick else ROWS, 5 if options.quick else ITERATIONS, options)


def fit(rows: int, iterations: int, options: Options) -> Case:
    """Make the case: each level updates `iterations` times from all rows, then assigns them."""

    def make() -> dict[str, Any]:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(rows, DIM, generator=generator)
        return {"x": x.to(options.device), "init": [c.to(options.device) for c in starts(x)]}

    readings = len(LEVELS) * (iterations + 1)
    return Case(
        op="ResidualKMeans.fit",
        label=f"{'/'.join(map(str, LEVELS))}, d {DIM}, M {rows:,}, {iterations} iterations",
        sizes={"M": rows, "D": DIM, "levels": list(LEVELS), "iterations": iterations},
        dtype=torch.float32,
        make=make,
        agree=quality,
        compare=no_worse,
        contestants=[
            *(our_fit(backend, iterations) for backend in _BACKENDS[options.device]),
            peers_fit.torch_fit(iterations, options),
            peers_fit.faiss_fit(iterations, options),
            peers_fit.sklearn_fit(iterations, options),
            peers_fit.superkmeans_fit(iterations, options),
            peers_fit.semantic_id_fit(iterations, options),
            peers_fit.vector_quantize_fit(iterations, options),
            peers_gpu.flash_fit(iterations, options),
            peers_gpu.fastkmeans_fit(iterations, options),
        ],
        bytes=4 * rows * DIM * readings,
        flops=2 * rows * DIM * sum(LEVELS) * (iterations + 1),
        long=True,
    )


def starts(x: Tensor) -> list[Tensor]:
    """Return each level's first centroids: means of a few rows that a short fit before it left.

    Means lie among the rows, so that no centroid stays empty: libraries fill those in ways of
    their own, and would no longer compute the same.
    """
    residual, books = x[:16_384], []
    for size in LEVELS:
        book = residual[: 16 * size].reshape(size, 16, -1).mean(1)
        books.append(book)
        for _ in range(3):
            _, sums, mass = step_by_index_add(residual, book)
            book = torch.where(mass[:, None] > 0, sums / mass.clamp_min(1)[:, None], book)
        residual = residual - book[nearest(residual, book)]
    return books


def our_fit(backend: str, iterations: int) -> Contestant:
    """Return our fit from the case's first centroids."""

    def prepare(inputs: Inputs) -> Run:
        def run() -> list[Tensor]:
            module = ResidualKMeans(
                LEVELS, iterations=iterations, tolerance=0.0, init=inputs["init"], backend=backend
            )
            return module.fit(inputs["x"]).codebooks

        return run

    return Contestant(backend, prepare, "ours")


def quality(books: list[Tensor], inputs: dict[str, Any]) -> dict[str, float]:
    """Return the error that the codebooks leave, which must be less than their start's."""
    assert [tuple(book.shape) for book in books] == [(size, DIM) for size in LEVELS], "shapes"
    error = squared_error(inputs["x"], books)
    start = squared_error(inputs["x"], inputs["init"])
    assert error < start, f"mean squared error {error:.6g}, at the start {start:.6g}"
    return {"error": error}


def no_worse(facts: Mapping[str, Mapping[str, float]]) -> None:
    """Hold ours to the error of faiss (of torch, where faiss is not) from the same start."""
    yardstick = "faiss Kmeans" if "faiss Kmeans" in facts else "torch eager, chunked"
    most = 1.001 * facts[yardstick]["error"]
    for ours in ("native", "cuda", "triton"):
        if ours in facts:
            error = facts[ours]["error"]
            assert error <= most, (
                f"{ours} ends at error {error:.6g}, {yardstick} at {facts[yardstick]['error']:.6g}"
            )
