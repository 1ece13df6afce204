"""DIN attention: DIN's unit over searched histories, against the pairs written out, and FuxiCTR."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import livrec_fast
from livrec_fast.benchmarking import Case, Contestant, Options, ours

from . import peers, peers_din
from .agreement import Close

UNITS = {"sigmoid": (80, 40), "relu": (64, 16), "dice": (64,)}  # as published, and as libraries do
Inputs = dict[str, Any]


def cases(options: Options) -> Iterator[Case]:
    """Yield the cases, each as a forward pass and with gradients."""
    for training in (False, True):
        make = partial(case, options=options, training=training)
        if options.quick:
            yield make("sigmoid", 8, 100, 8, 16)
            continue
        for items in (50, 200):
            for candidates in (1, 8, 32):
                yield make("sigmoid", 16, items, candidates, 32)
        yield make("sigmoid", 1, 200, 128, 32)
        yield make("sigmoid", 16, 200, 128, 32)
        yield make("relu", 16, 200, 8, 64)
        yield make("dice", 16, 200, 8, 32)


def draw(
    kind: str, users: int, items: int, candidates: int, dim: int, training: bool, device: str
) -> Inputs:
    """Draw candidates, items and a unit; logits vary by about 1."""
    generator = torch.Generator().manual_seed(4)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    widths = [4 * dim, *UNITS[kind], 1]
    pairs = zip(widths[:-1], widths[1:], strict=True)
    inputs = {
        "q": normal(users, candidates, dim),
        "k": normal(users * items, dim),
        "offsets": torch.arange(users + 1, device=device) * items,
        "weights": [normal(*pair) * (2 / pair[0]) ** 0.5 for pair in pairs],
        "biases": [normal(width) / 4 for width in widths[1:]],
        "activation": kind,
    }
    if kind == "dice":
        for name in ("slopes", "gains", "shifts"):
            inputs[name] = [normal(width) / 4 + (name == "gains") for width in widths[1:-1]]
    return inputs | ({"grad": normal(users, candidates, dim)} if training else {})


def case(
    kind: str, users: int, items: int, candidates: int, dim: int, options: Options, training: bool
) -> Case:
    """Make one case: all compute the output, or the gradients of all floating inputs."""
    function = gradients if training else livrec_fast.din_attention
    unit = "/".join(map(str, UNITS[kind]))
    layers = [dim, *UNITS[kind], 1]
    products = sum(a * b for a, b in zip(layers[:-1], layers[1:], strict=True)) + dim
    shape = {"B": users, "C": candidates, "T": items, "d": dim}
    floats = users * (2 * candidates + items) * dim
    return Case(
        op="din_attention",
        label=f"{unit} {kind}, d {dim}, B {users}, T {items}, C {candidates}",
        sizes={**shape, "units": list(UNITS[kind]), "activation": kind},
        dtype=torch.float32,
        make=partial(draw, kind, users, items, candidates, dim, training, options.device),
        agree=Close(_formula, rounding=4e-6),  # sums over all pairs round by their number
        contestants=[
            *ours(function, options),
            peers.eager(partial(function, backend="reference")),
            written("pairs", of_pairs),
            written("first layer in parts", of_parts),
            *([] if options.quick else compiled()),
            *peers_din.contestants(kind, UNITS[kind], dim, gradients, options),
        ],
        bytes=4 * floats * (2 if training else 1),
        flops=2 * users * candidates * items * products * (3 if training else 1),
        direction="forward+backward" if training else "forward",
        long=users * candidates * items * (3 if training else 1) > 2**20,
    )


def compiled() -> list[Contestant]:
    """Return the peers through torch.compile."""
    ways = {"pairs": of_pairs, "first layer in parts": of_parts}
    return [written(name, function, compiling=True) for name, function in ways.items()]


def written(name: str, formula: Callable[..., Tensor], compiling: bool = False) -> Contestant:
    """Return a peer that is written in torch, all users as one batch."""

    def prepare(inputs: Inputs) -> Callable[[], Any]:
        function = torch.compile(peers.fresh(formula), dynamic=False) if compiling else formula
        run = partial(gradients if "grad" in inputs else _called, function=function, **inputs)
        run()
        return run

    return Contestant(f"torch, {name}{', compiled' if compiling else ''}", prepare)


def _called(function: Callable[..., Tensor], **inputs: Any) -> Tensor:
    with torch.no_grad():
        return function(**inputs)


def of_pairs(
    q: Tensor, k: Tensor, offsets: Tensor, weights: list[Tensor], biases: list[Tensor], **rest: Any
) -> Tensor:
    """Write all pairs out, as the formula has them."""
    k = k.view(len(q), 1, -1, k.shape[1])
    a, b = torch.broadcast_tensors(q[:, :, None], k)
    x = torch.cat([a, b, a - b, a * b], 3) @ weights[0] + biases[0]
    return _rest(x, k[:, 0], weights, biases, **rest)


def of_parts(
    q: Tensor, k: Tensor, offsets: Tensor, weights: list[Tensor], biases: list[Tensor], **rest: Any
) -> Tensor:
    """Take the first layer in its parts, of q, of k and of their product."""
    of_q, of_k, of_both, product = weights[0].split(q.shape[2])
    k = k.view(len(q), 1, -1, k.shape[1])
    x = (q @ (of_q + of_both) + biases[0])[:, :, None] + k @ (of_k - of_both)
    return _rest(x + (q[:, :, None] * k) @ product, k[:, 0], weights, biases, **rest)


def _rest(
    x: Tensor, k: Tensor, weights: list[Tensor], biases: list[Tensor], activation: str,
    slopes: list[Tensor] | None = None, gains: list[Tensor] | None = None,
    shifts: list[Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """Go on from what enters the first hidden units."""
    for at, (weight, bias) in enumerate(zip(weights[1:], biases[1:], strict=True)):
        if slopes and gains and shifts:
            gate = torch.sigmoid(gains[at] * x + shifts[at])
            x = gate * x + slopes[at] * (1 - gate) * x
        else:
            x = torch.relu(x) if activation == "relu" else torch.sigmoid(x)
        x = x @ weight + bias
    return x[..., 0] @ k


def gradients(
    *, grad: Tensor, function: Callable[..., Any] = livrec_fast.din_attention, **inputs: Any
) -> tuple[Tensor, ...]:
    """Return the gradients of all floating inputs."""
    leaves: list[Tensor] = []

    def leaf(value: Any) -> Any:
        if isinstance(value, list):
            return [leaf(item) for item in value]
        if isinstance(value, Tensor) and value.is_floating_point():
            leaves.append(value.detach().requires_grad_())
            return leaves[-1]
        return value

    out = function(**{name: leaf(value) for name, value in inputs.items()})
    return torch.autograd.grad(out, leaves, grad)


def _formula(inputs: Inputs) -> list[Tensor]:
    """Compute the output or the gradients, of all pairs, in the inputs' dtype."""
    found = gradients(function=of_pairs, **inputs) if "grad" in inputs else of_pairs(**inputs)
    return [found] if isinstance(found, Tensor) else list(found)
