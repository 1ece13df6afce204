"""Majority voting: the codes of rooms from those of their slices."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

import livrec_fast
from livrec_fast.benchmarking import Case, Options, ours
from livrec_fast.reference import majority_vote as reference

from . import peers, peers_votes

# levels, dtype of the codes, histories, mean slices of a history
SHAPES = [
    ((64, 64, 64, 64), torch.uint8, 100_000, 20),
    ((512, 256, 128), torch.int16, 100_000, 20),
    ((8192, 8192, 8192), torch.int16, 20_000, 100),
    ((64, 64, 64, 64), torch.uint8, 1, 2_000_000),
]


def cases(options: Options) -> Iterator[Case]:
    """Yield one case per shape and rule; the CUDA kernel has one rule."""
    for levels, dtype, histories, mean in SHAPES:
        if options.quick:
            histories, mean = (histories // 10, mean) if histories > 1 else (1, mean // 10)
        for rule in ("per_level",) if options.device == "cuda" else ("per_level", "path"):
            yield vote(levels, dtype, histories, mean, rule, options)


def vote(
    levels: tuple[int, ...],
    dtype: torch.dtype,
    histories: int,
    mean: int,
    rule: str,
    options: Options,
) -> Case:
    """Make the case of one shape; histories begin at random slices, low codes are frequent."""
    slices = histories * mean

    def make() -> dict[str, Any]:
        generator = torch.Generator().manual_seed(0)
        inner = torch.randint(0, slices + 1, (histories - 1,), generator=generator).sort().values
        offsets = torch.cat([torch.tensor([0]), inner, torch.tensor([slices])])
        draws = torch.rand((slices, len(levels)), generator=generator) ** 4
        codes = (draws * torch.tensor(levels)).to(dtype)
        return {
            "codes": codes.to(options.device),
            "offsets": offsets.to(options.device),
            "levels": levels,
            "rule": rule,
        }

    def agree(output: torch.Tensor, inputs: dict[str, Any]) -> None:
        assert output.equal(reference.majority_vote(**inputs)), "votes differ"

    voted_bytes = reference.vote_dtype(levels).itemsize
    backends = ("cuda",) if options.device == "cuda" else None
    return Case(
        op="majority_vote",
        label=f"{'/'.join(map(str, levels))}, {rule}, B {histories:,}, T {slices:,}",
        sizes={"B": histories, "T": slices, "levels": list(levels), "rule": rule},
        dtype=dtype,
        math=torch.float32,
        make=make,
        agree=agree,
        contestants=[
            *ours(livrec_fast.majority_vote, options, backends),
            peers.eager(reference.majority_vote),
            *peers_votes.loops(options, rule, histories),
        ],
        bytes=slices * len(levels) * dtype.itemsize
        + (histories + 1) * 8
        + histories * len(levels) * voted_bytes,
        flops=0,
    )
