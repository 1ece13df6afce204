"""What else one would embed prefixes with: torch's indexing and bags, FBGEMM's tables, Liger.

Peers take codes that are all known, as the cases have them, and do what ours do: from codes to
vectors, keys included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from livrec_fast.benchmarking import Absent, Contestant, Options

from .peers import Inputs, Noted, Run, absence, quickest

Lookup = Callable[[], Tensor]
_TBE = "FBGEMM TBE"


def table_rows(codes: Tensor, levels: Sequence[int], rows: Sequence[int]) -> list[Tensor]:
    """Return the row of each level's table, by modulo: the formula, for known codes."""
    key = torch.zeros(len(codes), dtype=torch.int64, device=codes.device)
    found = []
    for column, (size, height) in enumerate(zip(levels, rows, strict=True)):
        key = key * size + codes[:, column]
        found.append(key % height)
    return found


def indexed(
    codes: Tensor, tables: Sequence[Tensor], levels: Sequence[int], sparse: bool = False
) -> Tensor:
    """Look up with torch's own indexing."""
    rows = table_rows(codes, levels, [len(table) for table in tables])
    pairs = zip(rows, tables, strict=True)
    return torch.cat([F.embedding(at, table, sparse=sparse) for at, table in pairs], 1)


def bags(codes: Tensor, tables: Sequence[Tensor], levels: Sequence[int], sparse: bool) -> Tensor:
    """Look up with nn.EmbeddingBag's function: bags of one, whose kernel is quicker than F's."""
    rows = table_rows(codes, levels, [len(table) for table in tables])
    ends = torch.arange(len(codes), device=codes.device)
    pairs = zip(rows, tables, strict=True)
    return torch.cat([F.embedding_bag(r, t, ends, mode="sum", sparse=sparse) for r, t in pairs], 1)


def liger_lookup(codes: Tensor, tables: Sequence[Tensor], levels: Sequence[int]) -> Tensor:
    """Look up with Liger's embedding, whose gradients are added up atomically."""
    from liger_kernel.ops.experimental.embedding import LigerEmbeddingFunction

    rows = table_rows(codes, levels, [len(table) for table in tables])
    pairs = zip(rows, tables, strict=True)
    return torch.cat([LigerEmbeddingFunction.apply(table, at) for at, table in pairs], 1)


def liger_absence(options: Options) -> Absent | None:
    """Return why Liger cannot take part, or None."""
    reason = absence("liger_kernel", "liger-kernel", options, cpu_only=False)
    return Absent("Liger embedding", reason) if reason else None


def liger(options: Options) -> Contestant | Absent:
    """Return the forward pass of Liger's embedding."""
    absent = liger_absence(options)
    return absent or Contestant("Liger embedding", lambda i: lambda: liger_lookup(**i))


def copy(width: int) -> Contestant:
    """Return the floor of a forward pass: writing the output, read from one as large."""

    def prepare(inputs: Inputs) -> Run:
        source = indexed(inputs["codes"], inputs["tables"], inputs["levels"])
        assert source.shape[1] == width
        out = torch.empty_like(source)
        return lambda: out.copy_(source)

    return Contestant("copy of the output", prepare, "floor")


def row_adagrad(table: Tensor, state: Tensor, rows: Tensor, grad: Tensor, rate: float) -> None:
    """Take a step of row-wise Adagrad, in place, for distinct rows and their summed gradients."""
    now = state[rows] + grad.square().mean(1)
    state[rows] = now
    table.index_add_(0, rows, grad / (now.sqrt() + 1e-8)[:, None], alpha=-rate)


def tbe_absence(options: Options) -> Absent | None:
    """Return why FBGEMM cannot take part, or None."""
    reason = absence("fbgemm_gpu", "fbgemm-gpu-cpu", options)
    return Absent(_TBE, reason) if reason else None


class Tbe:
    """FBGEMM's tables over ours: bags of one side by side, or vectors level by level."""

    def __init__(self, tables: Sequence[Tensor], levels: Sequence[int], pooled: bool, rate: float):
        from fbgemm_gpu import split_table_batched_embeddings_ops_training as tbe
        from fbgemm_gpu.split_embedding_configs import EmbOptimType as Optimizer

        mode = tbe.PoolingMode.SUM if pooled else tbe.PoolingMode.NONE
        place = tbe.EmbeddingLocation.HOST, tbe.ComputeDevice.CPU
        self.pooled, self._levels = pooled, levels
        self._rows = [len(table) for table in tables]
        self._tables = tbe.SplitTableBatchedEmbeddingBagsCodegen(
            [(len(table), table.shape[1], *place) for table in tables],
            optimizer=Optimizer.EXACT_ROWWISE_ADAGRAD,
            learning_rate=rate,
            eps=1e-8,
            pooling_mode=mode,
            stochastic_rounding=False,
            bounds_check_mode=tbe.BoundsCheckMode.NONE,
            device="cpu",
        )
        for mine, table in zip(self.weights(), tables, strict=True):
            mine.detach().copy_(table.detach())

    def __call__(self, codes: Tensor) -> Tensor:
        """Look up: [M, width], or without bags [L M, d], level by level."""
        indices = torch.cat(table_rows(codes, self._levels, self._rows))
        out: Tensor = self._tables(indices, torch.arange(len(indices) + 1))
        return out

    def weights(self) -> list[Tensor]:
        """Return the tables, as they are."""
        found: list[Tensor] = self._tables.split_embedding_weights()
        return found

    def states(self) -> list[Tensor]:
        """Return Adagrad's sums, one per row."""
        return [state[0] for state in self._tables.split_optimizer_states()]


def side_by_side(out: Tensor, items: int) -> Tensor:
    """Bring vectors level by level to ours."""
    return out if len(out) == items else torch.cat(out.split(items), 1)


def tbe_forward(options: Options) -> Contestant | Absent:
    """Return FBGEMM's forward pass, in the quicker of both layouts."""
    if absent := tbe_absence(options):
        return absent

    def prepare(inputs: Inputs) -> Run:
        codes, ways = inputs["codes"], {}
        for note, pooled in {"bags of one": True, "level by level, no bags": False}.items():
            ways[note] = _forward(Tbe(inputs["tables"], inputs["levels"], pooled, 0.0), codes)
        note = quickest("cpu", ways)
        return Noted(ways[note], note)

    def finish(found: tuple[Tensor, int]) -> Tensor:
        return side_by_side(*found)

    return Contestant(_TBE, prepare, finish=finish)


def _forward(tables: Tbe, codes: Tensor) -> Callable[[], Any]:
    def run() -> tuple[Tensor, int]:
        with torch.no_grad():
            return tables(codes), len(codes)

    return run


def tbe_step(options: Options, rate: float) -> Contestant | Absent:
    """Return FBGEMM's passes with row-wise Adagrad fused, in the quicker of both layouts."""
    if absent := tbe_absence(options):
        return absent

    def prepare(inputs: Inputs) -> Run:
        def step(pooled: bool) -> Run:
            tables = Tbe(inputs["tables"], inputs["levels"], pooled, rate)
            grad, codes = inputs["grad"], inputs["codes"]
            if not pooled:
                grad = torch.cat(grad.chunk(len(inputs["levels"]), 1))

            def run() -> Any:
                tables(codes).backward(grad)
                return tables.weights(), tables.states()

            return run

        layouts = {"bags of one": True, "level by level, no bags": False}
        note = quickest("cpu", {name: step(pooled) for name, pooled in layouts.items()})
        return Noted(step(layouts[note]), note)  # anew: the trial has moved its tables

    return Contestant(_TBE, prepare)
