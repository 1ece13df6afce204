"""The checks: agreement with float64, gradients, strides, memory, repeats and threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import deterministic

from .subjects import FORMULA, Inputs, Subject, listed, map_tensors, to_double, with_leaves


def upstream(outputs: Sequence[Tensor], kind: str = "random") -> list[Tensor]:
    """Make gradients of `outputs` that are not contiguous: stride 2, or stride 0 as of a sum."""
    if kind == "sum":
        return [torch.ones((), dtype=o.dtype, device=o.device).expand(o.shape) for o in outputs]
    generator = torch.Generator().manual_seed(len(outputs))
    pairs = [torch.randn(*out.shape, 2, generator=generator) for out in outputs]
    return [pair.to(out)[..., 0] for pair, out in zip(pairs, outputs, strict=True)]


@dataclass(frozen=True)
class Results:
    """What an op returned, and each floating input's gradient (of none, if it has no gradients)."""

    returned: Any
    gradients: dict[str, Tensor]

    def named(self) -> dict[str, Tensor]:
        """Return all tensors by name."""
        outputs = {f"output {at}": out for at, out in enumerate(listed(self.returned))}
        return outputs | {f"gradient of {name}": grad for name, grad in self.gradients.items()}


@dataclass(frozen=True)
class Expected:
    """What the formula gives in the inputs' dtype and in float64, and the gradients fed into it."""

    same: Results
    exact: Results
    flows: list[Tensor]


def expected(subject: Subject, inputs: Inputs, kind: str = "random") -> Expected:
    """Compute what a backend is compared with; it may serve all backends of one device."""
    flows = upstream(listed(subject.run(inputs, FORMULA)), kind)
    exact = results(subject, FORMULA, to_double(inputs), flows)
    return Expected(results(subject, FORMULA, inputs, flows), exact, flows)


def results(
    subject: Subject, backend: str, inputs: Inputs, flows: Sequence[Tensor] | None = None
) -> Results:
    """Run an op forward and backward, with gradients `flows` of its outputs or random ones."""
    if not subject.op.differentiable:
        return Results(subject.run(inputs, backend), {})
    given, leaves = with_leaves(inputs)
    returned = subject.run(given, backend)
    outputs = listed(returned)
    flows = upstream(outputs) if flows is None else flows
    pairs = [(o, f.to(o.dtype)) for o, f in zip(outputs, flows, strict=True) if o.requires_grad]
    wanted = list(leaves.values())
    if pairs:
        roots, grads = zip(*pairs, strict=True)
        found = torch.autograd.grad(roots, wanted, grads, allow_unused=True, materialize_grads=True)
    else:  # as an empty formula may have none
        found = tuple(torch.zeros_like(leaf) for leaf in wanted)
    outputs = [output.detach() for output in outputs]
    returned = outputs[0] if isinstance(returned, Tensor) else tuple(outputs)
    return Results(returned, dict(zip(leaves, found, strict=True)))


def check_forward(
    subject: Subject, backend: str, inputs: Inputs, wanted: Expected | None = None
) -> None:
    """Hold outputs to the tolerance rule; integers exactly; or all to the oracle's own `agree`."""
    wanted = wanted or expected(subject, inputs)
    got = subject.run(inputs, backend)
    outputs, same, exact = map(listed, (got, wanted.same.returned, wanted.exact.returned))
    kinds, needed = ([(t.dtype, list(t.shape)) for t in tensors] for tensors in (outputs, same))
    assert kinds == needed, f"outputs are {kinds} where the formula gives {needed}"
    if subject.oracle.agree is not None:
        subject.oracle.agree(got, dict(inputs))
        return
    for at, triple in enumerate(zip(outputs, same, exact, strict=True)):
        _compare(f"output {at}", *triple, _atol(subject, inputs), 1.0)


def check_gradients(
    subject: Subject, backend: str, inputs: Inputs, wanted: Expected | None = None
) -> None:
    """Hold gradients to the tolerance rule, and their rows to be zero only where they should."""
    wanted = wanted or expected(subject, inputs)
    if not wanted.exact.gradients:
        return
    got = results(subject, backend, inputs, wanted.flows).gradients
    same, exact = wanted.same.gradients, wanted.exact.gradients
    assert got.keys() == exact.keys()
    atol = _atol(subject, inputs)
    greatest = max(_greatest(grad) for grad in exact.values())
    for name in exact:
        triple = got[name], same[name], exact[name]
        _compare(f"gradient of {name}", *triple, atol, min(1.0, greatest))
        _check_rows_alive(f"gradient of {name}", *triple)


def check_repeat(subject: Subject, backend: str, inputs: Inputs, times: int = 3) -> None:
    """Check that repeated runs give the same bits."""
    first = results(subject, backend, inputs)
    for _ in range(times - 1):
        _check_identical("a repeated run", results(subject, backend, inputs), first)


