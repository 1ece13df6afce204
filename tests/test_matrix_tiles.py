"""AMX's tiles as they are emulated: the instruction's arithmetic, products, and levels."""

import ctypes
import platform
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

from livrec_fast import _native, in_batch_contrastive_multi

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None or platform.machine() != "x86_64", reason="needs g++ on x86-64"
)
PROGRAM = """
#include "vectors.h"
#include "matrix_tiles.h"
extern "C" void multiply(const float* a, long a_row, long rows, const float* b, long b_row,
                         long depth, float* c, long c_row, long columns, bool add) {
  using namespace livrec::emulated;
  MatrixTiles tiles(true);
  multiply_tiles(tiles, a, a_row, rows, b, b_row, depth, c, c_row, columns, add);
}
"""
SIDE = 16


@pytest.fixture(scope="module")
def multiply(tmp_path_factory):
    """Compile the emulated tiles; return c (+)= a b for bfloat16 numbers held as float32."""
    folder = tmp_path_factory.mktemp("tiles")
    (folder / "tiles.cpp").write_text(PROGRAM)
    command = ["g++", "-std=c++17", "-O2", "-fPIC", "-shared", f"-I{ROOT / 'csrc'}"]
    command += ["-DLIVREC_ISA=emulated", str(folder / "tiles.cpp"), "-o", str(folder / "tiles.so")]
    subprocess.run(command, check=True)
    run = ctypes.CDLL(str(folder / "tiles.so")).multiply

    def call(left, right, out, add):
        """left: [rows, depth, 2]; right: [depth, columns, 2]; out: [more rows, more columns]."""
        a = words(left, padded(left.shape[0]), padded(left.shape[1]))
        b = words(right, padded(right.shape[0]), right.shape[1])
        pointers = [x.ctypes.data_as(ctypes.c_void_p) for x in (a, b, out)]
        long = ctypes.c_long
        run(
            pointers[0], long(a.shape[1]), long(left.shape[0]), pointers[1], long(b.shape[1]),
            long(left.shape[1]), pointers[2], long(out.shape[1]), long(right.shape[1]), add,
        )  # fmt: skip

    return call


def padded(count):
    return -(-count // SIDE) * SIDE


def words(numbers, rows, columns):
    """Return words of two bfloat16, zeros past the last."""
    bits = (np.ascontiguousarray(numbers, np.float32).view(np.uint32) >> 16).astype(np.uint32)
    out = np.zeros((rows, columns), np.uint32)
    out[: bits.shape[0], : bits.shape[1]] = bits[..., 0] | bits[..., 1] << 16
    return out


@needs_compiler
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize(
    "rows, depth, columns", [(1, 1, 16), (32, 16, 32), (37, 21, 48), (96, 64, 128)]
)
def test_products_of_any_size(multiply, rows, depth, columns, add):
    """Of small integers, all of whose sums are exact; what lies beside the product stays."""
    drawn = np.random.default_rng(rows)
    left = drawn.integers(-9, 10, (rows, depth, 2)).astype(np.float32)
    right = drawn.integers(-9, 10, (depth, columns, 2)).astype(np.float32)
    out = drawn.integers(-9, 10, (rows + 3, columns + 5)).astype(np.float32)
    wanted = out.copy()
    wanted[:rows, :columns] *= add
    wanted[:rows, :columns] += np.einsum("mki,kni->mn", left, right)
    multiply(left, right, out, add)
    assert wanted[:rows, :columns].any()
    np.testing.assert_array_equal(out, wanted)


@needs_compiler
def test_a_tile_is_added_up_as_the_instruction_does(multiply):
    """First numbers and second ones by themselves, in order, and their sum onto what was there."""
    drawn = np.random.default_rng(0)
    left, right = (drawn.standard_normal((16, 16, 2)).astype(np.float32) for _ in range(2))
    left, right = ((x.view(np.uint32) & 0xFFFF0000).view(np.float32) for x in (left, right))
    out = drawn.standard_normal((16, 16)).astype(np.float32)
    wanted, sums = out.copy(), np.zeros((16, 16, 2), np.float32)
    for k in range(16):  # products are exact in float64, and sums far from ties of float32
        sums = (left[:, k, None].astype(np.float64) * right[None, k] + sums).astype(np.float32)
    wanted += sums[..., 0] + sums[..., 1]
    in_one_chain = out.astype(np.float64) + np.einsum("mki,kni->mn", left, right, dtype=np.float64)
    multiply(left, right, out, True)
    np.testing.assert_array_equal(out, wanted)
    assert (out != in_one_chain.astype(np.float32)).any()  # another order has other bits


@needs_compiler
def test_denormals_are_zeros(multiply):
    """Of what is multiplied, of sums, and of what was there."""
    left, right = np.zeros((16, 16, 2), np.float32), np.zeros((16, 16, 2), np.float32)
    left[0, 0], right[0] = (2.0**-130, 0), 2.0**100  # a denormal times a large number
    left[1, 0] = (2.0**-120, 0)  # a normal one
    left[2, 0, 1], right[0, 1] = 2.0**-120, 2.0**-10  # normal ones whose product is not
    out = np.full((16, 16), 2.0**-127, np.float32)
    multiply(left, right, out, True)
    assert (out[0] == 0).all()
    assert out[1, 0] == 2.0**-20 and out[2, 0] == 2.0**-20 and out[2, 1] == 0
    assert (out[3:] == 0).all()


@pytest.mark.skipif("amx" not in _native.isa_built(), reason="this build has no x86-64 levels")
def test_tiles_run_only_where_the_processor_has_them():
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text() if cpuinfo.exists() else ""
    if "amx_bf16" not in flags or "amx_tile" not in flags:
        assert "amx" not in _native.isa_levels()
        with (
            pytest.raises(ValueError, match="'amx' is not one"),
            _native.use_isa("amx"),
        ):
            pass
    assert "amx_emulated" not in _native.isa_levels()  # for tests alone


@pytest.mark.skipif("amx" not in _native.isa_built(), reason="this build has no x86-64 levels")
@pytest.mark.parametrize("symmetric", [False, True])
def test_terms_in_emulated_tiles_agree_with_floats(symmetric):
    generator = torch.Generator().manual_seed(0)
    anchor = torch.randn(131, 50, generator=generator, requires_grad=True)
    keys = torch.randn(3, 131, 50, generator=generator, requires_grad=True)
    found = {}
    for level in ("baseline", "amx_emulated"):
        with _native.use_isa(level):
            losses = in_batch_contrastive_multi(
                anchor, keys, symmetric=symmetric, precision="bf16", backend="native"
            )
            found[level] = (losses, *torch.autograd.grad(losses.sum(), (anchor, keys)))
    wanted, ours = found.values()
    torch.testing.assert_close(ours[0], wanted[0], rtol=1e-5, atol=1e-5)
    for ours_at, wanted_at in zip(ours[1:], wanted[1:], strict=True):  # weights are rounded
        assert 0 < (ours_at - wanted_at).norm() < 4e-3 * wanted_at.norm()
