"""Fits of residual k-means, level by level, by the libraries of CPUs and in torch.

All make the same number of updates of all rows in float32, without subsampling or early end. Those
whose name ends in "own start" choose their initial centroids themselves; the others are given them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor

from livrec_fast.benchmarking import Absent, Contestant, Options

from .peers import Inputs, Noted, Run, absence, in_blocks, quickest
from .peers_encode import superkmeans_absence
from .peers_step import added, nearest, step_ways

Level = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # rows, start -> codebook, codes


def by_level(level: Level, inputs: Inputs) -> list[Tensor]:
    """Fit each level to what the ones before it left."""
    residual, books = inputs["x"], []
    for number, start in enumerate(inputs["init"]):
        book, codes = level(residual, start)
        books.append(book)
        if number + 1 < len(inputs["init"]):
            residual = residual - book[codes]
    return books


def torch_fit(iterations: int, options: Options) -> Contestant:
    """Return Lloyd's iterations in eager torch, over blocks of rows of the quickest size."""

    def prepare(inputs: Inputs) -> Run:
        x, start = inputs["x"], inputs["init"][0]
        note = in_blocks(step_ways(start), x, options, added, whole=False).note
        way, _, size = note.partition(", blocks of ")
        length = int(size.replace(",", "") or len(x))

        def level(rows: Tensor, book: Tensor) -> tuple[Tensor, Tensor]:
            for _ in range(iterations):
                step = step_ways(book)[way]
                _, sums, mass = added([step(block) for block in rows.split(length)])
                book = torch.where(mass[:, None] > 0, sums / mass.clamp_min(1)[:, None], book)
            return book, torch.cat([nearest(block, book) for block in rows.split(length)])

        return Noted(lambda: by_level(level, inputs), note)

    return Contestant("torch eager, chunked", prepare, "reference")


def faiss_fit(iterations: int, options: Options) -> Contestant | Absent:
    """Return faiss.Kmeans from the given centroids."""
    name = "faiss Kmeans"
    if reason := absence("faiss", "faiss-cpu", options):
        return Absent(name, reason)

    def prepare(inputs: Inputs) -> Run:
        import faiss

        faiss.omp_set_num_threads(options.threads)

        def level(rows: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
            means = faiss.Kmeans(
                rows.shape[1], len(start), niter=iterations, nredo=1,
                min_points_per_centroid=1, max_points_per_centroid=2**30,
            )  # fmt: skip
            means.train(rows.numpy(), init_centroids=start.numpy())
            codes = means.index.search(rows.numpy(), 1)[1][:, 0]
            return torch.from_numpy(means.centroids), torch.from_numpy(codes)

        return lambda: by_level(level, inputs)

    return Contestant(name, prepare)


def sklearn_fit(iterations: int, options: Options) -> Contestant | Absent:
    """Return scikit-learn's Lloyd from the given centroids."""
    name = "scikit-learn KMeans"
    if reason := absence("sklearn", "scikit-learn", options):
        return Absent(name, reason)

    def prepare(inputs: Inputs) -> Run:
        from sklearn.cluster import KMeans

        def level(rows: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
            means = KMeans(
                len(start), init=start.numpy(), n_init=1, max_iter=iterations, tol=0.0,
                algorithm="lloyd",
            )  # fmt: skip
            means.fit(rows.numpy())
            return torch.from_numpy(means.cluster_centers_), torch.from_numpy(means.labels_).long()

        return held(lambda: by_level(level, inputs), options)

    return Contestant(name, prepare)


def superkmeans_fit(iterations: int, options: Options) -> Contestant | Absent:
    """Return superkmeans, with pruning or by matrix products alone, whichever is quicker."""
    name = "superkmeans, own start"
    if reason := superkmeans_absence(options):
        return Absent(name, reason)

    def prepare(inputs: Inputs) -> Run:
        from superkmeans import SuperKMeans

        def level_by(products_only: bool, count: int) -> Level:
            def level(rows: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
                means = SuperKMeans(
                    *start.shape, hierarchical=False, iters=count, sampling_fraction=1.0,
                    max_points_per_cluster=2**31 - 1, n_threads=options.threads, tol=0.0,
                    early_termination=False, use_blas_only=products_only,
                )  # fmt: skip
                book = means.train(rows.numpy())
                codes = means.assign(rows.numpy(), book).astype(np.int64)
                return torch.from_numpy(book), torch.from_numpy(codes)

            return level

        few, start = inputs["x"][:65_536], inputs["init"][0]
        ways = {"pruning": False, "products only": True}
        trials = {note: (lambda f=flag: level_by(f, 5)(few, start)) for note, flag in ways.items()}
        note = quickest(options.device, trials)
        return Noted(lambda: by_level(level_by(ways[note], iterations), inputs), note)

    return Contestant(name, prepare)


def semantic_id_fit(iterations: int, options: Options) -> Contestant | Absent:
    """Return semantic-id's RQKMeans by torch; on a CPU it is scikit-learn's after k-means++."""
    name = "semantic-id, own start"
    if options.device == "cpu":
        return Absent(
            name,
            "semantic-id fits by scikit-learn's KMeans, timed by itself here, after a k-means++ "
            "that alone takes minutes",
        )
    if reason := absence("semantic_id", "semantic-id", options, cpu_only=False):
        return Absent(name, reason)

    def prepare(inputs: Inputs) -> Run:
        from semantic_id.algorithms import RQKMeansTorch

        sizes = [len(start) for start in inputs["init"]]

        def fit() -> list[Tensor]:
            coder = RQKMeansTorch(
                n_levels=len(sizes), n_clusters=sizes, metric="l2", implementation="kmeans",
                max_iter=iterations, tol=0.0, random_state=0, verbose=False, device="cuda",
            )  # fmt: skip
            return coder.fit(inputs["x"]).codebooks_

        return fit

    return Contestant(name, prepare)


def vector_quantize_fit(iterations: int, options: Options) -> Contestant | Absent:
    """Return the k-means with which vector-quantize-pytorch's ResidualVQ starts its codebooks."""
    name = "vector-quantize-pytorch, own start"
    package = "vector-quantize-pytorch"
    reason = absence("vector_quantize_pytorch", package, options, options.device == "cpu")
    if reason:
        return Absent(name, reason)

    def prepare(inputs: Inputs) -> Run:
        from vector_quantize_pytorch import ResidualVQ

        @torch.no_grad()
        def fit() -> list[Tensor]:
            sizes = tuple(len(start) for start in inputs["init"])
            quantizer = ResidualVQ(
                dim=inputs["x"].shape[1], codebook_size=sizes, kmeans_init=True,
                kmeans_iters=iterations, threshold_ema_dead_code=0,
            ).to(options.device).eval()  # fmt: skip
            quantizer(inputs["x"][None], freeze_codebook=True)
            return [layer.codebook for layer in quantizer.layers]

        return fit

    return Contestant(name, prepare)


def held(run: Run, options: Options) -> Run:
    """Hold the thread pools of other libraries to the number of threads that we have."""
    from threadpoolctl import threadpool_limits

    def limited() -> Any:
        with ExitStack() as stack:
            stack.enter_context(threadpool_limits(options.threads))
            return run()

    return limited
