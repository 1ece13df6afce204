"""Codebooks to and from faiss, whose residual quantizer keeps them in one flat vector."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def _import() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise ImportError("faiss is needed: pip install 'livrec-fast[bench]'") from error
    return faiss


def to_faiss(codebooks: list[Tensor]) -> Any:
    """Return a trained faiss.ResidualQuantizer of these codebooks, with our search: beam 1."""
    faiss = _import()
    bits = []
    for level, codebook in enumerate(codebooks):
        size = len(codebook)
        if size < 2 or size & (size - 1):
            raise ValueError(
                f"levels: faiss needs powers of two from 2 on, got {size} at level {level}"
            )
        bits.append(size.bit_length() - 1)
    sizes = faiss.UInt64Vector()
    for count in bits:
        sizes.push_back(count)
    quantizer = faiss.ResidualQuantizer(codebooks[0].shape[1], sizes)
    flat = torch.cat([codebook.detach().float().cpu().flatten() for codebook in codebooks])
    faiss.copy_array_to_vector(np.ascontiguousarray(flat.numpy()), quantizer.codebooks)
    quantizer.max_beam_size = 1
    quantizer.is_trained = True
    quantizer.compute_codebook_tables()
    return quantizer


def from_faiss(quantizer: Any) -> list[Tensor]:
    """Return the codebooks of a trained faiss.ResidualQuantizer, float32."""
    faiss = _import()
    if not isinstance(quantizer, faiss.ResidualQuantizer):
        raise TypeError(
            f"quantizer: must be a faiss.ResidualQuantizer, got {type(quantizer).__name__}"
        )
    if not quantizer.is_trained:
        raise ValueError("quantizer: must be trained, got is_trained = False")
    flat = torch.from_numpy(faiss.vector_to_array(quantizer.codebooks).copy())
    sizes = [1 << bits for bits in faiss.vector_to_array(quantizer.nbits).tolist()]
    books = flat.reshape(sum(sizes), quantizer.d).split(sizes)
    return [book.clone() for book in books]
