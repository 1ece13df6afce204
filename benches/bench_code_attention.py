"""Code attention: from codes of histories to the attended values, and all gradients."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import livrec_fast
from livrec_fast.benchmarking import Case, Contestant, Options, ours
from livrec_fast.reference.code_attention_gradient import code_attention_gradient

from . import peers, peers_attention
from .agreement import Close

LEVELS, HEADS, DIM = (512, 256, 128), 4, 16
USERS, ITEMS, MOST_ITEMS = 16, 10_000, 20_000
KERNELS = {"cpu": ("native",), "cuda": ("triton", "cuda")}  # in the op's order
Inputs = dict[str, Any]


def streams() -> Path | None:
    """Return the folder of real histories, where LIVREC_TEST_DATA names the one above it."""
    folder = os.environ.get("LIVREC_TEST_DATA")
    path = Path(folder) / "danmaku" if folder else None
    return path if path is not None and (path / "events.parquet").is_file() else None


@cache
def real_histories() -> tuple[Tensor, ...]:
    """Return the codes of the longest histories, a row per event: the slice it fell into."""
    import numpy as np
    import pyarrow.parquet as pq

    folder = streams()
    assert folder is not None
    slices = pq.read_table(folder / "slices.parquet")
    events = pq.read_table(folder / "events.parquet", columns=["user", "item", "pos_ms"])
    flat = slices["embedding"].combine_chunks().flatten().to_numpy()
    vectors = torch.from_numpy(flat.copy()).view(len(slices), -1).float()
    codes: Tensor = livrec_fast.ResidualKMeans(LEVELS, iterations=5).fit(vectors).encode(vectors)

    item, place = (slices[name].to_numpy().astype(np.int64) for name in ("item", "slice"))
    user, room, ms = (events[name].to_numpy() for name in ("user", "item", "pos_ms"))
    width = 1 + int(place.max())
    key = item * width + place
    order = key.argsort()
    wanted = room.astype(np.int64) * width + ms // 30_000
    rows = order[np.searchsorted(key, wanted, sorter=order)]
    assert (key[rows] == wanted).all(), "an event outside of all slices"
    longest = np.bincount(user).argsort()[::-1][:USERS]
    return tuple(codes[torch.from_numpy(rows[user == one][-MOST_ITEMS:])] for one in longest)


def draw_codes(kind: str, users: int, items: int) -> tuple[Tensor, Tensor]:
    """Return codes int16 [T, F] and offsets: uniform, with odds 1, 1/2, 1/3, ..., or real ones."""
    if kind == "histories":
        parts = real_histories()
        lengths = torch.tensor([0, *map(len, parts)])
        return torch.cat(parts).to(torch.int16), lengths.cumsum(0)
    generator = torch.Generator().manual_seed(0)
    columns = []
    for size in LEVELS:
        odds = torch.ones(size) if kind == "uniform" else 1 / torch.arange(1, size + 1)
        columns.append(odds.multinomial(users * items, replacement=True, generator=generator))
    return torch.stack(columns, 1).to(torch.int16), torch.arange(users + 1) * items


def draw(kind: str, users: int, items: int, candidates: int, options: Options) -> Inputs:
    """Draw queries, codes and tables; logits have a standard deviation of about 1.7."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(options.device)

    codes, offsets = draw_codes(kind, users, items)
    return {
        "q": normal(users, candidates, HEADS, DIM),
        "codes": codes.to(options.device),
        "key_tables": [normal(size, HEADS, DIM) for size in LEVELS],
        "value_tables": [normal(size, HEADS, DIM) for size in LEVELS],
        "offsets": offsets.to(options.device),
    }


