"""The Triton kernels of the nearest codeword: what their split products and exact sums rest on."""

import re
from importlib.util import find_spec

import gpu_gates as gates
import pytest
import torch
from conftest import run_in_tritons_interpreter
from hard_vectors import WHOLE, Draw, exact_codes
from test_gates import needs_triton

from livrec_fast import kmeans_step, residual_kmeans_details, residual_kmeans_encode

NAN, INF = float("nan"), float("inf")


def whole_numbers_have_one_right_code():
    """Rows in registers with six, four and three products, and rows in scratch memory."""
    for name in ("crowd", "flat", "same", "giant", "rounded_codewords"):
        for rows, dim, size in [(20, 17, 48), (20, 40, 60), (9, 100, 33), (5, 150, 40)]:
            x, books = WHOLE[name](Draw(name, dim), rows, dim, size)
            codes = residual_kmeans_encode(x, books, backend="triton")
            assert codes.long().equal(exact_codes(x, books)), (name, rows, dim, size)


def seconds_tie_to_the_lowest_code():
    """Each codeword twice: the second is the first's equal, wherever the tiles divide."""
    book = torch.arange(100.0)[:, None].repeat(2, 3)
    x = torch.arange(100.0)[:, None].repeat(1, 3)
    got = residual_kmeans_details(x, [book, book[:1]], second=True, backend="triton")
    first = torch.arange(100)
    assert got.codes[:, 0].long().equal(first) and got.second[:, 0].long().equal(first + 100)
    assert (got.gap[:, 0] == 0).all()
    assert (got.second[:, 1] == 0).all() and (got.gap[:, 1] == INF).all()
    assert (got.residual_norms == 0).all()


def bad_rows_stay_alone():
    """They get codes in range; what is told of the other rows does not change."""
    for dim in (9, 140):
        draw = Draw("bad", dim)
        x, books = draw.normal(70, dim), [draw.normal(70, dim), draw.normal(5, dim)]
        flags = {"reconstruction": True, "second": True, "backend": "triton"}
        wanted = residual_kmeans_details(x, books, **flags)
        others = torch.arange(70) != 13
        for value in (NAN, INF, -INF, 3.4e38):
            broken = x.clone()
            broken[13] = value
            got = residual_kmeans_details(broken, books, **flags)
            for codes in (got.codes, got.second):
                assert (codes < torch.tensor([70, 5])).all()
            for one, other in zip(got, wanted, strict=True):
                assert one[others].equal(other[others])
            step = kmeans_step(broken, books[0], backend="triton")
            assert ((step.codes >= 0) & (step.codes < 70)).all()
            assert step.codes[others].equal(wanted.codes[others, 0].int())


def sums_are_exact_across_runs_of_codes():
    """Codes with more rows than one program adds up, with none, and with one."""
    x = torch.cat([torch.zeros(1300, 20), torch.full((1, 20), 9.0), torch.full((600, 20), 5.0)])
    x += Draw("sums").normal(*x.shape) * 2.0**-12
    x[0, 0] = 2.0**-40  # below a quantum: rounded away, as in the formula
    book = torch.tensor([0.0, 77, 9, 5])[:, None].repeat(1, 20)
    weights = Draw("weights").uniform(len(x))
    for given in (None, weights):
        got = kmeans_step(x, book, weights=given, backend="triton")
        wanted = kmeans_step(x, book, weights=given, backend="reference")
        assert got.codes.bincount(minlength=4).tolist() == [1300, 0, 1, 600]
        assert got.sums.equal(wanted.sums) and got.mass.equal(wanted.mass)


EDGES = [
    whole_numbers_have_one_right_code,
    seconds_tie_to_the_lowest_code,
    bad_rows_stay_alone,
    sums_are_exact_across_runs_of_codes,
]


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("edge", EDGES, ids=lambda edge: edge.__name__)
def test_edge_in_tritons_interpreter(edge):
    run_in_tritons_interpreter(edge)


@needs_triton
def test_rounding_to_quanta_is_not_folded():
    """(v + c) - c must reach the chip as an addition of c and one of -c."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module = gates.load("kmeans_step")

    @triton.jit
    def alone(quantum, value, out, _round_to: triton.language.constexpr):
        rounded = _round_to(triton.language.load(quantum), triton.language.load(value))
        triton.language.store(out, rounded)

    signature = {"quantum": "*fp64", "value": "*fp64", "out": "*fp64", "_round_to": "constexpr"}
    source = ASTSource(alone, signature, constexprs={(3,): module._round_to})
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    sass = gates.dump(built.asm["cubin"])
    assert len(re.findall(r"\b(?:DADD|DFMA)\b", sass)) == 2, sass


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dim", [20, 64, 100, 128, 200])
def test_large_batches_on_a_gpu(dim):
    """Sums and codes do not depend on how blocks share the chip."""
    x = torch.randn(100_003, dim, device="cuda")
    book = torch.randn(300, dim, device="cuda")
    first = kmeans_step(x, book, backend="triton")
    for _ in range(3):
        for one, other in zip(kmeans_step(x, book, backend="triton"), first, strict=True):
            assert one.equal(other)
    details = residual_kmeans_details(x, [book], backend="triton")
    assert details.codes[:, 0].int().equal(first.codes)
