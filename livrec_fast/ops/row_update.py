"""Steps of optimisers on some rows of a table."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .._checks import FLOATS, check_choice, check_same, check_tensor
from .._dispatch import Backend, Op, refuse_wide
from ..reference import row_update as reference


def _check_values(table: Tensor, state: Tensor | None, rows: Tensor, *rest: object) -> None:
    for at in ((rows < 0) | (rows >= len(table))).nonzero()[:1, 0].tolist():
        raise IndexError(f"rows: must be in [0, {len(table)}), got rows[{at}] = {int(rows[at])}")
    for at in (rows.diff() <= 0).nonzero()[:1, 0].tolist():
        raise ValueError(
            f"rows: must ascend, got rows[{at}] = {int(rows[at])} before {int(rows[at + 1])}"
        )


_op = Op(
    "row_update",
    "(Tensor(a!) table, Tensor(b!)? state, Tensor rows, Tensor sums, str rule, float lr, "
    "float eps, int seed) -> ()",
    fake=lambda *args: None,
    reference=reference.row_update,
    check_values=_check_values,
    backends=(Backend("native", refuse_wide),),
    differentiable=False,
)


def row_update(
    table: Tensor,
    rows: Tensor,
    sums: Tensor,
    *,
    rule: str,
    lr: float,
    state: Tensor | None = None,
    eps: float = 1e-8,
    seed: int = 0,
    backend: str = "auto",
) -> None:
    r"""Take a step of an optimiser on some rows of a table, in place.

    With g the gradient of a row: "sgd": $w \leftarrow w - \eta g$. "adagrad":
    $s \leftarrow s + g^2,\ w \leftarrow w - \eta g / (\sqrt{s} + \epsilon)$, per element.
    "rowwise_adagrad": the same with one s per row, $s \leftarrow s + \mathrm{mean}(g^2)$.

    In PyTorch, of "rowwise_adagrad"::

        state[rows] += sums.square().mean(1)
        table[rows] -= lr * sums / (state[rows].sqrt() + eps)[:, None]

    Args:
        table: [H, d] float32, float16, bfloat16 or float64, of any strides; it is changed.
        rows: int64 [n], ascending and distinct, each in [0, H).
        sums: [n, d] float32 (float64 for float64 tables), what `prefix_ngram_gradient` returns.
        rule: "sgd", "adagrad" or "rowwise_adagrad".
        lr: the learning rate, positive and finite.
        state: the sums of squares so far, changed too: [H, d] for "adagrad", [H] for
            "rowwise_adagrad", sums' dtype; None for "sgd".
        eps: positive and finite; keeps the divisor from 0.
        seed: an int64; of the rounding of float16 and bfloat16 rows: up or down at random, so that
            its mean is the exact value and small steps are not lost. The same seed, row and column
            draw the same on every device.
        backend: "auto", "native" or "reference".

    Returns:
        None: table and state are changed. Rows that are not named stay as they are, to the bit.

    Computed in float32 (float64 for float64). Autocast changes nothing. Not differentiable: a graph
    that saved the table notices the change. Deterministic for any thread count. Workspace: two rows
    per thread; of the reference, a few copies of sums.

    Raises:
        TypeError: a wrong type or dtype. ValueError: a wrong shape, rule or rate, a state that does
        not go with the rule, or rows that do not ascend. IndexError: a row out of range; the table
        is then as it was.

    Source: Duchi et al., "Adaptive subgradient methods" (2011); one number per row as in Mudigere
    et al., "Software-hardware co-design for fast and scalable training of deep learning
    recommendation models" (2022).

    Example:
        >>> rows, sums = prefix_ngram_gradient(grad, codes, (64,), (64,), (32,))
        >>> row_update(table, rows, sums, rule="rowwise_adagrad", lr=0.05, state=state)
    """
    check_step(rule, lr, eps)
    check_tensor("table", table, ("H", "d"), FLOATS)
    wide = (torch.float64 if table.dtype == torch.float64 else torch.float32,)
    check_tensor("rows", rows, ("n",), (torch.int64,))
    check_tensor("sums", sums, (rows.shape[0], table.shape[1]), wide)
    check_state("state", state, rule, table)
    check_same("device", table=table, rows=rows, sums=sums, state=state)
    given: list[Any] = [table.detach(), None if state is None else state.detach()]
    _op(*given, rows, sums.detach(), rule, float(lr), float(eps), seed, backend=backend)
    torch.autograd.graph.increment_version(table)  # graphs that saved it must not use it now


def check_step(rule: str, lr: float, eps: float) -> None:
    """Check what says how rows are moved."""
    check_choice("rule", rule, reference.RULES)
    for name, value in {"lr": lr, "eps": eps}.items():
        if not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise ValueError(f"{name}: must be positive and finite, got {value!r}")


def check_state(name: str, state: Any, rule: str, table: Tensor) -> None:
    """Check the state of a table, None where the rule has none."""
    if rule == "sgd":
        if state is not None:
            raise ValueError(f"{name}: rule 'sgd' has none, got {type(state).__name__}")
        return
    if state is None:
        raise ValueError(f"{name}: rule {rule!r} needs it, got None")
    wide = (torch.float64 if table.dtype == torch.float64 else torch.float32,)
    check_tensor(name, state, tuple(table.shape) if rule == "adagrad" else table.shape[:1], wide)
