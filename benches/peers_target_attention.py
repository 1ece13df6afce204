"""What else attends from candidates to long histories: torch's attentions, batched or user by user.

Peers get keys and values as suits them before the clock starts: heads first or last, and histories
of unequal length padded with a mask, or cut up by user. Which attention of torch's and which layout
are quickest is found by trial.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from livrec_fast.benchmarking import Absent, Contestant, Options
from livrec_fast.benchmarking._clock import clock_of

from .peers import Inputs, Noted, Run
from .peers_attention import _ATTENTIONS

HEADS_LAST, HEADS_FIRST, PADDED, BY_USER = "heads last", "heads first", "padded", "user by user"


class Laid(NamedTuple):
    """Keys and values as a layout has them, [B, H, T, d] or per user, and how to get back."""

    q: Tensor
    k: Any
    v: Any
    mask: Tensor | None
    leaves: list[Tensor]
    restore: Callable[[list[Tensor]], list[Tensor]]


def laid_out(layout: str, inputs: Inputs) -> Laid:
    """Bring keys and values into a layout, as leaves where gradients are wanted."""
    training, lengths = "grad" in inputs, inputs["offsets"].diff()
    q = inputs["q"].detach().clone().requires_grad_(training)
    pair = [inputs["k"], inputs["v"]]
    users = len(q)
    if layout == BY_USER:
        leaves = [x.detach().clone().requires_grad_(training) for x in pair]
        k, v = (x.transpose(0, 1).split(lengths.tolist(), 1) for x in leaves)
        return Laid(q, k, v, None, [q, *leaves], lambda found: found)
    if layout == PADDED:
        split = [x.split(lengths.tolist()) for x in pair]
        padded = [torch.nn.utils.rnn.pad_sequence(x, batch_first=True) for x in split]
        held = torch.arange(padded[0].shape[1], device=q.device) < lengths[:, None]

        def cut(found: list[Tensor]) -> list[Tensor]:
            return [found[0], *(x.transpose(1, 2)[held] for x in found[1:])]

        leaves = [x.transpose(1, 2).contiguous().requires_grad_(training) for x in padded]
        return Laid(q, *leaves, held[:, None, None], [q, *leaves], cut)
    batched = [x.detach().clone().unflatten(0, (users, -1)) for x in pair]
    if layout == HEADS_LAST:
        leaves = [x.requires_grad_(training) for x in batched]
        k, v = (x.transpose(1, 2) for x in leaves)
        return Laid(
            q, k, v, None, [q, *leaves],
            lambda found: [found[0], *(x.flatten(0, 1) for x in found[1:])],
        )  # fmt: skip
    leaves = [x.transpose(1, 2).contiguous().requires_grad_(training) for x in batched]
    return Laid(
        q, *leaves, None, [q, *leaves],
        lambda found: [found[0], *(x.transpose(1, 2).flatten(0, 1) for x in found[1:])],
    )  # fmt: skip


def attend(laid: Laid) -> Tensor:
    """Attend with torch's attention: [B, C, H, dv]."""
    heads = laid.q.transpose(1, 2)
    if isinstance(laid.k, Tensor):
        out = F.scaled_dot_product_attention(heads, laid.k, laid.v, attn_mask=laid.mask)
        return out.transpose(1, 2)
    users = zip(heads, laid.k, laid.v, strict=True)
    each = [F.scaled_dot_product_attention(*(x[None] for x in user))[0] for user in users]
    return torch.stack(each).transpose(1, 2)


def running(layout: str, inputs: Inputs, function: Callable[[Laid], Tensor] = attend) -> Run:
    """Return a run; with a gradient among the inputs, forward and backward."""
    laid = laid_out(layout, inputs)

    def run() -> Any:
        out = function(laid)
        if "grad" not in inputs:
            return out, lambda found: found
        return list(torch.autograd.grad(out, laid.leaves, inputs["grad"])), laid.restore

    return run


def finish(output: tuple[Any, Callable[[Any], Any]]) -> Any:
    """Bring results to our layout, untimed."""
    found, restore = output
    return restore(found)


def sdpa(options: Options) -> Callable[[Inputs], Run]:
    """Return what prepares torch's attention, the quickest by trial."""

    def prepare(inputs: Inputs) -> Run:
        alike = len(set(inputs["offsets"].diff().tolist())) == 1
        layouts = (HEADS_LAST, HEADS_FIRST) if alike else (PADDED, BY_USER)
        ways = {layout: running(layout, inputs) for layout in layouts}
        name, layout, note = quickest_attention(options, ways)
        return Noted(with_backend(name, ways[layout]), note)

    return prepare


def quickest_attention(options: Options, ways: Mapping[str, Run]) -> tuple[str, str, str]:
    """Return the attention of torch's and the layout that are quickest, and both in words."""
    clock, times = clock_of(options.device), {}
    for layout, way in ways.items():
        for name in _ATTENTIONS[options.device]:
            run = with_backend(name, way)
            try:
                run()
            except RuntimeError:  # this attention takes no such inputs here
                continue
            times[name, layout] = min(clock(run) for _ in range(3))
    name, layout = min(times, key=times.__getitem__)
    return name, layout, f"{name.lower()}, {layout}"


def with_backend(name: str, run: Run) -> Run:
    """Return a run that uses one attention of torch's."""

    def chosen() -> Any:
        with sdpa_kernel(SDPBackend.__members__[name]):
            return run()

    return chosen


def flex(inputs: Inputs) -> Run:
    """Prepare FlexAttention over batched histories; those of unequal length are masked."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, lengths = inputs["q"], inputs["offsets"].diff()
    alike, block = len(set(lengths.tolist())) == 1, None
    if not alike:

        def inside(b: Tensor, h: Tensor, c: Tensor, t: Tensor) -> Tensor:
            return t < lengths[b]

        sizes = len(q), None, q.shape[1], int(lengths.max())
        block = create_block_mask(inside, *sizes, device=q.device)
    compiled = torch.compile(flex_attention, dynamic=False)

    def attended(laid: Laid) -> Tensor:
        out: Tensor = compiled(laid.q.transpose(1, 2), laid.k, laid.v, block_mask=block)
        return out.transpose(1, 2)

    layout = HEADS_LAST if alike else PADDED
    run = running(layout, inputs, attended)
    run()
    return Noted(run, layout)


def contestants(
    options: Options, training: bool, rough: Callable[[Any, Inputs], None]
) -> Iterator[Contestant | Absent]:
    """Yield all peers of a case; FlexAttention not if quick, nor with gradients on a CPU.

    rough: the rule of peers that err more than the formula, FlexAttention in float32 and gradients
        of SDPA in 16 bits.
    """
    yield Contestant("SDPA", sdpa(options), finish=finish, agree=rough)
    if training and options.device == "cpu":
        yield Absent("FlexAttention", "FlexAttention has no gradients on a CPU")
    elif not options.quick:
        yield Contestant("FlexAttention", flex, finish=finish, agree=rough)
