"""Gradients of an operator: how torch is told of them, and recomputation by the reference.

The gradient of `livrec::<op>.<backend>` is an operator too, `livrec::<op>_backward.<backend>`, so
that `torch.compile` sees one opaque node and C++ can implement it. Its arguments are the gradients
of the outputs, the op's own arguments, its outputs, and for each input tensor whether its gradient
is wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

_TAGS = (torch.Tag.pt2_compliant_tag,)


class _Slot:
    """Stands where a tensor was taken out of an argument list."""


def _is_slot(arg: Any) -> bool:
    return isinstance(arg, (Tensor, _Slot))


def tensors_of(args: Sequence[Any]) -> list[Any]:
    """Return the tensors among operator arguments, lists opened, in order."""
    lists = [arg if isinstance(arg, (list, tuple)) else [arg] for arg in args]
    return [item for items in lists for item in items if _is_slot(item)]


def first_tensor(args: Sequence[Any]) -> Tensor:
    """Return the first tensor among operator arguments."""
    return next(iter(tensors_of(args[:1]) or tensors_of(args)))


def with_tensors(args: Sequence[Any], tensors: Iterable[Any]) -> list[Any]:
    """Return `args` with their tensors replaced, in order, by `tensors`."""
    supply = iter(tensors)

    def replace(arg: Any) -> Any:  # calls no one that holds it: tensors go when their users do
        return next(supply) if _is_slot(arg) else arg

    return [
        [replace(item) for item in arg] if isinstance(arg, (list, tuple)) else replace(arg)
        for arg in args
    ]


@contextmanager
def plain_torch(device: torch.device) -> Iterator[None]:
    """Compute as written: no autocast, and autograd alive even inside an operator.

    Below the autograd dispatch key torch records nothing, and a recomputed graph would silently
    have zero gradients; so the keys that were excluded on the way in are allowed again.
    """
    keys = torch._C.DispatchKey
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in (keys.AutogradFunctionality, keys.AutogradOther, keys.ADInplaceOrView):
        excluded = excluded.remove(key)
    included = torch._C._dispatch_tls_local_include_set()
    with (
        torch._C._ForceDispatchKeyGuard(included, excluded),
        torch.autocast(device.type, enabled=False),
    ):
        yield


def recompute_backward(function: Callable[..., Any]) -> Callable[..., list[Tensor]]:
    """Make a backward of `function`: run it again and differentiate it with torch's autograd."""

    def backward(
        grads: Sequence[Tensor | None], *args: Any, outputs: Any, needs: Sequence[bool]
    ) -> list[Tensor]:
        given = tensors_of(args)
        with plain_torch(given[0].device), torch.enable_grad():
            leaves = [t.detach().requires_grad_(need) for t, need in zip(given, needs, strict=True)]
            results = function(*with_tensors(args, leaves))
            results = [results] if isinstance(results, Tensor) else results
            used = [
                (result, grad)
                for result, grad in zip(results, grads, strict=True)
                if grad is not None and result.requires_grad
            ]
            wanted = [leaf for leaf in leaves if leaf.requires_grad]
            if not used:
                return [torch.zeros_like(leaf) for leaf in wanted]
            found = torch.autograd.grad(
                [result for result, _ in used],
                wanted,
                [grad for _, grad in used],
                materialize_grads=True,
            )
        return _unshared(found, (*given, *tensors_of(grads)))

    return backward


