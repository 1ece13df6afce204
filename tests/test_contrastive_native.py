"""in_batch_contrastive's C++ kernel: against float64, over many tiles, masks and temperatures."""

import json

import pytest
import torch
from conftest import SUBJECTS, python

from livrec_fast import _native, in_batch_contrastive
from livrec_fast.testing.checks import check_forward, check_gradients, expected, results

pytestmark = pytest.mark.skipif(_native.MISSING is not None, reason=f"{_native.MISSING}")
ISA_LEVELS = _native.isa_levels() if _native.MISSING is None else []
SIZES = {"B": 301, "D": 40, "E": 77}
MB = 2**20
EXTRA = torch.randn(77, 40, generator=torch.Generator().manual_seed(4))
PLAIN = dict.fromkeys(
    ("query_ids", "key_ids", "false_negative_threshold", "log_q", "weights", "valid", "extra_keys")
)


def draw(dtype=torch.float32, **changes):
    """Draw inputs with every option at once; a query in eight resembles one of another row."""
    sizes = SIZES | {name: changes.pop(name) for name in SIZES if name in changes}
    oracle = SUBJECTS["in_batch_contrastive"].oracle
    made = oracle.make_inputs(torch.Generator().manual_seed(3), torch.float32, **sizes)
    made["query"][::8] = made["query"].flip(0)[::8] + 0.1 * made["query"][::8]
    made |= {name: made[name].to(dtype) for name in ("query", "key", "extra_keys")}
    return made | changes


def check(**inputs):
    subject = SUBJECTS["in_batch_contrastive"]
    wanted = expected(subject, inputs)
    check_forward(subject, "native", inputs, wanted)
    check_gradients(subject, "native", inputs, wanted)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("options", ["all", "plain"])
@pytest.mark.parametrize("value", [0.01, 2 / 150, 0.0134, 0.05, 0.2, 1.0, 30.0])
def test_agrees_with_float64_at_every_temperature(value, options, symmetric):
    changes = PLAIN if options == "plain" else {}
    check(**draw(**changes, temperature=torch.tensor(value), symmetric=symmetric))


@pytest.mark.parametrize("rows", [1, 2, 63, 64, 65, 95, 97, 130, 257, 600])
@pytest.mark.parametrize("isa", ISA_LEVELS)
def test_every_level_at_every_number_of_rows(isa, rows):
    with _native.use_isa(isa):
        check(**draw(B=rows, E=0 if rows == 65 else 5, D=33))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [1, 16, 100, 128, 300])
def test_widths_and_dtypes(dim, dtype):
    check(**draw(dtype, D=dim, B=150, temperature=torch.tensor(0.1)))


MASKS = [
    {"log_q": None, "extra_keys": None},
    {"key_ids": torch.arange(301) % 50},
    {"query_ids": torch.arange(301) % 3, "key_ids": None},
    {"false_negative_threshold": 0.99},
    {"false_negative_threshold": -0.3},
    {"valid": torch.arange(301) % 97 != 0, "symmetric": False},
    {"valid": torch.arange(301) < 2},
    {"log_q": torch.linspace(-90, 60, 301)},
]


@pytest.mark.parametrize("changes", MASKS)
def test_masks_and_corrections_one_by_one(changes):
    options = {"extra_keys": EXTRA, "symmetric": True, "temperature": 0.07}
    check(**draw(**PLAIN | options | changes))


@pytest.mark.parametrize("changes", [*MASKS, *({"temperature": t} for t in (0.01, 0.2, 1.0))])
def test_the_temperatures_gradient_errs_no_more_than_the_formulas(changes):
    """Of one number either may err little by chance: of many draws it counts."""
    subject, errors = SUBJECTS["in_batch_contrastive"], []
    changes = {"temperature": 0.07, "extra_keys": EXTRA, "symmetric": True} | changes
    changes["temperature"] = torch.tensor(changes["temperature"])
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        inputs = draw(**PLAIN | changes)
        inputs |= {name: torch.randn(301, 40, generator=generator) for name in ("query", "key")}
        wanted = expected(subject, inputs)
        found = results(subject, "native", inputs, wanted.flows), wanted.same, wanted.exact
        ours, formulas, exact = (float(r.gradients["temperature"]) for r in found)
        errors.append([ours - exact, formulas - exact])
    ours, formulas = torch.tensor(errors).square().mean(0).sqrt().tolist()
    assert 0 < ours < 1.2 * formulas


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
def test_vectors_of_any_length(scale, symmetric):
    """Logits reach into the thousands: no shift but the greatest logit would serve."""
    made = draw(normalize=False, symmetric=symmetric, temperature=torch.tensor(0.5))
    for name in ("query", "key", "extra_keys"):
        made[name] = (made[name] * 8).round() / 8 * scale
    check(**made)


@pytest.mark.parametrize(
    "mask",
    [
        {"key_ids": torch.zeros(300, dtype=torch.int64)},
        {"query_ids": torch.zeros(300, dtype=torch.int64)},
        {"false_negative_threshold": -1.5},
        {"valid": torch.arange(300) == 170},
    ],
)
@pytest.mark.parametrize("symmetric", [False, True])
def test_without_negatives_all_is_exactly_zero(mask, symmetric):
    generator = torch.Generator().manual_seed(5)
    query, key = torch.randn(2, 300, 24, generator=generator).unbind()
    leaves = [query.requires_grad_(), key.requires_grad_(), torch.tensor(0.01).requires_grad_()]
    options = {**mask, "symmetric": symmetric, "reduction": "none", "backend": "native"}
    losses = in_batch_contrastive(*leaves[:2], temperature=leaves[2], **options)
    assert (losses == 0).all() and not losses.signbit().any()
    for grad in torch.autograd.grad(losses.sum(), leaves):
        assert (grad == 0).all()


