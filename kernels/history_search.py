"""History search in Triton: the best items of each user's own history, dense or from codes.

A history is cut into pieces. A program scores a piece for a few candidates, with a chain of fused
multiply-adds per score, in the order of d: equal rows tie wherever they lie, as they need not on
tensor cores. The scores stay in registers as numbers of 32 bits of the same order. The k-th
greatest is found bit by bit, by counting; what is above it, and the latest of what equals it, goes
to memory as a list of k numbers: those 32 bits, then the item's position. Lists are sorted and put
together, each program a run of a user's, until each user has one.

Floors. Arithmetic: D multiply-adds and about 100 other operations, most of them counting, per
candidate and item. From memory: D numbers per item, or 4 F bytes of row numbers and the masks'
columns; each block of 8 candidates reads them again, mostly from L2. The lists are 8 k bytes per
piece of 1,024 items and candidate.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._code_rows import MOST_FIELDS, Pieces, as_argument, rows_of
from ._code_tiles import piece_at

MOST = 1024  # items of a piece, and so those that are found for a candidate
_RUN = 64  # lists that a program puts together


@triton.jit
def _products(
    query, tables, rows, items, there, candidates, wanted, T, FIELDS: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Return scores [candidates, items], of rows that `rows` names or of the items' own."""
    scores = tl.zeros((candidates.shape[0], items.shape[0]), tl.float32)
    for d in range(0, D, BLOCK_D):
        dims = d + tl.arange(0, BLOCK_D)
        inside = dims < D
        at = candidates.to(tl.int64)[:, None] * D + dims[None, :]
        own = tl.load(query + at, mask=wanted[:, None] & inside[None, :], other=0.0)
        total = tl.zeros((BLOCK_D, items.shape[0]), tl.float32)
        for field in range(FIELDS):  # unrolled, rows of all fields would wait in registers
            table = tables[0]
            for other in tl.static_range(1, FIELDS):
                table = tl.where(field == other, tables[other], table)
            row = items
            if rows is not None:
                row = tl.load(rows + tl.cast(T, tl.int64) * field + items, mask=there, other=-1)
                row = row.to(tl.int64)
            known = inside[:, None] & (there & (row >= 0))[None, :]
            place = dims[:, None] + row[None, :] * D
            total += tl.load(table + place, mask=known, other=0.0).to(tl.float32)
        scores = tl.dot(own.to(tl.float32), total, scores, input_precision="ieee")
    return scores


@triton.jit
def _may_find(
    may, items, there, asked, wanted, item_ids, query_ids, item_bits, required_bits, item_times,
    since, until,
):  # fmt: skip
    """Return which items each candidate may find, of those that `may` has."""
    if item_ids is not None:
        own = tl.load(item_ids + items, mask=there, other=-1).to(tl.int64)
        needed = tl.load(query_ids + asked, mask=wanted, other=-1)
        may = may & (own[None, :] == needed[:, None]) & (needed != -1)[:, None]
    if item_bits is not None:
        own = tl.load(item_bits + items, mask=there, other=0).to(tl.int64)
        needed = tl.load(required_bits + asked, mask=wanted, other=0)[:, None]
        may = may & ((own[None, :] & needed) == needed)
    if item_times is not None:
        own = tl.load(item_times + items, mask=there, other=0).to(tl.int64)[None, :]
        if since is not None:
            may = may & (own >= tl.load(since + asked, mask=wanted, other=0)[:, None])
        if until is not None:
            may = may & (own < tl.load(until + asked, mask=wanted, other=0)[:, None])
    return may


