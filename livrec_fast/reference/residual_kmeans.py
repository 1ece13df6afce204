"""Residual k-means, as the formula has it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._oracle import Oracle, randn


def code_dtype(most_codewords: int) -> torch.dtype:
    """Return the smallest of uint8, int16 and int32 that holds codes below most_codewords."""
    if most_codewords <= 256:
        return torch.uint8
    return torch.int16 if most_codewords <= 32768 else torch.int32


def residual_kmeans_encode(x: Tensor, codebooks: Sequence[Tensor]) -> Tensor:
    """c_l = argmin_j |r_(l-1) - C_l[j]|^2, lowest j on ties;  r_l = r_(l-1) - C_l[c_l];  r_0 = x.

    |r - c|^2 = |r|^2 - 2 (r.c - |c|^2 / 2), and |r|^2 is the same for every j: the greatest
    bracket wins. float16 and bfloat16 are computed in float32: half precision cannot tell codewords
    apart.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    residual = x.to(wide)
    codes = []
    for codebook in (codebook.to(wide) for codebook in codebooks):
        score = residual @ codebook.T - codebook.square().sum(1) / 2
        code = score.argmax(1)
        residual = residual - codebook[code]
        codes.append(code)
    return torch.stack(codes, 1).to(code_dtype(max(len(codebook) for codebook in codebooks)))


