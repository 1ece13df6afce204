"""One step of Lloyd's k-means, as the formula has it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._oracle import Oracle, randn
from .residual_kmeans import hold_to_rule, rounding_bound


def round_to(quantum: Tensor, value: Tensor) -> Tensor:
    """Round float64 values to multiples of `quantum`, a power of two.

    Beside 1.5 * 2^52 quanta a float64 has no room for anything finer than a quantum.
    """
    coarse = 1.5 * 2**52 * quantum
    return (value + coarse) - coarse


def quantum_of(bound: Tensor) -> Tensor:
    """Return the quantum with which sums whose terms' sizes add up to `bound` at most are exact.

    All partial sums are then whole quanta below 2^53, so every addition is exact in float64.
    """
    exponent = 0x7FF << 52  # without its mantissa a float64 is the power of two at or below it
    power = (bound.clamp_min(2.0**-900).view(torch.int64) & exponent).view(torch.float64)
    return power * 2.0**-50


def quanta_of(x: Tensor, codebook: Tensor, weights: Tensor | None) -> Tensor:
    """Return the quanta [3] of the sums, the mass and the inertia that these rows can have."""
    if len(x) == 0:
        return x.new_ones(3, dtype=torch.float64)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    largest = torch.stack(x.aminmax()).abs().amax().double()
    norms = [torch.linalg.vector_norm(rows, dim=1, dtype=wide) for rows in (x, codebook)]
    longest = 1.001 * torch.cat(norms).amax().double().square()  # norms err in their last bits
    heaviest = largest.new_ones(()) if weights is None else weights.amax().double()
    return quantum_of(len(x) * heaviest * torch.stack([largest, largest.new_ones(()), 4 * longest]))


def kmeans_step(
    x: Tensor, codebook: Tensor, weights: Tensor | None, penalty: Tensor | None, quanta: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """c_i = argmin_j |x_i - C[j]|^2 + p_j;  S_j = sum of w_i x_i and W_j = sum of w_i over c_i = j.

    |x - c|^2 = |x|^2 - 2 (x.c - |c|^2 / 2), and |x|^2 is the same for every j.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows, book = x.to(wide), codebook.to(wide)
    score = rows @ book.T - book.square().sum(1) / 2
    if penalty is not None:
        score = score - penalty / 2
    codes = score.argmax(1)
    error = (rows - book[codes]).square().sum(1)
    weight = rows.new_ones(len(rows)).double() if weights is None else weights.double()
    terms = round_to(quanta[0], weight[:, None] * rows.double())
    weight = round_to(quanta[1], weight)
    sums = torch.zeros_like(book, dtype=torch.float64).index_add(0, codes, terms)
    mass = sums.new_zeros(len(book)).index_add(0, codes, weight)
    inertia = round_to(quanta[2], weight * error.double()).sum()
    return codes.int(), error, sums, mass, inertia


def agree(outputs: tuple[Tensor, ...], inputs: dict[str, Any]) -> None:
    """Hold codes to the exactness rule, and all else to what follows from these very codes.

    Sums of whole quanta are exact: they have one right answer, to the last bit.
    """
    codes, error, sums, mass, inertia = outputs
    x, book, code = inputs["x"].double(), inputs["codebook"].double(), codes.long()
    weights, penalty = inputs.get("weights"), inputs.get("penalty")
    score = x @ book.T - book.square().sum(1) / 2
    bound = 2 * rounding_bound(x, book)
    if penalty is not None:
        score = score - penalty.double() / 2
        finite = penalty.double().abs().masked_fill(penalty.isinf(), 0)
        bound = bound + 4 * torch.finfo(torch.float32).eps * finite.amax()
    hold_to_rule("codes", code, score, bound)
    exact = (x - book[code]).square().sum(1)
    close = 4 * (x.shape[1] + 4) * torch.finfo(error.dtype).eps * exact
    assert ((error - exact).abs() <= close).all(), "error: is not |x - C[code]|^2"
    quanta = inputs.get("quanta")
    if quanta is None:
        quanta = quanta_of(inputs["x"], inputs["codebook"], weights)
    weight = torch.ones(len(x), dtype=torch.float64) if weights is None else weights.double()
    terms = round_to(quanta[0], weight[:, None] * x)
    weight = round_to(quanta[1], weight)
    assert sums.equal(torch.zeros_like(book).index_add(0, code, terms)), "sums: not exact"
    assert mass.equal(sums.new_zeros(len(book)).index_add(0, code, weight)), "mass: not exact"
    assert inertia.equal(round_to(quanta[2], weight * error.double()).sum()), "inertia: not exact"


def make_inputs(
    generator: torch.Generator,
    dtype: torch.dtype,
    *,
    M: int,
    D: int,
    N: int,
    weighted: int,
    penalised: int,
) -> dict[str, Any]:
    """Draw rows off the origin, codewords, weights (one in four is 0) and penalties."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    inputs: dict[str, Any] = {
        "x": randn(generator, dtype, M, D) + 0.5,
        "codebook": randn(generator, wide, N, D) + 0.5,
    }
    if weighted:
        inputs["weights"] = (4 * torch.rand(M, generator=generator)).sub(1).relu().to(wide)
    if penalised:
        inputs["penalty"] = 2 * torch.rand(N, generator=generator).to(wide)
    return inputs


_TYPICAL = {"M": 400, "D": 24, "N": 37, "weighted": 1, "penalised": 1}
ORACLES = {
    "kmeans_step": Oracle(
        kmeans_step,
        make_inputs,
        sizes={"M": (0, 90), "D": (1, 40), "N": (1, 70), "weighted": (0, 1), "penalised": (0, 1)},
        cases={
            "typical": _TYPICAL,
            "plain": {**_TYPICAL, "weighted": 0, "penalised": 0},
            "no rows": {**_TYPICAL, "M": 0},
            "one of each": {"M": 1, "D": 1, "N": 1, "weighted": 0, "penalised": 0},
            "many codewords": {"M": 700, "D": 40, "N": 1500, "weighted": 1, "penalised": 0},
        },
        agree=agree,
    )
}
