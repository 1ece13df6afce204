"""Residual k-means: vectors to codes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

import livrec_fast
from livrec_fast.benchmarking import Case, Options, ours
from livrec_fast.reference import residual_kmeans as reference

from . import peers

SHAPES = [((64, 64, 64, 64), 128, 200_000), ((512, 256, 128), 256, 100_000)]
DTYPES = (torch.float32, torch.bfloat16)


def cases(options: Options) -> Iterator[Case]:
    """Yield one case per shape and dtype."""
    for levels, dim, rows in SHAPES:
        for dtype in DTYPES[:1] if options.quick else DTYPES:
            yield encode(levels, dim, rows // 10 if options.quick else rows, dtype, options)


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

    formula = reference.residual_kmeans_encode
    code_bytes = reference.code_dtype(max(levels)).itemsize
    return Case(
        op="residual_kmeans_encode",
        label=f"{'/'.join(map(str, levels))}, d {dim}, M {rows:,}",
        sizes={"M": rows, "D": dim, "levels": list(levels)},
        dtype=dtype,
        math=torch.float32,
        make=make,
        agree=reference.agree,
        contestants=[
            *ours(livrec_fast.residual_kmeans_encode, options),
            peers.eager(formula),
            *peers.compiled(formula, options),
            peers.faiss_residual_quantizer(levels, dtype, options, lut=0),
            peers.faiss_residual_quantizer(levels, dtype, options, lut=1),
        ],
        bytes=rows * dim * dtype.itemsize + rows * len(levels) * code_bytes,
        flops=2 * rows * dim * sum(levels),
    )
