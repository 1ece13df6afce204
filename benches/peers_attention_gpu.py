"""The attentions of GPUs that are no choice of torch's `scaled_dot_product_attention`.

Both take 16-bit rows alone. `varlen_attn` reads jagged rows as they come. ffpa-attn is for heads of
more than 256, which ours does not have: below, it calls torch's attention unless told not to. It is
told so here, and takes heads of 64 at the least.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from livrec_fast.benchmarking import Absent, Contestant, Options

from .peers import Inputs, Noted, Run, absence, quickest
from .peers_target_attention import (
    HEADS_FIRST,
    HEADS_LAST,
    PADDED,
    Laid,
    finish,
    running,
)

LEAST_HEAD = 64  # of ffpa-attn
OWN_KERNELS = {"FFPA_TRITON_ALLOW_SMALL_D": "1", "FFPA_FORCE_NO_SDPA_FALLBACK": "1"}
Rule = Callable[[Any, Inputs], Any]


def contestants(
    options: Options, dtype: torch.dtype, dim: int, rough: Rule
) -> Iterator[Contestant | Absent]:
    """Yield both, or why not."""
    rounded = dtype in (torch.float16, torch.bfloat16)
    reason = None if rounded else "takes 16-bit rows only"
    if options.device != "cuda":
        reason = "runs on a GPU only"
    elif reason is None and find_spec("torch.nn.attention.varlen") is None:
        reason = "this torch has none"
    if reason is not None:
        yield Absent("varlen_attn", f"varlen_attn: {reason}")
    else:
        yield Contestant("varlen_attn", varlen, agree=rough)
    reason = absence("ffpa_attn", "ffpa-attn", options, cpu_only=False)
    if reason is None and not (rounded and dim >= LEAST_HEAD):
        reason = f"ffpa-attn takes 16-bit rows and heads of {LEAST_HEAD} or more"
    if reason is not None:
        yield Absent("ffpa-attn", reason)
    else:
        yield Contestant("ffpa-attn", partial(ffpa, options), finish=finish, agree=rough)


def varlen(inputs: Inputs) -> Run:
    """Prepare torch's attention of jagged rows, whose offsets take 32 bits."""
    from torch.nn.attention.varlen import varlen_attn

    training, offsets = "grad" in inputs, inputs["offsets"].int()
    users, candidates = inputs["q"].shape[:2]
    longest = int(offsets.diff().max())
    starts = torch.arange(users + 1, dtype=torch.int32, device=offsets.device) * candidates
    leaves = [inputs[n].detach().clone().requires_grad_(training) for n in ("q", "k", "v")]

    def run() -> Any:
        q, k, v = leaves
        out = varlen_attn(q.flatten(0, 1), k, v, starts, offsets, candidates, longest)
        out = out.unflatten(0, q.shape[:2])
        return list(torch.autograd.grad(out, leaves, inputs["grad"])) if training else out

    return run


def ffpa(options: Options, inputs: Inputs) -> Run:
    """Prepare ffpa-attn's own Triton kernels, autotuned; a mask where lengths differ."""
    from ffpa_attn import TritonBackend, ffpa_attn_func

    os.environ.update(OWN_KERNELS)
    sides = {
        "forward_backend": TritonBackend(forward=True, autotune=True),
        "backward_backend": TritonBackend(backward=True, autotune=True),
    }

    def attended(laid: Laid) -> Tensor:
        out: Tensor = ffpa_attn_func(laid.q.transpose(1, 2), laid.k, laid.v, laid.mask, **sides)
        return out.transpose(1, 2)

    alike = len(set(inputs["offsets"].diff().tolist())) == 1
    layouts = (HEADS_LAST, HEADS_FIRST) if alike else (PADDED,)
    ways = {layout: running(layout, inputs, attended) for layout in layouts}
    note = quickest(options.device, ways)
    return Noted(ways[note], note)
