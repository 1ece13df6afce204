"""Libraries that quantise residuals with given codebooks, each as fast as it can be called."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

import livrec_fast
from livrec_fast.benchmarking import Absent, Contestant, Options
from livrec_fast.modules._faiss import to_faiss
from livrec_fast.reference.residual_kmeans import code_dtype

from .peers import Inputs, Run, absence, in_blocks


def faiss_residual_quantizer(
    levels: Sequence[int], dtype: torch.dtype, options: Options, lut: int
) -> Contestant | Absent:
    """Return faiss's residual quantizer over our codebooks, greedy (a beam of 1).

    lut: 0 encodes from the residuals; 1 from tables of inner products, made beforehand.
    """
    name = f"faiss RQ, LUT {lut}"
    if reason := absence("faiss", "faiss-cpu", options):
        return Absent(name, reason)
    if dtype != torch.float32:
        return Absent(name, f"faiss takes float32 only, not {str(dtype)[6:]}")
    if any(n & (n - 1) for n in levels):
        return Absent(
            name, f"faiss takes codebook sizes that are powers of two, not {list(levels)}"
        )

    def prepare(inputs: Inputs) -> Run:
        import faiss

        faiss.omp_set_num_threads(options.threads)
        quantizer = to_faiss(inputs["codebooks"])
        quantizer.use_beam_LUT = lut
        return in_blocks({"": quantizer.compute_codes}, inputs["x"].numpy(), options)

    def unpacked(codes: np.ndarray) -> Tensor:
        return livrec_fast.unpack_codes(torch.from_numpy(codes), levels)  # of the same layout

    return Contestant(name, prepare, finish=unpacked)


def vector_quantize(levels: Sequence[int], dim: int, options: Options) -> Contestant | Absent:
    """Return vector-quantize-pytorch's ResidualVQ: frozen, without beams, in inference mode."""
    name = "vector-quantize-pytorch"
    reason = absence("vector_quantize_pytorch", name, options, options.device == "cpu")
    if reason:
        return Absent(name, reason)

    def prepare(inputs: Inputs) -> Run:
        from vector_quantize_pytorch import ResidualVQ

        quantizer = ResidualVQ(dim=dim, codebook_size=tuple(levels)).eval().to(options.device)
        for layer, book in zip(quantizer.layers, inputs["codebooks"], strict=True):
            layer.codebook = book.float()

        @torch.inference_mode()
        def encode(rows: Tensor) -> Tensor:
            return quantizer(rows.float()[None], freeze_codebook=True)[1][0]  # a batch of one

        return in_blocks({"": encode}, inputs["x"], options)

    return Contestant(name, prepare, finish=lambda codes: codes.to(code_dtype(max(levels))))


def semantic_id(levels: Sequence[int], options: Options) -> Contestant | Absent:
    """Return semantic-id's RQKMeans, by torch or (on a CPU) NumPy and scikit-learn."""
    name = "semantic-id"
    reason = absence("semantic_id", name, options, options.device == "cpu")
    if reason:
        return Absent(name, reason)

    def prepare(inputs: Inputs) -> Run:
        x, books = inputs["x"], [book.float() for book in inputs["codebooks"]]
        ways = {"torch": _semantic_id_torch(levels, books, options.device)}
        if options.device == "cpu":
            numpy = _semantic_id_numpy(levels, books)
            ways["numpy"] = lambda rows: numpy(rows.float().numpy())
        return in_blocks(ways, x, options)

    def finish(codes: np.ndarray) -> Tensor:
        return torch.from_numpy(codes).to(code_dtype(max(levels)))

    return Contestant(name, prepare, finish=finish)


def _semantic_id_torch(
    levels: Sequence[int], books: list[Tensor], device: str
) -> Callable[[Any], Any]:
    from semantic_id.algorithms import RQKMeansTorch

    coder = RQKMeansTorch(
        n_levels=len(levels), n_clusters=list(levels), metric="l2", implementation="kmeans",
        max_iter=1, tol=0.0, random_state=0, verbose=False, device=device,
    )  # fmt: skip
    coder.codebooks_ = books
    return coder.encode


def _semantic_id_numpy(levels: Sequence[int], books: list[Tensor]) -> Callable[[Any], Any]:
    from semantic_id import RQKMeans

    coder = RQKMeans(n_levels=len(levels), n_clusters=list(levels))
    coder.codebooks_, coder.D_ = [book.numpy() for book in books], books[0].shape[1]
    return coder.encode


def superkmeans(levels: Sequence[int], options: Options) -> Contestant | Absent:
    """Return superkmeans's exact assignment, level by level; we subtract in between."""
    name = "superkmeans"
    if reason := superkmeans_absence(options):
        return Absent(name, reason)

    def prepare(inputs: Inputs) -> Run:
        books = [book.float() for book in inputs["codebooks"]]
        assign = [assignment(*book.shape) for book in books]

        def encode(rows: Tensor) -> Tensor:
            residual, codes = rows.float(), []
            for level, book in enumerate(books):
                found = assign[level](residual.numpy(), book.numpy())
                codes.append(torch.from_numpy(found.view(np.int32)))
                if level + 1 < len(books):
                    residual = residual - book[codes[-1]]
            return torch.stack(codes, 1)

        return in_blocks({"": encode}, inputs["x"], options)

    return Contestant(name, prepare, finish=lambda codes: codes.to(code_dtype(max(levels))))


def superkmeans_absence(options: Options) -> str | None:
    """Return why superkmeans cannot take part."""
    if options.device == "cpu" and options.threads != os.cpu_count():
        return "superkmeans assigns on all cores, whatever number of threads it is given"
    return absence("superkmeans", "superkmeans", options)


def assignment(size: int, dim: int) -> Callable[[Any, Any], Any]:
    """Return superkmeans's function of rows and centroids to the nearest centroids, uint32."""
    from superkmeans import SuperKMeans

    return SuperKMeans(n_clusters=size, dimensionality=dim).assign
