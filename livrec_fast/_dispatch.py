"""How an op finds its kernel.

Every op is one torch operator per backend, `livrec::<op>.<backend>`, all of one schema: the
reference and the Triton launchers are registered from Python, the C++ kernels from their own
library under the same name. A call tries the backends in order and takes the first that has no
reason against it.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from . import _native
from ._autograd import (
    first_tensor,
    plain_torch,
    recompute_backward,
    register_gradient,
    slots_of,
    tensors_of,
)
from ._checks import autocast_is_on

_LIBRARY = torch.library.Library("livrec", "FRAGMENT")
_FORCED = os.environ.get("LIVREC_BACKEND", "auto")
if _FORCED not in (_NAMES := ("auto", "cuda", "triton", "native", "reference")):
    raise ValueError(f"LIVREC_BACKEND: must be one of {', '.join(_NAMES)}, got {_FORCED!r}")
_instead: ContextVar[Callable[[Op, Sequence[Any]], Any] | None]
_instead = ContextVar("livrec_instead", default=None)

OPS: dict[str, Op] = {}


class BackendError(RuntimeError):
    """The named backend cannot run these arguments; the message says why, backend by backend."""


@dataclass(frozen=True)
class Backend:
    """One way to compute an op.

    refuse: of the operator's arguments, a constant text that says what speaks against it, or None.
    run: a Python function of the operator's arguments, or None where C++ registers it.
    backward: `(grads, *args, outputs=, needs=)` returns the gradients of those input tensors whose
        `needs` is true; None where C++ registers it; "reference" recomputes by the reference.
    """

    name: str
    refuse: Callable[..., str | None]
    run: Callable[..., Any] | None = None
    backward: Callable[..., list[Tensor]] | Literal["reference"] | None = "reference"


class Op:
    """A public op: its schema, its fake, its gradients and its backends in order of preference."""

    def __init__(
        self,
        name: str,
        schema: str,
        *,
        fake: Callable[..., Any],
        reference: Callable[..., Any],
        check_values: Callable[..., None] = lambda *args: None,
        backends: Sequence[Backend] = (),
        differentiable: bool = True,
        autocast: Sequence[str] = (),
    ):
        """Register the op's operators; the reference becomes the last backend.

        schema: torch's schema without the name, such as "(Tensor x, int k) -> Tensor".
        check_values: raises on bad contents (ids, offsets): looked at before the reference runs,
            and to name the culprit when a kernel has stopped. Shapes and dtypes are the public
            function's duty.
        autocast: names of the arguments cast to autocast's dtype where it is on; others stay as
            given.
        """
        self.name, self.check_values, self.differentiable = name, check_values, differentiable
        self.schema = torch._C.parse_schema(f"{name}{schema}")
        self.mutates = [a.name for a in self.schema.arguments if a.is_write]
        self.lower = [argument.name in autocast for argument in self.schema.arguments]
        self.lowers = any(self.lower)
        self.recorded: dict[str, type[torch.autograd.Function]] = {}

        def run_reference(*args: Any) -> Any:
            check_values(*args)
            with plain_torch(first_tensor(args).device), torch.no_grad():
                return reference(*args)

        recompute = recompute_backward(reference)
        self.backends = (*backends, Backend("reference", lambda *args: None, run_reference))
        inputs = schema.split(") ->")[0].strip()[1:]
        for backend in self.backends:
            qualified = f"{name}.{backend.name}"
            _LIBRARY.define(f"{qualified}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
            if backend.run is not None:
                _LIBRARY.impl(qualified, backend.run, "CompositeExplicitAutograd")
            torch.library.register_fake(f"livrec::{qualified}", fake, lib=_LIBRARY)
            if differentiable:
                backward = recompute if backend.backward == "reference" else backend.backward
                recorded = register_gradient(_LIBRARY, name, backend.name, inputs, backward)
                self.recorded[backend.name] = recorded
        OPS[name] = self

    def operator(self, backend: str) -> Any:
        """Return torch's operator of one backend, `torch.ops.livrec.<op>.<backend>`."""
        return getattr(getattr(torch.ops.livrec, self.name), backend)

    def reasons(self, *args: Any) -> dict[str, str | None]:
        """Return what speaks against each backend (None: nothing), in order of preference."""
        return {backend.name: backend.refuse(*args) for backend in self.backends}

    def __call__(self, *args: Any, backend: str = "auto") -> Any:
        """Run on the operator's arguments, whose shapes and dtypes have been checked."""
        compiling = torch.compiler.is_compiling()
        instead = None if compiling else _instead.get()
        if instead is not None:
            return instead(self, args)
        args = tuple(self._cast(args))
        chosen = self.choose(args, backend)
        if compiling:
            return self.operator(chosen)(*args)
        try:
            return self._run(chosen, args)
        except RuntimeError:
            self.check_values(*args)  # a kernel stops in few words: this names the culprit
            raise

    def _run(self, chosen: str, args: Sequence[Any]) -> Any:
        """Run eagerly. torch would find out in Python what is to be recorded, if anything is."""
        if chosen not in self.recorded:
            return self.operator(chosen)(*args)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return self.recorded[chosen].apply(slots_of(args), *tensors_of(args))
        with torch._C._AutoDispatchBelowAutograd():
            return self.operator(chosen)(*args)

    def choose(self, args: Sequence[Any], backend: str) -> str:
        """Return the name of the backend that a call takes, or raise BackendError."""
        wanted = _FORCED if backend == "auto" else backend
        chosen = None
        for candidate in self.backends:
            if wanted in ("auto", candidate.name) and candidate.refuse(*args) is None:
                chosen = candidate.name
                break
        if chosen is None:
            origin = " (LIVREC_BACKEND)" if backend == "auto" != wanted else ""
            table = _table(self, args)
            raise BackendError(f"backend: {wanted!r}{origin} cannot run this.\n{table}")
        if chosen == "reference" and wanted == "auto" and not torch.compiler.is_compiling():
            _warn_once_if_not_compiled()
        return chosen

    def _cast(self, args: Sequence[Any]) -> Sequence[Any]:
        if not self.lowers or not autocast_is_on(device := first_tensor(args).device.type):
            return args
        dtype = torch.get_autocast_dtype(device)

        def cast(arg: Any) -> Any:
            if isinstance(arg, (list, tuple)):
                return [cast(item) for item in arg]
            may = isinstance(arg, Tensor) and arg.is_floating_point() and arg.dtype != torch.float64
            return arg.to(dtype) if may else arg

        return [cast(arg) if lower else arg for arg, lower in zip(args, self.lower, strict=True)]


