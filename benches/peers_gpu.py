"""The k-means libraries of GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from livrec_fast.benchmarking import Absent, Contestant, Options
from livrec_fast.reference.residual_kmeans import code_dtype

from .agreement import squared_error
from .peers import Inputs, Run, absence

TF32 = 2.0**-10  # a product of flash-kmeans keeps 10 bits of each float32 factor's mantissa


def flash_encode(levels: Sequence[int], options: Options) -> Contestant | Absent:
    """Return flash-kmeans's assignment, level by level; we subtract in between."""
    name = "flash-kmeans"
    if reason := absence("flash_kmeans", name, options, cpu_only=False):
        return Absent(name, reason)

    def prepare(inputs: Inputs) -> Run:
        x, books = inputs["x"], [book.float() for book in inputs["codebooks"]]

        def encode() -> Tensor:
            residual, codes = x.float(), []
            for book in books:
                codes.append(flash_assign(residual, book))
                residual = residual - book[codes[-1]]
            return torch.stack(codes, 1)

        return encode

    return Contestant(
        name, prepare, finish=lambda c: c.to(code_dtype(max(levels))), agree=nearly_as_near
    )


def flash_assign(x: Tensor, codebook: Tensor) -> Tensor:
    """Return flash-kmeans's nearest codewords of rows, int32."""
    from flash_kmeans.assign_euclid_triton import euclid_assign_triton

    return euclid_assign_triton(x[None], codebook[None], x.square().sum(1)[None])[0]


def nearly_as_near(codes: Tensor, inputs: Inputs) -> dict[str, float]:
    """Hold codes to the error of the nearest ones within what TF32 products may cost."""
    x, books = inputs["x"].float(), [book.float() for book in inputs["codebooks"]]
    assert codes.shape == (len(x), len(books)) and codes.dtype == code_dtype(max(map(len, books)))
    residual = x.double()
    for level, book in enumerate(books):
        residual = residual - book.double()[codes[:, level].long()]
    error, best = float(residual.square().sum(1).mean()), squared_error(x, books)
    assert error <= (1 + 4 * TF32) * best, f"mean squared error {error:.6g}, exactly {best:.6g}"
    return {"error, exactly = 1": error / best}


def fastkmeans_encode(options: Options) -> Absent:
    """Say why fastkmeans does not encode."""
    reason = absence("fastkmeans", "fastkmeans", options, cpu_only=False)
    return Absent("fastkmeans", reason or "fastkmeans assigns only rows that lie in host memory")


def flash_step(options: Options) -> Contestant | Absent:
    """Return one step of flash-kmeans: its assignment and its sums of sorted rows."""
    name = "flash-kmeans"
    if reason := absence("flash_kmeans", name, options, cpu_only=False):
        return Absent(name, reason)

    def prepare(inputs: Inputs) -> Run:
        from flash_kmeans import triton_centroid_update_sorted_euclid as add_up

        x, book = inputs["x"], inputs["codebook"]

        def step() -> tuple[Tensor, Tensor, Tensor]:
            codes = flash_assign(x, book)
            sums = torch.zeros_like(book)[None]
            mass = torch.zeros(1, len(book), dtype=torch.int32, device=x.device)
            add_up(
                x[None], codes[None], book[None],
                centroid_sums=sums, centroid_cnts=mass, calculate_new=False,
            )  # fmt: skip
            return codes, sums[0], mass[0]

        return step

    def nearly(output: Sequence[Tensor], inputs: dict[str, Any]) -> dict[str, float]:
        codes, sums, mass = output
        x, book = inputs["x"], inputs["codebook"]
        exact = torch.zeros_like(book, dtype=torch.float64).index_add(0, codes.long(), x.double())
        assert (sums - exact).abs().max() <= 1e-4 * exact.abs().max(), "sums: wrong"
        assert mass.long().equal(codes.long().bincount(minlength=len(book))), "mass: wrong"
        column = codes.to(code_dtype(len(book)))[:, None]
        return nearly_as_near(column, {"x": x, "codebooks": [book]})

    return Contestant(name, prepare, agree=nearly)


def flash_fit(iterations: int, options: Options) -> Contestant | Absent:
    """Return flash-kmeans's fit, level by level, from the case's initial centroids."""
    name = "flash-kmeans"
    if reason := absence("flash_kmeans", name, options, cpu_only=False):
        return Absent(name, reason)

    def prepare(inputs: Inputs) -> Run:
        from flash_kmeans import batch_kmeans_Euclid

        def fit() -> list[Tensor]:
            residual, books = inputs["x"], []
            for start in inputs["init"]:
                _, book, _ = batch_kmeans_Euclid(
                    residual[None], len(start), max_iters=iterations, init_centroids=start[None]
                )
                books.append(book[0])
                residual = residual - book[0][flash_assign(residual, book[0])]
            return books

        return fit

    return Contestant(name, prepare)


def fastkmeans_fit(iterations: int, options: Options) -> Contestant | Absent:
    """Return fastkmeans's fit, level by level, from its own random rows and rows in host memory."""
    name = "fastkmeans, own start"
    if reason := absence("fastkmeans", "fastkmeans", options, cpu_only=False):
        return Absent(name, reason)

    def prepare(inputs: Inputs) -> Run:
        from fastkmeans import FastKMeans

        def fit() -> list[Tensor]:
            residual, books = inputs["x"], []
            for start in inputs["init"]:
                means = FastKMeans(residual.shape[1], len(start), niter=iterations, tol=0.0)
                means.train(residual.cpu().numpy())
                book = torch.from_numpy(means.centroids).to(residual.device)
                books.append(book)
                score = residual @ book.T - book.square().sum(1) / 2
                residual = residual - book[score.argmax(1)]
            return books

        return fit

    return Contestant(name, prepare)
