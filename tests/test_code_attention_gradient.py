"""Gradients of code attention: rows and sums, sparse tensors, masked rows, large logits."""

import pytest
import torch
from hard_vectors import kernels_of, run
from test_code_attention import FIELDS
from test_target_attention import COMMON

from livrec_fast import code_attention, code_attention_gradient, prefix_ngram_keys
from livrec_fast.reference.code_attention import make_inputs


def _other(name, change):
    return lambda good: {name: change(good[name])}


BAD_INPUTS = {
    "code_attention_gradient": [
        *COMMON,
        *FIELDS,
        ("grad list", lambda g: {"grad": [[0.0]]}, TypeError, "grad: .* list"),
        ("grad int", _other("grad", torch.Tensor.int), TypeError, "grad: .* int32"),
        ("grad half", _other("grad", torch.Tensor.half), TypeError, "grad: dtype .*float16"),
        ("grad few", _other("grad", lambda t: t[1:]), ValueError, r"grad: .*\[6, 4, 2, 24\], got"),
        ("grad narrow", _other("grad", lambda t: t[..., 1:]), ValueError, r"grad: .* 2, 23\]"),
        ("grad meta", _other("grad", lambda t: t.to("meta")), ValueError, "grad: device .* meta"),
        ("out none", lambda g: {"out": None}, TypeError, "out: must be a tensor, got NoneType"),
        ("out half", _other("out", torch.Tensor.bfloat16), TypeError, "out: dtype .*bfloat16"),
        ("out of q", lambda g: {"out": g["q"]}, ValueError, r"out: .*24\], got \[6, 4, 2, 16\]"),
        ("out meta", _other("out", lambda t: t.to("meta")), ValueError, "out: device .* meta"),
        ("lse none", lambda g: {"lse": None}, TypeError, "lse: must be a tensor, got NoneType"),
        ("lse half", _other("lse", torch.Tensor.half), TypeError, "lse: .* float32, got float16"),
        ("lse few", _other("lse", lambda t: t[:, 1:]), ValueError, r"lse: .*\[6, 4, 2\], got"),
        ("lse meta", _other("lse", lambda t: t.to("meta")), ValueError, "lse: device .* meta"),
        ("grad_lse", lambda g: {"grad_lse": 1.0}, TypeError, "grad_lse: must be .*, got float"),
        ("its dtype", _other("grad_lse", torch.Tensor.double), TypeError, "grad_lse: .* float64"),
        ("its shape", _other("grad_lse", lambda t: t[1:]), ValueError, r"grad_lse: .* got \[5,"),
        ("its device", _other("grad_lse", lambda t: t.to("meta")), ValueError, "grad_lse: .* meta"),
    ]
}
KERNELS = kernels_of("code_attention_gradient")
SIZES = {"B": 5, "C": 3, "L": 30, "F": 4, "N": 9, "H": 2, "d": 8, "dv": 6, "bias": 2, "rows": 20}
FIELD_KINDS = [
    {"kind": 0},
    {"kind": 1, "hash": 1, "rows": 5},
    {"kind": 2, "hash": 2},
    {"kind": 3, "pack": 1},
    {"kind": 0, "N": 300},
    {"odd": 1, "bias": 1},
    {"odd": 2},
    {"odd": 3, "kind": 2},
]
POSITIONAL = ("q", "codes", "key_tables", "value_tables", "offsets")


def _inputs(dtype=torch.float32, seed=0, **sizes):
    generator = torch.Generator().manual_seed(seed)
    inputs = make_inputs(generator, dtype, **SIZES | sizes)
    del inputs["return_lse"]
    return inputs


def _leaves(inputs):
    tables = [*inputs["key_tables"], *inputs["value_tables"]]
    floats = [inputs["q"], inputs["bias"], *tables]
    return [t.detach().requires_grad_() for t in floats if t is not None]


def _flows(results, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(t.shape, generator=generator).to(t) for t in results]


def _gradient(inputs, kernel="auto", both=True):
    """Return what the op gives for the attention's own results and random gradients of them."""
    with torch.no_grad():
        out, lse = code_attention(**inputs, return_lse=True)
    grad, grad_lse = _flows((out, lse))
    args = (grad, *(inputs[name] for name in POSITIONAL), out, lse)
    rest = {name: value for name, value in inputs.items() if name not in POSITIONAL}
    return run(code_attention_gradient, kernel, *args, **rest, grad_lse=grad_lse if both else None)


def _dense(inputs, both=True):
    leaves = _leaves(inputs)
    tables = iter(leaves[len(leaves) - 2 * len(inputs["key_tables"]) :])
    given = {name: [next(tables) for _ in inputs[name]] for name in ("key_tables", "value_tables")}
    given |= {"q": leaves[0], "bias": None if inputs["bias"] is None else leaves[1]}
    results = code_attention(**inputs | given, return_lse=True)
    flows = _flows(results)
    count = 2 if both else 1
    return torch.autograd.grad(results[:count], leaves, flows[:count])