def cases(options: Options) -> Iterator[Case]:
    """Yield the cases, each as a forward pass and with gradients."""
    for training in (False, True):
        make = partial(case, options=options, training=training)
        if options.quick:
            yield make("zipf", USERS // 2, ITEMS // 10, 8)
            continue
        for items in (50, 500, 2_000):
            yield make("uniform", USERS, items, 8)
        for candidates in (1, 8, 32, 64, 128, 256):
            yield make("uniform", USERS, ITEMS, candidates)
        yield make("zipf", USERS, ITEMS, 8)
        if streams():
            yield make("histories", USERS, 0, 8)
        if training:
            yield make("uniform", 4 * USERS, ITEMS, 8)  # whose memory is of interest


def case(
    kind: str, users: int, items: int, candidates: int, options: Options, training: bool
) -> Case:
    """Make one case: all compute the output, or the gradients of queries and tables."""
    shape = {"B": users, "C": candidates, "T": items or None, "H": HEADS, "d": DIM}

    def make() -> Inputs:
        inputs = draw(kind, users, items, candidates, options)
        if training:
            like = torch.randn(inputs["q"].shape, generator=torch.Generator().manual_seed(2))
            inputs["grad"] = like.to(options.device)
        return inputs

    function = gradients if training else livrec_fast.code_attention
    agree, kernels = Close(formula), KERNELS[options.device]
    total = users * items or sum(map(len, real_histories()))
    return Case(
        op="code_attention",
        label=f"{'/'.join(map(str, LEVELS))}, H {HEADS}, d {DIM}, {kind}, B {users}, "
        f"T {f'{items:,}' if items else 'real'}, C {candidates}",
        sizes={**shape, "levels": list(LEVELS), "codes": kind},
        dtype=torch.float32,
        make=make,
        agree=agree,
        contestants=[
            *(with_distinct(one, agree) for one in ours(function, options, kernels)),
            peers.eager(partial(function, backend="reference")),
            *peers_attention.contestants(options, training, partial(agree, times=8)),
        ],
        bytes=least_bytes(users, total, candidates, training),
        flops=least_flops(users, total, candidates, training),
        direction="forward+backward" if training else "forward",
        long=total * candidates * (8 if training else 1) > USERS * ITEMS * 32,
    )


def least_bytes(users: int, total: int, candidates: int, training: bool) -> int:
    """Return what is read and written once: codes, q, out and tables, and with gradients theirs."""
    floats = HEADS * DIM * 2 * (users * candidates + sum(LEVELS))
    return total * len(LEVELS) * 2 + 4 * floats * (2 if training else 1)


def least_flops(users: int, total: int, candidates: int, training: bool) -> int:
    """Return the operations of the factorised form: products with rows, sums over items by row."""
    columns, fields = candidates * HEADS, len(LEVELS)
    products = 4 * users * columns * sum(LEVELS) * DIM * (3 if training else 1)
    return products + columns * fields * total * (6 if training else 2)


def gradients(*, grad: Tensor, q: Tensor, backend: str, **rest: Any) -> tuple[Tensor, ...]:
    """Return the gradients of q and of all tables, keys first."""
    keys, values = ([t.detach() for t in rest.pop(f"{n}_tables")] for n in ("key", "value"))
    leaves = [leaf.requires_grad_() for leaf in (q.detach(), *keys, *values)]
    given = {"q": leaves[0], "key_tables": keys, "value_tables": values, **rest}
    out = livrec_fast.code_attention(**given, backend=backend)
    return torch.autograd.grad(out, leaves, grad)


def formula(inputs: Inputs) -> list[Tensor]:
    """Compute the output, or the gradients user by user, in the inputs' dtype."""
    if "grad" not in inputs:
        out = livrec_fast.code_attention(**inputs, backend="reference")
        assert isinstance(out, Tensor)
        return [out]
    scale, fields = DIM**-0.5, [1] * len(LEVELS)
    q, tables = inputs["q"], [*inputs["key_tables"], *inputs["value_tables"]]
    given = {**inputs, "grad_lse": None, "bias": None, "scale": scale, "levels": list(LEVELS)}
    given |= {"groups": fields, "hashing": "modulo", "packed": False, "out": q, "lse": q[..., 0]}
    grad_q, _, *found = code_attention_gradient(**given)
    pairs = [*zip(found[::3], found[1::3], strict=True), *zip(found[::3], found[2::3], strict=True)]
    made = (
        torch.zeros_like(table).index_copy_(0, *pair)
        for table, pair in zip(tables, pairs, strict=True)
    )
    return [grad_q, *made]


def with_distinct(contestant: Contestant, agree: Close) -> Contestant:
    """Let a contestant's row say which share of a user's rows of codes is distinct."""

    def stating(output: Any, inputs: Inputs) -> dict[str, float]:
        agree(output, inputs)
        users = inputs["codes"].split(inputs["offsets"].diff().tolist())
        parts = sorted(len(user.unique(dim=0)) / len(user) for user in users)
        facts = {"distinct rows": parts[len(parts) // 2]}
        if len(inputs["offsets"].diff().unique()) > 1:
            facts |= {"at least": parts[0], "at most": parts[-1]}
        return facts

    return Contestant(contestant.name, contestant.prepare, contestant.kind, agree=stating)
