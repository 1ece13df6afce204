"""Every op, found by itself: a test that asks for `subject` gets each op, `target` its backends."""

import json
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from livrec_fast import ResidualKMeans
from livrec_fast.testing import subjects, targets

ROOT = Path(__file__).parent.parent
SUBJECTS = subjects()
LEVELS = (20, 8)  # of the small codebooks that tests of files use
ROWS, DIM = 300, 6

torch.set_num_threads(1)  # inputs are small; the tests of threads set their own


def pytest_generate_tests(metafunc):
    """Parametrise by `subject`, its `target` (native per level) or its `backend`, and by `stem`."""
    asked = metafunc.fixturenames
    if "target" in asked:
        pairs = [(s, target) for s in SUBJECTS.values() for target in targets(s)]
        ids = [f"{subject.op.name}-{str(target).replace(' ', '-')}" for subject, target in pairs]
        metafunc.parametrize("subject, target", pairs, ids=ids)
    elif "backend" in asked:
        pairs = [
            (subject, backend)
            for subject in SUBJECTS.values()
            for backend in dict.fromkeys(target.backend for target in targets(subject))
        ]
        ids = [f"{subject.op.name}-{backend}" for subject, backend in pairs]
        metafunc.parametrize("subject, backend", pairs, ids=ids)
    elif "subject" in asked:
        metafunc.parametrize("subject", SUBJECTS.values(), ids=list(SUBJECTS))
    if "stem" in asked:
        metafunc.parametrize("stem", sorted({subject.stem for subject in SUBJECTS.values()}))


def python(*arguments, path=ROOT, cwd=ROOT, **variables):
    """Run a piece of Python, or a file or module with arguments, in a fresh interpreter."""
    given = {k: v for k, v in os.environ.items() if not k.startswith("LIVREC_")}
    given |= {"PYTHONPATH": str(path), **variables}
    command = [sys.executable, *(["-c"] if len(arguments) == 1 else []), *arguments]
    return subprocess.run(command, env=given, cwd=cwd, capture_output=True, text=True)


@cache
def forks():
    """Start, once in a test process, what runs pieces of Python in Triton's interpreter."""
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    given = {k: v for k, v in os.environ.items() if not k.startswith("LIVREC_")}
    return subprocess.Popen(
        [sys.executable, ROOT / "tests" / "forks.py"], cwd=ROOT, env=given | {"PYTHONPATH": path},
        text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip


def in_tritons_interpreter(piece):
    """Run a piece of Python in a process of its own, where Triton's kernels are interpreted."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("stdout", "stderr")]
        print(json.dumps([piece, *map(str, files)]), file=forks().stdin, flush=True)
        answer = forks().stdout.readline()
        assert answer, "tests/forks.py has ended"
        printed = [file.read_text() if file.exists() else "" for file in files]
    return subprocess.CompletedProcess(piece, int(answer), *printed)


def run_in_tritons_interpreter(edge):
    """Run a function of a test module where Triton's kernels are interpreted."""
    done = in_tritons_interpreter(f"import {edge.__module__} as tests; tests.{edge.__name__}()")
    assert done.returncode == 0, done.stderr


@pytest.fixture(autouse=True)
def seeded():
    """What a test draws from torch's own generator is the same on every run."""
    torch.manual_seed(0)


@pytest.fixture
def vectors():
    return np.random.default_rng(0).standard_normal((ROWS, DIM)).astype(np.float32)


@pytest.fixture
def coder(vectors):
    return ResidualKMeans(LEVELS, iterations=3).fit(torch.from_numpy(vectors))


@pytest.fixture
def books(coder, tmp_path):
    coder.save(tmp_path / "books.safetensors")
    return tmp_path / "books.safetensors"


@pytest.fixture
def npy(vectors, tmp_path):
    np.save(tmp_path / "x.npy", vectors)
    return tmp_path / "x.npy"