def refuse_native(tensor: Tensor) -> str | None:
    """Say why a C++ CPU kernel cannot take `tensor`, or None."""
    if _native.MISSING is not None:
        return _native.MISSING
    return None if tensor.device.type == "cpu" else "runs on CPU tensors only"


def refuse_wide(first: Tensor, *rest: object) -> str | None:
    """Say why a C++ CPU kernel in float32 cannot take an operator's arguments, or None."""
    if first.dtype == torch.float64:
        return "computes in float32, not in float64"
    return refuse_native(first)


def refuse_cuda(tensor: Tensor) -> str | None:
    """Say why a CUDA C++ kernel cannot take `tensor`, or None."""
    if tensor.device.type != "cuda":
        return "runs on CUDA tensors only"
    return None if _native.WITH_CUDA else "the library was built without its CUDA kernels"


def refuse_triton(tensor: Tensor) -> str | None:
    """Say why a Triton kernel cannot take `tensor`, or None; its interpreter takes CPU tensors."""
    if tensor.device.type == "cuda":
        return None
    return None if os.environ.get("TRITON_INTERPRET") == "1" else "runs on CUDA tensors only"


def explain(op: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """Return, by backend, what would run `op(*args, **kwargs)` and what speaks against each.

    Example: `print(livrec_fast.explain(livrec_fast.residual_kmeans_encode, x, codebooks))`.
    """

    def stop(called: Op, operator_args: Sequence[Any]) -> None:
        raise _Explained(_table(called, operator_args))

    try:
        with intercepted(stop):
            op(*args, **kwargs)
    except _Explained as explained:
        return explained.table
    raise TypeError(f"op: {op!r} is not an op of livrec_fast")


@contextmanager
def intercepted(instead: Callable[[Op, Sequence[Any]], Any]) -> Iterator[None]:
    """Inside the block, ops called eagerly return `instead(op, operator arguments)`."""
    token = _instead.set(instead)
    try:
        yield
    finally:
        _instead.reset(token)


class _Explained(Exception):
    def __init__(self, table: str):
        super().__init__(table)
        self.table = table


def _table(op: Op, args: Sequence[Any]) -> str:
    """Write the backends of `op`, in order, the reasons against them and what they were given."""
    reasons = op.reasons(*args)
    able = [name for name, reason in reasons.items() if reason is None]
    chosen = next((name for name in able if _FORCED in ("auto", name)), None)
    by = "auto" if _FORCED == "auto" else "LIVREC_BACKEND"
    pairs = zip(op.schema.arguments, args, strict=True)
    lines = [f"{op.name}({', '.join(_describe(*pair) for pair in pairs)})"]
    for name, reason in reasons.items():
        verdict = reason or (f"chosen by {by}" if name == chosen else "could run it")
        lines.append(f"  {name:<10} {verdict}")
    return "\n".join(lines)


def _describe(argument: Any, value: Any) -> str:
    def one(item: Any) -> str:
        if isinstance(item, Tensor):
            return f"{str(item.dtype)[6:]}{list(item.shape)} on {item.device}"
        return repr(item)

    listed = isinstance(value, (list, tuple))
    return f"{argument.name}=" + (f"[{', '.join(map(one, value))}]" if listed else one(value))


_warned = False


def _warn_once_if_not_compiled() -> None:
    global _warned
    if _native.MISSING is not None and not _warned:
        _warned = True
        warnings.warn(f"livrec_fast computes by its reference: {_native.MISSING}", stacklevel=5)
