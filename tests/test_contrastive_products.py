"""Products that in_batch_contrastive's C++ kernel keeps for its gradient."""

import pytest
import torch
from conftest import SUBJECTS

from livrec_fast import InBatchContrastive, _native, in_batch_contrastive
from livrec_fast.ops import contrastive

native = pytest.mark.skipif(_native.MISSING is not None, reason=f"{_native.MISSING}")
SUBJECT = SUBJECTS["in_batch_contrastive"]
LEVELS = _native.isa_levels() if _native.MISSING is None else []
NAMES = [argument.name for argument in SUBJECT.op.schema.arguments]
AT = NAMES.index("keep_products")
PLAIN = dict.fromkeys(
    ("query_ids", "key_ids", "false_negative_threshold", "log_q", "valid", "extra_keys")
)
SIZES = {
    "many tiles": {"B": 301, "D": 40, "E": 77},
    "whole tiles": {"B": 256, "D": 128, "E": 0},
    "pair vectors": {"B": 70, "D": 17, "E": 3, "P": 5},
    "groups": {"B": 131, "D": 24, "E": 9, "groups": 1},
    "unsampled positive": {"B": 131, "D": 24, "E": 9, "rule": 1},
}
CHANGES = {
    "all": {},
    "plain": PLAIN,
    "one way": {"symmetric": False},
    "no bits": {"keep_pairs": False},
    "as they are": {"normalize": False, "temperature": torch.tensor(3.0)},
    "bf16": {"precision": "bf16"},
}


def arguments(sizes, dtype=torch.float32, **changes):
    """Return the operator's arguments, and which of them have gradients."""
    generator = torch.Generator().manual_seed(8)
    inputs = SUBJECT.oracle.make_inputs(generator, dtype, **sizes)
    kept = changes.pop("keep_pairs", None)
    args = SUBJECT.arguments(inputs | changes)
    if kept is not None:
        args[NAMES.index("keep_pairs")] = kept
    names = ("query", "key", "temperature", "log_q", "extra_keys")
    return args, [at for at, name in enumerate(NAMES) if name in names and args[at] is not None]


def run(args, leaves, kept, backend="native"):
    """Return all outputs, and the gradients of the leaves."""
    given = [arg.detach().requires_grad_() if at in leaves else arg for at, arg in enumerate(args)]
    given[AT] = kept
    outputs = SUBJECT.op.operator(backend)(*given)
    grad = torch.linspace(0.5, 1.5, len(outputs[0]), dtype=outputs[0].dtype)
    return outputs, torch.autograd.grad(outputs[0], [given[at] for at in leaves], grad)


def same(given, wanted):
    """Tell whether gradients have the same bits, and are no zeros."""
    assert all(grad.any() for grad in wanted if grad.numel())
    return all(torch.equal(one, other) for one, other in zip(given, wanted, strict=True))


@native
@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize(
    ("sizes", "name"),
    [(s, n) for s in SIZES for n in CHANGES if n != "plain" or s.endswith("tiles")],
)
def test_kept_or_computed_again_they_give_the_same_bits(isa, sizes, name):
    args, leaves = arguments(SIZES[sizes], **CHANGES[name])
    with _native.use_isa(isa):
        (*once, none), wanted = run(args, leaves, 0)
        columns = none.shape[1]
        assert none.shape[0] == 0 and columns >= len(args[0])
        for rows in (0.6, 1.0):  # of some, and of all
            count = int(rows * len(args[0])) * columns
            (*kept, products), found = run(args, leaves, count + columns - 1)
            assert products.numel() == count
            assert all(torch.equal(one, other) for one, other in zip(kept, once, strict=True))
            assert same(found, wanted)


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("groups", [0, 1])
def test_they_are_those_of_the_reference(dtype, groups):
    """-inf where a pair is masked, or is a row's own; columns that are not valid do not matter."""
    args, leaves = arguments({"B": 150, "D": 40, "E": 20, "groups": groups}, dtype)
    used = torch.nn.functional.pad(args[NAMES.index("valid")], (0, 20), value=True)
    products, wanted = (run(args, leaves, 2**24, name)[0][3] for name in ("native", "reference"))
    assert products.dtype == wanted.dtype == torch.float32
    assert products.diagonal().isneginf().all() and not used.all()
    products, wanted = products[:, used], wanted[:, used]
    assert torch.equal(products.isinf(), wanted.isinf()) and wanted.isinf().sum() > 150
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2  # the reference rounds them to the dtype
    torch.testing.assert_close(products, wanted, rtol=0, atol=tolerance)


