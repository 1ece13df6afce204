"""What prefix n-grams allocate: nothing of a table's size, and no indices."""

import gc
import json
import weakref

import pytest
import torch
from conftest import python

from livrec_fast import _native, prefix_ngram_lookup

MB = 2**20
PROGRAM = """
import json, torch
from livrec_fast import pack_codes, prefix_ngram_gradient, prefix_ngram_lookup
from livrec_fast.benchmarking._clock import peak_extra_bytes
torch.set_num_threads(2)

def peak(way):
    way()  # what a first call keeps is not of interest
    return peak_extra_bytes(way, "cpu")

def peaks(**ways):
    print(json.dumps({name: peak(way) for name, way in ways.items()}))
"""
GRADIENTS = """
rows, dims = (64, 2**22), (16, 16)
codes = torch.randint(0, 64, (3000, 2))
codes[:, 1] *= 2**16
levels = (64, 2**22)
tables = [torch.full((h, d), 0.5, requires_grad=True) for h, d in zip(rows, dims)]
grad = torch.randn(3000, 32)

def backward(sparse):
    out = prefix_ngram_lookup(codes, tables, levels, sparse=sparse)
    found = torch.autograd.grad(out, tables, grad)
    assert found[1].is_sparse == sparse and found[1].shape == (2**22, 16)

peaks(
    sparse=lambda: backward(True),
    dense=lambda: backward(False),
    gradient=lambda: prefix_ngram_gradient(grad, codes, levels, rows, dims),
)
"""
PACKED = """
levels, items = (64,) * 4, 2_000_000
codes = torch.randint(0, 64, (items, 4), dtype=torch.uint8)
packed = pack_codes(codes, levels)
tables = [torch.randn(h, 1) for h in (64, 4096, 2**18, 2**20)]
offsets = torch.arange(0, items + 1, 20)
peaks(
    items=lambda: prefix_ngram_lookup(packed, tables, levels, packed=True, mode="sum"),
    histories=lambda: prefix_ngram_lookup(
        packed, tables, levels, packed=True, mode="sum", offsets=offsets, pool="mean"
    ),
    formula=lambda: prefix_ngram_lookup(
        packed, tables, levels, packed=True, mode="sum", backend="reference"
    ),
)
"""


def measured(program):
    done = python(PROGRAM + program)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    if None in found.values():
        pytest.skip("the peak of the resident set cannot be asked here")
    return found


needs_native = pytest.mark.skipif(_native.MISSING is not None, reason=str(_native.MISSING))


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("kernel", ["auto", "reference"])
def test_gradients_go_when_nobody_holds_them(kernel, sparse):
    table = torch.randn(5, 3, requires_grad=True)
    codes = torch.tensor([[0], [4]])
    gc.collect()
    gc.disable()
    try:
        out = prefix_ngram_lookup(codes, [table], (5,), sparse=sparse, backend=kernel)
        (grad,) = torch.autograd.grad(out.sum(), [table])
        held = weakref.ref(grad)
        del out, grad
        assert held() is None
    finally:
        gc.enable()


@needs_native
def test_gradients_of_rows_need_nothing_of_a_tables_size():
    found = measured(GRADIENTS)
    assert found["dense"] > 250 * MB  # such a gradient is seen
    assert found["sparse"] < 8 * MB and found["gradient"] < 8 * MB


@needs_native
def test_packed_codes_are_read_without_indices():
    found = measured(PACKED)
    assert found["formula"] > 100 * MB
    output = 2_000_000 * 4
    assert found["items"] < output + 4 * MB  # int64 indices of one level would be 16 MB
    assert found["histories"] < 4 * MB
