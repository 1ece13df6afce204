"""Encodes a mapped file of vectors: `python benches/out_of_core.py --rows 10000000`.

Writes a float32 file of the rows into a temporary folder (5 GB for 10 million), encodes as many of
them as each of two sizes has, and reports time, rows per second, and the anonymous memory that the
run added beyond the codes: what an encoder needs for itself, the same at both sizes. (Pages of the
mapped file are the kernel's to drop, so they do not count.) Linux only.
"""

from __future__ import annotations

import json
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Self

import click
import numpy as np
import torch

import livrec_fast
from livrec_fast.benchmarking import Machine
from livrec_fast.reference import residual_kmeans as reference

LEVELS, DIM, CHUNK = (64, 64, 64, 64), 128, 100_000
OUT = Path(__file__).resolve().parents[1] / "out/bench/out_of_core.json"


@click.command()
@click.option("--rows", type=click.IntRange(CHUNK), required=True, help="Rows of the file.")
@click.option("--folder", type=click.Path(exists=True, file_okay=False), help="Of the file.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), default=OUT)
def main(rows: int, folder: str | None, out: Path) -> None:
    """Write the file, encode its first 100,000 rows and then all, and report."""
    generator = torch.Generator().manual_seed(0)
    books = [torch.randn(n, DIM, generator=generator) / 2**at for at, n in enumerate(LEVELS)]
    with tempfile.TemporaryDirectory(dir=folder) as made:
        path = write(Path(made) / "vectors.f32", rows, generator)
        encode(mapped(path, CHUNK), books)  # what the library keeps from its first call
        found = [measured(mapped(path, count), books) for count in (CHUNK, rows)]
    out.parent.mkdir(parents=True, exist_ok=True)
    report = {"machine": Machine("cpu").describe(), "op": "residual_kmeans_encode",
              "levels": list(LEVELS), "D": DIM, "runs": found}  # fmt: skip
    out.write_text(json.dumps(report, indent=1) + "\n")
    for run in found:
        click.echo(
            f"{run['M']:>12,} rows: {run['seconds']:.3f} s, {run['rows_per_second']:,.0f} rows/s, "
            f"{run['anonymous_bytes'] / 1e6:.1f} MB anonymous beyond {run['code_bytes'] / 1e6:.1f} "
            "MB of codes"
        )
    click.echo(f"written: {out}")


def write(path: Path, rows: int, generator: torch.Generator) -> Path:
    """Write rows of normal numbers, a chunk at a time."""
    with path.open("wb") as file:
        for start in range(0, rows, CHUNK):
            chunk = torch.randn(min(CHUNK, rows - start), DIM, generator=generator)
            file.write(memoryview(chunk.numpy()))
    return path


def mapped(path: Path, rows: int) -> torch.Tensor:
    """Return the first rows of the file, mapped copy-on-write since torch wants to be able to."""
    return torch.from_numpy(np.memmap(path, np.float32, "c", shape=(rows, DIM)))


def encode(x: torch.Tensor, books: list[torch.Tensor]) -> torch.Tensor:
    """Encode by the compiled library, which reads rows as it needs them."""
    return livrec_fast.residual_kmeans_encode(x, books, backend="native")


def measured(x: torch.Tensor, books: list[torch.Tensor]) -> dict[str, Any]:
    """Encode twice, for the memory and for the time; hold a spread of rows to the rule."""
    with Watch() as watch:
        codes = encode(x, books)
    few = torch.linspace(0, len(x) - 1, 10_000).long()
    reference.agree(codes[few], {"x": x[few], "codebooks": books})
    start = time.perf_counter()
    encode(x, books)
    seconds = time.perf_counter() - start
    return {
        "M": len(x),
        "seconds": seconds,
        "rows_per_second": len(x) / seconds,
        "code_bytes": codes.nbytes,
        "anonymous_bytes": max(0, watch.peak - watch.before - codes.nbytes),
    }


class Watch:
    """Follows the anonymous memory of this process, whose peak Linux does not keep."""

    def __enter__(self) -> Self:
        self.before = self.peak = anonymous_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._follow)
        self._thread.start()
        return self

    def _follow(self) -> None:
        while not self._done.wait(0.002):
            self.peak = max(self.peak, anonymous_bytes())

    def __exit__(self, *_: object) -> None:
        self.peak = max(self.peak, anonymous_bytes())
        self._done.set()
        self._thread.join()


def anonymous_bytes() -> int:
    """Return RssAnon."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no RssAnon")


if __name__ == "__main__":
    main()
