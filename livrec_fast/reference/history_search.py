"""The best items of each user's own history, as the formula has it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ._formula import per_user, wide_dtype
from ._oracle import Oracle, randn, random_offsets
from ._search_mask import draw_masks, kept, kept_of
from .code_attention import decode, draw_fields, look_up
from .prefix_ngram_keys import prefix_ngram_keys


def history_search(
    query: Tensor, keys: Tensor, offsets: Tensor, k: int, *masks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """score_t = query . key_t over the user's own rows; the k greatest, and where they are.

    The product is summed row by row, not by a matrix product, whose blocks may round equal rows
    differently: equal rows must tie. masks: item_ids, query_ids and so on, as `kept` takes them.
    """
    wide = wide_dtype(query.dtype)
    query, keys = query.to(wide).contiguous(), keys.to(wide).contiguous()
    users = zip(query, per_user(keys, offsets), kept(query, offsets, *masks), strict=True)
    return _stack(
        [best((user[:, None] * rows).sum(2), may, k) for user, rows, may in users], query, k
    )


def history_search_codes(
    query: Tensor,
    codes: Tensor,
    tables: Sequence[Tensor],
    offsets: Tensor,
    k: int,
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    """score_t = sum_f LUT_f[row_f(codes[t])], LUT_f = tables[f] query^T; row -1 adds nothing.

    Equal codes read equal entries and add them in one order, so they tie. rest: the masks as
    `kept` takes them; levels, groups, hashing and packed, which say which rows codes name.
    """
    *masks, levels, groups, hashing, packed = rest
    sizes = [len(table) for table in tables]
    named = prefix_ngram_keys(codes, levels, sizes, hashing, groups, packed)
    query = query.to(wide_dtype(query.dtype))
    tables = [table.to(query.dtype) for table in tables]
    found = []
    users = zip(query, per_user(named, offsets), kept(query, offsets, *masks), strict=True)
    for user, rows, may in users:
        luts = [table @ user.T for table in tables]
        found.append(best(sum(map(look_up, luts, rows.T)).T, may, k))  # type: ignore[union-attr]
    return _stack(found, query, k)


def best(scores: Tensor, may: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k greatest of each row among those that `may` be found, then -inf and -1.

    The rightmost is the first among equals.
    """
    length = scores.shape[1]
    order = length - 1 - scores.flip(1).argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, (~may).gather(1, order).byte().argsort(dim=1, stable=True))[:, :k]
    masked = ~may.gather(1, order)
    scores = scores.gather(1, order).masked_fill(masked, -torch.inf)
    fill = (0, max(k - length, 0))
    return functional.pad(scores, fill, value=-torch.inf), functional.pad(
        order.masked_fill(masked, -1), fill, value=-1
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
    query, codes = inputs["query"].double(), inputs["codes"]
    tables = [table.double() for table in inputs["tables"]]
    sizes, depth = [len(table) for table in tables], len(tables)
    groups = inputs["groups"] or ([depth] if inputs["prefix"] else [1] * depth)
    names = inputs["levels"] or sizes, sizes, inputs["hashing"], groups, inputs["packed"]
    rows = prefix_ngram_keys(codes, *names)
    size = decode(rows, [table.norm(dim=1, keepdim=True) for table in tables])[:, 0]
    twins = rows.unique(dim=0, return_inverse=True)[1] if len(rows) else rows[:, 0]
    _agree(output, query, decode(rows, tables), size, query.shape[2] + depth + 1, twins, inputs)


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
    for user, (rows, norm, twin, may) in enumerate(zip(*users, kept_of(inputs), strict=True)):
        for candidate, q in enumerate(query[user]):
            bound = terms * torch.finfo(wide).eps * q.norm() * norm
            at = user, candidate
            try:
                hold(scores[at], positions[at], rows @ q, bound, twin, may[candidate])
            except AssertionError as error:
                raise AssertionError(f"user {user}, candidate {candidate}: {error}") from None


def hold(
    scores: Tensor, positions: Tensor, exact: Tensor, bound: Tensor, twins: Tensor, may: Tensor
) -> None:
    """Check one candidate's answer [k] against float64 scores [t], give or take `bound` [t].

    may: bool [t], the items that can be found at all.
    """
    filled = min(len(scores), int(may.sum()))
    assert (scores[filled:] == -torch.inf).all(), "a short history must be filled with -inf"
    assert (positions[filled:] == -1).all(), "a short history must be filled with -1"
    scores, positions = scores[:filled], positions[:filled]
    assert ((positions >= 0) & (positions < len(exact))).all(), "a position is outside the history"
    assert may[positions].all(), "a masked item is reported"
    left = may.clone()
    left[positions] = False
    assert int(left.sum()) == int(may.sum()) - filled, "a position is reported twice"
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
    ids: int,
    bits: int,
    times: int,
) -> dict[str, Any]:
    """Draw histories of at most L rows; one in three repeats a recent one, unless `distinct`.

    Differences across a tie show no derivative, so that a gradcheck needs distinct rows.
    """
    offsets = random_offsets(generator, B, L)
    query, keys = draw_exact(generator, dtype, (B, C, D), int(offsets[-1]))
    if not distinct:
        back = torch.randint(-8, 5, (len(keys),), generator=generator).clamp(min=0)
        keys = keys[(torch.arange(len(keys)) - back).clamp(min=0)]
    masks = draw_masks(generator, offsets, C, ids, bits, times)
    return {"query": query, "keys": keys, "offsets": offsets, "k": K, **masks}


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
    ids: int,
    bits: int,
    times: int,
    rows: int = 2**31,
    kind: int = 0,
    hash: int = 0,
    pack: int = 0,
) -> dict[str, Any]:
    """Draw histories of at most L rows of F codes; equal rows of codes are common."""
    offsets = random_offsets(generator, B, L)
    named = {"F": F, "N": N, "rows": rows, "kind": kind, "hash": hash, "pack": pack, "odd": 0}
    fields, sizes = draw_fields(generator, int(offsets[-1]), **named)
    query, table = draw_exact(generator, dtype, (B, C, D), sum(sizes))
    masks = draw_masks(generator, offsets, C, ids, bits, times)
    tables = list(table.split(sizes))
    return {"query": query, "tables": tables, "offsets": offsets, "k": K, **fields, **masks}


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


