"""Prefix n-gram embedding: codes to vectors, and the gradients of the tables."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import livrec_fast
from livrec_fast.benchmarking import Absent, Case, Contestant, Options, ours
from livrec_fast.reference import prefix_ngram as reference

from . import peers, peers_embedding

LEVELS, DIM, MOST_ROWS = (64,) * 4, 32, 2**20
ITEMS = (4_096, 65_536, 1_000_000)
MANY = 5_000_000  # forward only: the output takes 2.5 GB, and so does every peer's
Inputs = dict[str, Any]


def histories() -> Path | None:
    """Return the vectors whose codes are real ones, where LIVREC_TEST_DATA names their folder."""
    folder = os.environ.get("LIVREC_TEST_DATA")
    path = Path(folder) / "danmaku" / "slices.parquet" if folder else None
    return path if path is not None and path.is_file() else None


def shapes(options: Options) -> Iterator[tuple[str, int]]:
    """Yield how codes are distributed, and how many items there are."""
    if options.quick:
        yield "zipf", 6_553
        return
    for items in ITEMS:
        yield from (("uniform", items), ("zipf", items))
    if histories():
        yield "histories", ITEMS[1]


def rows(options: Options) -> list[int]:
    """Return the rows of the tables: all keys, up to a million (quick: fewer)."""
    most = MOST_ROWS // 8 if options.quick else MOST_ROWS
    return [min(most, LEVELS[0] ** depth) for depth in range(1, len(LEVELS) + 1)]


def draw_codes(kind: str, items: int) -> Tensor:
    """Draw uint8 codes: uniform, each code with odds 1, 1/2, 1/3, ..., or of real vectors."""
    generator = torch.Generator().manual_seed(0)
    if kind == "uniform":
        shape = (items, len(LEVELS))
        return torch.randint(0, LEVELS[0], shape, generator=generator, dtype=torch.uint8)
    if kind == "zipf":
        odds = 1 / torch.arange(1, LEVELS[0] + 1)
        drawn = odds.multinomial(items * len(LEVELS), replacement=True, generator=generator)
        return drawn.view(items, len(LEVELS)).to(torch.uint8)
    import pyarrow.parquet as pq

    table = pq.read_table(histories())
    flat = table["embedding"].combine_chunks().flatten().to_numpy()
    vectors = torch.from_numpy(flat.copy()).view(len(table), -1).float()
    codes: Tensor = livrec_fast.ResidualKMeans(LEVELS, iterations=5).fit(vectors).encode(vectors)
    return codes.repeat(-(-items // len(codes)), 1)[:items].to(torch.uint8)


def draw(kind: str, items: int, options: Options) -> Inputs:
    """Draw codes, tables, and the gradient of their lookup."""
    generator = torch.Generator().manual_seed(1)
    tables = [torch.randn(h, DIM, generator=generator) for h in rows(options)]
    return {
        "codes": draw_codes(kind, items).to(options.device),
        "tables": [table.to(options.device) for table in tables],
        "levels": LEVELS,
    }


def cases(options: Options) -> Iterator[Case]:
    """Yield the forward pass, and with gradients, dense and sparse."""
    for kind, items in shapes(options):
        yield forward(kind, items, options)
        for sparse in (False, True):
            yield both(kind, items, sparse, options)
    if not options.quick:
        yield forward("uniform", MANY, options)


def compiled(options: Options) -> list[Contestant | Absent]:
    """Return the formula through torch.compile, unless quick: compiling takes seconds."""
    if options.quick:
        return []
    return peers.compiled(peers_embedding.indexed, options, autotuned=False)


def label(kind: str, items: int) -> str:
    """Say the shape in a line."""
    return f"64/64/64/64, d {DIM}, {kind}, M {items:,}"


def forward(kind: str, items: int, options: Options) -> Case:
    """Make the case of a lookup: its output is the same to the bit for all."""

    def agree(output: Tensor, inputs: Inputs) -> None:
        assert output.equal(peers_embedding.indexed(**inputs)), "vectors differ"

    width = DIM * len(LEVELS)
    peer: list[Contestant | Absent] = [
        peers_embedding.copy(width),
        peers.eager(reference.prefix_ngram_lookup),
        Contestant("torch indexing", lambda i: lambda: peers_embedding.indexed(**i)),
        *compiled(options),
        Contestant("nn.EmbeddingBag", lambda i: lambda: peers_embedding.bags(**i, sparse=False)),
        peers_embedding.tbe_forward(options),
        peers_embedding.liger(options),
    ]
    return Case(
        op="prefix_ngram_lookup",
        label=label(kind, items),
        sizes={"M": items, "levels": list(LEVELS), "d": DIM, "codes": kind},
        dtype=torch.float32,
        make=lambda: draw(kind, items, options),
        agree=agree,
        contestants=[*ours(livrec_fast.prefix_ngram_lookup, options), *peer],
        bytes=items * (len(LEVELS) + 8 * width),
        flops=0,
    )


def both(kind: str, items: int, sparse: bool, options: Options) -> Case:
    """Make the case of a lookup and the gradients of its tables, all from a given gradient."""
    width = DIM * len(LEVELS)

    def make() -> Inputs:
        grad = torch.randn(items, width, generator=torch.Generator().manual_seed(2))
        return {**draw(kind, items, options), "grad": grad.to(options.device)}

    def contestant(
        name: str, function: Callable[..., Tensor], kind: Any = "peer", after: Any = list
    ) -> Contestant:
        def prepare(inputs: Inputs) -> Callable[[], Any]:
            tables = [table.clone().requires_grad_() for table in inputs["tables"]]

            def run() -> Any:
                out = function(codes=inputs["codes"], tables=tables, levels=LEVELS)
                return after(torch.autograd.grad(out, tables, inputs["grad"]))

            run()  # compiles
            return run

        return Contestant(name, prepare, kind)

    mine = "triton" if options.device == "cuda" else "native"

    def lookup(**given: Any) -> Tensor:
        return livrec_fast.prefix_ngram_lookup(**given, sparse=sparse, backend=mine)

    def bags(**given: Any) -> Tensor:
        return peers_embedding.bags(**given, sparse=sparse)

    found: list[Contestant | Absent] = [
        contestant(mine, lookup, "ours"),
        contestant("nn.EmbeddingBag, uncoalesced" if sparse else "nn.EmbeddingBag", bags),
    ]
    if sparse:  # sums per row, as ours: what torch's optimisers make of it first
        found.append(contestant("nn.EmbeddingBag, coalesced", bags, after=coalesced))
        index = partial(peers_embedding.indexed, sparse=True)
        found.append(contestant("torch indexing, uncoalesced", index))
    else:
        found.append(contestant("torch indexing", peers_embedding.indexed))
        absent = peers_embedding.liger_absence(options)
        found.append(absent or contestant("Liger embedding", peers_embedding.liger_lookup))
        if not options.quick:
            function = torch.compile(peers.fresh(peers_embedding.indexed), dynamic=False)
            found.append(contestant("torch.compile", function))
    return Case(
        op="prefix_ngram_lookup",
        label=f"{label(kind, items)}, {'sparse' if sparse else 'dense'}",
        sizes={"M": items, "levels": list(LEVELS), "d": DIM, "codes": kind, "sparse": sparse},
        dtype=torch.float32,
        make=make,
        agree=agree_gradients,
        contestants=found,
        bytes=items * (len(LEVELS) + 12 * width) + (0 if sparse else 4 * DIM * sum(rows(options))),
        flops=items * width,
        direction="forward+backward",
    )


def coalesced(grads: Sequence[Tensor]) -> list[Tensor]:
    """Add up the gradients of each row."""
    return [grad.coalesce() for grad in grads]


def sums(inputs: Inputs) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield per level the rows that occur, and in float64 their gradients' and magnitudes' sums."""
    heights = [len(table) for table in inputs["tables"]]
    keys = peers_embedding.table_rows(inputs["codes"], LEVELS, heights)
    for key, part in zip(keys, inputs["grad"].split(DIM, 1), strict=True):
        found, place = torch.unique(key, return_inverse=True)
        total = torch.zeros(len(found), DIM, dtype=torch.float64, device=key.device)
        size = total.clone().index_add_(0, place, part.double().abs())
        yield found, total.index_add_(0, place, part.double()), size


def agree_gradients(output: Any, inputs: Inputs) -> None:
    """Hold gradients to float64 sums: rows that occur, and zeros elsewhere."""
    for level, (grad, (found, total, size)) in enumerate(zip(output, sums(inputs), strict=True), 1):
        if grad.is_sparse:
            grad = grad.coalesce()
            assert torch.equal(grad.indices()[0], found), f"rows of level {level} differ"
            values = grad.values()
        else:
            values = grad[found]
            assert int(grad.any(1).sum()) <= len(found), f"level {level}: gradient elsewhere"
        error = ((values - total).abs() / size.clamp(min=1e-6)).amax()
        assert error < 4e-6, f"level {level}: {float(error):.1e} of the summed magnitudes off"
