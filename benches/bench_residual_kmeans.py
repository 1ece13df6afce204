"""Residual k-means: vectors to codes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

import livrec_fast
from livrec_fast.benchmarking import Absent, Case, Contestant, Options, ours
from livrec_fast.reference import residual_kmeans as reference

from . import peers, peers_encode, peers_gpu
from .agreement import Codes

# levels, dimension, numbers of rows: those of the sources (whose half precision is timed too) last
SHAPES = [
    ((64, 64, 64, 64), 128, (10_000, 100_000, 1_000_000, 200_000)),
    ((512, 256, 128), 256, (10_000, 1_000_000, 100_000)),
    ((8192, 8192, 8192), 256, (100_000, 10_000)),
]
LONG = 10**12  # floating-point operations from which a case has fewer rounds, and no slow peers


def cases(options: Options) -> Iterator[Case]:
    """Yield one case per shape and number of rows, and one in half precision per shape."""
    if options.quick:
        for levels, dim, rows in SHAPES[:2]:
            yield encode(levels, dim, rows[-1] // 10, torch.float32, options)
        return
    for levels, dim, numbers in SHAPES:
        for rows in sorted(numbers):
            yield encode(levels, dim, rows, torch.float32, options)
        if max(levels) < 8192:
            yield encode(levels, dim, numbers[-1], torch.bfloat16, options)


def encode(
    levels: tuple[int, ...], dim: int, rows: int, dtype: torch.dtype, options: Options
) -> Case:
    """Make the case of one shape; half precision is widened, so float32's matrix rate bounds it."""

    def make() -> dict[str, Any]:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(options.device, dtype)

        books = [draw(n, dim) / 2**level for level, n in enumerate(levels)]
        return {"x": draw(rows, dim), "codebooks": books}

    code_bytes = reference.code_dtype(max(levels)).itemsize
    flops = 2 * rows * dim * sum(levels)
    return Case(
        op="residual_kmeans_encode",
        label=f"{'/'.join(map(str, levels))}, d {dim}, M {rows:,}",
        sizes={"M": rows, "D": dim, "levels": list(levels)},
        dtype=dtype,
        math=torch.float32,
        make=make,
        agree=Codes(),
        contestants=[
            *ours(livrec_fast.residual_kmeans_encode, options),
            *opponents(levels, dim, rows, dtype, options),
        ],
        bytes=rows * dim * dtype.itemsize + rows * len(levels) * code_bytes,
        flops=flops,
        long=rows >= 10**6 or flops >= LONG,
    )


def opponents(
    levels: Sequence[int], dim: int, rows: int, dtype: torch.dtype, options: Options
) -> Iterator[Contestant | Absent]:
    """Yield the peers: all at the sources' sizes, and at great ones those that are quick there."""
    formula, flops = reference.residual_kmeans_encode, 2 * rows * dim * sum(levels)
    if rows < 10**6 and flops < LONG:
        usual = any(rows == numbers[-1] and levels == shape for shape, _, numbers in SHAPES[:2])
        yield peers.eager(formula)
        yield from peers.compiled(formula, options, autotuned=usual)
        if dtype == torch.float32 and flops < LONG / 5:  # slow, and float32's
            if max(levels) < 8192:
                yield peers_encode.faiss_residual_quantizer(levels, dtype, options, lut=0)
            yield peers_encode.vector_quantize(levels, dim, options)
            yield peers_encode.semantic_id(levels, options)
    if not options.quick:  # whose rows are few
        yield peers.eager_in_blocks(formula, options)
        yield peers.compiled_in_blocks(formula, options)
    lut = int(max(levels) < 8192)  # the tables of more codewords are more than faiss can hold
    yield peers_encode.faiss_residual_quantizer(levels, dtype, options, lut)
    yield peers_encode.superkmeans(levels, options)
    yield peers_gpu.flash_encode(levels, options)
    yield peers_gpu.fastkmeans_encode(options)
