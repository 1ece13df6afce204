"""What else attends over item features: keys and values made of them, or queries turned to them.

"products" makes keys and values by two matrix products, "absorbed" turns queries to the features
and what is averaged into values, both with torch's attention in between. Histories of unequal
length are padded, with a mask, before the clock starts, or attended to user by user, as a trial
finds quicker.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from livrec_fast.benchmarking import Contestant, Options

from .peers import Inputs, Noted, Run, fresh
from .peers_target_attention import (
    BY_USER,
    HEADS_FIRST,
    HEADS_LAST,
    PADDED,
    Laid,
    attend,
    finish,
    quickest_attention,
    with_backend,
)

LEAVES = ("q", "x", "w_k", "w_v")
Lengths = tuple[int, ...] | None


def products(
    q: Tensor, x: Tensor, w_k: Tensor, w_v: Tensor, mask: Tensor | None, lengths: Lengths,
    copied: bool,
) -> Tensor:  # fmt: skip
    """Make keys and values, then attend. copied: to heads first, not just seen so."""
    k, v = ((x @ w.flatten(1)).unflatten(-1, w.shape[1:]).transpose(-3, -2) for w in (w_k, w_v))
    if copied:
        k, v = k.contiguous(), v.contiguous()
    if lengths is not None:
        return attend(Laid(q, k.split(lengths, 1), v.split(lengths, 1), None, [], list))
    return attend(Laid(q, k, v, mask, [], list))


def absorbed(
    q: Tensor, x: Tensor, w_k: Tensor, w_v: Tensor, mask: Tensor | None, lengths: Lengths,
    copied: bool,
) -> Tensor:  # fmt: skip
    """Ask for features with all heads' queries as one head's, then turn averages into values."""
    asking = torch.einsum("bchd,Dhd->bhcD", q, w_k).flatten(1, 2)
    scale = q.shape[3] ** -0.5

    def average(some: Tensor, rows: Tensor) -> Tensor:
        rows = rows[:, None]
        return F.scaled_dot_product_attention(
            some[:, None], rows, rows, attn_mask=mask, scale=scale
        )[:, 0]

    if lengths is None:
        mixed = average(asking, x)
    else:
        users = zip(asking.split(1), x.split(lengths), strict=True)
        mixed = torch.cat([average(some, rows[None]) for some, rows in users])
    return torch.einsum("bhcD,Dhd->bchd", mixed.unflatten(1, (q.shape[2], -1)), w_v)


def running(layout: str, inputs: Inputs, function: Callable[..., Tensor]) -> Run:
    """Return a run over features in a layout; with a gradient, forward and backward."""
    training, lengths = "grad" in inputs, inputs["offsets"].diff()
    x, mask, restore = inputs["x"], None, list
    each = tuple(lengths.tolist())
    if layout == PADDED:
        x = torch.nn.utils.rnn.pad_sequence(x.split(each), batch_first=True)
        held = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
        mask = held[:, None, None]

        def restore(found: Any) -> list[Tensor]:
            return [grad[held] if at == 1 else grad for at, grad in enumerate(found)]

    elif layout != BY_USER:
        x = x.unflatten(0, (len(each), -1))

        def restore(found: Any) -> list[Tensor]:
            return [grad.flatten(0, 1) if at == 1 else grad for at, grad in enumerate(found)]

    given = {**inputs, "x": x}
    leaves = [given[name].detach().clone().requires_grad_(training) for name in LEAVES]
    rest = mask, each if layout == BY_USER else None, layout == HEADS_FIRST

    def run() -> Any:
        out = function(*leaves, *rest)
        if not training:
            return out, lambda found: found
        return list(torch.autograd.grad(out, leaves, inputs["grad"])), restore

    return run


def contestants(options: Options) -> Iterator[Contestant]:
    """Yield both ways, eager and, unless quick, compiled."""
    for name, function in (("products", products), ("absorbed", absorbed)):
        for compiling in (False,) if options.quick else (False, True):
            prepare = partial(prepared, options, function, compiling)
            title = f"{name} + SDPA{', compiled' if compiling else ''}"
            yield Contestant(title, prepare, finish=finish)


def prepared(
    options: Options, function: Callable[..., Tensor], compiling: bool, inputs: Inputs
) -> Run:
    """Prepare a way, with the attention and the layout that are quickest where nothing compiles."""
    alike = len(set(inputs["offsets"].diff().tolist())) == 1
    layouts = [HEADS_LAST] if alike else [PADDED, BY_USER]
    if alike and function is products:
        layouts.append(HEADS_FIRST)
    ways = {layout: running(layout, inputs, function) for layout in layouts}
    name, layout, note = quickest_attention(options, ways)
    if not compiling:
        return Noted(with_backend(name, ways[layout]), note)
    compiled = torch.compile(fresh(function), dynamic=False)
    run = with_backend(name, running(layout, inputs, compiled))
    run()
    return Noted(run, note)
