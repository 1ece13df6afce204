"""The gradients of DIN's attention unit in Triton: two sweeps over pairs.

The first sweep has a candidate at a time: it finds the softmax's sums, goes back through the
layers, writes the gradient of the query, and adds those of weights to the sums of its program, one
candidate after the other; programs' sums are added up in their order. The second has a tile of
items and all candidates of it, and writes the gradients of keys and values once.

Floors. Products, for each pair and weight: two operations forth, two back to the layer before, and
two for the weight's gradient; the second sweep does the first four again, and the first one its way
forth where there is a softmax, all as three TF32 ones. From memory: keys and values once for each
candidate and sweep, mostly from a cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._code_rows import as_argument
from ._din_layers import (
    again,
    alone_of,
    back_through_layers,
    back_to_keys,
    enter,
    logits,
    part_of,
)
from ._din_packing import configs_of, packed, tile_of, unpacked
from ._din_sums import add_to, add_up, end_candidate, softmax_of
from ._target_tiles import ascending, candidates_of, put_rows, rows_at

_MOST_PARTS = 256  # programs of the first sweep


@triton.jit(do_not_specialize=["C", "Q", "run"])
def _sweep_candidates(
    grad, out, q, k, v, weights, units, bounds, owners, grad_q, tops, inverses, means,
    weight_sums, unit_sums, C, Q, run, WEIGHTS: tl.constexpr, UNITS: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, SIZES: tl.constexpr, WIDTHS: tl.constexpr,
    ACTIVATION: tl.constexpr, SOFTMAX: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Write the gradients of `run` queries, and what the other sweep needs of their softmax.

    weight_sums [programs, WEIGHTS], unit_sums [programs, UNITS], zeros: as `unpacked` takes them.
    """
    program = tl.program_id(0).to(tl.int64)
    weight_sums += program * WEIGHTS
    unit_sums += program * UNITS
    value_dims = tl.arange(0, BLOCK_V)
    for candidate in range(program * run, tl.minimum((program + 1) * run, Q)):
        if owners is None:
            user = candidate // C
        else:
            user = tl.load(owners + candidate)
        begin = tl.load(bounds + user)
        rows = (tl.load(bounds + user + 1) - begin).to(tl.int32)
        alone = alone_of(q, candidate, weights, units, D, BLOCK_D, WIDTHS[0])
        inside = value_dims < DV
        flow = tl.load(grad + candidate * DV + value_dims, mask=inside, other=0.0).to(tl.float32)
        top, inverse, mean = 0.0, 1.0, 0.0
        if SOFTMAX:
            result = tl.load(out + candidate * DV + value_dims, mask=inside, other=0.0)
            top, inverse, mean = softmax_of(
                q, k, v, candidate, alone, flow, tl.sum(flow * result.to(tl.float32), 0), weights,
                units, begin, rows, D, DV, SIZES, WIDTHS, ACTIVATION, BLOCK_T, BLOCK_D, BLOCK_V,
            )  # fmt: skip
            tl.store(tops + candidate, top)
            tl.store(inverses + candidate, inverse)
            tl.store(means + candidate, mean)
        entered = tl.zeros_like(alone)
        for first in range(0, rows, BLOCK_T):
            row, left, here = begin + first, rows - first, again(weights, first)
            x = enter(k, row, left, q, candidate, alone, here, D, BLOCK_T, BLOCK_D, WIDTHS[0])
            score, raw = logits(x, here, units, SIZES, WIDTHS, ACTIVATION, BLOCK_D, True)
            v_tile = rows_at(k if v is None else v, row, left, 0, BLOCK_T, 1, DV, BLOCK_V)
            slope = tl.sum(v_tile.to(tl.float32) * flow[None, :], 1)
            if SOFTMAX:
                slope = tl.exp(score - top) * inverse * (slope - mean)
            slope = tl.where(tl.arange(0, BLOCK_T) < left, slope, 0.0)
            found, rest = back_through_layers(slope, raw, here, units, BLOCK_D, WIDTHS, ACTIVATION)
            for part in range(0, BLOCK_D, 32):
                keys = tl.trans(rows_at(k, row, left, 0, BLOCK_T, 1, D, 32, part).to(tl.float32))
                outer = tl.dot(keys, found[0], input_precision="tf32x3")
                add_to(weight_sums, (3 * BLOCK_D + part) * WIDTHS[0], outer)
            for _ in range(0, tl.minimum(left, 1)):  # its products want warps laid out otherwise
                add_up(
                    weight_sums, unit_sums, slope, raw, found, rest, units, BLOCK_D, SIZES, WIDTHS,
                    ACTIVATION,
                )  # fmt: skip
            entered += tl.sum(found[0], 0)
            tl.debug_barrier()  # other threads may read the sums at the next tile
        end_candidate(q, candidate, entered, weights, weight_sums, grad_q, D, BLOCK_D, WIDTHS[0])
        tl.debug_barrier()