def check_threads(subject: Subject, backend: str, inputs: Inputs) -> None:
    """Check that one thread and two give the same bits."""
    before, found = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(results(subject, backend, inputs))
    finally:
        torch.set_num_threads(before)
    _check_identical("a run with 2 threads instead of 1", *found)


def check_strided(subject: Subject, backend: str, inputs: Inputs) -> None:
    """Check inputs of every layout: transposed, stride 2, unaligned, expanded with stride 0."""
    for label, layout in LAYOUTS.items():
        laid_out = map_tensors(layout, inputs)
        try:
            wanted = expected(subject, laid_out, "sum")
            check_forward(subject, backend, laid_out, wanted)
            check_gradients(subject, backend, laid_out, wanted)
        except Exception as error:
            error.add_note(f"with {label} inputs")
            raise


def check_poisoned(subject: Subject, backend: str, inputs: Inputs) -> None:
    """Check that nothing is read before it is written: fresh memory holds NaN and huge integers."""
    with _fresh_memory(poisoned=False):
        clean = results(subject, backend, inputs)
    with _fresh_memory(poisoned=True):
        _check_identical("a run in poisoned memory", results(subject, backend, inputs), clean)


@contextmanager
def _fresh_memory(poisoned: bool) -> Iterator[None]:
    """Turn torch's deterministic mode on, in which it can fill what `torch.empty` returns."""
    mode, fill = torch.get_deterministic_debug_mode(), deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = poisoned  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


def _transposed(name: str, t: Tensor) -> Tensor:
    return t.transpose(0, -1).contiguous().transpose(0, -1) if t.dim() > 1 else _stepped(name, t)


def _stepped(name: str, t: Tensor) -> Tensor:
    return torch.stack([t, t], -1)[..., 0]


def _unaligned(name: str, t: Tensor) -> Tensor:
    return t.new_zeros(t.numel() + 1)[1:].view(t.shape).copy_(t)


def _expanded(name: str, t: Tensor) -> Tensor:
    """Repeat the first row; what must ascend keeps its values."""
    kept = t.dim() == 0 or len(t) == 0 or "offsets" in name or name == "rows"
    return t if kept else t[:1].expand(t.shape)


LAYOUTS: dict[str, Callable[[str, Tensor], Tensor]] = {
    "transposed": _transposed,
    "stride-2": _stepped,
    "unaligned": _unaligned,
    "expanded": _expanded,
}


def _atol(subject: Subject, inputs: Inputs) -> float:
    kinds = {leaf.dtype for leaf in with_leaves(inputs)[1].values()} or {torch.float32}
    return max(subject.oracle.atol[kind] for kind in kinds)


def _compare(
    what: str, got: Tensor, same: Tensor, exact: Tensor, atol: float, least: float
) -> None:
    """Check |got - exact| <= 2 |same - exact| + atol * scale, in max and in RMS; integers exactly.

    The scale is the norm of `exact`, as rounding is relative, or `least` where that is more: 1, or
    the greatest of an op's gradients where all are smaller.
    """
    if not got.is_floating_point():
        wrong = (got != exact).nonzero().tolist()
        assert not wrong, f"{what}: {len(wrong)} elements are wrong, the first at {wrong[0]}"
        return
    got, same, exact = got.double(), same.double(), exact.double()
    odd = ~exact.isfinite()
    assert torch.equal(got[odd], exact[odd]), f"{what}: differs where float64 gives an infinity"
    assert got[~odd].isfinite().all(), f"{what}: is not finite where float64 is"
    error, own, size = (got - exact)[~odd], (same - exact)[~odd], exact[~odd]
    for label, norm in (("max", _greatest), ("RMS", _rms)):
        limit = 2 * norm(own) + atol * max(norm(size), least)
        assert norm(error) <= limit, (
            f"{what}: {label} error {norm(error):.3g} exceeds {limit:.3g}, as the formula's own is "
            f"{norm(own):.3g}; shape {list(got.shape)}, {label} value {norm(size):.3g}"
        )


def _greatest(values: Tensor) -> float:
    return float(values.abs().max()) if values.numel() else 0.0


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt()) if values.numel() else 0.0


def _check_rows_alive(what: str, got: Tensor, same: Tensor, exact: Tensor) -> None:
    """Check that no row is all zero where the formula's is not by more than its own error."""
    if not exact.numel():
        return
    got, same, exact = (t.double().reshape(*t.shape[:1], -1) for t in (got, same, exact))
    noise = 4 * (same - exact).abs().amax(-1)
    dead = (exact.abs().amax(-1) > noise) & (got == 0).all(-1)
    assert not dead.any(), (
        f"{what}: {int(dead.sum())} of {dead.numel()} rows are all zero where the formula's are "
        f"not, the first is row {int(dead.reshape(-1).nonzero()[0])}"
    )


def _check_identical(what: str, got: Results, want: Results) -> None:
    found = got.named()
    for name, tensor in want.named().items():
        wrong = ~torch.isclose(found[name], tensor, rtol=0, atol=0, equal_nan=True)
        assert not wrong.any(), f"{name}: {int(wrong.sum())} elements change in {what}"