def test_small_losses_keep_their_digits():
    """At logits near 100, logsumexp - s_ii would keep only 1e-5 of a loss."""
    noise = torch.randn(200, 8, generator=torch.Generator().manual_seed(6))
    unit = torch.eye(8)[torch.arange(200) % 8] + 1e-3 * noise
    ids = torch.arange(200) % 8
    losses = in_batch_contrastive(unit, unit, temperature=0.05, key_ids=ids, reduction="none")
    wanted = in_batch_contrastive(
        unit.double(), unit.double(), temperature=0.05, key_ids=ids, reduction="none"
    )
    assert wanted.max() < 1e-6
    torch.testing.assert_close(losses.double(), wanted, rtol=1e-4, atol=0)


@pytest.mark.parametrize("symmetric", [False, True])
def test_threads_change_no_bit(symmetric):
    subject, before, found = SUBJECTS["in_batch_contrastive"], torch.get_num_threads(), []
    inputs = draw(B=1_301, symmetric=symmetric)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(results(subject, "native", inputs).named())
    finally:
        torch.set_num_threads(before)
    assert all(tensor.any() for tensor in found[0].values() if tensor.numel())
    for other in found[1:]:
        for name, tensor in found[0].items():
            assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("isa", ISA_LEVELS)
@pytest.mark.parametrize("threshold", [0.5, -0.5])
def test_pairs_kept_or_found_again_are_the_same(threshold, isa, normalize, dtype):
    """Of large batches no bits are kept. Cosines here lie on the threshold but for rounding."""
    subject, found = SUBJECTS["in_batch_contrastive"], []
    inputs = draw(dtype, B=531, D=24, normalize=normalize, temperature=torch.tensor(1.0))
    inputs |= {"false_negative_threshold": threshold, "query": 1.1 * inputs["query"].sign()}
    operator = subject.op.operator("native")
    args = subject.arguments(inputs)
    args = [a.detach().requires_grad_() if at in (0, 1, 2) else a for at, a in enumerate(args)]
    at = next(i for i, a in enumerate(subject.op.schema.arguments) if a.name == "keep_pairs")
    assert args[at] is True
    with _native.use_isa(isa):
        for kept in (True, False):
            args[at] = kept
            losses, _, pairs, _ = operator(*args)
            assert pairs.shape == ((531, 9) if kept else (0, 0))
            found.append([losses, *torch.autograd.grad(losses.sum(), args[:3])])
            if kept:
                bits = (pairs[:, :, None] >> torch.arange(64)) & 1
                bits = bits.flatten(1)[:, :531]
                assert torch.equal(bits, bits.T) and 531 < bits.sum() < 531**2
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_large_batches_keep_no_pairs():
    """Groups of equal queries: the threshold masks what their ids would."""
    rows, groups = 16_400, 5_000
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(groups, (rows,), generator=generator)
    query = torch.randn(groups, 16, generator=generator)[ids]
    key = torch.randn(rows, 16, generator=generator)
    by_ids = in_batch_contrastive(query, key, query_ids=ids, reduction="none", backend="native")
    found = in_batch_contrastive(
        query, key, false_negative_threshold=0.999, reduction="none", backend="native"
    )
    assert torch.equal(found, by_ids)
    assert not torch.equal(found, in_batch_contrastive(query, key, reduction="none"))


@pytest.mark.parametrize("name", ["query", "key", "extra_keys"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_spreads_as_in_the_formula(name, value):
    inputs = draw(B=70, **PLAIN | {"extra_keys": EXTRA[:9], "symmetric": True})
    inputs[name][5, 3] = value
    losses = in_batch_contrastive(**inputs, backend="native")
    wanted = in_batch_contrastive(**inputs, backend="reference")
    assert torch.equal(losses.isnan(), wanted.isnan()) and wanted.isnan().any()
    torch.testing.assert_close(losses, wanted, equal_nan=True)


ROWS = 12_288
PROGRAM = """
import json, torch
from livrec_fast import in_batch_contrastive
from livrec_fast.benchmarking._clock import peak_extra_bytes
torch.set_num_threads(2)
def training(rows, **options):
    query, key = (torch.randn(rows, 128, requires_grad=True) for _ in range(2))
    def run():
        loss = in_batch_contrastive(query, key, backend="native", **options)
        return torch.autograd.grad(loss, (query, key))
    return run
ways = [training(ROWS), training(ROWS, symmetric=True, false_negative_threshold=0.9)]
ways.append(training(ROWS, keep_products=True))
for way in ways:
    way()  # what a first call keeps is not of interest
print(json.dumps([peak_extra_bytes(way, "cpu") for way in ways]))
"""


def test_workspace_is_as_documented():
    done = python(PROGRAM.replace("ROWS", str(ROWS)))
    assert done.returncode == 0, done.stderr
    plain, with_pairs, with_products = json.loads(done.stdout)
    if plain is None:
        pytest.skip("the peak cannot be reset here")
    bits, matrix = ROWS**2 / 8, ROWS**2 * 4
    own = 2 * 2 * 4 * ROWS * 144 + 2 * 4 * ROWS * 128 + 100 * ROWS  # units, gradients, results
    kept, spare = 64 * MB, 20 * MB  # spare: what the allocator leaves between, in huge pages
    assert plain < own + spare < matrix / 8, f"{plain / MB:.1f} MB"
    assert with_pairs < own + bits + spare < matrix / 7, f"{with_pairs / MB:.1f} MB"
    assert kept < with_products < own + kept + spare < matrix / 4, f"{with_products / MB:.1f} MB"