@triton.jit(do_not_specialize=["C", "users"])
def _sweep_items(
    grad, q, k, v, weights, units, bounds, q_bounds, starts, owners, tops, inverses, means,
    grad_k, grad_v, C, users, D: tl.constexpr, DV: tl.constexpr, SIZES: tl.constexpr,
    WIDTHS: tl.constexpr, ACTIVATION: tl.constexpr, SOFTMAX: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Write the gradients of a tile of keys and values: the sums over all candidates, in turn.

    starts: the first tile of each user; owners: the user of each tile, `users` for those beyond.
    Where there is no v, keys are the values, and grad_k the gradient of both.
    """
    tile = tl.program_id(0).to(tl.int64)
    owner = tl.load(owners + tile)
    user = tl.minimum(owner, users - 1)
    begin = tl.load(bounds + user) + (tile - tl.load(starts + user)) * BLOCK_T
    end = tl.where(owner < users, tl.load(bounds + user + 1), begin)
    rows = tl.minimum(end - begin, BLOCK_T).to(tl.int32)
    start, count = candidates_of(user, q_bounds, C)
    count = tl.where(rows > 0, count, 0)
    there = tl.arange(0, BLOCK_T) < rows
    v_tile = rows_at(k if v is None else v, begin, rows, 0, BLOCK_T, 1, DV, BLOCK_V)
    into_k = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    into_v = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
    value_dims = tl.arange(0, BLOCK_V)
    for own in range(0, count):
        candidate, here = start + own, again(weights, own)
        alone = alone_of(q, candidate, here, units, D, BLOCK_D, WIDTHS[0])
        flow = tl.load(grad + candidate * DV + value_dims, mask=value_dims < DV, other=0.0)
        flow = flow.to(tl.float32)[None, :]
        x = enter(k, begin, rows, q, candidate, alone, here, D, BLOCK_T, BLOCK_D, WIDTHS[0])
        score, raw = logits(x, here, units, SIZES, WIDTHS, ACTIVATION, BLOCK_D, True)
        slope = tl.sum(v_tile.to(tl.float32) * flow, 1)
        if SOFTMAX:
            score = tl.exp(score - tl.load(tops + candidate)) * tl.load(inverses + candidate)
            slope = score * (slope - tl.load(means + candidate))
        slope = tl.where(there, slope, 0.0)
        found, _ = back_through_layers(slope, raw, here, units, BLOCK_D, WIDTHS, ACTIVATION)
        into_k += back_to_keys(found[0], here, part_of(q, candidate, 0, D, BLOCK_D), BLOCK_D)
        into_v += score[:, None] * flow
    if v is None:
        into_k += into_v
    else:
        put_rows(grad_v, into_v, begin, rows, 0, 1, DV, BLOCK_V)
    put_rows(grad_k, into_k, begin, rows, 0, 1, D, BLOCK_D)


_OPTIONS = {"num_warps": 8, "num_stages": 1}  # weights of a layer fill the shared memory


def fits(d: int, dv: int, sizes: Sequence[int]) -> bool:
    """Return whether the kernels below have registers for tiles of such widths."""
    return max(d, dv) <= 128 and max(sizes) <= 64


def _plan(d: int, dv: int, sizes: Sequence[int]) -> dict[str, Any]:
    return tile_of(d, dv, sizes, {1024: 16}, 32)


def _first_sweep(
    grad: Tensor, out: Tensor, rows: Sequence[Tensor | None], held: tuple[Tensor, Tensor],
    bounds: Tensor, owners: Tensor | None, shape: dict[str, Any],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradient of q, tops, inverses and means [3, .], and sums of weights' gradients."""
    q = rows[0]
    assert q is not None
    many = out.numel() // out.shape[-1]
    run = triton.cdiv(many, _MOST_PARTS)
    parts = triton.cdiv(many, run)
    empty = {"dtype": torch.float32, "device": q.device}
    found = torch.empty((3, many if shape["SOFTMAX"] else 0), **empty)
    first = shape["BLOCK_D"] * shape["WIDTHS"][0]
    sizes = len(held[0]) + first, len(held[1])
    sums = [torch.zeros((parts, size), **empty) for size in sizes]
    grad_q = torch.empty_like(q)
    _sweep_candidates[(parts,)](
        grad, out, *rows, *held, bounds, owners, grad_q, *found, *sums, q.shape[1], many, run,
        WEIGHTS=sizes[0], UNITS=sizes[1], **shape, **_OPTIONS,
    )  # fmt: skip
    of_weights, of_units = (one.sum(0, dtype=torch.float64) for one in sums)
    return grad_q, found, of_weights, of_units


def _second_sweep(
    grad: Tensor, rows: Sequence[Tensor | None], held: tuple[Tensor, Tensor], bounds: Tensor,
    q_bounds: Tensor | None, found: Tensor, shape: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Return the gradients of k and v."""
    q, k, v = rows
    assert q is not None and k is not None
    users = len(bounds) - 1
    starts = torch.zeros_like(bounds)
    torch.cumsum((bounds.diff() + (shape["BLOCK_T"] - 1)) // shape["BLOCK_T"], 0, out=starts[1:])
    count = users + len(k) // shape["BLOCK_T"]  # at least as many as there are tiles
    every = torch.arange(count, device=k.device)
    owners = torch.searchsorted(starts[1:], every, right=True)
    grad_k, grad_v = torch.empty_like(k), None if v is None else torch.empty_like(v)
    _sweep_items[(count,)](
        grad, q, k, v, *held, bounds, q_bounds, starts, owners, *found, grad_k, grad_v, q.shape[1],
        users, **shape, **_OPTIONS,
    )  # fmt: skip
    return grad_k, grad_v


def din_attention_gradient(
    grad: Tensor | None, q: Tensor, k: Tensor, v: Tensor | None, offsets: Tensor,
    weights: Sequence[Tensor], biases: Sequence[Tensor], slopes: Sequence[Tensor],
    gains: Sequence[Tensor], shifts: Sequence[Tensor], activation: str, softmax: bool,
    q_offsets: Tensor | None, out: Tensor, needs: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    """Return those gradients that `needs` asks for, a word for each tensor that is given.

    The host is not asked: offsets that do not ascend from 0 to the end are made to.
    """
    lists = (weights, biases, slopes, gains, shifts)
    given = [q, k, *([] if v is None else [v]), offsets, *chain.from_iterable(lists)]
    wanted = list(zip(given, needs, strict=False))  # but for q_offsets
    if grad is None or not grad.numel() or not len(k) or len(offsets) < 2:
        return [torch.zeros_like(one).contiguous() for one, need in wanted if need]
    d, dv = q.shape[-1], out.shape[-1]
    tile = _plan(d, dv, [weight.shape[1] for weight in weights[:-1]])
    shape = {**tile, "D": d, "DV": dv, "ACTIVATION": activation, "SOFTMAX": softmax}
    with torch.cuda.device_of(q):
        bounds, q_bounds, owners = ascending(offsets, len(k)), None, None
        if q_offsets is not None:
            every = torch.arange(len(q), device=q.device)
            q_bounds = ascending(q_offsets, len(q))
            owners = torch.searchsorted(q_bounds[1:], every, right=True)
        held = packed(d, weights, (biases, slopes, gains, shifts), biases[-1], tile)
        grad, out = as_argument(grad), as_argument(out)
        rows = [None if one is None else as_argument(one) for one in (q, k, v)]
        grad_q, found, *sums = _first_sweep(grad, out, rows, held, bounds, owners, shape)
        of_rows: tuple[Tensor | None, ...] = (None, None)
        if any(needs[1 : 2 + (v is not None)]):
            of_rows = _second_sweep(grad, rows, held, bounds, q_bounds, found, shape)
        of_weights, kinds = unpacked(d, *sums, tile)
    of_lists = [of_weights, *(kind for kind, many in zip(kinds, lists[1:], strict=True) if many)]
    made = [grad_q, *of_rows[: 1 + (v is not None)], None, *chain.from_iterable(of_lists)]
    pairs = zip(made, wanted, strict=True)
    return [one.to(like.dtype).contiguous() for one, (like, need) in pairs if need]


def compile_configs() -> Iterator[tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """Yield launches as those above compile: kernel, argument types, constants, options.

    A type ending in ":16" is known to be divisible by 16. "matrix": tensor cores are meant.
    """
    types = dict.fromkeys(("C", "Q", "run", "users"), "i32")
    types |= dict.fromkeys(("bounds", "q_bounds", "starts", "owners"), "*i64:16")
    floats = ("weights", "units", "tops", "inverses", "means", "weight_sums", "unit_sums")
    types |= dict.fromkeys(floats, "*fp32:16")
    tensors = ("grad", "out", "q", "k", "v", "grad_q", "grad_k", "grad_v")
    for kind, (d, dv, sizes, activation) in configs_of():
        if not fits(d, dv, sizes):
            continue
        own = types | dict.fromkeys(tensors, kind)
        shape = {**_plan(d, dv, sizes), "D": d, "DV": dv, "ACTIVATION": activation}
        shape["SOFTMAX"] = activation != "dice"
        if d == dv:
            shape |= dict.fromkeys(("v", "q_bounds", "grad_v"))
        options = {**_OPTIONS, "matrix": True}
        first = {**shape, "WEIGHTS": 4096, "UNITS": 513, **({"owners": None} if d == dv else {})}
        yield _sweep_candidates, own, first, options
        yield _sweep_items, own, shape, options