_SIZES = {
    "B": (0, 5), "C": (0, 4), "L": (0, 60), "D": (1, 40), "K": (1, 70), "ids": (0, 1),
    "bits": (0, 1), "times": (0, 1),
}  # fmt: skip
_ALL, _NONE = (dict.fromkeys(("ids", "bits", "times"), on) for on in (1, 0))
_TYPICAL = {"B": 6, "C": 4, "L": 80, "D": 32, "K": 10, **_ALL}
_SMALL = {"B": 3, "C": 2, "L": 5, "D": 8, "K": 2, **_ALL}
_MASKED = {"B": 3, "C": 3, "L": 300, "D": 8, "K": 20, **_NONE}
_CASES = {
    "typical": _TYPICAL,
    "no masks": _TYPICAL | _NONE,
    "no users": _SMALL | {"B": 0},
    "no candidates": _SMALL | {"C": 0},
    "empty histories": _SMALL | {"L": 0},
    "one of each": {"B": 1, "C": 1, "L": 1, "D": 1, "K": 1, **_NONE},
    "k past every length": {"B": 4, "C": 2, "L": 20, "D": 8, "K": 50, **_NONE},
    "long": {"B": 2, "C": 2, "L": 3000, "D": 64, "K": 200, **_NONE},
    "same author": _MASKED | {"ids": 1},
    "behaviour bits": _MASKED | {"bits": 1},
    "time window": _MASKED | {"times": 1},
    "all masks": _MASKED | _ALL,
    "nothing left": _MASKED | {"ids": 2},
}
_NAMING = {"rows": (1, 100), "kind": (0, 3), "hash": (0, 2), "pack": (0, 1)}
_FIELDS = {"F": 3, "N": 12, "rows": 50, "kind": 0, "hash": 0, "pack": 0}
_NAMED = {
    "hashed fields": _TYPICAL | {"kind": 1, "rows": 5, "hash": 1},
    "prefixes": _TYPICAL | {"kind": 2, "N": 8, "rows": 45},
    "mixed groups": _TYPICAL | {"kind": 3, "F": 5, "N": 16, "hash": 2},
    "packed": _TYPICAL | {"kind": 3, "N": 9, "pack": 1},
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
        {**_SIZES, "F": (1, 4), "N": (1, 20), **_NAMING},
        {name: {**_FIELDS, **sizes} for name, sizes in {**_CASES, **_NAMED}.items()},
        agree=agree_codes,
    ),
}
