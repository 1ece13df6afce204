"""The Triton kernels of code attention: their edges, and how they reach the chip."""

import re
from importlib.util import find_spec

import gpu_gates as gates
import pytest
import torch
from conftest import run_in_tritons_interpreter
from test_gates import needs_triton

from livrec_fast import code_attention, code_attention_gradient, explain
from livrec_fast.reference.code_attention import make_inputs

POSITIONAL = ("q", "codes", "key_tables", "value_tables", "offsets")
SIZES = {"B": 3, "C": 2, "L": 20, "F": 2, "N": 9, "H": 1, "d": 6, "dv": 5, "bias": 2}


def _inputs(dtype=torch.float32, **sizes):
    inputs = make_inputs(torch.Generator().manual_seed(3), dtype, **SIZES | sizes)
    del inputs["return_lse"]
    return inputs


def _double(value):
    if isinstance(value, list):
        return [_double(item) for item in value]
    floats = torch.is_tensor(value) and value.is_floating_point()
    return value.double() if floats else value


def _flows(out, lse):
    generator = torch.Generator().manual_seed(4)
    return (torch.randn(t.shape, generator=generator).to(t) for t in (out, lse))


def _all(inputs, kernel):
    """Return out, lse and everything of the gradient."""
    out, lse = code_attention(**inputs, return_lse=True, backend=kernel)
    grad, grad_lse = _flows(out, lse)
    args = (grad, *(inputs[name] for name in POSITIONAL), out, lse)
    rest = {name: value for name, value in inputs.items() if name not in POSITIONAL}
    found = code_attention_gradient(*args, **rest, grad_lse=grad_lse, backend=kernel)
    return [out, lse, *found]


def _agree(inputs, limit=2e-5):
    got = _all(inputs, "triton")
    wanted = _all({name: _double(value) for name, value in inputs.items()}, "reference")
    for at, (one, other) in enumerate(zip(got, wanted, strict=True)):
        assert one.shape == other.shape
        if not one.is_floating_point():
            assert one.equal(other), at
            continue
        there = other.isfinite()
        assert one[~there].double().equal(other[~there]), at
        error, greatest = (one.double() - other)[there].abs(), other[there].abs()
        assert not error.numel() or error.max() <= limit * greatest.max().clamp(min=1), at
    assert all(one.any() for one in got if one.is_floating_point() and one.numel())
    return got


def histories_of_many_pieces():
    """Lengths around a piece's, and one of several; the pieces' greatest logits far apart."""
    inputs = _inputs(bias=1)
    offsets = torch.tensor([0, 256, 256, 513, 1600])
    generator = torch.Generator().manual_seed(0)
    T = int(offsets[-1])
    inputs |= {
        "q": torch.randn(4, 2, 1, 6, generator=generator),
        "codes": torch.randint(-1, 3, (T, 2), generator=generator),
        "offsets": offsets,
        "bias": torch.linspace(-60, 60, T).roll(700),
    }
    _agree(inputs)


def candidates_of_many_blocks():
    """More than one block of candidates, the last in part; columns that fill no tile."""
    for sizes in ({"C": 100, "d": 17, "dv": 70}, {"C": 33, "d": 100, "dv": 3, "bias": 0}):
        _agree(_inputs(B=2, L=40, **sizes))


def as_many_fields_as_it_takes():
    _agree(_inputs(F=8, N=40, kind=3, rows=7, hash=1, H=2))


def hot_logits_do_not_overflow():
    """Logits up to 10^4 of both signs, of whole numbers, so that they are exact."""
    inputs = _inputs(B=1, L=20, F=1, bias=1)
    generator = torch.Generator().manual_seed(0)
    whole = torch.randint(-9, 10, (9, 1, 6), generator=generator).float()
    T = len(inputs["codes"])
    inputs |= {"q": torch.full((1, 2, 1, 6), 100.0), "key_tables": [whole], "scale": 2.0}
    inputs["bias"] = torch.arange(T).float() * 500 - 5000
    _agree(inputs)


def values_with_a_common_part():
    """D is nearly one number: its differences must survive, and gradients of logits add up to 0."""
    inputs = _inputs(L=60)
    inputs["value_tables"] = [table + 1000 for table in inputs["value_tables"]]
    _agree(inputs, 2e-4)


def masked_histories_get_zeros():
    inputs = _inputs(bias=1)
    inputs["bias"] = torch.full_like(inputs["bias"], -torch.inf)
    out, lse, *found = _all(inputs, "triton")
    assert out.eq(0).all() and lse.isneginf().all()
    assert all(one.eq(0).all() for one in (*found[:2], *found[3::3], *found[4::3]))
    assert all(len(rows) for rows in found[2::3])


