"""What else one would search a history with: products with keys, or sums of looked-up products.

From codes, peers either decode the keys and multiply, or multiply queries with tables and add up by
code; then torch's topk. Histories of unequal length are searched one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from livrec_fast.benchmarking import Absent, Contestant, Options

from .peers import Inputs, Noted, Run, absence, fresh, quickest

Found = tuple[Tensor, Tensor]
Rule = Callable[[Any, Inputs], None]


def starts_of(tables: Sequence[Tensor]) -> Tensor:
    """Return where each table's rows start when one stands on the other."""
    sizes = torch.tensor([0, *(len(table) for table in tables[:-1])])
    return sizes.cumsum(0).to(tables[0].device)


def decoded(codes: Tensor, tables: Sequence[Tensor]) -> Tensor:
    """Return the keys [T, D] that codes stand for."""
    return F.embedding_bag(codes + starts_of(tables), torch.cat(list(tables)), mode="sum")


def best(scores: Sequence[Tensor], k: int) -> Found:
    """Return the k best of scores [C, T] per user; of all at once where there is but one tensor."""
    found = [one.topk(k, dim=-1) for one in scores]
    if len(found) == 1:
        return found[0].values, found[0].indices
    return torch.stack([f.values for f in found]), torch.stack([f.indices for f in found])


def scored(query: Tensor, keys: Tensor, lengths: tuple[int, ...]) -> list[Tensor]:
    """Multiply queries with keys: a batch where the lengths are equal, else user by user."""
    if len(set(lengths)) == 1:
        return [query @ keys.unflatten(0, (len(query), -1)).mT]
    return [q @ rows.T for q, rows in zip(query, keys.split(lengths), strict=True)]


def by_keys(
    query: Tensor, table: Tensor, codes: Tensor, starts: Tensor, lengths: tuple[int, ...], k: int
) -> Found:
    """Decode with a bag, multiply, take the best."""
    keys = F.embedding_bag(codes + starts, table, mode="sum")
    return best(scored(query, keys, lengths), k)


def by_embedding(
    query: Tensor, table: Tensor, codes: Tensor, starts: Tensor, lengths: tuple[int, ...], k: int
) -> Found:
    """Decode with an embedding per field, multiply, take the best."""
    keys = sum(F.embedding(rows, table) for rows in (codes + starts).T)
    assert isinstance(keys, Tensor)
    return best(scored(query, keys, lengths), k)


def by_gather(
    query: Tensor, table: Tensor, codes: Tensor, starts: Tensor, lengths: tuple[int, ...], k: int
) -> Found:
    """Multiply with the tables, gather products by field and add them up, take the best."""
    luts = query @ table.T
    parts = []
    for lut, rows in zip(luts, (codes + starts).split(lengths), strict=True):
        parts.append(sum(lut.index_select(1, column) for column in rows.T))
    return best(parts, k)


def by_bag(
    query: Tensor, table: Tensor, codes: Tensor, starts: Tensor, lengths: tuple[int, ...], k: int
) -> Found:
    """Multiply with the tables; a bag of the products, whose rows are candidates; the best."""
    luts = table @ query.mT
    users = zip(luts, (codes + starts).split(lengths), strict=True)
    parts = [F.embedding_bag(rows, lut, mode="sum").T for lut, rows in users]
    return best([torch.stack(parts)] if len(set(lengths)) == 1 else parts, k)


_GATHERED = {"bag": by_keys, "embedding": by_embedding}
_LOOKED_UP = {"gather": by_gather, "bag of products": by_bag}


def codes(options: Options, rule: Rule) -> Iterator[Contestant]:
    """Yield the peers of a search from codes."""
    for name, ways in (("gather + bmm + topk", _GATHERED), ("LUT + topk", _LOOKED_UP)):
        yield _quickest(name, ways, options, rule, compiling=False)
        if not options.quick:
            yield _quickest(f"{name}, compiled", ways, options, rule, compiling=True)


def _quickest(
    name: str, ways: dict[str, Callable[..., Found]], options: Options, rule: Rule, compiling: bool
) -> Contestant:
    """Return the quickest of `ways` by trial."""

    def prepare(inputs: Inputs) -> Run:
        tables, lengths = inputs["tables"], tuple(inputs["offsets"].diff().tolist())
        given = inputs["query"], torch.cat(tables), inputs["codes"], starts_of(tables), lengths

        def running(way: Callable[..., Found]) -> Run:
            function = torch.compile(fresh(way), dynamic=False) if compiling else way
            return lambda: function(*given, inputs["k"])

        runs = {note: running(way) for note, way in ways.items()}
        note = quickest(options.device, runs)
        return Noted(runs[note], note)

    return Contestant(name, prepare, agree=rule)


def by_product(query: Tensor, keys: Tensor, lengths: tuple[int, ...], k: int) -> Found:
    """Multiply, take the best."""
    return best(scored(query, keys, lengths), k)


def dense(options: Options, rule: Rule) -> Iterator[Contestant | Absent]:
    """Yield the peers of a search among keys."""
    for compiling in (False, True)[: 1 if options.quick else 2]:

        def prepare(inputs: Inputs, compiling: bool = compiling) -> Run:
            lengths = tuple(inputs["offsets"].diff().tolist())
            given = inputs["query"], inputs["keys"], lengths, inputs["k"]
            way = torch.compile(fresh(by_product), dynamic=False) if compiling else by_product
            way(*given)
            return lambda: way(*given)

        name = f"bmm + topk{', compiled' if compiling else ''}"
        yield Contestant(name, prepare, agree=rule)
    yield faiss_exact(options, rule)


def faiss_exact(options: Options, rule: Rule) -> Contestant | Absent:
    """Return faiss's exact search, user by user, which needs no index."""
    if reason := absence("faiss", "faiss-cpu", options):
        return Absent("faiss knn", reason)

    def prepare(inputs: Inputs) -> Run:
        import faiss

        faiss.omp_set_num_threads(options.threads)
        keys = inputs["keys"].split(inputs["offsets"].diff().tolist())
        users = [(q.numpy(), rows.numpy()) for q, rows in zip(inputs["query"], keys, strict=True)]
        kind, k = faiss.METRIC_INNER_PRODUCT, inputs["k"]
        return lambda: [faiss.knn(q, rows, k, metric=kind) for q, rows in users]

    def finish(found: list[tuple[Any, Any]]) -> Found:
        scores, positions = (
            torch.stack(list(map(torch.from_numpy, p))) for p in zip(*found, strict=True)
        )
        return scores, positions

    return Contestant("faiss knn", prepare, finish=finish, agree=rule)
