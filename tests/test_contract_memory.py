"""The contract, part 4: what a call takes, it gives back."""

import ctypes
import gc
import os

import pytest
import torch

from livrec_fast.testing import inputs_for
from livrec_fast.testing.subjects import listed, with_leaves

_CALLS, _LOST = 100, 24  # an object that every call loses takes 32 bytes of glibc's heap or more


class Heap(ctypes.Structure):
    """What glibc's mallinfo2 fills in."""

    _names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in _names.split()]


def allocated():
    """Return the bytes that the process holds of the C library."""
    mallinfo2 = getattr(ctypes.CDLL(None), "mallinfo2", None) if os.name == "posix" else None
    if mallinfo2 is None:
        pytest.skip("needs mallinfo2 of glibc 2.33")
    mallinfo2.restype = Heap
    gc.collect()
    heap = mallinfo2()
    return heap.uordblks + heap.hblkhd


def lost_per_call(run):
    """Return how many bytes a call keeps, in the best of a few windows: what is lost always is."""
    run()
    found = []
    for _ in range(6):
        before = allocated()
        for _ in range(_CALLS):
            run()
        found.append((allocated() - before) / _CALLS)
        if found[-1] < _LOST:
            break
    return min(found)


def test_calls_lose_no_memory(subject, target):
    inputs = inputs_for(subject.oracle, "typical", subject.oracle.dtypes[0], device=target.device)
    if target.backend == "triton":
        pytest.skip("its launchers are Python, and its interpreter is slow")
    with target.active():
        assert lost_per_call(lambda: subject.run(inputs, target.backend)) < _LOST
        if subject.op.differentiable:
            held, leaves = with_leaves(inputs)

            def both_ways():
                outputs = listed(subject.run(held, target.backend))
                outputs = [o.to_dense() if o.is_sparse else o for o in outputs if o.requires_grad]
                leaf = list(leaves.values())
                torch.autograd.grad([o.sum() for o in outputs], leaf, allow_unused=True)

            assert lost_per_call(both_ways) < _LOST


def test_a_lost_object_is_found():
    kept = []
    assert lost_per_call(lambda: kept.append(ctypes.create_string_buffer(1024))) > _LOST
