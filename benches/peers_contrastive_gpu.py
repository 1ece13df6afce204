"""The libraries of GPUs that train by cross entropies of rows and keys without all the logits.

They have one direction, so that a symmetric loss is two of them, and no masks. Each rounds in its
own way, which has its own rule, and the row tells the greatest error. The loss of all is held to
1%: it is a mean over rows, in which rounding cancels. Gradients are held in RMS to what a product
in TF32 may be off by (inf-cl), to 5% where they are added up in 16 bits (cut-cross-entropy) or come
from 16-bit logits (Liger), and to 20% where cut-cross-entropy filters: to drop every probability
below its epsilon, 2^-7 for bfloat16, takes 5% of the gradients of 2,048 such rows, and less of
more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from livrec_fast.benchmarking import Absent, Contestant, Options

from .agreement import Close
from .peers import Inputs, Noted, Run, absence, quickest
from .peers_contrastive import Loss, Setting, both_ways, training

TF32 = 2.0**-10  # a product keeps 10 bits of each factor's mantissa
LOSS, ROUNDED, FILTERED = 0.01, 0.05, 0.2  # relative errors
CHUNKS = (1, 4, 16)  # Liger's chunk_mem_const, by trial
Rule = Callable[[Any, Inputs], Any]


def contestants(setting: Setting, options: Options, close: Close) -> Iterator[Contestant | Absent]:
    """Yield inf-cl, cut-cross-entropy, filtering and not, and Liger."""
    exact = 1 if setting.dtype == torch.float32 else 8
    tf32 = partial(close.roughly, limit=4 * TF32 / setting.temperature, of_first=LOSS)
    rough = partial(close.roughly, limit=ROUNDED, of_first=LOSS)
    dropping = partial(close.roughly, limit=FILTERED, of_first=LOSS)
    cut = partial(cut_cross_entropy, setting)
    yield contestant("inf-cl", "inf_cl", setting, options, lambda: inf_cl(setting), tf32)
    for name, epsilon, rule in (
        ("cut-cross-entropy", "high", dropping),
        ("cut-cross-entropy, unfiltered", None, rough),
    ):
        if setting.dtype == torch.float32 and setting.training:
            yield Absent(name, "cut-cross-entropy has gradients of 16-bit rows only")
        else:
            made = partial(cut, epsilon)
            yield contestant(name, "cut_cross_entropy", setting, options, made, rule)
    rule = partial(close, times=8) if exact == 1 else rough
    yield contestant("Liger", "liger_kernel", setting, options, None, rule)


def contestant(
    name: str, module: str, setting: Setting, options: Options,
    make: Callable[[], Loss] | None, rule: Rule,
) -> Contestant | Absent:  # fmt: skip
    """Return a contestant, Liger where nothing makes its loss, or why not."""
    if setting.threshold is not None:
        return Absent(name, f"{name.partition(',')[0]}: without masks")
    if reason := absence(module, name.partition(",")[0], options, cpu_only=False):
        return Absent(name, reason)

    def prepare(inputs: Inputs) -> Run:
        return (
            liger(setting, inputs) if make is None else training(make(), inputs, setting.training)
        )

    return Contestant(name, prepare, agree=rule)


def units(query: Tensor, key: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return unit rows, the queries over the temperature, each rounded once."""
    first = F.normalize(query.float(), dim=1) / temperature
    return first.to(query.dtype), F.normalize(key.float(), dim=1).to(key.dtype)


def inf_cl(setting: Setting) -> Loss:
    """Return inf-cl's loss of one device."""
    from inf_cl import cal_flash_loss

    def loss(query: Tensor, key: Tensor) -> Tensor:
        given = units(query, key, setting.temperature)
        found: Tensor = cal_flash_loss(*given, head_dim=min(256, query.shape[1]))
        return found.mean()

    return both_ways(loss, setting.symmetric)


def cut_cross_entropy(setting: Setting, epsilon: str | None) -> Loss:
    """Return cut-cross-entropy's loss; gradients below an epsilon are dropped where it has one."""
    from cut_cross_entropy import linear_cross_entropy

    def loss(query: Tensor, key: Tensor) -> Tensor:
        own = torch.arange(len(query), device=query.device)
        given = units(query, key, setting.temperature)
        found: Tensor = linear_cross_entropy(*given, own, filter_eps=epsilon)
        return found

    return both_ways(loss, setting.symmetric)


def liger(setting: Setting, inputs: Inputs) -> Run:
    """Prepare Liger's fused linear cross entropy, its chunks of the quickest size."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    def prepared(chunk: int) -> Run:
        def loss(query: Tensor, key: Tensor) -> Tensor:
            own = torch.arange(len(query), device=query.device)
            found: Tensor = liger_fused_linear_cross_entropy(
                *units(query, key, setting.temperature), own,
                accum_dtype=torch.float32, chunk_mem_const=chunk,
            )  # fmt: skip
            return found

        return training(both_ways(loss, setting.symmetric), inputs, setting.training)

    ways = {f"chunk_mem_const {chunk}": prepared(chunk) for chunk in CHUNKS}
    note = quickest("cuda", ways)
    return Noted(ways[note], note)
