"""The edges of residual_kmeans_encode and _decode: ties, strides, code widths, bad rows, memory."""

import pytest
import torch
from conftest import in_tritons_interpreter, python
from torch import Tensor

from livrec_fast import BackendError, residual_kmeans_decode, residual_kmeans_encode
from livrec_fast._native import isa, isa_levels, use_isa
from livrec_fast.reference.residual_kmeans import agree

NAN, INF = float("nan"), float("inf")
BACKENDS = ["reference", *(f"native {level}" for level in isa_levels())]


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def encode(x, codebooks, backend):
    """Encode with "reference", "triton" or "native <level>"."""
    name, _, level = backend.partition(" ")
    with use_isa(level) if level else use_isa(isa()) if isa() else torch.no_grad():
        return residual_kmeans_encode(x, codebooks, backend=name)


def ties_go_to_the_lowest_code(backend):
    """Whole numbers, so that scores are exact whatever the order of a sum."""
    distinct, x = draw(37, 20).mul(2).round(), draw(90, 20, seed=1).mul(2).round()
    codes = encode(x, [distinct.repeat(3, 1)], backend)
    score = x @ distinct.T - distinct.square().sum(1) / 2
    first_best = (score == score.max(1, keepdim=True).values).int().argmax(1)
    assert codes[:, 0].long().equal(first_best) and codes.unique().numel() > 10
    assert (encode(x, [torch.ones(300, 20)], backend) == 0).all()
    axes = torch.cat([-torch.eye(50), torch.eye(50)])
    assert encode(axes[60:61] + axes[97:98], [axes], backend).item() == 60


def rows_may_lie_anywhere(backend):
    x, books = draw(130, 24), [draw(40, 24, seed=1), draw(33, 24, seed=2)]
    wanted = encode(x, books, backend)
    wide = torch.full((130, 60), NAN)
    wide[:, 30:54] = x
    assert encode(wide[:, 30:54], books, backend).equal(wanted)
    assert encode(x.T.contiguous().T, books, backend).equal(wanted)
    assert encode(x[1::3], books, backend).equal(wanted[1::3])
    assert encode(x[7:8].expand(50, -1), books, backend).equal(wanted[7:8].expand(50, -1))
    turned = [book.T.contiguous().T for book in books]
    assert encode(x, [turned[0], books[1].repeat(2, 1)[:33]], backend).equal(wanted)


def rows_may_lie_far_apart(backend):
    try:
        memory = torch.empty(2**31 + 2**20, dtype=torch.bfloat16)
    except RuntimeError:
        pytest.skip("cannot reserve 4 GiB of addresses")
    far = memory.as_strided((3, 8), (2**30 + 7, 1))
    far.copy_(draw(3, 8))
    books = [draw(20, 8, seed=1).bfloat16()]
    assert encode(far, books, backend).equal(encode(far.clone(), books, backend))


def codes_do_not_depend_on_the_batch(backend):
    x, books = draw(150, 19), [draw(65, 19, seed=1), draw(7, 19, seed=2)]
    whole = encode(x, books, backend)
    for first, last in [(0, 1), (3, 16), (5, 70), (17, 18), (64, 150), (149, 150), (90, 95)]:
        assert encode(x[first:last], books, backend).equal(whole[first:last])


def long_rows_and_many_levels(backend):
    for dim, sizes in ((64, (70, 1, 33)), (65, (30, 65)), (131, (64, 70, 3, 2)), (200, (20,))):
        books = [draw(size, dim, seed=size) / 2**level for level, size in enumerate(sizes)]
        x = draw(140, dim)
        agree(encode(x, books, backend), {"x": x, "codebooks": books})


def codes_take_the_smallest_type(backend):
    types = {1: torch.uint8, 256: torch.uint8, 257: torch.int16}
    if backend != "triton":  # its interpreter takes a minute for these
        types |= {32768: torch.int16, 32769: torch.int32, 65536: torch.int32}
    for size, dtype in types.items():
        bits = torch.arange(size)[:, None] >> torch.arange(16) & 1
        book = 2.0 * bits - 1
        codes = encode(book[[0, -1]], [book[:1], book - book[:1]], backend)
        assert codes.dtype == dtype
        assert codes.tolist() == [[0, 0], [0, size - 1]]


