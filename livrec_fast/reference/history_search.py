"""The best items of each user's own history, as the formula has it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ._formula import per_user, wide_dtype
from ._oracle import Oracle, randn, random_offsets
from .code_attention import decode, draw_codes, look_up


def history_search(query: Tensor, keys: Tensor, offsets: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """score_t = query . key_t over the user's own rows; the k greatest, and where they are.

    The product is summed row by row, not by a matrix product, whose blocks may round equal rows
    differently: equal rows must tie.
    """
    wide = wide_dtype(query.dtype)
    query, keys = query.to(wide).contiguous(), keys.to(wide).contiguous()
    users = zip(query, per_user(keys, offsets), strict=True)
    return _stack([best((user[:, None] * rows).sum(2), k) for user, rows in users], query, k)


def history_search_codes(
    query: Tensor, codes: Tensor, tables: Sequence[Tensor], offsets: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """score_t = sum_f LUT_f[codes[t, f]] with LUT_f = tables[f] query^T; a code of -1 adds nothing.

    Equal codes read equal entries and add them in one order, so they tie.
    """
    query = query.to(wide_dtype(query.dtype))
    tables = [table.to(query.dtype) for table in tables]
    found = []
    for user, rows in zip(query, per_user(codes, offsets), strict=True):
        luts = [table @ user.T for table in tables]
        found.append(best(sum(map(look_up, luts, rows.T)).T, k))  # type: ignore[union-attr]
    return _stack(found, query, k)


def best(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k greatest of each row, the rightmost first among equals, then -inf and -1."""
    length = scores.shape[1]
    values, order = scores.flip(1).sort(dim=1, descending=True, stable=True)
    positions = length - 1 - order
    fill = (0, max(k - length, 0))
    return functional.pad(values[:, :k], fill, value=-torch.inf), functional.pad(
        positions[:, :k], fill, value=-1
    )


def _stack(found: Sequence[tuple[Tensor, Tensor]], query: Tensor, k: int) -> tuple[Tensor, Tensor]:
    none = query.new_empty(0, query.shape[1], k)  # B = 0 has no first user to tell the shape
    scores = torch.cat([none, *(scores[None] for scores, _ in found)])
    return scores, torch.cat([none.long(), *(positions[None] for _, positions in found)])


def agree(output: tuple[Tensor, Tensor], inputs: dict[str, Any]) -> None:
    """Hold scores and positions to the exactness rule, candidate by candidate."""
    query, keys = inputs["query"].double(), inputs["keys"].double()
    size = keys.norm(dim=1)
    twins = keys.unique(dim=0, return_inverse=True)[1] if len(keys) else size.long()
    _agree(output, query, keys, size, query.shape[2] + 1, twins, inputs)


def agree_codes(output: tuple[Tensor, Tensor], inputs: dict[str, Any]) -> None:
    """Hold scores and positions from codes to the same rule; rows of equal codes are equal rows."""
    query, codes = inputs["query"].double(), inputs["codes"].long()
    tables = [table.double() for table in inputs["tables"]]
    size = decode(codes, [table.norm(dim=1, keepdim=True) for table in tables])[:, 0]
    twins = codes.unique(dim=0, return_inverse=True)[1] if len(codes) else codes[:, 0]
    terms = query.shape[2] + len(tables) + 1
    _agree(output, query, decode(codes, tables), size, terms, twins, inputs)


def _agree(
    output: tuple[Tensor, Tensor],
    query: Tensor,
    keys: Tensor,
    size: Tensor,
    terms: int,
    twins: Tensor,
    inputs: dict[str, Any],
) -> None:
    """Check each user's candidates. size: a bound of |key|; twins: the same number for equal rows.

    A sum of n products in any order errs by at most n * eps * sum |products| <= n * eps * |q|
    |key|.
    """
    scores, positions = output
    wide = wide_dtype(inputs["query"].dtype)
    assert scores.dtype == wide and positions.dtype == torch.int64, (scores.dtype, positions.dtype)
    assert scores.shape == positions.shape == (*query.shape[:2], inputs["k"]), scores.shape
    users = (per_user(rows, inputs["offsets"]) for rows in (keys, size, twins))
    for user, (rows, norm, twin) in enumerate(zip(*users, strict=True)):
        for candidate, q in enumerate(query[user]):
            bound = terms * torch.finfo(wide).eps * q.norm() * norm
            at = user, candidate
            try:
                hold(scores[at], positions[at], rows @ q, bound, twin)
            except AssertionError as error:
                raise AssertionError(f"user {user}, candidate {candidate}: {error}") from None


