"""The peers, each in its best configuration; one that is not installed says so.

A peer that misses its library, or cannot take a case, is an `Absent` with the reason.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

import livrec_fast
from livrec_fast.benchmarking import Absent, Contestant, Options
from livrec_fast.modules._faiss import to_faiss

Inputs = dict[str, Any]


def eager(formula: Callable[..., Any]) -> Contestant:
    """Return the reference itself, in eager torch."""
    return Contestant("torch eager", lambda inputs: lambda: formula(**inputs), "reference")


def compiled(formula: Callable[..., Any], options: Options) -> list[Contestant | Absent]:
    """Return the reference through torch.compile, as it comes and (unless quick) autotuned."""
    modes = {"torch.compile": None}
    if not options.quick:
        modes["torch.compile autotuned"] = "max-autotune-no-cudagraphs"
    if options.device == "cpu" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        return [Absent(name, "torch.compile needs a C++ compiler on a CPU") for name in modes]

    def contestant(name: str, mode: str | None) -> Contestant:
        def prepare(inputs: Inputs) -> Callable[[], Any]:
            torch._dynamo.reset()  # each case is compiled for its own static shapes
            function = torch.compile(formula, mode=mode, dynamic=False, fullgraph=True)
            function(**inputs)
            return lambda: function(**inputs)

        return Contestant(name, prepare)

    return [contestant(name, mode) for name, mode in modes.items()]


def faiss_residual_quantizer(
    levels: Sequence[int], dtype: torch.dtype, options: Options, lut: int
) -> Contestant | Absent:
    """Return faiss's residual quantizer over our codebooks, greedy (a beam of 1).

    lut: 0 encodes from the residuals; 1 from tables of inner products, made beforehand.
    """
    name = f"faiss RQ, LUT {lut}"
    try:
        import faiss
    except ImportError:
        return Absent(name, "faiss is not installed (pip install faiss-cpu)")
    if options.device != "cpu":
        return Absent(name, "faiss encodes residual codes on a CPU only")
    if dtype != torch.float32:
        return Absent(name, f"faiss takes float32 only, not {str(dtype)[6:]}")
    if any(n & (n - 1) for n in levels):
        return Absent(
            name, f"faiss takes codebook sizes that are powers of two, not {list(levels)}"
        )

    def prepare(inputs: Inputs) -> Callable[[], Any]:
        faiss.omp_set_num_threads(options.threads)
        quantizer = to_faiss(inputs["codebooks"])
        quantizer.use_beam_LUT = lut
        x = inputs["x"].numpy()
        return lambda: quantizer.compute_codes(x)

    def unpacked(codes: np.ndarray) -> Tensor:
        return livrec_fast.unpack_codes(torch.from_numpy(codes), levels)  # of the same layout

    return Contestant(name, prepare, finish=unpacked)
