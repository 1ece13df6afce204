"""What code attention allocates: the rows that histories name, never their items' vectors."""

import json

import pytest
from conftest import python

from livrec_fast import _native

MB = 2**20
USERS, ITEMS, THREADS = 16, 20_000, 2
HEADS, DIM, LEVELS, CANDIDATES = 4, 16, (512, 256, 128), 8
PROGRAM = f"""
import json, torch
from livrec_fast import code_attention, code_attention_gradient
from livrec_fast.benchmarking._clock import peak_extra_bytes
torch.set_num_threads({THREADS})
users, items, heads, dim, levels = {USERS}, {ITEMS}, {HEADS}, {DIM}, {LEVELS}
codes = torch.stack([torch.randint(n, (users * items,)) for n in levels], 1).to(torch.int16)
offsets = torch.arange(users + 1) * items
keys, values = ([torch.randn(n, heads, dim) for n in levels] for _ in range(2))
q = torch.randn(users, {CANDIDATES}, heads, dim)
given = (q, codes, keys, values, offsets)
out, lse = code_attention(*given, return_lse=True, backend="native")
ways = [
    lambda: code_attention(*given, backend="native"),
    lambda: code_attention_gradient(torch.ones_like(out), *given, out, lse, backend="native"),
]
for way in ways:
    way()  # what a first call keeps is not of interest
print(json.dumps([peak_extra_bytes(way, "cpu") for way in ways]))
"""


@pytest.mark.skipif(_native.MISSING is not None, reason=f"{_native.MISSING}")
def test_workspace_is_as_documented():
    done = python(PROGRAM)
    assert done.returncode == 0, done.stderr
    forward, gradient = json.loads(done.stdout)
    if forward is None:
        pytest.skip("the peak cannot be reset here")
    rows = sum(LEVELS)
    own = THREADS * (4 * rows * (HEADS * 2 * DIM + 128) + 4 * len(LEVELS) * ITEMS)
    sums = 16 * rows * HEADS * 2 * DIM * 4
    vectors = USERS * ITEMS * HEADS * 2 * DIM * 4
    assert forward < own + 2 * MB < vectors / 30, f"{forward / MB:.1f} MB"
    assert gradient < 2 * own + sums + 3 * MB < vectors / 10, f"{gradient / MB:.1f} MB"