@native
def test_threads_change_no_bit():
    args, leaves = arguments({"B": 1_100, "D": 24, "E": 300})
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(run(args, leaves, 2**24))
    finally:
        torch.set_num_threads(before)
    for outputs, grads in found[1:]:
        assert same(grads, found[0][1])
        assert torch.equal(outputs[3], found[0][0][3])


class Spy:
    """The operator, and how many products it was asked to keep."""

    schema = SUBJECT.op.schema
    kept: int | None = None

    def choose(self, *args):
        """Choose as the operator does."""
        return SUBJECT.op.choose(*args)

    def __call__(self, *args, backend):
        """Run the operator."""
        self.kept = args[AT]
        return SUBJECT.op(*args, backend=backend)


@native
@pytest.mark.parametrize(
    ("wants", "kept"),
    [
        ({}, 2**24),
        ({"keep_products": False}, 0),
        ({"leaf": "temperature"}, 2**24),
        ({"leaf": None}, 0),
        ({"grad": False}, 0),
        ({"backend": "reference"}, 0),
        ({"dtype": torch.float64}, 0),
    ],
)
def test_who_keeps_them(wants, kept, monkeypatch):
    """Who asks for it and wants gradients, from the kernel."""
    spy = Spy()
    monkeypatch.setattr(contrastive, "_op", spy)
    dtype = wants.get("dtype", torch.float32)
    leaves = {"query": torch.randn(48, 8, dtype=dtype), "temperature": torch.tensor(0.1)}
    leaf = wants.get("leaf", "query")
    if leaf is not None:
        leaves[leaf].requires_grad_()
    with torch.set_grad_enabled(wants.get("grad", True)):
        in_batch_contrastive(
            key=torch.randn(48, 8, dtype=dtype), **leaves, backend=wants.get("backend", "auto"),
            keep_products=wants.get("keep_products", True),
        )  # fmt: skip
    assert spy.kept == kept


@native
def test_the_module_passes_it_on(monkeypatch):
    spy = Spy()
    monkeypatch.setattr(contrastive, "_op", spy)
    for keeps in (False, True):
        InBatchContrastive(keep_products=keeps)(torch.randn(9, 4), torch.randn(9, 4))
        assert bool(spy.kept) == keeps


def test_triton_keeps_none():
    args, _ = arguments({"B": 20, "D": 8, "E": 0})
    args[AT] = 2**24
    assert SUBJECT.op.reasons(*args)["triton"] == "keeps no products"


@native
def test_the_gradient_takes_them_and_checks_them():
    args, leaves = arguments({"B": 20, "D": 8, "E": 0}, **PLAIN)
    args[AT] = 2**24
    outputs = [*SUBJECT.op.operator("native")(*args)]
    backward = torch.ops.livrec.in_batch_contrastive_backward.native
    needs = [at in leaves for at, arg in enumerate(args) if isinstance(arg, torch.Tensor)]
    grads = [torch.ones(20), None, None, None]
    found = backward(grads, *args, outputs, needs)[0]
    changed = outputs[3].clone()
    changed[7] += 0.5  # of one row: its own gradient is another
    other = backward(grads, *args, [*outputs[:3], changed], needs)[0]
    assert [i for i in range(20) if not torch.equal(found[i], other[i])] == [7]
    for wrong in (torch.ones(20, 19), outputs[3].double()):
        with pytest.raises(RuntimeError, match="outputs: products must be as the forward pass"):
            backward(grads, *args, [*outputs[:3], wrong], needs)
