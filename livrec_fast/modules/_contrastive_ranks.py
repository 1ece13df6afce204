"""Rows of a contrastive loss to all ranks, and their gradients back; means over all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .._checks import FLOATS
from ..reference._formula import wide_dtype
from ._eager import eager
from ._key_rows import KeyRows

_DTYPES = (*FLOATS, torch.int64)
_EXTRA = "extra_"
NAMES = ("query", *KeyRows._fields, *(_EXTRA + name for name in KeyRows._fields))


class Group:
    """The ranks of a process group, or one alone."""

    def __init__(self, group: Any, size: int, rank: int):
        self._group, self.size, self.rank = group, size, rank

    @classmethod
    def of(cls, group: Any) -> Group:
        """Find the ranks; where torch.distributed has not been started, this one is alone."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls(None, 1, 0)
        return cls(group, dist.get_world_size(group), dist.get_rank(group))

    def gather(self, mine: Tensor) -> list[Tensor]:
        """Return what each rank has; all have the same shape."""
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(parts, mine, group=self._group)
        return parts

    def gather_bytes(self, mine: Tensor, counts: Sequence[int]) -> list[Tensor]:
        """Return the bytes of each rank, of which there are `counts`."""
        padded = mine.new_zeros(max(counts))
        padded[: len(mine)] = mine
        return [part[:count] for part, count in zip(self.gather(padded), counts, strict=True)]

    def send_bytes(self, parts: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
        """Send each rank its part; return what each has sent here, of which there are `counts`."""
        into = parts[0].new_empty(sum(counts))
        sizes = [len(part) for part in parts]
        dist.all_to_all_single(into, torch.cat(list(parts)), list(counts), sizes, self._group)
        return list(into.split(list(counts)))


class Layout(NamedTuple):
    """What travels: rows by rank and tensor, the width of a row, dtypes, and who has gradients."""

    rows: list[list[int]]
    shapes: list[tuple[int, ...]]
    dtypes: list[torch.dtype]
    wanted: list[bool]

    def sizes(self, rank: int, only_wanted: bool = False) -> list[int]:
        """Return the bytes of each tensor of a rank, or of each that has a gradient."""
        return [
            rows * shape.numel() * dtype.itemsize
            for rows, shape, dtype, wanted in zip(
                self.rows[rank], map(torch.Size, self.shapes), self.dtypes, self.wanted, strict=True
            )
            if wanted or not only_wanted
        ]


class Gathered(NamedTuple):
    """What the other ranks have, in their order.

    keys, queries: of their valid rows, of which `before` stand before this rank's.
    extra: their further keys, if they have any.
    temperature: the one given; its gradient will be the same on every rank.
    """

    keys: KeyRows
    queries: Tensor | None
    extra: list[KeyRows]
    before: int
    temperature: Tensor


@eager
def gather(
    group: Group, own: KeyRows, queries: Tensor | None, extra: Sequence[KeyRows],
    temperature: Tensor, queries_are_pair_vectors: bool = False,
) -> Gathered:  # fmt: skip
    """Get the rows of the other ranks; each may have its own number of them.

    Two collectives: of what each rank brings, and of all tensors together. The backward pass has
    one, which sends each rank the gradients of its rows; they are added up in the order of the
    ranks. The gradient of the temperature becomes the mean of the ranks', on each of them.

    Raises: ValueError, on every rank, where the ranks bring different things.
    """
    mine = own.known()
    if queries is not None:
        mine["query"] = queries
        if queries_are_pair_vectors:  # they need not travel twice
            del mine["pair_vectors"]
    for rows in extra:
        if len(rows.keys):  # where a rank has none, it need not say what it would know of them
            mine |= {f"{_EXTRA}{name}": value for name, value in rows.known().items()}
    mine, layout = _agree(group, mine, temperature)
    *others, temperature = _Gather.apply(group, layout, *mine.values(), temperature)
    found = dict(zip(mine, others, strict=True))
    before = sum(rows[list(mine).index("keys")] for rows in layout.rows[: group.rank])
    far = {k.removeprefix(_EXTRA): found.pop(k) for k in list(found) if k.startswith(_EXTRA)}
    queries = found.pop("query", None)
    if queries is not None and queries_are_pair_vectors:
        found["pair_vectors"] = queries.detach()
    return Gathered(KeyRows(**found), queries, [KeyRows(**far)] if far else [], before, temperature)


def _agree(
    group: Group, mine: dict[str, Tensor], temperature: Tensor
) -> tuple[dict[str, Tensor], Layout]:
    """Tell each other what is brought: all the same, but for the number of rows.

    Extra keys that only other ranks have are added as none.
    """
    alive = torch.is_grad_enabled()

    def described(tensor: Tensor | None) -> list[int]:
        if tensor is None:
            return [0, 0, 0, 0]
        width = torch.Size(tensor.shape[1:]).numel()
        grad = alive and tensor.requires_grad
        return [len(tensor), width, _DTYPES.index(tensor.dtype), int(grad)]

    named = {name: mine.get(name) for name in NAMES} | {"temperature": temperature[None]}
    header = torch.tensor([described(tensor) for tensor in named.values()])
    every = torch.stack(group.gather(header.to(temperature.device))).cpu()  # [ranks, names, 4]
    has_extra = every[:, NAMES.index(f"{_EXTRA}keys"), 0] > 0
    everything = {}
    rows, dtypes, wanted = [], [], []
    for at, name in enumerate(named):
        told = every[has_extra if name.startswith(_EXTRA) else slice(None), at, 1:]
        if len(told.unique(dim=0)) > 1:
            raise ValueError(_difference(name, told.tolist()))
        if not len(told) or not told[0, 0] or name == "temperature":
            continue
        width, code, grad = told[0].tolist()
        if (tensor := named[name]) is None:
            shape = (0, width) if name.endswith(("keys", "vectors")) else (0,)
            tensor = temperature.new_empty(shape, dtype=_DTYPES[code])
            tensor.requires_grad_(bool(grad))
        everything[name] = tensor
        rows.append(every[:, at, 0].tolist())
        dtypes.append(_DTYPES[code])
        wanted.append(bool(grad))
    shapes = [tuple(tensor.shape[1:]) for tensor in everything.values()]
    return everything, Layout([list(r) for r in zip(*rows, strict=True)], shapes, dtypes, wanted)


def _difference(name: str, told: list[list[int]]) -> str:
    each = [
        f"width {width} of {str(_DTYPES[code])[6:]}{', requires_grad' if grad else ''}"
        if width
        else "nothing"
        for width, code, grad in told
    ]
    return f"{name}: must be given alike on every rank, got {'; '.join(each)}"


class _Gather(torch.autograd.Function):
    """Rows of the other ranks; the gradients go back to where the rows came from."""

    @staticmethod
    def forward(ctx: Any, group: Group, layout: Layout, *tensors: Tensor) -> tuple[Tensor, ...]:
        *mine, temperature = tensors
        ctx.group, ctx.layout = group, layout
        sizes = [layout.sizes(rank) for rank in range(group.size)]
        parts = group.gather_bytes(_packed(mine), [sum(size) for size in sizes])
        apart = [part.split(size) for part, size in zip(parts, sizes, strict=True)]
        del apart[group.rank]
        found = [
            torch.cat(pieces).view(dtype).view(-1, *shape)
            for pieces, dtype, shape in zip(
                zip(*apart, strict=True), layout.dtypes, layout.shapes, strict=True
            )
        ]
        ctx.mark_non_differentiable(
            *(rows for rows, wanted in zip(found, layout.wanted, strict=True) if not wanted)
        )
        return *found, temperature.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        group, layout = ctx.group, ctx.layout
        *rows, temperature = grads
        wanted = [at for at, wants in enumerate(layout.wanted) if wants]
        parts = [temperature.new_empty(0, dtype=torch.uint8)] * group.size
        others = [rank for rank in range(group.size) if rank != group.rank]
        split = [rows[at].split([layout.rows[rank][at] for rank in others]) for at in wanted]
        for number, rank in enumerate(others):
            parts[rank] = _packed([*(pieces[number] for pieces in split), temperature[None]])
        sizes = [*layout.sizes(group.rank, only_wanted=True), temperature.dtype.itemsize]
        counts = [0 if rank == group.rank else sum(sizes) for rank in range(group.size)]
        received = group.send_bytes(parts, counts)
        apart = [received[rank].split(sizes) for rank in others]
        found: list[Tensor | None] = [None] * len(layout.wanted)
        for number, at in enumerate(wanted):
            dtype, shape = layout.dtypes[at], layout.shapes[at]
            pieces = [_unpacked(part[number], dtype, shape) for part in apart]
            found[at] = _sum(pieces, wide_dtype(dtype)).to(dtype)
        every = [_unpacked(part[-1], temperature.dtype, ()) for part in apart]
        every.insert(group.rank, temperature[None])
        mean = _sum(every, torch.float64)[0] / group.size
        return None, None, *found, mean.to(temperature.dtype)


def _packed(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.detach().contiguous().view(-1).view(torch.uint8) for t in tensors])