def _unshared(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> list[Tensor]:
    """Copy what shares memory with `others`, or is part of more (as a slice is), or came twice."""
    taken = {other.untyped_storage().data_ptr() for other in others}
    kept = []
    for tensor in tensors:
        storage = tensor.untyped_storage()
        whole = storage.nbytes() == tensor.nbytes and storage.data_ptr() not in taken
        taken.add(storage.data_ptr())
        kept.append(
            tensor.contiguous() if whole else tensor.clone(memory_format=torch.contiguous_format)
        )
    return kept


class _Once(torch.autograd.Function):
    """Passes gradients on, and refuses to be differentiated itself."""

    @staticmethod
    def forward(ctx: Any, name: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.name = name
        return tuple(tensor.view_as(tensor) for tensor in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(f"{ctx.name} can be differentiated once: its gradient has no gradient")


def register_gradient(
    library: torch.library.Library,
    name: str,
    backend: str,
    inputs: str,
    backward: Callable[..., list[Tensor]] | None,
) -> type[torch.autograd.Function]:
    """Define `livrec::<name>_backward.<backend>` as the gradient of `livrec::<name>.<backend>`.

    inputs: the op's argument list as its schema writes it. backward: None where C++ has it.
    Returns the same for eager calls: `.apply(args with slots for tensors, *tensors)`.
    """
    qualified = f"{name}_backward.{backend}"
    library.define(
        f"{qualified}(Tensor?[] grads, {inputs}, Tensor[] outputs, bool[] needs) -> Tensor[]",
        tags=_TAGS,
    )
    if backward is not None:

        def run(grads: Any, *rest: Any) -> list[Tensor]:
            *args, outputs, needs = rest
            return backward(grads, *args, outputs=outputs, needs=needs)

        library.impl(qualified, run, "CompositeExplicitAutograd")

    def fake(grads: Any, *rest: Any) -> list[Tensor]:
        *args, _, needs = rest
        given = zip(tensors_of(args), needs, strict=True)
        return [tensor.new_empty(tensor.shape) for tensor, need in given if need]

    def differentiate(ctx: Any, grads: Sequence[Tensor | None], needs: Any) -> list[Tensor | None]:
        tensors = iter(ctx.saved_tensors)
        args = with_tensors(ctx.args, tensors)
        operator = getattr(getattr(torch.ops.livrec, f"{name}_backward"), backend)
        results = list(tensors)
        with torch.no_grad():
            found = operator(list(grads), *args, results, needs)
        if torch.is_grad_enabled():  # somebody means to differentiate the gradient
            found = _Once.apply(name, len(found), *found, *tensors_of([*grads, *args]))
        found = iter(found)
        return [next(found) if need else None for need in needs]

    def gradient(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        found = differentiate(ctx, grads, _per_tensor(ctx.args, ctx.needs_input_grad))
        return tuple(  # torch takes an empty list for one of tensors, and wants it back
            grad if tensors_of([arg]) else [] if isinstance(arg, list) and not arg else None
            for arg, grad in zip(ctx.args, with_tensors(ctx.args, found), strict=True)
        )

    class Recorded(torch.autograd.Function):
        """What torch makes of the two below for any arguments, without its search for tensors."""

        @staticmethod
        def forward(ctx: Any, args: Sequence[Any], *tensors: Tensor) -> Any:
            operator = getattr(getattr(torch.ops.livrec, name), backend)
            with torch._C._AutoDispatchBelowAutograd():
                output = operator(*with_tensors(args, tensors))
            _keep(ctx, args, tensors, output)
            return tuple(output) if isinstance(output, list) else output

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
            return (None, *differentiate(ctx, grads, list(ctx.needs_input_grad[1:])))

    torch.library.register_fake(f"livrec::{qualified}", fake, lib=library)
    torch.library.register_autograd(
        f"livrec::{name}.{backend}", gradient, setup_context=_save, lib=library
    )
    return Recorded


def slots_of(args: Sequence[Any]) -> list[Any]:
    """Return `args` with a slot for each tensor."""
    return with_tensors(args, repeat(_Slot()))


def _save(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
    _keep(ctx, slots_of(inputs), tensors_of(inputs), output)


def _keep(ctx: Any, args: Sequence[Any], tensors: Sequence[Tensor], output: Any) -> None:
    ctx.set_materialize_grads(False)  # an output that nobody used has none, however large it is
    ctx.save_for_backward(*tensors, *([output] if isinstance(output, Tensor) else output))
    ctx.args = args


def _per_tensor(args: Sequence[Any], per_argument: Sequence[Any]) -> list[bool]:
    """Spread what torch says per argument, a list for a list or one word, over the tensors."""
    spread: list[bool] = []
    for arg, value in zip(args, per_argument, strict=True):
        count = len(tensors_of([arg]))
        spread.extend(value if isinstance(value, (list, tuple)) and count else [value] * count)
    return spread
