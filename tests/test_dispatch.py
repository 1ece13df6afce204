"""The choice of a backend: explained, forced, refused; and what autograd allows."""

import pytest
import torch
from conftest import python

import livrec_fast
from livrec_fast import BackendError, explain, residual_kmeans_decode, residual_kmeans_encode

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
BOOKS = [torch.eye(4), torch.eye(4)[:3] / 2]
native = pytest.mark.skipif(livrec_fast._native.MISSING is not None, reason="no compiled library")

TABLE = """residual_kmeans_encode(x=float32[5, 4] on cpu, codebooks=[float32[4, 4] on cpu, \
float32[3, 4] on cpu])
  native     chosen by auto
  triton     runs on CUDA tensors only
  reference  could run it"""


@native
def test_explain():
    assert explain(residual_kmeans_encode, X, BOOKS) == TABLE
    assert explain(residual_kmeans_encode, x=X, codebooks=BOOKS) == TABLE


def test_explain_refuses_what_is_no_op():
    with pytest.raises(TypeError, match="op: .*is not an op of livrec_fast"):
        explain(len, [])


def test_explain_checks_arguments_and_leaves_no_trace():
    with pytest.raises(TypeError, match="x: must be a tensor"):
        explain(residual_kmeans_encode, [1.0], BOOKS)
    assert residual_kmeans_encode(X, BOOKS).shape == (5, 2)


def test_a_named_backend_never_falls_back():
    with pytest.raises(BackendError) as caught:
        residual_kmeans_encode(X.double(), [b.double() for b in BOOKS], backend="native")
    lines = str(caught.value).splitlines()
    assert lines[0] == "backend: 'native' cannot run this."
    assert lines[1].startswith("residual_kmeans_encode(x=float64[5, 4] on cpu, codebooks=[float64")
    assert [line.split(maxsplit=1)[0] for line in lines[2:]] == ["native", "triton", "reference"]
    assert lines[2].endswith("computes in float32; x is float64")
    assert lines[3].endswith("computes in float32; x is float64")
    assert lines[4].endswith("chosen by auto")


@pytest.mark.parametrize("name", ["cuda", "nativ", ""])
def test_a_backend_that_an_op_does_not_have(name):
    with pytest.raises(BackendError, match=f"backend: '{name}' cannot run this"):
        residual_kmeans_decode(torch.zeros(3, 2, dtype=torch.uint8), BOOKS, backend=name)


SETUP = """
import sys, torch, livrec_fast
from livrec_fast import _native, explain
from torch.utils._python_dispatch import TorchDispatchMode
class Show(TorchDispatchMode):
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "livrec":
            print(op)
        return op(*args, **(kwargs or {}))
x, books = torch.ones(5, 4), [torch.eye(4)]
def encode(x=x, books=books, **options):
    with Show():
        return livrec_fast.residual_kmeans_encode(x, books, **options)
"""


def told(program, **variables):
    """Return the lines that a piece of Python prints, or that it dies with."""
    done = python(SETUP + program, **variables)
    return (done.stderr if done.returncode else done.stdout).strip().splitlines()


@native
def test_livrec_backend_forces_a_choice():
    program = "print(explain(encode)); encode(); encode(backend='native')"
    *_, explained, forced, named = told(program, LIVREC_BACKEND="reference")
    assert explained.split() == ["reference", "chosen", "by", "LIVREC_BACKEND"]
    assert forced == "livrec.residual_kmeans_encode.reference"
    assert named == "livrec.residual_kmeans_encode.native", "a name outranks the variable"


def test_livrec_backend_never_falls_back():
    program = (
        "try: encode(x.double(), [books[0].double()])\n"
        "except livrec_fast.BackendError as error: print(str(error).splitlines()[0])"
    )
    (line,) = told(program, LIVREC_BACKEND="native")
    assert line == "backend: 'native' (LIVREC_BACKEND) cannot run this."


def test_a_bogus_livrec_backend_is_refused():
    *_, line = told("", LIVREC_BACKEND="nativ")
    assert line.startswith("ValueError: LIVREC_BACKEND: must be one of auto, ")
    assert line.endswith("got 'nativ'")


@native
def test_livrec_cpu_isa_forces_a_level():
    lines = told("encode(); print(_native.isa())", LIVREC_CPU_ISA="baseline")
    assert lines == ["livrec.residual_kmeans_encode.native", "baseline"]


@native
@pytest.mark.parametrize("level", ["avx9", ""])
def test_a_bogus_livrec_cpu_isa_is_refused(level):
    *_, line = told("print(_native.isa())", LIVREC_CPU_ISA=level)
    assert line.startswith("ValueError: LIVREC_CPU_ISA: must be one of baseline")
    assert line.endswith(f"got {level!r}")


@native
def test_use_isa_restores_the_level():
    before = livrec_fast._native.isa()
    with livrec_fast._native.use_isa("baseline"):
        assert livrec_fast._native.isa() == "baseline"
    assert livrec_fast._native.isa() == before
    with pytest.raises(ValueError, match="isa: 'sse' is not one of the levels"):
        with livrec_fast._native.use_isa("sse"):
            pass


CODES = torch.tensor([[0, 2], [3, 0], [0, 1]])


def test_double_backward_says_no():
    books = [book.clone().requires_grad_() for book in BOOKS]
    out = residual_kmeans_decode(CODES, books)
    (grad, _) = torch.autograd.grad(out.square().sum(), books, create_graph=True)
    with pytest.raises(RuntimeError, match="residual_kmeans_decode can be differentiated once"):
        grad.sum().backward()


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (True, True)])
def test_gradients_of_some_inputs(wanted):
    books = [book.clone().requires_grad_(want) for book, want in zip(BOOKS, wanted, strict=True)]
    weights = torch.arange(12.0).reshape(3, 4)
    (residual_kmeans_decode(CODES, books) * weights).sum().backward()
    for book, column, want in zip(books, CODES.T, wanted, strict=True):
        if want:
            expected = torch.zeros_like(book).index_add(0, column, weights)
            torch.testing.assert_close(book.grad, expected)
        else:
            assert book.grad is None


def test_no_graph_where_none_is_wanted():
    assert not residual_kmeans_decode(CODES, BOOKS).requires_grad
    books = [book.clone().requires_grad_() for book in BOOKS]
    assert not residual_kmeans_encode(X, books).requires_grad
    with torch.no_grad():
        assert not residual_kmeans_decode(CODES, books).requires_grad