def _unpacked(part: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    return part.clone().view(dtype).view(-1, *shape)  # the part may begin anywhere: no view of it


def _sum(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Add up in the order given."""
    total = tensors[0].to(dtype)
    for tensor in tensors[1:]:
        total = total + tensor
    return total


@eager
def reduce(
    group: Group, losses: Tensor, weights: Tensor | None, valid: Tensor | None, reduction: str
) -> Tensor:
    """Reduce the rows' losses of all ranks: the same value on each, and this rank's gradient.

    The gradient is `size` times that of this rank's rows: its mean over the ranks is the whole.
    """
    if weights is None:
        weights = torch.ones_like(losses)
    if valid is not None:
        weights = weights.masked_fill(~valid, 0)
    weighted = losses * weights
    if reduction == "none":
        return weighted
    mine = torch.stack([weighted.sum(dtype=torch.float64), weights.sum(dtype=torch.float64)])
    total, weight = _sum(group.gather(mine.detach()), torch.float64).unbind()
    share = mine[0]
    if reduction == "mean":
        weight = weight.masked_fill(weight == 0, 1)
        total = total / weight
        share = (share - total * mine[1]) / weight  # as a mean's own gradient in its weights is
    share = group.size * share
    return (total + (share - share.detach())).to(losses.dtype)
