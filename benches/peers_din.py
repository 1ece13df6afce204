"""FuxiCTR's DIN unit: one candidate per row, so that each candidate gets a history of its own."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import Tensor

from livrec_fast.benchmarking import Absent, Contestant, Options

from .peers import Inputs, Run, fresh

FILES = ("h5py", "polars", "ray", "requests")  # FuxiCTR reads files with these, of which none is
_NAMES = {"sigmoid": "Sigmoid", "relu": "ReLU"}


def contestants(
    activation: str, units: Sequence[int], dim: int, gradients: Callable[..., Any], options: Options
) -> Iterator[Contestant | Absent]:
    """Yield FuxiCTR's unit, eager and, unless quick, compiled, or why not.

    gradients: of a `function` of the case's inputs, returns those of all floating inputs.
    """
    for compiling in (False,) if options.quick else (False, True):
        name = f"FuxiCTR DIN_Attention{', compiled' if compiling else ''}"
        if find_spec("fuxictr") is None:
            reason = "is not installed (pip install --no-deps -r requirements/peers.txt)"
            yield Absent(name, f"fuxictr {reason}")
        elif activation not in _NAMES:
            yield Absent(name, "FuxiCTR's Dice normalises by the batch's own statistics")
        else:

            def prepare(inputs: Inputs, compiling: bool = compiling) -> Run:
                function = unit(activation, units, dim, inputs["q"].device)
                if compiling:
                    function = torch.compile(fresh(function), dynamic=False)
                return prepared(function, gradients, inputs)

            yield Contestant(name, prepare)


def prepared(function: Callable[..., Tensor], gradients: Callable[..., Any], inputs: Inputs) -> Run:
    """Return a run of a function, after its first."""

    def run() -> Any:
        if "grad" in inputs:
            return gradients(function=function, **inputs)
        with torch.no_grad():
            return function(**inputs)

    run()
    return run


def unit(
    activation: str, units: Sequence[int], dim: int, device: torch.device
) -> Callable[..., Tensor]:
    """Return FuxiCTR's module as a function of the case's inputs, whose weights it takes."""
    module = attention_class()(dim, list(units), _NAMES[activation]).to(device)
    steps = [2 * layer for layer in range(len(units) + 1)]  # activations are between

    def attend(
        q: Tensor, k: Tensor, offsets: Tensor, weights: list[Tensor], biases: list[Tensor],
        activation: str,
    ) -> Tensor:  # fmt: skip
        given = {}
        for step, weight, bias in zip(steps, weights, biases, strict=True):
            given[f"attention_layer.mlp.{step}.weight"] = weight.T
            given[f"attention_layer.mlp.{step}.bias"] = bias
        history = k.view(len(q), 1, -1, k.shape[1]).expand(-1, q.shape[1], -1, -1)
        pairs = q.flatten(0, 1), history.flatten(0, 1)
        found: Tensor = torch.func.functional_call(module, given, pairs)
        return found.view(q.shape)

    return attend


class StandIns(MetaPathFinder, Loader):
    """Finds stand-ins, after all else, for packages that are not installed and their modules."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Find one."""
        return ModuleSpec(name, self, is_package=True) if name.split(".")[0] in FILES else None

    def create_module(self, spec: ModuleSpec) -> Any:
        """Make one, which has any attribute."""
        return MagicMock(__path__=[], __spec__=spec)

    def exec_module(self, module: Any) -> None:
        """Leave it as it is."""


def attention_class() -> Any:
    """Import FuxiCTR's unit; file readers that it does not need may be absent."""
    finder = StandIns()
    sys.meta_path.append(finder)
    try:
        name = "fuxictr.pytorch.layers.attentions.target_attention"
        return import_module(name).DIN_Attention
    finally:
        sys.meta_path.remove(finder)
        for name in [n for n, module in sys.modules.items() if isinstance(module, MagicMock)]:
            del sys.modules[name]
