"""What a reference says besides its formula: how to make inputs, and when two answers agree."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

ATOL = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float64: 1e-12}


@dataclass(frozen=True)
class Oracle:
    """The oracle of one public op.

    function: the formula; takes the arguments of torch's operator `livrec::<op>`.
    make_inputs: `(generator, dtype, **sizes)` returns the keyword arguments of the public op, on
        the CPU; device moves and gradients are the caller's.
    sizes: for every size that make_inputs takes, the least and the greatest that tests draw.
    cases: named corners, as sizes; "typical" is one of them.
    dtypes: floating dtypes that the op takes.
    agree: `(output, inputs)` raises AssertionError where an output is wrong, for ops whose right
        answer is not unique; None compares with the float64 formula by the tolerance rule
        (integers exactly).
    atol: absolute tolerance by dtype, added to twice the error of the formula in that dtype.
    """

    function: Callable[..., Any]
    make_inputs: Callable[..., dict[str, Any]]
    sizes: Mapping[str, tuple[int, int]]
    cases: Mapping[str, Mapping[str, int]]
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)
    agree: Callable[[Any, dict[str, Any]], None] | None = None
    atol: Mapping[torch.dtype, float] = field(default_factory=lambda: ATOL)


def random_offsets(generator: torch.Generator, users: int, most: int) -> Tensor:
    """Draw jagged offsets int64 [users + 1]: lengths 0..most, some histories empty."""
    lengths = torch.randint(0, most + 1, (users,), generator=generator)
    if users > 1:
        lengths[torch.randint(0, users, (1,), generator=generator)] = 0
    return torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])


def randn(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    """Draw normal values in float32 and round them to `dtype`: every dtype sees like data."""
    return torch.randn(shape, generator=generator).to(dtype)
