"""What a benchmark ran on, and how fast that machine copies and multiplies."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .. import _native
from ..info import cpu_name, version_of
from ._clock import clock_of

_ROOT = Path(__file__).resolve().parents[2]
_PEERS = (
    "scikit-learn", "superkmeans", "semantic-id", "vector-quantize-pytorch", "flash-kmeans",
    "fastkmeans", "fbgemm-gpu-cpu", "fuxictr", "ffpa-attn", "inf-cl", "cut-cross-entropy",
    "liger-kernel", "sentence-transformers", "pytorch-metric-learning", "info-nce-pytorch",
)  # fmt: skip
_SOURCES = ("benches", "csrc", "kernels", "livrec_fast", "setup.py", ":!benches/results")


@dataclass
class Machine:
    """One device, with the threads that a CPU uses; and the best rates that it has shown."""

    device: str = "cpu"
    _rates: dict[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The processor's own name."""
        return torch.cuda.get_device_name() if self.device == "cuda" else cpu_name()

    @property
    def slug(self) -> str:
        """The name as a file is called; a CPU with another number of threads is another machine."""
        threads = "" if self.device == "cuda" else f" {torch.get_num_threads()} threads"
        return re.sub(r"[^a-z0-9]+", "-", (self.name + threads).lower()).strip("-")

    def describe(self) -> dict[str, Any]:
        """Return what rows record of the machine."""
        return {
            "device": self.name,
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "isa": _native.isa(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "triton": version_of("triton"),
            "faiss": version_of("faiss-cpu"),
            "peers": {name: v for name in _PEERS if (v := version_of(name))},
            "commit": commit(),
        }

    def measured(self) -> dict[str, float]:
        """Return the best rates seen so far: copy_gb_s, and matmul_<dtype>_tflop_s."""
        return dict(self._rates)

    def measure(self, dtype: torch.dtype) -> None:
        """Measure the copy rate and the matrix rate in `dtype`, and keep the best of all calls."""
        self._copy_rate()
        self._matmul_rate(dtype)

    def _copy_rate(self) -> None:
        """Measure the gigabytes per second, read and written, of a large copy."""
        size = 2**28
        source = torch.ones(size // 4, device=self.device)
        target = torch.empty_like(source)
        self._keep_best("copy_gb_s", 2 * size / 1e9, lambda: target.copy_(source))

    def _matmul_rate(self, dtype: torch.dtype) -> None:
        """Measure the teraflops of a large matrix product in `dtype`."""
        n = 8192 if self.device == "cuda" else 1024
        a, b = (torch.randn(n, n, device=self.device).to(dtype) for _ in range(2))
        runs: list[Callable[[], Any]] = [lambda: a @ b]
        all_cores = torch.get_num_threads() == os.cpu_count()
        if self.device == "cpu" and dtype == torch.float32 and all_cores:
            runs.append(lambda: a.numpy() @ b.numpy())  # may be the better, but takes all cores
        self._keep_best(f"matmul_{str(dtype)[6:]}_tflop_s", 2 * n**3 / 1e12, *runs)

    def _keep_best(self, name: str, amount: float, *runs: Callable[[], Any]) -> None:
        clock = clock_of(self.device)
        for run in runs:
            run()
            rate = amount / min(clock(run) for _ in range(8))
            self._rates[name] = max(rate, self._rates.get(name, 0.0))


def commit() -> str | None:
    """Return the checkout's commit, "-dirty" where the sources differ from it; None elsewhere."""

    def git(*args: str) -> str:
        command = ["git", "-C", str(_ROOT), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    if not (_ROOT / ".git").exists():
        return None
    try:
        changed = git("status", "--porcelain", "--", *_SOURCES)
        return git("rev-parse", "--short=10", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None
