"""Codebooks and codes to and from faiss's residual quantizer."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._checks import check_tensor
from ..ops.pack_codes import pack_codes, unpack_codes
from ..reference.pack_codes import bit_widths, packed_bytes

_CARRIED = ("max_beam_size", "use_beam_LUT", "search_type", "norm_min", "norm_max")
_MOST_PRODUCTS = 2**24  # of codewords with those of the levels above, 64 MB


def _import() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise ImportError("faiss is needed: pip install 'livrec-fast[bench]'") from error
    return faiss


def to_faiss(codebooks: list[Tensor], like: Any = None) -> Any:
    """Return a trained faiss.ResidualQuantizer of these codebooks, with our search: beam 1.

    like: one of the same levels whose beam, search type and norms' quantisation it shall have.

    faiss's tables of products between codewords serve searches by tables alone; where they would
    be large they are left to the caller, who makes them by compute_codebook_tables().
    """
    faiss = _import()
    sizes = faiss.UInt64Vector()
    for level, codebook in enumerate(codebooks):
        size = len(codebook)
        if size < 2 or size & (size - 1):
            raise ValueError(
                f"levels: faiss needs powers of two from 2 on, got {size} at level {level}"
            )
        sizes.push_back(size.bit_length() - 1)
    quantizer = faiss.ResidualQuantizer(codebooks[0].shape[1], sizes)
    flat = torch.cat([codebook.detach().float().cpu().flatten() for codebook in codebooks])
    faiss.copy_array_to_vector(np.ascontiguousarray(flat.numpy()), quantizer.codebooks)
    quantizer.max_beam_size = 1
    if like is not None:
        _take_over(quantizer, _checked(like, "like"))
    quantizer.is_trained = True
    offsets = faiss.vector_to_array(quantizer.codebook_offsets).tolist()
    above = zip(offsets, offsets[1:], strict=False)
    if sum(start * (end - start) for start, end in above) <= _MOST_PRODUCTS:
        quantizer.compute_codebook_tables()
    return quantizer


def _take_over(quantizer: Any, like: Any) -> None:
    """Give `quantizer` what `like` has beside codebooks; the codes then take as many bytes."""
    faiss = _import()
    ours, theirs = (faiss.vector_to_array(q.nbits).tolist() for q in (quantizer, like))
    if ours != theirs:
        raise ValueError(f"like: must have levels of {ours} bits, got {theirs}")
    for name in _CARRIED:
        setattr(quantizer, name, getattr(like, name))
    if like.qnorm.ntotal:  # the norms that ST_norm_cqint chooses from
        quantizer.qnorm.add(like.qnorm.reconstruct_n(0, like.qnorm.ntotal))
    faiss.copy_array_to_vector(faiss.vector_to_array(like.norm_tabs), quantizer.norm_tabs)
    quantizer.set_derived_values()


def from_faiss(quantizer: Any) -> list[Tensor]:
    """Return the codebooks of a trained faiss.ResidualQuantizer, float32."""
    faiss = _import()
    quantizer = _checked(quantizer, "quantizer")
    flat = torch.from_numpy(faiss.vector_to_array(quantizer.codebooks).copy())
    sizes = [1 << bits for bits in faiss.vector_to_array(quantizer.nbits).tolist()]
    books = flat.reshape(sum(sizes), quantizer.d).split(sizes)
    return [book.clone() for book in books]


def _checked(quantizer: Any, name: str) -> Any:
    faiss = _import()
    if isinstance(quantizer, faiss.IndexResidualQuantizer):
        quantizer = quantizer.rq
    if not isinstance(quantizer, faiss.ResidualQuantizer):
        raise TypeError(
            f"{name}: must be a faiss.ResidualQuantizer, got {type(quantizer).__name__}"
        )
    if not quantizer.is_trained:
        raise ValueError(f"{name}: must be trained, got is_trained = False")
    return quantizer


def _of_these(codebooks: list[Tensor], quantizer: Any) -> Any:
    """Check that a quantizer holds these codebooks; norms and bits of others mean nothing here."""
    quantizer = _checked(quantizer, "quantizer")
    theirs = from_faiss(quantizer)
    sizes, given = ([list(book.shape) for book in books] for books in (codebooks, theirs))
    if sizes != given:
        raise ValueError(f"quantizer: must have codebooks of shapes {sizes}, got {given}")
    for level, (ours, other) in enumerate(zip(codebooks, theirs, strict=True)):
        if not ours.detach().float().cpu().equal(other):
            raise ValueError(f"quantizer: must have these codebooks, level {level} differs")
    return quantizer


def pack(codes: Tensor, codebooks: list[Tensor], quantizer: Any) -> Tensor:
    """Return codes in faiss's bytes: their bits and, behind them, those of the norm if it keeps it.

    The layout of the codes is ours, from the lowest bit of the first byte on, without gaps.
    """
    levels = [len(book) for book in codebooks]
    if quantizer is None:
        return pack_codes(codes, levels)
    faiss, quantizer = _import(), _of_these(codebooks, quantizer)
    given = np.ascontiguousarray(codes.cpu().numpy(), np.int32)
    packed = np.zeros((len(given), quantizer.code_size), np.uint8)
    if len(given):
        quantizer.pack_codes(len(given), faiss.swig_ptr(given), faiss.swig_ptr(packed))
    return torch.from_numpy(packed).to(codes.device)


def unpack(packed: Tensor, codebooks: list[Tensor], quantizer: Any) -> Tensor:
    """Return the codes in faiss's bytes; the bits of a norm, which come last, are left out."""
    levels = [len(book) for book in codebooks]
    own = packed_bytes(levels)
    width = own if quantizer is None else _of_these(codebooks, quantizer).code_size
    check_tensor("packed", packed, ("M", "code_size"), (torch.uint8,))
    if packed.shape[1] != width:
        norm = 0 if quantizer is None else _checked(quantizer, "quantizer").norm_bits
        raise ValueError(
            f"packed: a row must have {width} bytes, for {sum(bit_widths(levels))} bits of codes "
            f"and {norm} of norm, got {packed.shape[1]}"
        )
    return unpack_codes(packed[:, :own], levels)