def every_half_is_widened_exactly(backend):
    for dtype in (torch.float16, torch.bfloat16):
        x = torch.arange(-(2**15), 2**15, 7).to(torch.int16).view(dtype)[:, None]
        x = x[(x.abs() < 2**14).all(1)]
        book = torch.tensor(
            [[-9000.0], [-1.0], [-1e-3], [-3e-6], [0.0], [4e-6], [2e-3], [1.5], [8e3]]
        )
        codes = encode(x, [book.to(dtype)], backend)
        agree(codes, {"x": x, "codebooks": [book.to(dtype)]})
        assert codes.unique().tolist() == list(range(9))


EDGES = [
    ties_go_to_the_lowest_code,
    rows_may_lie_anywhere,
    rows_may_lie_far_apart,
    codes_do_not_depend_on_the_batch,
    long_rows_and_many_levels,
    codes_take_the_smallest_type,
    every_half_is_widened_exactly,
]


@pytest.mark.parametrize("edge", EDGES, ids=lambda edge: edge.__name__)
@pytest.mark.parametrize("how", BACKENDS)
def test_edge(how, edge):
    edge(how)


def bad_rows_get_codes_in_range():
    """A kernel on a GPU cannot tell of bad rows without stalling: it keeps them from the others."""
    for dim in (9, 80):
        x, books = draw(70, dim), [draw(70, dim, seed=1), draw(5, dim, seed=2)]
        wanted = encode(x, books, "triton")
        for value in (NAN, INF, -INF, 3e38):
            broken = x.clone()
            broken[13] = value
            codes = encode(broken, books, "triton")
            assert (codes < torch.tensor([70, 5])).all()
            assert codes[:13].equal(wanted[:13]) and codes[14:].equal(wanted[14:])


