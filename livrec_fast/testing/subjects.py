"""What is tested, on what and where: ops with their oracles, inputs, backends that run here."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from .. import _native
from .._autograd import tensors_of
from .._dispatch import OPS, Op, intercepted
from ..reference._oracle import Oracle

FORMULA = "formula"  # names the oracle's own function where a backend is asked for
Inputs = Mapping[str, Any]


@dataclass(frozen=True)
class Subject:
    """A public op under test.

    It is called through its public function, with the formula in the operator's place for FORMULA,
    so that what the public function does around the operator is tested with it.
    """

    op: Op
    function: Callable[..., Any]
    oracle: Oracle
    stem: str

    def run(self, inputs: Inputs, backend: str = "auto") -> Any:
        """Call the public function with a backend, or with the formula instead of one.

        What it changes in place it is given copies of, and these are returned.
        """
        changed = self._changed(inputs)
        inputs = {**inputs, **changed}
        if backend != FORMULA:
            returned = self.function(**inputs, backend=backend)
        else:
            with intercepted(lambda op, args: self.oracle.function(*args)):
                returned = self.function(**inputs)
        return tuple(tensors_of(list(changed.values()))) if changed else returned

    def arguments(self, inputs: Inputs) -> list[Any]:
        """Return the operator's arguments for the public function's `inputs`."""
        seen: list[Any] = []

        def record(op: Op, args: Sequence[Any]) -> Any:
            seen[:] = args
            return self.oracle.function(*args)

        with intercepted(record):
            self.function(**{**inputs, **self._changed(inputs)})
        return seen

    def _changed(self, inputs: Inputs) -> dict[str, Any]:
        """Copy the inputs that the op changes in place."""
        given = {n: inputs[n] for n in self.op.mutates if inputs[n] is not None}
        return map_tensors(lambda _, t: t.clone(), given)

    def refusal(self, inputs: Inputs, backend: str) -> str | None:
        """Say what speaks against a backend for these inputs, or None."""
        return self.op.reasons(*self.arguments(inputs))[backend]


def subjects() -> dict[str, Subject]:
    """Find every op: its public function in the package's root, its oracle beside the formula."""
    root = import_module("livrec_fast")
    found = {}
    for name, op in OPS.items():
        function = getattr(root, name)
        stem = function.__module__.rpartition(".")[2]
        oracle = import_module(f"livrec_fast.reference.{stem}").ORACLES[name]
        found[name] = Subject(op, function, oracle, stem)
    return found


@dataclass(frozen=True)
class Target:
    """A backend as it can run here; native once per instruction-set level."""

    backend: str
    isa: str | None = None
    device: str = "cpu"

    def __str__(self) -> str:
        return " ".join(filter(None, [self.backend, self.isa, self.device.removeprefix("cpu")]))

    @contextmanager
    def active(self) -> Iterator[None]:
        """Inside the block, native kernels run at this target's level."""
        if self.isa is None:
            yield
        else:
            with _native.use_isa(self.isa):
                yield


# Ops with code for a level that only adds instructions: others are there as at the level below.
USED_BY = {
    "avx512_vnni": ("residual_kmeans", "kmeans_step"),
    "avx512_bf16": ("in_batch_contrastive", "target_attention"),
    "amx": ("in_batch_contrastive",),
}


def targets(subject: Subject) -> list[Target]:
    """Return every backend that has no reason against the typical inputs, on each device here."""
    found = []
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        inputs = inputs_for(subject.oracle, "typical", subject.oracle.dtypes[0], device=device)
        for name, reason in subject.op.reasons(*subject.arguments(inputs)).items():
            levels = levels_of(subject.op.name) if name == "native" else [None]
            found += [Target(name, level, device) for level in levels if reason is None]
    return found


def levels_of(op: str) -> list[str | None]:
    """Return the instruction-set levels that differ for an op, and the one it runs at here."""
    levels = _native.isa_levels()
    return [
        level for level in levels if level == levels[-1] or op.startswith(USED_BY.get(level, op))
    ]


def inputs_for(
    oracle: Oracle,
    case: str | Mapping[str, int],
    dtype: torch.dtype = torch.float32,
    *,
    seed: int = 0,
    device: str = "cpu",
) -> dict[str, Any]:
    """Draw the keyword inputs of a named case or of given sizes; the same call draws the same."""
    sizes = oracle.cases[case] if isinstance(case, str) else case
    key = repr((sorted(sizes.items()), seed)).encode()
    generator = torch.Generator().manual_seed(zlib.crc32(key))
    return map_tensors(lambda _, t: t.to(device), oracle.make_inputs(generator, dtype, **sizes))


def corners(oracle: Oracle) -> dict[str, Mapping[str, int]]:
    """Return the oracle's cases, and the typical one with each size in turn at its least."""
    typical = oracle.cases["typical"]
    least = {f"{n} = {low}": {**typical, n: low} for n, (low, _) in oracle.sizes.items()}
    named = {label: sizes for label, sizes in least.items() if sizes not in oracle.cases.values()}
    return {**oracle.cases, **named}


def map_tensors(change: Callable[[str, Tensor], Any], inputs: Inputs) -> dict[str, Any]:
    """Return `inputs` with every tensor, in lists too, replaced by `change(name, tensor)`."""

    def replace(name: str, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(replace(f"{name}[{i}]", item) for i, item in enumerate(value))
        return change(name, value) if isinstance(value, Tensor) else value

    return {name: replace(name, value) for name, value in inputs.items()}


def to_double(inputs: Inputs) -> dict[str, Any]:
    """Return `inputs` with floating tensors in float64."""
    return map_tensors(lambda _, t: t.double() if t.is_floating_point() else t, inputs)


def with_leaves(inputs: Inputs) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return `inputs` with floating tensors, as strided, that want gradients; and those tensors."""
    leaves: dict[str, Tensor] = {}

    def leaf(name: str, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        return leaves.setdefault(name, tensor.detach().requires_grad_())

    return map_tensors(leaf, inputs), leaves


def listed(outputs: Any) -> list[Tensor]:
    """Return an op's outputs as a list, without those that were not asked for."""
    every = [outputs] if isinstance(outputs, Tensor) else outputs
    return [output for output in every if output is not None]