def _scattered(found, inputs):
    """Return the op's gradients as dense ones, in the order of leaves."""
    grad_q, grad_bias, *sums = found
    tables = []
    for name, first in {"key_tables": 1, "value_tables": 2}.items():
        for table, rows, values in zip(inputs[name], sums[::3], sums[first::3], strict=True):
            tables.append(torch.zeros(table.shape).to(values).index_copy(0, rows, values))
    return [grad_q, *([] if inputs["bias"] is None else [grad_bias]), *tables]


@pytest.mark.parametrize("both", [True, False])
@pytest.mark.parametrize("kinds", FIELD_KINDS, ids=str)
def test_the_formula_is_what_autograd_gives(kinds, both):
    inputs = _inputs(torch.float64, **kinds)
    found = _gradient(inputs, both=both)
    wanted = _dense(inputs, both)
    assert found[1].shape == inputs["bias"].shape
    torch.testing.assert_close(tuple(_scattered(found, inputs)), wanted)
    assert all(grad.ne(0).any() for grad in wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kernel", KERNELS)
def test_dtypes_and_rows(kernel, dtype):
    inputs = _inputs(dtype, kind=3, hash=1)
    found = _gradient(inputs, kernel)
    kinds = [t.dtype for t in found]
    assert kinds == [dtype, torch.float32, *[torch.int64, torch.float32, torch.float32] * 4]
    sizes = [len(table) for table in inputs["key_tables"]]
    names = ("codes", "levels", "groups", "hashing", "packed")
    rows = prefix_ngram_keys(**{name: inputs[name] for name in names}, rows=sizes)
    for field, (at, keys, values) in enumerate(
        zip(found[2::3], found[3::3], found[4::3], strict=True)
    ):
        assert at.tolist() == sorted({row for row in rows[:, field].tolist() if row >= 0})
        assert keys.shape == (len(at), 2, 8) and values.shape == (len(at), 2, 6)
    exact = {
        name: value.double() if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in inputs.items()
    }
    exact |= {name: [t.double() for t in inputs[name]] for name in ("key_tables", "value_tables")}
    tolerance = {torch.float32: 1e-5, torch.float16: 0.01, torch.bfloat16: 0.1}[dtype]
    wanted = _dense(exact)
    for mine, want in zip(_scattered(found, inputs), wanted, strict=True):
        assert (mine - want).abs().max() <= tolerance * want.abs().max()


@pytest.mark.parametrize("kernel", KERNELS)
def test_rows_of_masked_histories_are_listed_with_zeros(kernel):
    inputs = _inputs(bias=1)
    inputs["bias"].fill_(-torch.inf)
    grad_q, grad_bias, *sums = _gradient(inputs, kernel)
    for at, code in zip(sums[::3], inputs["codes"].T, strict=True):
        assert at.tolist() == sorted(set(code.tolist()) - {-1}) != []
    for tensor in (grad_q, grad_bias, *sums[1::3], *sums[2::3]):
        assert tensor.numel() and tensor.eq(0).all()


def test_masked_histories_get_no_gradient_from_an_infinite_one_of_lse():
    inputs = _inputs(odd=1)
    dense, sparse = _sparse(inputs, True, lambda out, lse: lse.square().sum())
    assert torch.isneginf(code_attention(**inputs, return_lse=True)[1]).any()
    assert all(t.to_dense().isfinite().all() for t in (*dense, *sparse))


@pytest.mark.parametrize("kernel", KERNELS)
def test_nothing_to_add_up(kernel):
    for sizes in ({"B": 0}, {"L": 0}):
        found = _gradient(_inputs(bias=0, **sizes), kernel)
        assert [list(t.shape) for t in found[1:]] == [[0], *[[0], [0, 2, 8], [0, 2, 6]] * 4]
    found = _gradient(_inputs(C=0), kernel)
    assert all(len(rows) for rows in found[2::3])
    assert all(t.eq(0).all() for t in (found[1], *found[3::3], *found[4::3]))


def _sparse(inputs, sparse, flow, **rest):
    leaves = _leaves(inputs)
    offset = len(leaves) - 2 * len(inputs["key_tables"])
    tables = leaves[offset:]
    keys, values = tables[: len(tables) // 2], tables[len(tables) // 2 :]
    given = {"q": leaves[0], "key_tables": keys, "value_tables": values}
    given["bias"] = None if inputs["bias"] is None else leaves[1]
    results = code_attention(**inputs | given, sparse=sparse, return_lse=True, **rest)
    found = torch.autograd.grad(flow(*results), leaves, allow_unused=True)
    return found[:offset], found[offset:]


FLOWS = {
    "both": lambda out, lse: out.float().square().sum() + lse[lse.isfinite()].sum(),
    "out": lambda out, lse: out.float().square().sum(),
    "lse": lambda out, lse: lse[lse.isfinite()].square().sum(),
}


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("kinds", [*FIELD_KINDS, {"bias": 0}], ids=str)
def test_sparse_gradients_are_coalesced_and_the_dense_ones(kinds, flow):
    inputs = _inputs(**kinds)
    (mine, sparse), (others, dense) = (_sparse(inputs, s, FLOWS[flow]) for s in (True, False))
    torch.testing.assert_close(mine, others, rtol=1e-4, atol=3e-5)
    for ours, theirs in zip(sparse, dense, strict=True):
        assert ours.is_sparse and ours.is_coalesced() and ours.shape == theirs.shape
        assert torch.equal(ours.indices()[0], torch.unique(ours.indices()[0]))
        torch.testing.assert_close(ours.to_dense(), theirs, rtol=1e-4, atol=3e-5)
    assert any(theirs.any() for theirs in dense)


def test_sparse_gradients_under_autocast_have_the_dtype_of_tables():
    """Field 3 has one row, where gradients that should cancel do so in spite of bfloat16."""
    inputs = _inputs(seed=3)
    exact = [t for part in _sparse(inputs, False, FLOWS["out"]) for t in part]
    with torch.autocast("cpu", torch.bfloat16):
        sparse, dense = (_sparse(inputs, s, FLOWS["out"]) for s in (True, False))
    assert all(t.is_sparse for t in sparse[1]) and len(inputs["key_tables"][3]) == 1
    for ours, theirs, want in zip(sum(sparse, ()), sum(dense, ()), exact, strict=True):
        assert ours.dtype == theirs.dtype == torch.float32
        ours = ours.to_dense() if ours.is_sparse else ours
        limit = 2 * (theirs - want).abs().max() + 8e-3 * want.abs().max().clamp(min=1)
        assert (ours - want).abs().max() <= limit


def test_sparse_gradients_train_one_table_with_a_sparse_optimiser():
    inputs = _inputs(kind=2, rows=50)
    table = inputs["value_tables"][3].requires_grad_()
    before = table.detach().clone()
    optimizer = torch.optim.SparseAdam([table], lr=0.1)
    code_attention(**inputs, sparse=True).square().sum().backward()
    assert inputs["q"].grad is None
    optimizer.step()
    moved = (table.detach() != before).flatten(1).any(1)
    wanted = torch.zeros(len(table), dtype=torch.bool)
    wanted[table.grad.coalesce().indices()[0]] = True
    assert torch.equal(moved, wanted) and 0 < wanted.sum() < len(table)


def _large(pattern, dtype, n=64):
    """Draw one history whose logits are +-10^4 exactly: q is 100, keys are +-100."""
    signs = {
        "one": [1.0] + [-1.0] * (n - 1), "equal": [1.0] * n, "low": [-1.0] * n,
        "alternating": [1.0, -1.0] * (n // 2),
    }[pattern]  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    return {
        "q": torch.full((1, 2, 1, 1), 100.0, dtype=dtype),
        "codes": torch.arange(n)[:, None],
        "key_tables": [100 * torch.tensor(signs, dtype=dtype).reshape(n, 1, 1)],
        "value_tables": [torch.randn(n, 1, 3, generator=generator).to(dtype)],
        "offsets": torch.tensor([0, n]),
        "bias": torch.zeros(n, dtype=dtype),
        "scale": 1.0,
    }


@pytest.mark.parametrize("kernel", kernels_of("code_attention"))
@pytest.mark.parametrize("pattern", ["one", "equal", "low", "alternating"])
def test_logits_of_ten_thousand(pattern, kernel):
    def call(dtype, name):
        inputs = _large(pattern, dtype)
        leaves = _leaves(inputs)
        given = dict(zip(("q", "bias"), leaves, strict=False))
        given |= {"key_tables": [leaves[2]], "value_tables": [leaves[3]]}
        results = run(code_attention, name, **inputs | given, return_lse=True)
        return (*results, *torch.autograd.grad(results, leaves, _flows(results)))

    got, want = call(torch.float32, kernel), call(torch.float64, "reference")
    for at, (mine, exact) in enumerate(zip(got, want, strict=True)):
        mine, exact = mine.detach(), exact.detach()
        scale = max(1.0, float(exact.abs().max()))
        assert (mine - exact).abs().max() <= 2e-6 * scale, at


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("pattern", ["one", "equal", "low", "alternating"])
def test_row_gradients_at_logits_of_ten_thousand(pattern, kernel):
    inputs, exact = (_large(pattern, dtype) for dtype in (torch.float32, torch.float64))
    found, wanted = _scattered(_gradient(inputs, kernel), inputs), _dense(exact)
    for at, (mine, want) in enumerate(zip(found, wanted, strict=True)):
        assert (mine - want).abs().max() <= 2e-6 * max(1.0, float(want.abs().max())), at
