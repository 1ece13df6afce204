"""History search: the best k items of each user's history, from codes and from dense keys."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import livrec_fast
from livrec_fast.benchmarking import Case, Options, ours
from livrec_fast.reference import history_search as reference
from livrec_fast.reference._formula import per_user

from . import peers, peers_search
from .bench_code_attention import ITEMS, LEVELS, USERS, draw_codes, real_histories, streams

DIM, FOUND = 64, 200
Inputs = dict[str, Any]


def cases(options: Options) -> Iterator[Case]:
    """Yield searches from codes and from keys."""
    if options.quick:
        yield case("uniform", USERS // 4, ITEMS // 10, 8, options, dense=False)
        return
    for candidates in (1, 8):
        yield case("uniform", USERS, ITEMS, candidates, options, dense=False)
    if streams():
        yield case("histories", USERS, 0, 8, options, dense=False)
    yield case("uniform", USERS, ITEMS, 8, options, dense=True)


def draw(kind: str, users: int, items: int, candidates: int, options: Options) -> Inputs:
    """Draw queries, codes and tables."""
    generator = torch.Generator().manual_seed(3)
    codes, offsets = draw_codes(kind, users, items)
    tables = [torch.randn(size, DIM, generator=generator).to(options.device) for size in LEVELS]
    return {
        "query": torch.randn(users, candidates, DIM, generator=generator).to(options.device),
        "codes": codes.to(options.device),
        "tables": tables,
        "offsets": offsets.to(options.device),
        "k": FOUND,
    }


def with_keys(inputs: Inputs) -> Inputs:
    """Return the same search with the keys that the codes stand for."""
    keys = peers_search.decoded(inputs["codes"], inputs["tables"])
    return {"query": inputs["query"], "keys": keys} | {n: inputs[n] for n in ("offsets", "k")}


def case(kind: str, users: int, items: int, candidates: int, options: Options, dense: bool) -> Case:
    """Make one case: the reference's rule for ours and for it, the scores for peers."""

    def make() -> Inputs:
        inputs = draw(kind, users, items, candidates, options)
        return with_keys(inputs) if dense else inputs

    total = users * items or sum(map(len, real_histories()))
    function = livrec_fast.history_search if dense else livrec_fast.history_search_codes
    answer = users * candidates * (FOUND * 12 + DIM * 4)
    codes_read = total * len(LEVELS) * 2 + 4 * DIM * sum(LEVELS)
    products = users * sum(LEVELS) * DIM * 2 + total * len(LEVELS)
    shape = {"B": users, "C": candidates, "T": items or None, "D": DIM, "k": FOUND}
    name = f"D {DIM}, k {FOUND}, {kind}, B {users}, T {f'{items:,}' if items else 'real'}"
    return Case(
        op=function.__name__,
        label=f"{'' if dense else '/'.join(map(str, LEVELS)) + ', '}{name}, C {candidates}",
        sizes={**shape, "codes": kind} | ({} if dense else {"levels": list(LEVELS)}),
        dtype=torch.float32,
        make=make,
        agree=agree,
        contestants=[
            *ours(function, options),
            peers.eager(partial(function, backend="reference")),
            *(peers_search.dense if dense else peers_search.codes)(options, agree_scores),
        ],
        bytes=answer + (total * DIM * 4 if dense else codes_read),
        flops=candidates * (2 * total * DIM if dense else products),
    )


def agree(output: tuple[Tensor, Tensor], inputs: Inputs) -> None:
    """Hold scores and positions to the rule of the reference, ties and all."""
    if "keys" in inputs:
        reference.agree(output, inputs)
    else:
        names = {"levels": None, "prefix": False, "groups": None, "hashing": "modulo"}
        reference.agree_codes(output, {**inputs, **names, "packed": False})


def agree_scores(output: tuple[Tensor, Tensor], inputs: Inputs) -> None:
    """Hold a peer's scores to the best of float64, and to those at its positions; not its ties.

    With every score off by at most `bound`, so is each of the best in order.
    """
    if "keys" not in inputs:
        inputs = with_keys({**inputs, "tables": [table.double() for table in inputs["tables"]]})
    users = per_user(inputs["keys"].double(), inputs["offsets"])
    for query, keys, scores, at in zip(inputs["query"].double(), users, *output, strict=True):
        exact = query @ keys.T
        # DIM + 3: terms of the product, and of the sum of fields, whose rows may exceed their sum
        bound = 3 * (DIM + 3) * 2**-23 * query.norm(dim=1).amax() * keys.norm(dim=1).amax()
        best = exact.topk(scores.shape[1], dim=1).values
        assert (scores - best).abs().amax() <= bound, "other scores than the best"
        assert (exact.gather(1, at.long()) - scores).abs().amax() <= bound, "scores of others"
        assert (at.sort(1).values.diff(dim=1) > 0).all(), "a position twice"
