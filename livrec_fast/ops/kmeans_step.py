"""One step of Lloyd's k-means: nearest codewords and the sums of their rows, in one reading."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._checks import FLOATS, check_finite, check_same, check_tensor
from .._dispatch import Backend, Op, refuse_native, refuse_triton
from ..reference import kmeans_step as reference


class KMeansStep(NamedTuple):
    """What `kmeans_step` returns.

    codes: int32 [M], the nearest codeword of each row.
    error: float32 [M] (float64 for float64), |x - C[code]|^2, without weight and penalty.
    sums: float64 [N, D], the sum of w x over the rows of each codeword.
    mass: float64 [N], the sum of w over the rows of each codeword.
    inertia: float64 0-d, the sum of w |x - C[code]|^2 over all rows.
    """

    codes: Tensor
    error: Tensor
    sums: Tensor
    mass: Tensor
    inertia: Tensor


def _check_values(
    x: Tensor, codebook: Tensor, weights: Tensor | None, penalty: Tensor | None, quanta: Tensor
) -> None:
    check_finite("x", x)
    check_finite("codebook", codebook)
    if weights is not None:
        bad = (~(weights >= 0) | weights.isinf()).nonzero()
        if len(bad):
            at = int(bad[0])
            raise ValueError(
                f"weights: must be finite and not negative, got weights[{at}] = {weights[at]}"
            )
    if penalty is not None:
        bad = (penalty.isnan() | (penalty == -torch.inf)).nonzero()
        if len(bad):
            at = int(bad[0])
            raise ValueError(f"penalty: must be finite or +inf, got penalty[{at}] = {penalty[at]}")
        if len(x) and bool((penalty == torch.inf).all()):
            raise ValueError("penalty: at least one codeword must be allowed, all are +inf")
    if not bool((quanta > 0).all()) or not bool(quanta.isfinite().all()):
        raise ValueError(f"quanta: must be positive and finite, got {quanta.tolist()}")


def _fake(x: Tensor, codebook: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    count = x.shape[0]
    return (
        x.new_empty(count, dtype=torch.int32),
        x.new_empty(count, dtype=wide),
        codebook.new_empty(codebook.shape, dtype=torch.float64),
        codebook.new_empty(codebook.shape[0], dtype=torch.float64),
        codebook.new_empty((), dtype=torch.float64),
    )


def _triton(
    x: Tensor, codebook: Tensor, weights: Tensor | None, penalty: Tensor | None, quanta: Tensor
) -> tuple[Tensor, ...]:
    from ..kernels import kmeans_step, residual_kmeans

    codes, error = residual_kmeans.assign(x, codebook, penalty)
    sums = kmeans_step.accumulate(x, codes, error, weights, len(codebook), quanta)
    return (codes.int() if codes.dtype != torch.int32 else codes, error, *sums)


def _refuse_native(x: Tensor, *rest: Tensor | None) -> str | None:
    if x.dtype == torch.float64:
        return "computes in float32; x is float64"
    return refuse_native(x)


def _refuse_triton(x: Tensor, *rest: Tensor | None) -> str | None:
    if x.dtype == torch.float64:
        return "computes in float32; x is float64"
    if x.shape[1] > 16384:
        return "addresses codewords in 32 bits: D must be at most 16,384"
    return refuse_triton(x)


_op = Op(
    "kmeans_step",
    "(Tensor x, Tensor codebook, Tensor? weights, Tensor? penalty, Tensor quanta) "
    "-> (Tensor codes, Tensor error, Tensor sums, Tensor mass, Tensor inertia)",
    fake=_fake,
    reference=reference.kmeans_step,
    check_values=_check_values,
    backends=(Backend("native", _refuse_native), Backend("triton", _refuse_triton, _triton)),
    differentiable=False,
)


def kmeans_step(
    x: Tensor,
    codebook: Tensor,
    *,
    weights: Tensor | None = None,
    penalty: Tensor | None = None,
    quanta: Tensor | None = None,
    backend: str = "auto",
) -> KMeansStep:
    r"""Assign each row to its nearest codeword and add up the rows of each codeword.

    $c_i = \arg\min_j \|x_i - C_j\|^2 + p_j,\quad S_j = \sum_{c_i = j} w_i x_i,\quad
    W_j = \sum_{c_i = j} w_i$; Lloyd's next codeword is $S_j / W_j$.

    In PyTorch, without weights and penalty::

        codes = torch.cdist(x, codebook).argmin(1)
        sums = torch.zeros_like(codebook).index_add(0, codes, x)
        mass = codes.bincount(minlength=len(codebook))

    Args:
        x: [M, D] float32, float16, bfloat16 or float64; rows may be strided.
        codebook: [N, D] float32 (float64 for float64), 1 <= N <= 65,536.
        weights: [M] of codebook's dtype, finite, not negative: a row of weight 2 counts twice.
        penalty: [N] of codebook's dtype, finite or +inf: what a codeword costs beside its distance,
            +inf bars it. It takes part in the choice, and in nothing that is returned.
        quanta: float64 [3], powers of two: terms of sums, of mass and of inertia are rounded to
            multiples of them before they are added. None takes what suits these rows; parts of
            one data set that shall add up exactly need common ones, of `kmeans_quanta`.
        backend: "auto", "triton", "native" or "reference".

    Returns:
        KMeansStep(codes, error, sums, mass, inertia). M = 0 gives empty codes and zero sums.

    Ties go to the lowest code. Numerics: codes obey the rule of `residual_kmeans_encode`. Sums,
    mass and inertia are exact sums of rounded terms: they are the same to the bit for any number
    of threads, any order of the rows and any division into parts. Rounding moves a term by at most
    M max(term) 2^-51. Autocast leaves the inputs as they are. Not differentiable. Workspace on a
    CPU: that of `residual_kmeans_encode`, and N (D + 1) float64 per thread where these take at most
    512 KB, else N per thread and an int64 per row; on a GPU: that of `residual_kmeans_encode`, and
    about 32 bytes per row to sort the codes; of the reference: arrays of M x N and M x D.

    Raises:
        TypeError: a wrong type or dtype. ValueError: a wrong shape or device, N out of range,
        weights or penalty out of range, or a row of x that is not finite or too large for float32
        distances (on a GPU such a row gets a code in range that means nothing).
        BackendError: the named backend cannot run this.

    Source: Lloyd, "Least squares quantization in PCM" (1982), for the codebooks of FLUID, section
    3.2 and LARM, equations 3-4.

    Example:
        >>> step = kmeans_step(x, codebook)
        >>> codebook = (step.sums / step.mass[:, None]).float()  # where mass > 0
    """
    check_tensor("x", x, ("M", "D"), FLOATS)
    rows, dim = x.shape
    if dim < 1:
        raise ValueError(f"x: D must be at least 1, got shape {list(x.shape)}")
    wide = (torch.float64 if x.dtype == torch.float64 else torch.float32,)
    check_tensor("codebook", codebook, ("N", dim), wide)
    size = codebook.shape[0]
    if not 1 <= size <= 65536:
        raise ValueError(f"codebook: N must be 1 to 65536, got {size}")
    if weights is not None:
        check_tensor("weights", weights, (rows,), wide)
    if penalty is not None:
        check_tensor("penalty", penalty, (size,), wide)
    if quanta is not None:
        check_tensor("quanta", quanta, (3,), (torch.float64,))
    check_same("device", x=x, codebook=codebook, weights=weights, penalty=penalty, quanta=quanta)
    if quanta is None:
        quanta = reference.quanta_of(x, codebook, weights)
    return KMeansStep(*_op(x, codebook, weights, penalty, quanta, backend=backend))


def kmeans_quanta(rows: int, largest: float, longest: float, heaviest: float = 1.0) -> Tensor:
    """Return the quanta, float64 [3], with which the parts of a data set add up exactly.

    Args:
        rows: of all parts together.
        largest: the greatest |x_id|.
        longest: the greatest |x|^2 of a row and |c|^2 of a codeword.
        heaviest: the greatest weight.
    """
    terms = torch.tensor([largest, 1.0, 4 * longest], dtype=torch.float64)
    return reference.quantum_of(rows * heaviest * terms)
