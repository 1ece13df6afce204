"""What else one would attend to codes with: embeddings or bags of tables, then torch's attention.

Peers keep the tables as suits them, and histories of unequal length padded or not, before the clock
starts; from codes as they are stored to the output, or the gradients, all is timed. Which attention
of torch's, which tables and which layout are quickest is found by trial.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from livrec_fast.benchmarking import Absent, Contestant, Options
from livrec_fast.benchmarking._clock import clock_of

from .peers import Inputs, Noted, Run, fresh

EMBEDDING, ONE_BAG, TWO_BAGS = "embedding", "k and v in one bag", "k and v in a bag each"
BATCH, PADDED, BY_USER = "", "padded", "user by user"
_ATTENTIONS = {
    "cpu": ("FLASH_ATTENTION", "MATH"),
    "cuda": ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH"),
}


class Way(NamedTuple):
    """One way to compute it: how tables are kept, how histories are laid out, whose attention."""

    tables: str
    layout: str
    attention: str

    @property
    def note(self) -> str:
        """The way in words."""
        kept = "" if self.tables == EMBEDDING else self.tables
        return ", ".join(filter(None, [self.attention.lower(), self.layout, kept]))


def tables_of(kept: str, inputs: Inputs) -> list[Tensor]:
    """Return the tables of keys and values as a way keeps them: each, in two, or in one."""
    keys, values = ([t.flatten(1) for t in inputs[f"{n}_tables"]] for n in ("key", "value"))
    if kept == EMBEDDING:
        return [*keys, *values]
    both = [torch.cat(keys), torch.cat(values)]
    return both if kept == TWO_BAGS else [torch.cat(both, 1)]


def gradients_of(kept: str, found: Sequence[Tensor], inputs: Inputs) -> list[Tensor]:
    """Return gradients of q and of all tables from those of what a way keeps."""
    grad_q, grads = found[0], list(found[1:])
    keys, values = inputs["key_tables"], inputs["value_tables"]
    if kept == ONE_BAG:
        grads = list(grads[0].split([t[0].flatten(1)[0].numel() for t in (keys, values)], 1))
    if kept != EMBEDDING:
        grads = [part for grad in grads for part in grad.split([len(t) for t in keys])]
    tables = [*keys, *values]
    return [grad_q, *(grad.reshape(t.shape) for grad, t in zip(grads, tables, strict=True))]


class Laid(NamedTuple):
    """Histories as a layout has them: codes, where each field's rows start, and the rest."""

    codes: Tensor
    starts: Tensor
    mask: Tensor | None
    lengths: tuple[int, ...] | None


def laid_out(layout: str, inputs: Inputs) -> Laid:
    """Bring histories into a layout."""
    codes, offsets = inputs["codes"], inputs["offsets"]
    sizes = torch.tensor([0, *(len(table) for table in inputs["key_tables"][:-1])])
    starts, lengths = sizes.cumsum(0).to(codes.device), offsets.diff()
    if layout == BATCH:
        return Laid(codes, starts, None, None)
    if layout == BY_USER:
        return Laid(codes, starts, None, tuple(lengths.tolist()))
    padded = torch.nn.utils.rnn.pad_sequence(codes.split(lengths.tolist()), batch_first=True)
    mask = torch.arange(padded.shape[1], device=codes.device) < lengths[:, None]
    return Laid(padded.flatten(0, 1), starts, mask[:, None, None], None)


def decoded(q: Tensor, tables: Sequence[Tensor], codes: Tensor, starts: Tensor) -> list[Tensor]:
    """Return keys and values, [T, H d] each, from tables as `tables_of` has them."""
    if len(tables) > 2:
        half, columns = len(tables) // 2, codes.long().T
        halves = tables[:half], tables[half:]
        return [sum(map(F.embedding, columns, part)) for part in halves]  # type: ignore[misc]
    rows = codes + starts
    bags = [F.embedding_bag(rows, table, mode="sum") for table in tables]
    width = q.shape[2] * q.shape[3]
    return bags if len(bags) == 2 else [bags[0][:, :width], bags[0][:, width:]]


def attend(
    q: Tensor,
    tables: Sequence[Tensor],
    codes: Tensor,
    starts: Tensor,
    mask: Tensor | None,
    lengths: tuple[int, ...] | None,
) -> Tensor:
    """Decode, then attend: all users at once, or with `lengths` one after the other."""
    k, v = (x.unflatten(1, (q.shape[2], -1)) for x in decoded(q, tables, codes, starts))
    if lengths is not None:
        users = zip(q, k.split(lengths), v.split(lengths), strict=True)
        heads = ([x.transpose(0, 1)[None] for x in user] for user in users)
        each = [F.scaled_dot_product_attention(*user)[0] for user in heads]
        return torch.stack(each).transpose(1, 2)
    k, v = (x.unflatten(0, (len(q), -1)).transpose(1, 2) for x in (k, v))
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask)
    return out.transpose(1, 2)


