"""`livrec-fast codes`: a killed or failed run changes nothing, memory stays small."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from livrec_fast.benchmarking._clock import peak_extra_bytes

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

from coding import fixed, run  # noqa: E402
from conftest import DIM  # noqa: E402

ROOT = Path(__file__).parent.parent

SLOW = """
    import sys, time
    from livrec_fast import codes
    apply = codes._apply
    def slowly(function, chunk, path):
        print("chunk", flush=True)
        time.sleep(0.2)
        return apply(function, chunk, path)
    codes._apply = slowly
    codes.command(sys.argv[1:])
"""


@pytest.mark.skipif(not hasattr(os, "O_TMPFILE"), reason="files have names here from the start")
@pytest.mark.parametrize("suffix", ["npy", "parquet"])
def test_a_killed_run_changes_nothing(npy, books, tmp_path, suffix):
    out = tmp_path / f"c.{suffix}"
    run("encode", npy, "--codebooks", books, "--out", out)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    arguments = ["encode", npy, "--codebooks", books, "--out", out, "--packed", "--chunk", 5]
    command = [sys.executable, "-c", textwrap.dedent(SLOW), *map(str, arguments)]
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=variables) as process:
        for _ in range(3):
            assert process.stdout.readline() == b"chunk\n"
        process.send_signal(signal.SIGKILL)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_failed_write_keeps_the_old_codes(npy, books, tmp_path, monkeypatch):
    out = tmp_path / "c.npy"
    run("encode", npy, "--codebooks", books, "--out", out)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    output = run("encode", npy, "--codebooks", books, "--out", out, "--packed", code=1)
    assert "No space left" in output
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux for its peak")
def test_memory_does_not_grow_with_the_file(books, tmp_path):
    rows = 1_600_000
    values = np.random.default_rng(0).standard_normal((rows, DIM)).astype(np.float32)
    given = tmp_path / "x.parquet"  # one row group of 38 MB
    pq.write_table(pa.table({"embedding": fixed(values)}), given, compression="none")
    before = pa.default_memory_pool()
    pa.set_memory_pool(pa.system_memory_pool())  # the default one keeps what it has freed
    try:
        arguments = (
            "encode",
            given,
            "--codebooks",
            books,
            "--out",
            tmp_path / "c.npy",
            "--chunk",
            5_000,
        )
        run(*arguments)
        peak = peak_extra_bytes(lambda: run(*arguments), "cpu")
    finally:
        pa.set_memory_pool(before)
    if peak is None:
        pytest.skip("the peak cannot be reset here")
    assert peak < 19 * 2**20, f"{peak / 2**20:.1f} MB"  # what is read ahead varies
