"""in_batch_contrastive in bfloat16: at every level, against float64 and torch's own bfloat16."""

import pytest
import torch
import torch.nn.functional as F
from conftest import SUBJECTS

from livrec_fast import _native, in_batch_contrastive
from livrec_fast.testing.checks import check_forward, check_gradients, expected, results

pytestmark = pytest.mark.skipif(_native.MISSING is not None, reason=f"{_native.MISSING}")
EMULATED = [level for level in ("amx_emulated",) if "amx" in _native.isa_built()]
ISA_LEVELS = [*_native.isa_levels(), *EMULATED]
SUBJECT = SUBJECTS["in_batch_contrastive"]


def draw(dtype=torch.float32, **sizes):
    sizes = {"B": 301, "D": 40, "E": 77, "bf16": 1} | sizes
    return SUBJECT.oracle.make_inputs(torch.Generator().manual_seed(3), dtype, **sizes)


def check(inputs):
    wanted = expected(SUBJECT, inputs)
    check_forward(SUBJECT, "native", inputs, wanted)
    check_gradients(SUBJECT, "native", inputs, wanted)


@pytest.mark.parametrize(
    "sizes",
    [
        {"B": 1, "E": 1, "D": 1},
        {"B": 3, "E": 0, "D": 2},
        {"B": 97, "E": 64, "D": 33},
        {"B": 300, "E": 1, "D": 300},
        {"groups": 1},
        {"rule": 1},
        {"P": 7},
    ],
)
@pytest.mark.parametrize("isa", ISA_LEVELS)
def test_every_level_agrees(isa, sizes):
    with _native.use_isa(isa):
        check(draw(**sizes))


@pytest.mark.parametrize("symmetric, normalize", [(False, True), (True, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes_and_vectors_of_any_length(dtype, symmetric, normalize):
    inputs = draw(dtype) | {"symmetric": symmetric, "normalize": normalize}
    check(inputs | {"temperature": torch.tensor(0.2 if normalize else 5.0)})


@pytest.mark.parametrize("isa", ISA_LEVELS)
def test_inputs_of_bfloat16_take_the_same_path(isa):
    inputs = draw(torch.bfloat16)
    with _native.use_isa(isa):
        lowered = in_batch_contrastive(**inputs | {"precision": None}, backend="native")
        wide = {n: inputs[n].float() for n in ("query", "key", "extra_keys")}
        assert torch.equal(in_batch_contrastive(**inputs | wide, backend="native"), lowered)
        exact = in_batch_contrastive(**inputs | wide | {"precision": None}, backend="native")
    assert not torch.equal(exact, lowered)


def test_the_sums_are_exacter_than_a_product_in_bfloat16():
    """Rounding is of vectors alone: the loss is that of the rounded vectors, in float32."""
    inputs = draw() | {"false_negative_threshold": None}
    rounded = {
        n: F.normalize(inputs[n], dim=1).bfloat16().float() for n in ("query", "key", "extra_keys")
    }
    found = in_batch_contrastive(**inputs, backend="native")
    options = inputs | rounded | {"normalize": False, "precision": None}
    wanted = in_batch_contrastive(**options, backend="native")
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("temperature", [0.05, 0.2])
def test_gradients_err_no_more_than_torchs_own_in_bfloat16(temperature):
    generator = torch.Generator().manual_seed(0)
    both = torch.randn(512, 128, generator=generator)
    leaves = [(both + torch.randn(512, 128, generator=generator)) for _ in range(2)]
    leaves = [leaf.requires_grad_() for leaf in leaves]

    def eager(query, key):
        query, key = (F.normalize(x, dim=1).bfloat16() for x in (query, key))
        return F.cross_entropy((query @ key.T) / temperature, torch.arange(512))

    def ours(query, key, **options):
        return in_batch_contrastive(query, key, temperature=temperature, **options)

    exact = torch.autograd.grad(ours(*(x.double() for x in leaves)), leaves)
    losses = {"eager": eager(*leaves), "ours": ours(*leaves, precision="bf16", backend="native")}
    for at in range(2):
        errors = {}
        for name, loss in losses.items():
            found = torch.autograd.grad(loss, leaves, retain_graph=True)[at]
            errors[name] = float((found - exact[at]).norm() / exact[at].norm())
        assert 0 < errors["ours"] <= 1.2 * errors["eager"] < 0.1, errors


@pytest.mark.parametrize("isa", ISA_LEVELS)
def test_flushing_denormals_loses_no_number(isa):
    """Two numbers of bfloat16 in a word, the second a zero, look like a denormal float32."""
    inputs = draw(B=40, D=1) | {"normalize": False, "temperature": torch.tensor(1.0)}
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # the setting is the thread's own
    try:
        with _native.use_isa(isa):
            found = [results(SUBJECT, "native", inputs).named()]
            assert torch.set_flush_denormal(True)
            found.append(results(SUBJECT, "native", inputs).named())
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(before)
    for name, tensor in found[0].items():
        assert tensor.abs().max() > 1e-3, name
        torch.testing.assert_close(found[1][name], tensor, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("symmetric", [False, True])
def test_threads_change_no_bit(symmetric):
    before, found = torch.get_num_threads(), []
    inputs = draw(B=1_301) | {"symmetric": symmetric}
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(results(SUBJECT, "native", inputs).named())
    finally:
        torch.set_num_threads(before)
    assert all(tensor.any() for tensor in found[0].values() if tensor.numel())
    for other in found[1:]:
        for name, tensor in found[0].items():
            assert torch.equal(tensor, other[name]), name