def residual_kmeans_details(
    x: Tensor, codebooks: Sequence[Tensor], reconstruction: bool, second: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Encode; |r_l| after each level; sum_l C_l[c_l]; the second best code and its gap.

    What was not asked for is empty. A level of one codeword has no second: code 0, gap infinite.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    residual, total = x.to(wide), torch.zeros_like(x, dtype=wide)
    codes, norms, seconds, gaps = [], [], [], []
    for codebook in (codebook.to(wide) for codebook in codebooks):
        score = residual @ codebook.T - codebook.square().sum(1) / 2
        code = score.argmax(1)
        if second:
            best = score.gather(1, code[:, None])[:, 0]
            others = score.scatter(1, code[:, None], -torch.inf)
            seconds.append(others.argmax(1))
            gaps.append(2 * (best - others.amax(1)))
        residual, total = residual - codebook[code], total + codebook[code]
        codes.append(code)
        norms.append(residual.norm(dim=1))
    dtype = code_dtype(max(len(codebook) for codebook in codebooks))
    return (
        torch.stack(codes, 1).to(dtype),
        torch.stack(norms, 1),
        total if reconstruction else total.new_empty(0),
        torch.stack(seconds, 1).to(dtype) if second else total.new_empty(0, dtype=dtype),
        torch.stack(gaps, 1) if second else total.new_empty(0),
    )


def residual_kmeans_decode(codes: Tensor, codebooks: Sequence[Tensor]) -> Tensor:
    """x = sum_l C_l[c_l]."""
    pairs = zip(codes.long().T, codebooks, strict=True)
    chosen = [F.embedding(code, codebook) for code, codebook in pairs]
    return torch.stack(chosen).sum(0)


def rounding_bound(residual: Tensor, codebook: Tensor) -> Tensor:
    """Bound, per row, the float32 error of r.c - |c|^2 / 2 over all codewords c.

    A sum of n products in any order errs by at most n * eps * sum |products|; here n = D + 1. The
    residual is the float32 one, whose own rounding is no part of this: it follows from the codes.
    Products below 2^-126 err by 2^-149 at most instead.
    """
    eps, least = torch.finfo(torch.float32).eps, 2.0**-149
    longest = codebook.norm(dim=1).max()
    size = residual.norm(dim=1) * longest + longest.square()
    return 4 * (residual.shape[1] + 1) * (eps * size + least)


def hold_to_rule(what: str, code: Tensor, score: Tensor, bound: Tensor) -> None:
    """Check that each row's code has a score [M, N] within `bound` [M] of the best."""
    assert ((code >= 0) & (code < score.shape[1])).all(), f"{what}: a code is out of range"
    short = score.amax(1) - score.gather(1, code[:, None])[:, 0]
    worst = int((short - bound).argmax()) if len(short) else 0
    assert (short <= bound).all(), (
        f"{what}, row {worst}: code {code[worst]} scores {short[worst]:.3g} less than the best; "
        f"rounding explains {bound[worst]:.3g}"
    )


def agree(codes: Tensor, inputs: dict[str, Any]) -> None:
    """Hold codes to the exactness rule, level by level, along the path that they took themselves.

    Equal to float64's argmin wherever the best two scores differ by more than the rounding bound;
    elsewhere the chosen score is within the bound of the best.
    """
    codebooks = inputs["codebooks"]
    assert codes.dtype == code_dtype(max(len(codebook) for codebook in codebooks)), codes.dtype
    levels = zip(codebooks, residuals(codes, inputs), codes.long().T, strict=True)
    for level, (codebook, residual, code) in enumerate(levels):
        book = codebook.double()
        score = residual @ book.T - book.square().sum(1) / 2
        hold_to_rule(f"level {level}", code, score, 2 * rounding_bound(residual, book))


def residuals(codes: Tensor, inputs: dict[str, Any]) -> list[Tensor]:
    """Return what each level codes, as float64: x, and what its codes leave of it in float32."""
    wide = torch.float64 if inputs["x"].dtype == torch.float64 else torch.float32
    left = [inputs["x"].to(wide)]
    for codebook, code in zip(inputs["codebooks"], codes.long().T, strict=True):
        left.append(left[-1] - codebook.to(wide)[code.clamp(0, len(codebook) - 1)])
    return [rows.double() for rows in left[:-1]]


def agree_on_details(outputs: Sequence[Tensor | None], inputs: dict[str, Any]) -> None:
    """Hold codes and second codes to the exactness rule, and floats to what the codes imply."""
    codes, norms, reconstruction, second, gap = outputs
    assert codes is not None and norms is not None
    agree(codes, {"x": inputs["x"], "codebooks": inputs["codebooks"]})
    eps = torch.finfo(norms.dtype).eps
    residual = inputs["x"].double()
    size = residual.norm(dim=1)
    levels = zip(inputs["codebooks"], residuals(codes, inputs), strict=True)
    for level, (codebook, coded) in enumerate(levels):
        book, code = codebook.double(), codes[:, level].long()
        bound = 2 * rounding_bound(coded, book)
        if second is not None and gap is not None:
            score = coded @ book.T - book.square().sum(1) / 2
            best = score.gather(1, code[:, None])[:, 0]
            score = score.scatter(1, code[:, None], -torch.inf)
            if len(book) > 1:
                assert (second[:, level] != codes[:, level]).all(), "second: is the first"
                hold_to_rule(f"second, level {level}", second[:, level].long(), score, bound)
                wrong = (gap[:, level] - 2 * (best - score.amax(1))).abs()
                assert (wrong <= 2 * bound).all(), f"gap, level {level}: off by {wrong.max()}"
            else:
                assert (second[:, level] == 0).all() and (gap[:, level] == torch.inf).all()
        residual = residual - book[code]
        size = size + book[code].norm(dim=1)
        wrong = (norms[:, level] - residual.norm(dim=1)).abs()
        slack = eps * (residual.shape[1] + 4) * residual.norm(dim=1) + eps * (level + 1) * size
        assert (wrong <= 4 * slack).all(), f"residual_norms, level {level}: off by {wrong.max()}"
    if reconstruction is not None:
        wrong = (reconstruction - (inputs["x"].double() - residual)).norm(dim=1)
        assert (wrong <= 4 * eps * len(inputs["codebooks"]) * size).all(), "reconstruction: is off"


def make_inputs(
    generator: torch.Generator, dtype: torch.dtype, *, M: int, D: int, L: int, N: int
) -> dict[str, Any]:
    """Draw rows and codebooks, each level's a little smaller and nearer to 0 than the last."""
    sizes = [max(1, N - 3 * level) for level in range(L)]
    books = [randn(generator, dtype, n, D) / 2**level for level, n in enumerate(sizes)]
    return {"x": randn(generator, dtype, M, D), "codebooks": books}


def make_detail_inputs(
    generator: torch.Generator, dtype: torch.dtype, *, all: int, **sizes: int
) -> dict[str, Any]:
    """Draw rows and codebooks; ask for everything or for the least."""
    inputs = make_inputs(generator, dtype, **sizes)
    return inputs | {"reconstruction": bool(all), "second": bool(all)}


def make_decode_inputs(
    generator: torch.Generator, dtype: torch.dtype, **sizes: int
) -> dict[str, Any]:
    """Draw codes and codebooks."""
    codebooks = make_inputs(generator, dtype, **sizes)["codebooks"]
    columns = [torch.randint(len(book), (sizes["M"],), generator=generator) for book in codebooks]
    return {"codes": torch.stack(columns, 1).to(torch.int16), "codebooks": codebooks}


_SIZES = {"M": (0, 70), "D": (1, 40), "L": (1, 4), "N": (1, 80)}
_CASES = {
    "typical": {"M": 300, "D": 32, "L": 3, "N": 40},
    "no rows": {"M": 0, "D": 8, "L": 2, "N": 4},
    "one of each": {"M": 1, "D": 1, "L": 1, "N": 1},
    "wide codes": {"M": 40, "D": 16, "L": 2, "N": 300},
}
ORACLES = {
    "residual_kmeans_encode": Oracle(
        residual_kmeans_encode, make_inputs, _SIZES, _CASES, agree=agree
    ),
    "residual_kmeans_details": Oracle(
        residual_kmeans_details,
        make_detail_inputs,
        {**_SIZES, "all": (0, 1)},
        {
            **{name: {**case, "all": 1} for name, case in _CASES.items()},
            "codes and norms": {**_CASES["typical"], "all": 0},
        },
        agree=agree_on_details,
    ),
    "residual_kmeans_decode": Oracle(residual_kmeans_decode, make_decode_inputs, _SIZES, _CASES),
}