def test_edges_in_tritons_interpreter():
    done = in_tritons_interpreter(
        "import test_residual_kmeans as tests\n"
        "for edge in tests.EDGES: edge('triton'); print(edge.__name__)\n"
        "tests.bad_rows_get_codes_in_range()"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [edge.__name__ for edge in EDGES]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("how", BACKENDS)
def test_names_the_first_bad_row(how, threads):
    x = draw(3000, 8)
    x[[700, 2900]] = NAN
    torch.set_num_threads(threads)
    try:
        with pytest.raises(ValueError, match=r"^x: row 700 is not finite$"):
            encode(x, [draw(9, 8)], how)
        x[[700, 2900]] = 3e38
        with pytest.raises(ValueError, match=r"^x: row 700 is too large: at level 0 "):
            encode(x, [draw(9, 8)], how)
    finally:
        torch.set_num_threads(1)


@pytest.mark.skipif(not isa_levels(), reason="the compiled library was not built")
def test_memory_does_not_grow_with_rows():
    """Codes take 4 MB here; scores of one level alone would take 256 MB."""
    program = (
        "import resource, torch; from livrec_fast import residual_kmeans_encode as encode\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024\n"
        "torch.set_num_threads(2)\n"
        "x, books = torch.ones(1_000_000, 16), [torch.randn(64, 16) for _ in range(4)]\n"
        "encode(x[:5000], books, backend='native')\n"
        "before = peak(); encode(x, books, backend='native'); print(peak() - before)"
    )
    done = python(program)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= 4 + 4


def test_decode_sums_codewords():
    books = [draw(5, 3, seed=1), draw(4, 3, seed=2)]
    codes = torch.tensor([[4, 0], [0, 3]], dtype=torch.uint8)
    wanted = torch.stack([books[0][4] + books[1][0], books[0][0] + books[1][3]])
    assert residual_kmeans_decode(codes, books).equal(wanted)


def meta(tensor):
    return tensor.to("meta")


def with_value(row, value):
    def change(tensor):
        other = tensor.clone()
        other[row, 0] = value
        return other

    return change


def changed(name, change):
    return lambda good: {name: change(good[name])}


def book(level, change):
    return changed("codebooks", lambda c: [*c[:level], change(c[level]), *c[level + 1 :]])


_LEVEL = r"^codebooks\[0\]: "
_BAD_CODEBOOKS = [
    ("codebooks: none", lambda g: {"codebooks": []}, ValueError, "^codebooks: at least one level"),
    ("codebooks: list", book(0, Tensor.tolist), TypeError, _LEVEL + "must be a tensor, got list"),
    ("codebooks: integers", book(0, Tensor.int), TypeError, _LEVEL + "dtype .* got int32"),
    (
        "codebooks: dtypes differ",
        book(2, Tensor.half),
        TypeError,
        r"^codebooks\[2\]: dtype must be that of codebooks\[0\], torch.float32, got torch.float16",
    ),
    ("codebooks: one dimension", book(0, lambda c: c[0]), ValueError, _LEVEL + r"shape.* \[32\]$"),
    (
        "codebooks: empty",
        book(0, lambda c: c[:0]),
        ValueError,
        _LEVEL + "N must be 1 to 65536.* 0$",
    ),
    (
        "codebooks: too many codewords",
        book(0, lambda c: torch.zeros(65537, 32)),
        ValueError,
        _LEVEL + "N must be 1 to 65536, got 65537$",
    ),
    (
        "codebooks: width",
        book(2, lambda c: c[:, :31]),
        ValueError,
        r"^codebooks\[2\]: shape must be \[N, 32\], got \[34, 31\]$",
    ),
    ("codebooks: device", book(0, meta), ValueError, _LEVEL + "device .* (x|codes), cpu, got meta"),
]
_BAD_ROWS = [
    *_BAD_CODEBOOKS,
    ("x: list", changed("x", Tensor.tolist), TypeError, "^x: must be a tensor, got list"),
    ("x: integers", changed("x", Tensor.int), TypeError, "^x: dtype .* got int32"),
    ("x: one dimension", changed("x", lambda x: x[0]), ValueError, r"^x: shape .* got \[32\]"),
    (
        "x: no column",
        lambda g: {"x": g["x"][:, :0], "codebooks": [b[:, :0] for b in g["codebooks"]]},
        ValueError,
        r"^x: D must be at least 1, got shape \[300, 0\]",
    ),
    ("x: width", changed("x", lambda x: x[:, :31]), ValueError, _LEVEL + r"shape .*\[N, 31\]"),
    ("x: device", changed("x", meta), ValueError, _LEVEL + "device .* x, meta, got cpu"),
    ("x: NaN", changed("x", with_value(17, NAN)), ValueError, "^x: row 17 is not finite"),
    ("x: infinity", changed("x", with_value(299, -INF)), ValueError, "^x: row 299 is not fin"),
    ("backend", lambda g: {"backend": "cuda"}, BackendError, "cannot run this"),
]
BAD_INPUTS = {
    "residual_kmeans_encode": _BAD_ROWS,
    "residual_kmeans_details": [
        *_BAD_ROWS,
        ("second: int", lambda g: {"second": 1}, TypeError, "^second: must be a bool, got int"),
    ],
    "residual_kmeans_decode": [
        *_BAD_CODEBOOKS,
        ("codes: list", changed("codes", Tensor.tolist), TypeError, "^codes: must be .* got list"),
        ("codes: floats", changed("codes", Tensor.float), TypeError, "^codes: dtype .* float32"),
        ("codes: device", changed("codes", meta), ValueError, _LEVEL + ".*codes, meta, got cpu"),
        (
            "codes: levels",
            changed("codes", lambda codes: codes[:, :2]),
            ValueError,
            r"^codes: shape must be \[M, 3\], got \[300, 2\]",
        ),
        (
            "codes: id = size",
            changed("codes", with_value(5, 40)),
            IndexError,
            r"^codes: codes\[5, 0\] = 40 is outside \[0, 40\)",
        ),
        (
            "codes: huge id",
            changed("codes", lambda codes: with_value(0, 2**62)(codes.long())),
            IndexError,
            r"^codes: codes\[0, 0\] = 4611686018427387904 is outside",
        ),
        (
            "codes: negative id",
            changed("codes", with_value(299, -1)),
            IndexError,
            r"^codes: codes\[299, 0\] = -1 is outside \[0, 40\)",
        ),
    ],
}
