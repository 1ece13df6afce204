"""Packing codes into bits: the layout, against Python's integers and faiss, and bad bytes."""

import pytest
import torch

from livrec_fast import pack_codes, unpack_codes

LEVELS = [(512, 256, 128), (64,) * 4, (5, 1, 300, 7), (65536,) * 16, (2**31, 3), (1,), (1, 1)]

_CODES = [
    ("list", lambda good: {"codes": [[0]]}, TypeError, "codes: must be a tensor, got list"),
    ("float", lambda good: {"codes": good["codes"].float()}, TypeError, "codes: dtype .* float32"),
    (
        "vector",
        lambda good: {"codes": good["codes"][0]},
        ValueError,
        r"codes: shape must be \[M, 4\]",
    ),
    ("too few", lambda good: {"codes": good["codes"][:, 1:]}, ValueError, r"codes: shape .*, 3\]"),
    (
        "id = size",
        lambda good: {"codes": _put(good["codes"], 200)},
        IndexError,
        r"= 200 .* \[0, 200\)",
    ),
    (
        "negative",
        lambda good: {"codes": _put(good["codes"], -1)},
        IndexError,
        r"codes\[7, 0\] = -1",
    ),
    ("huge id", lambda good: {"codes": _put(good["codes"].long(), 2**62)}, IndexError, str(2**62)),
]
_LEVELS = [
    ("no levels", lambda good: {"levels": []}, ValueError, r"levels: .* got \[\]"),
    (
        "level 0",
        lambda good: {"levels": [200, 0, 9, 9]},
        ValueError,
        r"levels: .* positive .*200, 0",
    ),
    (
        "level 2.5",
        lambda good: {"levels": [200, 2.5]},
        TypeError,
        r"levels: .* ints, got \[200, 2.5\]",
    ),
    ("one int", lambda good: {"levels": 24}, TypeError, "levels: .* got 24"),
    (
        "huge level",
        lambda good: {"levels": [2**31 + 1] * 4},
        ValueError,
        "levels: .* 2,147,483,648",
    ),
]
_PACKED = [
    ("list", lambda good: {"packed": [[0]]}, TypeError, "packed: must be a tensor, got list"),
    ("dtype", lambda good: {"packed": good["packed"].int()}, TypeError, "packed: dtype .* int32"),
    (
        "a byte short",
        lambda good: {"packed": good["packed"][:, 1:]},
        ValueError,
        r"packed: .*\[M, 4\]",
    ),
    (
        "other levels",
        lambda good: {"levels": [9] * 2},
        ValueError,
        r"packed: shape must be \[M, 1\]",
    ),
    (
        "corrupt",
        lambda good: {"packed": _put(good["packed"], 255)},
        IndexError,
        "row 7 .* 255 at level 0",
    ),
]
BAD_INPUTS = {"pack_codes": _CODES + _LEVELS, "unpack_codes": _PACKED + _LEVELS}


def _put(tensor, value):
    changed = tensor.clone()
    changed[7, 0] = value
    return changed


def _draw(levels, rows=50):
    generator = torch.Generator().manual_seed(len(levels))
    codes = torch.stack([torch.randint(n, (rows,), generator=generator) for n in levels], 1)
    codes[0], codes[1] = 0, torch.tensor(levels) - 1
    return codes


def _python_pack(row, levels):
    number, start = 0, 0
    for code, size in zip(row, levels, strict=True):
        number |= code << start
        start += (size - 1).bit_length()
    return list(number.to_bytes(-(-start // 8), "little"))


@pytest.mark.parametrize("levels", LEVELS, ids=str)
def test_layout_is_that_of_a_little_endian_integer(levels):
    codes = _draw(levels)
    packed = pack_codes(codes, levels)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == [_python_pack(row, levels) for row in codes.tolist()]
    assert torch.equal(unpack_codes(packed, levels).long(), codes)


def test_24_bits_are_three_bytes():
    codes = torch.tensor([[511, 1, 127]])
    assert pack_codes(codes, (512, 256, 128)).tolist() == [[0xFF, 0x03, 0xFE]]
    assert pack_codes(torch.tensor([[1, 2, 3, 63]]), [64] * 4).shape == (1, 3)


@pytest.mark.parametrize(
    ("most", "dtype"),
    [(256, torch.uint8), (257, torch.int16), (32768, torch.int16), (32769, torch.int32)],
)
def test_unpacked_dtype_is_the_smallest(most, dtype):
    codes = torch.tensor([[most - 1, 1]])
    unpacked = unpack_codes(pack_codes(codes, (most, 2)), (most, 2))
    assert unpacked.dtype == dtype
    assert unpacked.tolist() == codes.tolist()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_every_integer_dtype_packs_alike(dtype):
    codes = _draw((100, 30, 7))
    assert torch.equal(pack_codes(codes.to(dtype), (100, 30, 7)), pack_codes(codes, (100, 30, 7)))


@pytest.mark.parametrize("bits", [(9, 8, 7), (6, 6, 6, 6), (3, 5, 11), (16, 1)])
def test_faiss_packs_alike(bits):
    faiss = pytest.importorskip("faiss")
    levels = [2**width for width in bits]
    codes = _draw(levels)
    widths = faiss.UInt64Vector()
    for width in bits:
        widths.push_back(width)
    quantizer = faiss.ResidualQuantizer(8, widths)
    theirs = torch.empty(len(codes), quantizer.code_size, dtype=torch.uint8)
    numbers = codes.int().numpy()
    quantizer.pack_codes(len(codes), faiss.swig_ptr(numbers), faiss.swig_ptr(theirs.numpy()))
    assert torch.equal(pack_codes(codes, levels), theirs)
    assert torch.equal(unpack_codes(theirs, levels).long(), codes)


def test_corrupt_bytes_are_named_by_row_and_level():
    packed = pack_codes(torch.tensor([[4, 2], [1, 0]]), (5, 3))
    packed[1] |= 0b11000
    with pytest.raises(IndexError, match=r"row 1 holds 3 at level 1, outside \[0, 3\)"):
        unpack_codes(packed, (5, 3))


def test_left_over_bits_are_not_looked_at():
    packed = pack_codes(torch.tensor([[4, 2]]), (5, 3)) | 0b11100000
    assert unpack_codes(packed, (5, 3)).tolist() == [[4, 2]]


def test_a_level_of_one_codeword_takes_no_bits():
    assert pack_codes(torch.zeros(4, 2, dtype=torch.int64), (1, 1)).shape == (4, 0)
    assert unpack_codes(torch.empty(4, 0, dtype=torch.uint8), (1, 1)).tolist() == [[0, 0]] * 4


def test_no_rows():
    assert pack_codes(torch.empty(0, 2, dtype=torch.int64), (512, 3)).shape == (0, 2)
    assert unpack_codes(torch.empty(0, 2, dtype=torch.uint8), (512, 3)).shape == (0, 2)


def test_compiled_once_for_any_number_of_rows():
    compiled = torch.compile(
        lambda codes: unpack_codes(pack_codes(codes, (300, 7)), (300, 7)),
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    for rows in (5, 9):
        codes = _draw((300, 7), rows)
        with torch.compiler.set_stance("default" if rows == 5 else "fail_on_recompile"):
            assert torch.equal(compiled(codes).long(), codes)
