"""Functions that torch.compile is not to look into."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

_Given = ParamSpec("_Given")
_Result = TypeVar("_Result")


def eager(function: Callable[_Given, _Result]) -> Callable[_Given, _Result]:
    """Break the graph around a function, as torch.compiler.disable does, without loading Dynamo.

    Loading it takes longer than all of this library, for nothing where nothing is compiled.
    """

    @functools.wraps(function)
    def call(*args: _Given.args, **kwargs: _Given.kwargs) -> _Result:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)(*args, **kwargs)
        return function(*args, **kwargs)

    return call