def hold(scores: Tensor, positions: Tensor, exact: Tensor, bound: Tensor, twins: Tensor) -> None:
    """Check one candidate's answer [k] against float64 scores [t], give or take `bound` [t]."""
    filled = min(len(scores), len(exact))
    assert (scores[filled:] == -torch.inf).all(), "a short history must be filled with -inf"
    assert (positions[filled:] == -1).all(), "a short history must be filled with -1"
    scores, positions = scores[:filled], positions[:filled]
    assert ((positions >= 0) & (positions < len(exact))).all(), "a position is outside the history"
    left = torch.ones(len(exact), dtype=torch.bool)
    left[positions] = False
    assert int(left.sum()) == len(exact) - filled, "a position is reported twice"
    error = (scores.double() - exact[positions]).abs()
    assert (error <= bound[positions]).all(), f"a score is off by {error.max():.3g}"
    ties = (scores[1:] == scores[:-1]) & (positions[1:] < positions[:-1])
    assert ((scores[1:] < scores[:-1]) | ties).all(), "not in order of score, then of position"
    if filled and left.any():
        slack = (exact - bound)[left].max() - (exact + bound)[positions].min()
        assert slack <= 0, f"an item was left out that scores {slack:.3g} more, past rounding"
    same = twins[positions][:, None] == twins[positions]
    assert (scores[:, None] == scores)[same].all(), "equal rows do not tie"
    others = left.nonzero()[:, 0]
    later = (twins[others][:, None] == twins[positions]) & (others[:, None] > positions)
    assert not later.any(), "an equal row that is more recent was left out"


def make_inputs(
    generator: torch.Generator,
    dtype: torch.dtype,
    *,
    B: int,
    C: int,
    L: int,
    D: int,
    K: int,
    distinct: int,
) -> dict[str, Any]:
    """Draw histories of at most L rows; one in three repeats a recent one, unless `distinct`.

    Differences across a tie show no derivative, so that a gradcheck needs distinct rows.
    """
    offsets = random_offsets(generator, B, L)
    query, keys = draw_exact(generator, dtype, (B, C, D), int(offsets[-1]))
    if not distinct:
        back = torch.randint(-8, 5, (len(keys),), generator=generator).clamp(min=0)
        keys = keys[(torch.arange(len(keys)) - back).clamp(min=0)]
    return {"query": query, "keys": keys, "offsets": offsets, "k": K}


def make_codes_inputs(
    generator: torch.Generator,
    dtype: torch.dtype,
    *,
    B: int,
    C: int,
    L: int,
    D: int,
    F: int,
    N: int,
    K: int,
) -> dict[str, Any]:
    """Draw histories of at most L rows of F codes below N; equal rows of codes are common."""
    offsets = random_offsets(generator, B, L)
    query, rows = draw_exact(generator, dtype, (B, C, D), F * N)
    tables = list(rows.unflatten(0, (F, N)))
    codes = draw_codes(generator, int(offsets[-1]), [N] * F)
    return {"query": query, "codes": codes, "tables": tables, "offsets": offsets, "k": K}


def draw_exact(
    generator: torch.Generator, dtype: torch.dtype, shape: Sequence[int], rows: int
) -> tuple[Tensor, Tensor]:
    """Draw queries in multiples of 1/2 and rows of their width in multiples of 2^-10.

    For D <= 256 a float32 sum of their products in any order is then exact: ties are ties, and
    every dtype has the same answer and the same gradients. Ten bits after the point are more than
    TF32 or bfloat16 products would keep.
    """
    query = torch.randint(-8, 9, tuple(shape), generator=generator) / 2
    keys = (randn(generator, torch.float32, rows, shape[-1]) * 1024).round() / 1024
    return query.to(dtype), keys.to(dtype)


_SIZES = {"B": (0, 5), "C": (0, 4), "L": (0, 60), "D": (1, 40), "K": (1, 70)}
_CASES = {
    "typical": {"B": 6, "C": 4, "L": 80, "D": 32, "K": 10},
    "no users": {"B": 0, "C": 3, "L": 5, "D": 8, "K": 2},
    "no candidates": {"B": 3, "C": 0, "L": 5, "D": 8, "K": 2},
    "empty histories": {"B": 3, "C": 2, "L": 0, "D": 8, "K": 2},
    "one of each": {"B": 1, "C": 1, "L": 1, "D": 1, "K": 1},
    "k past every length": {"B": 4, "C": 2, "L": 20, "D": 8, "K": 50},
    "long": {"B": 2, "C": 2, "L": 3000, "D": 64, "K": 200},
}
ORACLES = {
    "history_search": Oracle(
        history_search,
        make_inputs,
        {**_SIZES, "distinct": (0, 1)},
        {name: {**sizes, "distinct": 0} for name, sizes in _CASES.items()},
        agree=agree,
    ),
    "history_search_codes": Oracle(
        history_search_codes,
        make_codes_inputs,
        {**_SIZES, "F": (1, 4), "N": (1, 20)},
        {name: {**sizes, "F": 3, "N": 12} for name, sizes in _CASES.items()},
        agree=agree_codes,
    ),
}