def unaligned_tables_are_copied():
    inputs = _inputs(d=16, dv=16)
    got = _all(inputs, "triton")
    for name in ("key_tables", "value_tables"):
        inputs[name] = [
            torch.cat([t.new_ones(1), t.flatten()])[1:].view(t.shape) for t in inputs[name]
        ]
        assert all(table.data_ptr() % 16 for table in inputs[name])
    assert all(one.equal(other) for one, other in zip(_all(inputs, "triton"), got, strict=True))


def bad_contents_stay_in_bounds():
    """The host does not look at them: codes out of range are unknown, offsets are cut off."""
    from livrec_fast.kernels import code_attention as kernels
    from livrec_fast.kernels import code_attention_gradient as gradients

    codes = torch.tensor([[0, 1], [2, 0], [-7, 1], [1, 3], [1, 2]])
    tables = [torch.ones(2, 1, 4), torch.full((3, 1, 4), 2.0)]
    q, rest = torch.zeros(3, 1, 1, 4), (None, 1.0, (2, 3), (1, 1), "modulo", False)
    offsets = torch.tensor([-3, 2**62, 1, 2**62])
    out, lse = kernels.code_attention(q, codes, tables, tables, offsets, *rest)
    sums = torch.tensor([3.0, 2, 2, 1, 3])
    assert torch.allclose(out[:, 0, 0, 0], torch.tensor([float(sums.mean()), 0, 0]))
    given = (q, codes, tables, tables, offsets, *rest, out, lse)
    found = gradients.code_attention_gradient(torch.ones_like(out), None, *given)
    assert [rows.tolist() for rows in found[2::3]] == [[0, 1], [0, 1, 2]]
    assert torch.allclose(found[4][:, 0, 0], torch.tensor([0.2, 0.4]))


def what_it_cannot_do_is_refused():
    asked = {
        "at most 8 fields": {"F": 9},
        "d and dv at most 128 in float32": {"dv": 129},
        "are float64": {"dtype": torch.float64},
    }
    for words, sizes in asked.items():
        told = explain(code_attention, **_inputs(**sizes))
        (line,) = [line for line in told.splitlines() if line.startswith("  triton")]
        assert words in line


EDGES = [
    histories_of_many_pieces,
    candidates_of_many_blocks,
    as_many_fields_as_it_takes,
    hot_logits_do_not_overflow,
    values_with_a_common_part,
    masked_histories_get_zeros,
    unaligned_tables_are_copied,
    bad_contents_stay_in_bounds,
    what_it_cannot_do_is_refused,
]


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("edge", EDGES, ids=lambda edge: edge.__name__)
def test_edge_in_tritons_interpreter(edge):
    run_in_tritons_interpreter(edge)


@needs_triton
def test_table_rows_travel_in_128_bits():
    """As many loads as a tile of keys and one of values need in each field, at least."""
    module = gates.load("code_attention")
    seen = 0
    for kernel, types, constants, options in module.compile_configs():
        if kernel is module._attend and constants["D"] == constants["DV"] == 64:
            sass = gates.compile_triton(kernel, types, constants, options, 90).sass
            assert len(re.findall(r"(LDG|LDGSTS)\.E\S*\.128", sass)) >= 2 * constants["FIELDS"]
            seen += 1
    assert seen >= 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_batches_on_a_gpu(dtype):
    """Against the reference on the CPU in float64, and against themselves."""
    sizes = {"B": 64, "C": 20, "L": 4000, "F": 3, "N": 300, "H": 2, "d": 64, "dv": 64, "kind": 2}
    inputs = _inputs(dtype, rows=50_000, **sizes)
    limit = {torch.float32: 1e-4, torch.bfloat16: 0.05}[dtype]

    def move(value):
        if isinstance(value, list):
            return [move(item) for item in value]
        return value.cuda() if torch.is_tensor(value) else value

    on_gpu = {name: move(value) for name, value in inputs.items()}
    got = code_attention(**on_gpu, return_lse=True, backend="triton")
    wanted = code_attention(**{n: _double(v) for n, v in inputs.items()}, return_lse=True)
    for one, other in zip(got, wanted, strict=True):
        there = other.isfinite()
        assert ((one.cpu().double() - other)[there].abs().max()) <= limit * other[there].abs().max()
    grad, grad_lse = _flows(*(t.cpu() for t in got))
    rest = {name: value for name, value in on_gpu.items() if name not in POSITIONAL}
    args = (grad.cuda(), *(on_gpu[name] for name in POSITIONAL), *got)
    rest |= {"grad_lse": grad_lse.cuda(), "backend": "triton"}
    first, again = (code_attention_gradient(*args, **rest) for _ in range(2))
    assert all(one.equal(other) for one, other in zip(first, again, strict=True))
    assert all(one.isfinite().all() and one.any() for one in first)
