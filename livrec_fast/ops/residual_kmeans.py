"""Residual k-means: vectors to semantic codes, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._checks import FLOATS, INTEGERS, check_codes, check_finite, check_same, check_tensor
from .._dispatch import Backend, Op, refuse_native, refuse_triton
from ..reference import residual_kmeans as reference


def _triton(x: Tensor, codebooks: Sequence[Tensor]) -> Tensor:
    from ..kernels import residual_kmeans as kernel

    return kernel.residual_kmeans_encode(x, codebooks)


def _triton_details(
    x: Tensor, codebooks: Sequence[Tensor], reconstruction: bool, second: bool
) -> tuple[Tensor, ...]:
    from ..kernels import residual_kmeans as kernel

    return kernel.residual_kmeans_details(x, codebooks, reconstruction, second)


def _refuse_triton(x: Tensor, codebooks: Sequence[Tensor], *rest: bool) -> str | None:
    if x.dtype == torch.float64:
        return "computes in float32; x is float64"
    if x.shape[1] > 16384:
        return "addresses codewords in 32 bits: D must be at most 16,384"
    return refuse_triton(x)


def _refuse_native(x: Tensor, codebooks: Sequence[Tensor], *rest: bool) -> str | None:
    if x.dtype == torch.float64:
        return "computes in float32; x is float64"
    return refuse_native(x)


def _check_rows(x: Tensor, codebooks: Sequence[Tensor]) -> None:
    """Check that each row is finite, and so short that no score along its way can overflow."""
    check_finite("x", x)
    length = torch.linalg.vector_norm(x, dim=1, dtype=torch.float64)
    limit = torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32).max
    for level, codebook in enumerate(codebooks):
        longest = torch.linalg.vector_norm(codebook, dim=1, dtype=torch.float64).max()
        bad = (length * longest + longest.square() > limit).nonzero()
        if len(bad):
            raise ValueError(
                f"x: row {int(bad[0])} is too large: at level {level} a residual as long as "
                f"{length[bad[0, 0]]:.3g} times a codeword as long as {longest:.3g} may pass "
                f"{limit:.3g}"
            )
        length = length + longest


_encode = Op(
    "residual_kmeans_encode",
    "(Tensor x, Tensor[] codebooks) -> Tensor",
    fake=lambda x, codebooks: x.new_empty(
        (x.shape[0], len(codebooks)), dtype=reference.code_dtype(max(len(c) for c in codebooks))
    ),
    reference=reference.residual_kmeans_encode,
    check_values=_check_rows,
    backends=(Backend("native", _refuse_native), Backend("triton", _refuse_triton, _triton)),
    differentiable=False,
)


class ResidualKMeansDetails(NamedTuple):
    """What `residual_kmeans_details` returns; None stands for what was not asked for.

    codes: [M, L], as of `residual_kmeans_encode`.
    residual_norms: float32 [M, L] (float64 for float64), the length of what levels 1 .. l leave.
    reconstruction: float32 [M, D] (float64 for float64), the sum of the codewords.
    second: [M, L], the second nearest codeword, 0 where a level has one only.
    gap: float32 [M, L] (float64 for float64), how much larger its squared distance is; +inf where
        there is no second.
    """

    codes: Tensor
    residual_norms: Tensor
    reconstruction: Tensor | None
    second: Tensor | None
    gap: Tensor | None


def _fake_details(
    x: Tensor, codebooks: Sequence[Tensor], reconstruction: bool, second: bool
) -> tuple[Tensor, ...]:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    dtype = reference.code_dtype(max(len(book) for book in codebooks))
    per_level = (x.shape[0], len(codebooks))
    return (
        x.new_empty(per_level, dtype=dtype),
        x.new_empty(per_level, dtype=wide),
        x.new_empty(x.shape if reconstruction else (0,), dtype=wide),
        x.new_empty(per_level if second else (0,), dtype=dtype),
        x.new_empty(per_level if second else (0,), dtype=wide),
    )


_details = Op(
    "residual_kmeans_details",
    "(Tensor x, Tensor[] codebooks, bool reconstruction, bool second) -> "
    "(Tensor codes, Tensor norms, Tensor reconstructed, Tensor runner_up, Tensor gap)",
    fake=_fake_details,
    reference=reference.residual_kmeans_details,
    check_values=lambda x, codebooks, *rest: _check_rows(x, codebooks),
    backends=(
        Backend("native", _refuse_native),
        Backend("triton", _refuse_triton, _triton_details),
    ),
    differentiable=False,
)

_decode = Op(
    "residual_kmeans_decode",
    "(Tensor codes, Tensor[] codebooks) -> Tensor",
    fake=lambda codes, codebooks: codebooks[0].new_empty((codes.shape[0], codebooks[0].shape[1])),
    reference=reference.residual_kmeans_decode,
    check_values=lambda codes, codebooks: check_codes(codes, [len(c) for c in codebooks]),
)


def _check_codebooks(codebooks: Sequence[Tensor], dim: int | str) -> list[Tensor]:
    books = list(codebooks)
    if not books:
        raise ValueError("codebooks: at least one level is needed, got none")
    for level, book in enumerate(books):
        check_tensor(f"codebooks[{level}]", book, ("N", dim), FLOATS)
        if not 1 <= book.shape[0] <= 65536:
            raise ValueError(f"codebooks[{level}]: N must be 1 to 65536, got {book.shape[0]}")
    check_same("dtype", **{f"codebooks[{level}]": book for level, book in enumerate(books)})
    return books


def _check_encode(x: Tensor, codebooks: Sequence[Tensor]) -> list[Tensor]:
    check_tensor("x", x, ("M", "D"), FLOATS)
    if x.shape[1] < 1:
        raise ValueError(f"x: D must be at least 1, got shape {list(x.shape)}")
    books = _check_codebooks(codebooks, x.shape[1])
    check_same("device", x=x, **{f"codebooks[{level}]": book for level, book in enumerate(books)})
    return books


def residual_kmeans_encode(
    x: Tensor, codebooks: Sequence[Tensor], *, backend: str = "auto"
) -> Tensor:
    r"""Quantise each row by its nearest codeword, then the rest by the next codebook, and so on.

    $c_l = \arg\min_j \|r_{l-1} - C_l[j]\|^2,\quad r_l = r_{l-1} - C_l[c_l],\quad r_0 = x$.

    In PyTorch, per level::

        code = torch.cdist(residual, codebook).argmin(1)
        residual = residual - codebook[code]

    Args:
        x: [M, D] float32, float16, bfloat16 or float64; rows may be strided.
        codebooks: L tensors [N_l, D], 1 <= N_l <= 65,536, of one dtype; sizes may differ.
        backend: "auto", "triton", "native" or "reference".

    Returns:
        codes [M, L]: uint8 where every N_l <= 256, else int16 where every N_l <= 32,768, else
        int32. M = 0 gives [0, L].

    Ties go to the lowest code. Numerics: float16 and bfloat16 are widened to float32. At each level
    the code of r, the residual in float32, equals float64's wherever the best two values of
    r.c - |c|^2/2 differ by more than 8 (D + 1) (eps (|r| max|c| + max|c|^2) + 2^-149), eps = 2^-23;
    elsewhere it is one whose value is that near the best. Codes are the same for any thread count
    and any batch. Autocast leaves the inputs as they are. Not differentiable.

    With AVX-512 VNNI, rounding to bytes finds the few codewords that can be nearest, under an error
    bound computed for each row, and float32 chooses among them: codes obey the same rule.

    Workspace on a CPU: one float32 copy of the codebooks (two where they are not contiguous
    float32), with AVX-512 VNNI a quarter of one more, and 450 D + 210,000 bytes per thread; a copy
    of x only where its columns are strided. On a GPU: 10 bytes per number of the
    codebooks, N_l rounded up to a multiple of 128 and D to a power of two from 16 on or, beyond 128
    (32 before compute capability 9.0), to a multiple of 32; beyond, also 1,024 D bytes per
    multiprocessor.

    Raises:
        TypeError: a wrong type or dtype. ValueError: a wrong shape, no codebook, N_l out of range,
        or a row of x that is not finite or too large for float32 distances (on a CPU; on a GPU such
        a row gets codes in range that mean nothing, as telling would stall the stream).
        BackendError: the named backend cannot run this.

    Source: FLUID, section 3.2 and LARM, equations 3-4 (residual k-means codes of live slices).

    Example:
        >>> codes = residual_kmeans_encode(x, [coarse, fine])  # [M, 2]
    """
    return _encode(x, _check_encode(x, codebooks), backend=backend)


def residual_kmeans_details(
    x: Tensor,
    codebooks: Sequence[Tensor],
    *,
    reconstruction: bool = False,
    second: bool = False,
    backend: str = "auto",
) -> ResidualKMeansDetails:
    r"""Encode, and tell in the same pass how well: what is left, and what nearly won.

    $\|r_l\|$ per level; $\sum_l C_l[c_l]$; per level the second nearest codeword $s_l$ and
    $\|r_{l-1} - C_l[s_l]\|^2 - \|r_{l-1} - C_l[c_l]\|^2$.

    In PyTorch, per level::

        distance, nearest = torch.cdist(residual, codebook).topk(2, largest=False)
        code, second, gap = *nearest.T, distance.square().diff(dim=1)[:, 0]
        residual = residual - codebook[code]

    Args:
        x: [M, D], as for `residual_kmeans_encode`.
        codebooks: L tensors [N_l, D], as for `residual_kmeans_encode`.
        reconstruction: also return the sum of the codewords, [M, D].
        second: also return the second nearest codewords and their gaps, as a beam search needs
            them; a falling gap tells of drift.
        backend: "auto", "triton", "native" or "reference".

    Returns:
        ResidualKMeansDetails(codes, residual_norms, reconstruction, second, gap). M = 0 gives
        tensors without rows.

    Codes, ties, numerics and determinism are those of `residual_kmeans_encode`; the second code
    obeys the same rule among the others, on the path of the codes; a gap is off by at most twice
    the rule's bound. Nothing here is differentiable: decode the codes for gradients. Workspace: as
    `residual_kmeans_encode`; the reference's, arrays of M x N_l.

    Raises: as `residual_kmeans_encode`.

    Source: FLUID, section 3.2; the beam of OneRec's and faiss's residual quantisers.

    Example:
        >>> details = residual_kmeans_details(x, [coarse, fine], second=True)
        >>> drift = (details.gap < 0.01).float().mean(0)  # share of rows on a border, per level
    """
    books = _check_encode(x, codebooks)
    for name, flag in {"reconstruction": reconstruction, "second": second}.items():
        if not isinstance(flag, bool):
            raise TypeError(f"{name}: must be a bool, got {type(flag).__name__}")
    codes, norms, total, other, gap = _details(x, books, reconstruction, second, backend=backend)
    return ResidualKMeansDetails(
        codes,
        norms,
        total if reconstruction else None,
        other if second else None,
        gap if second else None,
    )


def residual_kmeans_decode(
    codes: Tensor, codebooks: Sequence[Tensor], *, backend: str = "auto"
) -> Tensor:
    r"""Sum the codewords that codes stand for: $x_i = \sum_l C_l[c_{il}]$.

    In PyTorch::

        sum(codebook[code.long()] for codebook, code in zip(codebooks, codes.T))

    Args:
        codes: [M, L] integers, column l in [0, N_l).
        codebooks: L tensors [N_l, D] of one floating dtype, which the result has too.
        backend: "auto" or "reference".

    Returns:
        [M, D]; M = 0 gives [0, D]. Differentiable in the codebooks. Workspace: O(M L D).

    Raises:
        TypeError: a wrong type or dtype. ValueError: a wrong shape.
        IndexError: a code out of range.

    Source: FLUID, section 3.2 and LARM, equations 3-4.

    Example:
        >>> approximation = residual_kmeans_decode(codes, [coarse, fine])  # [M, D]
    """
    books = _check_codebooks(codebooks, "D")
    for level, book in enumerate(books):
        check_tensor(f"codebooks[{level}]", book, ("N", books[0].shape[1]), FLOATS)
    check_tensor("codes", codes, ("M", len(books)), INTEGERS)
    check_same("device", codes=codes, **{f"codebooks[{level}]": b for level, b in enumerate(books)})
    return _decode(codes, books, backend=backend)