@triton.jit
def _ordered(scores):
    """Return uint32, at least 1, that order as scores do; -0 is 0."""
    bits = tl.where(scores == 0, 0.0, scores).to(tl.uint32, bitcast=True)
    bits = tl.where(bits >> 31 != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    return tl.where(bits == 0, 1, bits)


@triton.jit(do_not_specialize=["B", "C", "T"])
def _select(
    query, table_0, table_1, table_2, table_3, table_4, table_5, table_6, table_7, rows, item_ids,
    query_ids, item_bits, required_bits, item_times, since, until, bounds, starts, owners, lists,
    B, C, T, FIELDS: tl.constexpr, D: tl.constexpr, K: tl.constexpr, SIZE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """List the best K items of a piece for a block of candidates, in no order; 0 fills."""
    tables = (table_0, table_1, table_2, table_3, table_4, table_5, table_6, table_7)
    program, blocks = tl.program_id(0), tl.cdiv(C, BLOCK_C)
    candidates = program % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    wanted = candidates < C
    piece = (program // blocks).to(tl.int64)
    owner, begin, end = piece_at(bounds, starts, owners, piece, B, SIZE)
    if begin >= end:
        return
    items = begin + tl.arange(0, SIZE)
    there = items < end
    own = query + owner * C * D
    scores = _products(own, tables, rows, items, there, candidates, wanted, T, FIELDS, D, BLOCK_D)
    may = _may_find(
        wanted[:, None] & there[None, :], items, there, owner * C + candidates, wanted, item_ids,
        query_ids, item_bits, required_bits, item_times, since, until,
    )  # fmt: skip
    numbers = tl.where(may, _ordered(scores), 0)
    least = tl.zeros((BLOCK_C,), tl.uint32)  # the K-th greatest, or 0 where there are not as many
    if end - begin > K:
        for bit in range(32):
            more = least | (tl.full((BLOCK_C,), 0x80000000, tl.uint32) >> bit)
            many = tl.sum((numbers >= more[:, None]).to(tl.int32), 1) >= K
            least = tl.where(many, more, least)
    above = (numbers > least[:, None]).to(tl.int32)
    equal = ((numbers == least[:, None]) & (numbers != 0)).to(tl.int32)
    counts = tl.cumsum(above + equal * 65536, 1)  # SIZE is less than 2^15
    greater, total = tl.sum(above, 1)[:, None], tl.sum(equal, 1)[:, None]
    later = total - counts // 65536
    kept = (above != 0) | ((equal != 0) & (later < K - greater))
    place = tl.where(above != 0, counts % 65536 - 1, greater + later)
    position = items - tl.load(bounds + owner)
    to = lists + ((piece * C + candidates) * K)[:, None]
    value = numbers.to(tl.int64) << 31 | position[None, :]
    tl.store(to + place, value, mask=kept)
    filled = tl.minimum(greater + total, K)
    place = tl.arange(0, SIZE)[None, :]  # K is at most SIZE
    empty = wanted[:, None] & (place >= filled) & (place < K)
    tl.store(to + place, tl.zeros_like(value), mask=empty)


@triton.jit(do_not_specialize=["B", "C"])
def _merge(
    lists, bounds, starts, owners, out, scores, positions, B, C, K: tl.constexpr,
    SIZE: tl.constexpr, SORTED: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Put a run of lists together: a list again, or what was found where `out` is None."""
    program, blocks = tl.program_id(0), tl.cdiv(C, BLOCK_C)
    candidates = program % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    run = (program // blocks).to(tl.int64)
    if owners is None:
        begin, end = tl.load(bounds + run), tl.load(bounds + run + 1)
    else:
        owner, begin, end = piece_at(bounds, starts, owners, run, B, SIZE)
    place = tl.arange(0, BLOCK_K)[None, :]
    wanted = (candidates < C)[:, None]
    best = tl.zeros((BLOCK_C, BLOCK_K), tl.int64)
    for piece in range(begin, end):
        at = ((piece * C + candidates) * K)[:, None]
        if SORTED:  # read backwards, for it lies best first
            at += BLOCK_K - 1 - place
            value = tl.load(lists + at, mask=wanted & (BLOCK_K - 1 - place < K), other=0)
        else:
            value = tl.sort(tl.load(lists + at + place, mask=wanted & (place < K), other=0))
        best = tl.bitonic_merge(tl.maximum(best, value), descending=True)
    to = ((run * C + candidates) * K)[:, None] + place
    inside = wanted & (place < K)
    if out is not None:
        tl.store(out + to, best, mask=inside)
    else:
        bits = (best >> 31).to(tl.uint32)
        bits = tl.where(bits >> 31 != 0, bits ^ 0x80000000, bits ^ 0xFFFFFFFF)
        found = best != 0
        score = tl.where(found, bits.to(tl.float32, bitcast=True), float("-inf"))
        tl.store(scores + to, score, mask=inside)
        tl.store(positions + to, tl.where(found, best & 0x7FFFFFFF, -1), mask=inside)


def _plan_select(C: int) -> tuple[dict[str, int], dict[str, int]]:
    """Return the tile and the launch options: 32 numbers of items' rows per thread at a time."""
    tile = {"SIZE": MOST, "BLOCK_C": 8 if C > 4 else 4, "BLOCK_D": 16}
    return tile, {"num_warps": 16, "num_stages": 1}


def _plan_merge(C: int, k: int) -> tuple[dict[str, int], dict[str, int]]:
    """Return the tile and the launch options: 8 numbers per thread."""
    width = max(16, triton.next_power_of_2(k))
    candidates = min(triton.next_power_of_2(C), max(1, 1024 // width))
    return {"BLOCK_C": candidates, "BLOCK_K": width}, {"num_warps": 4}


def _cut(bounds: Tensor, total: int, size: int) -> Pieces:
    """Cut what lies between bounds, `total` in all, into pieces of at most `size`."""
    starts = torch.zeros_like(bounds)
    torch.cumsum((bounds.diff() + (size - 1)) // size, 0, out=starts[1:])
    count = len(bounds) - 1 + total // size
    every = torch.arange(count, device=bounds.device)
    return Pieces(bounds, starts, torch.searchsorted(starts[1:], every, right=True), count, size)


def _search(
    query: Tensor, tables: Sequence[Tensor], rows: Tensor | None, items: int, offsets: Tensor,
    k: int, masks: Sequence[Tensor | None],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return what both operators do, of the tables' rows that `rows` names, or of one table's."""
    B, C, D = query.shape
    scores = query.new_empty((B, C, k), dtype=torch.float32)
    positions = query.new_empty((B, C, k), dtype=torch.int64)
    if not scores.numel():
        return scores, positions
    tile, options = _plan_select(C)
    pieces = _cut(offsets.clamp(0, items).cummax(0).values, items, tile["SIZE"])
    lists = query.new_empty((pieces.count, C, k), dtype=torch.int64)
    given = [None if mask is None else mask.contiguous() for mask in masks]
    none = [None] * (MOST_FIELDS - len(tables))
    _select[(pieces.count * triton.cdiv(C, tile["BLOCK_C"]),)](
        as_argument(query), *map(as_argument, tables), *none, rows, *given, pieces.bounds,
        pieces.starts, pieces.owners, lists, B, C, items, FIELDS=len(tables), D=D, K=k, **tile,
        **options,
    )  # fmt: skip
    tile, options = _plan_merge(C, k)
    blocks = triton.cdiv(C, tile["BLOCK_C"])
    most, count, done = items // pieces.size + 1, pieces.count, False  # lists of a user; of all
    while most > _RUN:
        pieces = _cut(pieces.starts, count, _RUN)
        merged = query.new_empty((pieces.count, C, k), dtype=torch.int64)
        _merge[(pieces.count * blocks,)](
            lists, pieces.bounds, pieces.starts, pieces.owners, merged, None, None, B, C, K=k,
            SIZE=_RUN, SORTED=done, **tile, **options,
        )  # fmt: skip
        lists, most, count, done = merged, triton.cdiv(most, _RUN), pieces.count, True
    _merge[(B * blocks,)](
        lists, pieces.starts, None, None, None, scores, positions, B, C, K=k, SIZE=_RUN,
        SORTED=done, **tile, **options,
    )  # fmt: skip
    return scores, positions


def history_search(
    query: Tensor, keys: Tensor, offsets: Tensor, k: int, *masks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return what torch's operator `livrec::history_search` does.

    Offsets are kept to the keys there are, and nothing else is looked at: the host is not asked.
    What is not contiguous is copied. Workspace: 8 C k bytes for each of B + T / 1,024 pieces. It is
    compiled once for each D, k and set of masks.
    """
    with torch.cuda.device_of(query):
        return _search(query, [keys], None, len(keys), offsets, k, masks)


def history_search_codes(
    query: Tensor, codes: Tensor, tables: Sequence[Tensor], offsets: Tensor, k: int, *rest: Any
) -> tuple[Tensor, Tensor]:
    """Return what torch's operator `livrec::history_search_codes` does.

    As `history_search`; a code out of range counts as unknown. The rows of tables are added up in
    float32, field by field, as tiles of items meet them; row numbers are 4 F bytes per item more.
    """
    *masks, levels, groups, hashing, packed = rest
    with torch.cuda.device_of(query):
        rows = rows_of(codes, tables, levels, groups, hashing, packed)
        return _search(query, tables, rows, len(codes), offsets, k, masks)


def compile_configs() -> Iterator[tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """Yield launches as those above compile: kernel, argument types, constants, options.

    A type ending in ":16" is known to be divisible by 16. "matrix": tensor cores are meant.
    """
    words = ("query_ids", "required_bits", "since", "until", "bounds", "starts", "owners", "lists")
    types = {name: "*i64:16" for name in (*words, "out", "positions", "item_times")}
    types |= {"item_ids": "*i32:16", "item_bits": "*u8", "scores": "*fp32:16", "rows": "*i32:16"}
    types |= {"B": "i64", "C": "i64", "T": "i64"}
    columns = ("item_ids", "query_ids", "item_bits", "required_bits", "item_times")
    unmasked = dict.fromkeys((*columns, "since", "until"))
    names = [f"table_{at}" for at in range(MOST_FIELDS)]
    for C, k in ((1, 1), (64, 100), (300, 1024)):
        tile, options = _plan_select(C)
        options["matrix"] = False
        for kind, fields, D, given in (
            ("*fp32:16", 0, 64, unmasked), ("*bf16:16", 0, 100, {}), ("*fp16:16", 3, 64, {}),
            ("*fp32:16", 8, 256, unmasked),
        ):  # fmt: skip
            many = max(fields, 1)
            held = {**types, **dict.fromkeys(names[:many], kind), "query": kind}
            constants = {**dict.fromkeys(names[many:]), **given, "K": k, "D": D, "FIELDS": many}
            constants |= tile if fields else {**tile, "rows": None}
            yield _select, held, constants, options
        tile, options = _plan_merge(C, k)
        options["matrix"] = False
        yield _merge, types, {"scores": None, "positions": None, "K": k, "SIZE": _RUN,
                              "SORTED": False, **tile}, options  # fmt: skip
        none = dict.fromkeys(("starts", "owners", "out"))
        for done in (False, True):
            yield _merge, types, {**none, "K": k, "SIZE": _RUN, "SORTED": done, **tile}, options