def running(way: Way, inputs: Inputs, function: Callable[..., Tensor] = attend) -> Run:
    """Return a run of `way`; with a gradient among the inputs, forward and backward."""
    training, laid = "grad" in inputs, laid_out(way.layout, inputs)
    leaves = [inputs["q"], *tables_of(way.tables, inputs)]
    leaves = [leaf.detach().clone().requires_grad_(training) for leaf in leaves]

    def run() -> tuple[Any, Callable[[Any], Any]]:
        with sdpa_kernel(SDPBackend.__members__[way.attention]):
            out = function(leaves[0], leaves[1:], *laid)
            if not training:
                return out, lambda found: found
            found = torch.autograd.grad(out, leaves, inputs["grad"])
        return found, lambda found: gradients_of(way.tables, found, inputs)

    return run


class Trials:
    """The quickest ways of one case, found once and shared by its contestants."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._found: dict[str, Way] = {}

    def embedding(self, inputs: Inputs) -> Way:
        """Return the quickest way with embeddings: attention and layout as for bags."""
        return self.bag(inputs)._replace(tables=EMBEDDING)

    def bag(self, inputs: Inputs) -> Way:
        """Return the quickest way with bags: first attention and layout, then how many bags."""
        if "bag" not in self._found:
            alike = len(set(inputs["offsets"].diff().tolist())) == 1
            layouts = (BATCH,) if alike else (PADDED, BY_USER)
            names = _ATTENTIONS[self._options.device]
            ways = [Way(ONE_BAG, layout, name) for layout in layouts for name in names]
            best, seconds = self._quickest(ways, inputs)
            other, more = self._quickest([best._replace(tables=TWO_BAGS)], inputs)
            self._found["bag"] = best if seconds <= more else other
        return self._found["bag"]

    def _quickest(self, ways: Sequence[Way], inputs: Inputs) -> tuple[Way, float]:
        clock, times = clock_of(self._options.device), {}
        for way in ways:
            run = running(way, inputs)
            try:
                first = clock(run)
            except RuntimeError:  # this attention takes no such inputs here
                continue
            more = 3 if first < 0.2 else int(first < 1.0)  # short ones vary
            times[way] = min([first, *(clock(run) for _ in range(more))])
        best = min(times, key=times.__getitem__)
        return best, times[best]


def contestants(
    options: Options, training: bool, rough: Callable[[Any, Inputs], None]
) -> Iterator[Contestant | Absent]:
    """Yield all peers of a case; those that compile not if quick: that takes seconds.

    rough: the rule of FlexAttention, whose float32 errs more than the formula's.
    """
    trials = Trials(options)
    choices = {"embedding + SDPA": trials.embedding, "embedding_bag + SDPA": trials.bag}
    for name, choose in choices.items():
        yield _contestant(name, choose, compiling=False)
    if options.quick:
        return
    for name, choose in choices.items():
        yield _contestant(f"{name}, compiled", choose, compiling=True)
    if training and options.device == "cpu":
        yield Absent("embedding_bag + FlexAttention", "FlexAttention has no gradients on a CPU")
    else:
        name = "embedding_bag + FlexAttention"
        yield Contestant(name, flex, finish=_finish, agree=rough)


def _contestant(name: str, choose: Callable[[Inputs], Way], compiling: bool) -> Contestant:
    def prepare(inputs: Inputs) -> Run:
        way = choose(inputs)
        if not compiling:
            return Noted(running(way, inputs), way.note)
        run = running(way, inputs, torch.compile(fresh(attend), dynamic=False))
        run()
        return Noted(run, way.note)

    return Contestant(name, prepare, finish=_finish)


def _finish(output: tuple[Any, Callable[[Any], Any]]) -> Any:
    found, restore = output
    return restore(found)


def flex(inputs: Inputs) -> Run:
    """Prepare FlexAttention behind a bag; histories of unequal length are padded and masked."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, lengths = inputs["q"], inputs["offsets"].diff()
    alike = len(set(lengths.tolist())) == 1
    way = Way(ONE_BAG, BATCH if alike else PADDED, "MATH")
    block = None
    if not alike:
        sizes = len(q), None, q.shape[1], int(lengths.max())

        def inside(b: Tensor, h: Tensor, c: Tensor, t: Tensor) -> Tensor:
            return t < lengths[b]

        block = create_block_mask(inside, *sizes, device=q.device)

    def attended(
        q: Tensor, tables: list[Tensor], codes: Tensor, starts: Tensor, *rest: Any
    ) -> Tensor:
        pair = (x.unflatten(1, (q.shape[2], -1)) for x in decoded(q, tables, codes, starts))
        k, v = (x.unflatten(0, (len(q), -1)).transpose(1, 2) for x in pair)
        out: Tensor = flex_attention(q.transpose(1, 2), k, v, block_mask=block)
        return out.transpose(1, 2)

    run = running(way, inputs, torch.compile(attended, dynamic=False))
    run()
    return Noted(run, way.layout)
