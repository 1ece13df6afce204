"""Steps of optimisers on the prefix tables that a lookup read, in one pass over its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._checks import FLOATS, check_same, check_tensor, named_items
from .._dispatch import Backend, Op, refuse_wide
from ..reference import prefix_ngram_update as reference
from ._prefix import check_arguments, check_contents, check_pooling, check_tables
from .prefix_ngram_gradient import refuse_sorting
from .row_update import check_state, check_step


def _refuse_native(
    tables: Sequence[Tensor], states: Sequence[Tensor], grad: Tensor, codes: Tensor,
    levels: Sequence[int], *rest: object,
) -> str | None:  # fmt: skip
    return refuse_wide(tables[0]) or refuse_sorting(levels)


def _check_values(
    tables: Sequence[Tensor], states: Sequence[Tensor], grad: Tensor, codes: Tensor,
    levels: Sequence[int], mode: str, offsets: Tensor | None, pool: str | None, hashing: str,
    groups: Sequence[int], packed: bool, *rest: object,
) -> None:  # fmt: skip
    check_contents(codes, levels, offsets, packed)


update = Op(
    "prefix_ngram_update",
    "(Tensor(a!)[] tables, Tensor(b!)[] states, Tensor grad, Tensor codes, int[] levels, str join, "
    "Tensor? offsets, str? pool, str hashing, int[] groups, bool packed, str rule, float lr, "
    "float eps, int[] seeds) -> ()",
    fake=lambda *args: None,
    reference=reference.prefix_ngram_update,
    check_values=_check_values,
    backends=(Backend("native", _refuse_native),),
    differentiable=False,
)


def prefix_ngram_update(
    tables: Sequence[Tensor],
    grad: Tensor,
    codes: Tensor,
    levels: Sequence[int],
    *,
    rule: str,
    lr: float,
    states: Sequence[Tensor] | None = None,
    eps: float = 1e-8,
    seeds: Sequence[int] | None = None,
    mode: str = "concat",
    offsets: Tensor | None = None,
    pool: str | None = None,
    hashing: str = "modulo",
    groups: Sequence[int] | None = None,
    packed: bool = False,
    backend: str = "auto",
) -> None:
    r"""Take a step of an optimiser on the rows that `prefix_ngram_lookup` read, in place.

    $g_l[h] = \sum_{i : h_l(k_{il}) = h} g_{il}$ for the rows h that occur; each is then moved as
    `row_update` says: "sgd": $w \leftarrow w - \eta g$, and so on.

    In PyTorch, per level, of "rowwise_adagrad"::

        rows, place = torch.unique(table_rows(keys[:, level]), return_inverse=True)
        sums = torch.zeros(len(rows), dim).index_add(0, place, grad_of_level)
        state[rows] += sums.square().mean(1)
        table[rows] -= lr * sums / (state[rows].sqrt() + eps)[:, None]

    Args:
        tables: a table [H_l, d_l] per level, all float32, float16, bfloat16 or float64, of any
            strides; they are changed. No two tables or states may
            share or interleave memory, such as columns of one tensor.
        grad: the gradient of the lookup's result, [M, width] or pooled [B, width]; float64 where
            tables are, else float32, float16 or bfloat16; of any strides.
        codes: as for the lookup.
        levels: as for the lookup.
        rule: "sgd", "adagrad" or "rowwise_adagrad".
        lr: the learning rate, positive and finite.
        states: the sums of squares so far, a tensor per table, changed too: [H_l, d_l] for
            "adagrad", [H_l] for "rowwise_adagrad", float32 (float64 for float64); None for "sgd".
        eps: positive and finite; keeps the divisor from 0.
        seeds: an int64 per table, of the rounding of float16 and bfloat16 rows; None: 0, 1, 2, ...
        mode: as for the lookup.
        offsets: as for the lookup.
        pool: as for the lookup.
        hashing: as for the lookup.
        groups: as for the lookup.
        packed: as for the lookup.
        backend: "auto", "native" or "reference".

    Returns:
        None: tables and states are changed. Rows that were not read stay as they are, to the bit.

    Computed in float32 (float64 for float64). The same as `row_update` of what
    `prefix_ngram_gradient` returns, on the same backend, to the bit; but a row is updated as soon
    as its sum is known, and sums are not written down. Autocast changes nothing. Not
    differentiable: a graph that saved a table notices the change. Deterministic for any thread
    count. Workspace on a CPU: about 40 bytes per item, 24 more per further group, 8 L bytes, and
    the sums of prefixes that share a row of a hashed table; nothing of a table's size. Of the
    reference: that of the two ops.

    Raises:
        TypeError: a wrong type or dtype. ValueError: a wrong shape, rule or rate, states that do
        not go with the rule, bad offsets. IndexError: a code out of range; the tables are then as
        they were. RuntimeError: tables that share or interleave memory.

    Source: the fused optimisers of Mudigere et al., "Software-hardware co-design for fast and
    scalable training of deep learning recommendation models" (2022); FLUID, equations 1-2.

    Example:
        >>> prefix_ngram_update(tables, grad, codes, (64, 64), rule="sgd", lr=0.1)
    """
    sizes, parts = check_arguments(codes, levels, mode, hashing, groups, packed)
    check_step(rule, lr, eps)
    named = check_tables(tables, len(sizes), mode, FLOATS)
    given = list(named.values())
    found = _check_states(states, rule, given)
    draws = list(range(len(given)) if seeds is None else seeds)
    if len(draws) != len(given) or not all(isinstance(draw, int) for draw in draws):
        raise ValueError(f"seeds: must be one int per table, got {seeds!r}")
    check_pooling(offsets, pool)
    count = codes.shape[0] if offsets is None else offsets.shape[0] - 1
    dims = [table.shape[1] for table in given]
    kinds = FLOATS[-1:] if given[0].dtype == torch.float64 else FLOATS[:-1]
    check_tensor("grad", grad, (count, dims[0] if mode == "sum" else sum(dims)), kinds)
    check_same("device", grad=grad, codes=codes, offsets=offsets, **named)
    changed = [[tensor.detach() for tensor in tensors] for tensors in (given, found)]
    how = (sizes, mode, offsets, pool, hashing, parts, packed)
    step = (rule, float(lr), float(eps), draws)
    update(*changed, grad.detach(), codes, *how, *step, backend=backend)
    for table in given:
        torch.autograd.graph.increment_version(table)  # graphs that saved it must not use it now


def _check_states(states: Any, rule: str, tables: list[Tensor]) -> list[Tensor]:
    if states is None or rule == "sgd":
        check_state("states", states, rule, tables[0])
        return []
    named = named_items("states", states)
    if len(named) != len(tables):
        raise ValueError(f"states: must be one per table, {len(tables)}, got {len(named)}")
    for (name, state), table in zip(named.items(), tables, strict=True):
        check_state(name, state, rule, table)
        check_same("device", **{"tables[0]": tables[0], name: state})
    return list(named.values())
