"""Agreement at sizes where the float64 answer, of all rows for every contestant, costs too much."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from livrec_fast.reference import residual_kmeans as reference
from livrec_fast.testing.subjects import to_double

_SCORES = 2**24  # float64 scores held at once: 128 MB


class Codes:
    """Hold codes to the exactness rule: of few rows all, of many a spread, and all in dispute.

    The first contestant's codes are held to float64 at `most` rows. Wherever a later one's differ,
    both are: a row goes unchecked only if everybody gives it the same codes.
    """

    def __init__(self, most: int = 131_072) -> None:
        self._most = most
        self._first: Tensor | None = None

    def __call__(self, codes: Tensor, inputs: dict[str, Any]) -> None:
        """Raise AssertionError where a code is further than rounding explains."""
        x, books = inputs["x"], inputs["codebooks"]
        assert codes.shape == (len(x), len(books)), f"codes: shape {list(codes.shape)}"
        first, self._first = self._first, codes if self._first is None else self._first
        if first is None:
            count = min(len(x), max(4096, self._most * 512 // max(map(len, books))), self._most)
            rows = torch.linspace(0, len(x) - 1, count, dtype=torch.float64).long().to(x.device)
            self._check(codes, rows, inputs)
            return
        assert codes.dtype == first.dtype, codes.dtype
        disputed = (codes != first).any(1).nonzero()[:, 0]
        self._check(codes, disputed, inputs)
        self._check(first, disputed, inputs, "the first contestant's codes: ")

    @staticmethod
    def _check(codes: Tensor, rows: Tensor, inputs: dict[str, Any], whose: str = "") -> None:
        x, books = inputs["x"], inputs["codebooks"]
        for some in rows.split(max(1, _SCORES // max(map(len, books)))):
            try:
                reference.agree(codes[some], {"x": x[some], "codebooks": books})
            except AssertionError as error:
                raise AssertionError(f"{whose}{error}") from error


def squared_error(x: Tensor, codebooks: list[Tensor]) -> float:
    """Return the mean of |x - sum_l C_l[c_l]|^2 over the rows, encoded and added up in float64."""
    total, books = 0.0, [book.double() for book in codebooks]
    for rows in x.split(max(1, _SCORES // max(map(len, books)))):
        residual = rows.double()
        for book in books:
            score = residual @ book.T - book.square().sum(1) / 2
            residual = residual - book[score.argmax(1)]
        total += float(residual.square().sum())
    return total / len(x)


class Close:
    """Hold outputs to float64: off by at most twice what the formula is in its dtype, and rounding.

    formula: gives the outputs, of the inputs and of them in float64; computed once for all
        contestants.
    rounding: of the greatest magnitude of an output, what may be added to that.
    pick: takes of the outputs what the formula gives, where that is less.
    """

    def __init__(
        self,
        formula: Callable[[dict[str, Any]], list[Tensor]],
        rounding: float = 1e-6,
        pick: Callable[[list[Tensor]], list[Tensor]] = list,
    ) -> None:
        self._formula = formula
        self._rounding = rounding
        self._pick = pick
        self._same: list[Tensor] = []
        self._exact: list[Tensor] = []

    def __call__(self, output: Any, inputs: dict[str, Any], times: float = 2) -> None:
        """Raise AssertionError where an output, or a gradient, is further off."""
        found = self._compute(output, inputs)
        for at, (got, same, exact) in enumerate(zip(found, self._same, self._exact, strict=True)):
            assert got.shape == exact.shape, f"{at}: shape {list(got.shape)}"
            error, own = (got - exact).abs(), (same - exact).abs()
            for norm in (Tensor.amax, lambda x: x.square().mean().sqrt()):
                limit = times * norm(own) + self._rounding * norm(exact.abs())
                off = norm(error)
                assert off <= limit, f"output {at}: off by {off:.3g}, limit {limit:.3g}"

    def roughly(
        self, output: Any, inputs: dict[str, Any], limit: float, of_first: float | None = None
    ) -> dict[str, float]:
        """Hold outputs to a relative error, in RMS, and tell the worst: for who rounds or drops.

        of_first: the limit of the first output, if another.
        """
        found = self._compute(output, inputs)
        errors = [
            float((got.detach() - exact.detach()).norm() / exact.detach().norm())
            for got, exact in zip(found, self._exact, strict=True)
        ]
        limits = [limit if of_first is None else of_first, *[limit] * len(errors[1:])]
        held = all(error <= most for error, most in zip(errors, limits, strict=True))
        assert held, f"relative errors {errors}, limits {limits}"
        return {"relative error": max(errors)}

    def _compute(self, output: Any, inputs: dict[str, Any]) -> list[Tensor]:
        """Compute the answers, once, and return the outputs as a list."""
        if not self._exact:
            self._same, self._exact = self._formula(inputs), self._formula(to_double(inputs))
        return self._pick([output] if isinstance(output, Tensor) else list(output))
