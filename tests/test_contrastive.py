"""The edges of in_batch_contrastive: masked and invalid rows, dtypes, and bad inputs."""

import math

import pytest
import torch
import torch.nn.functional as F

from livrec_fast import in_batch_contrastive

B, D, E = 12, 8, 5
LOG_Q = torch.linspace(-9, -1, B + E)
INF, NAN = math.inf, math.nan


def draw(seed=0, rows=B, dim=D, extras=E, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((rows, dim), (rows, dim), (extras, dim))
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes
    ]


@pytest.mark.parametrize(
    "mask",
    [
        {"key_ids": torch.zeros(B, dtype=torch.int64)},
        {"query_ids": torch.full((B,), -7)},
        {"false_negative_threshold": -1.5},
        {"false_negative_threshold": -INF},
        {"valid": torch.arange(B) == 2},
    ],
)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_without_negatives_are_exactly_zero(mask, symmetric, dtype):
    query, key, _ = (t.requires_grad_() for t in draw(dtype=dtype))
    temperature = torch.tensor(0.01, requires_grad=True)
    options = {**mask, "temperature": temperature, "symmetric": symmetric}
    losses = in_batch_contrastive(query, key, reduction="none", **options)
    assert losses.tolist() == [0] * B and not losses.signbit().any()
    losses.sum().backward()
    for leaf in (query, key, temperature):
        assert (leaf.grad == 0).all()


def test_rows_without_negatives_count_in_the_mean():
    query, key, _ = draw(rows=3)
    ids = torch.tensor([0, 0, 1])
    valid = torch.tensor([True, True, False])
    alone = in_batch_contrastive(query, key, key_ids=ids, reduction="none")
    assert alone[2] > 0
    losses = in_batch_contrastive(query, key, query_ids=torch.tensor([0, 0, 0]), reduction="none")
    assert losses.tolist() == [0, 0, 0]
    mean = in_batch_contrastive(query, key, key_ids=ids)
    torch.testing.assert_close(mean, alone.sum() / 3)
    assert in_batch_contrastive(query, key, key_ids=ids, valid=valid) == 0


@pytest.mark.parametrize("symmetric", [False, True])
def test_invalid_rows_are_as_if_absent(symmetric):
    query, key, extra = draw()
    keep = torch.arange(B) % 3 != 1
    log_q = LOG_Q.double()
    short = torch.cat([log_q[:B][keep], log_q[B:]])
    options = {"extra_keys": extra, "symmetric": symmetric}
    wanted = in_batch_contrastive(query[keep], key[keep], log_q=short, **options)
    for filler in (0.0, NAN, INF):
        spoilt = [t.masked_fill(~keep[:, None], filler).requires_grad_() for t in (query, key)]
        tail = log_q.masked_fill(F.pad(~keep, (0, E)), filler)
        loss = in_batch_contrastive(*spoilt, log_q=tail, valid=keep, **options)
        torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=0)
        for grad in torch.autograd.grad(loss, spoilt):
            assert (grad[~keep] == 0).all() and (grad[keep] != 0).any(1).all()


def test_the_threshold_drops_whole_pairs_and_only_those():
    """Queries 0 and 1 are parallel: neither sees the other's key, both see key 2's."""
    query = torch.tensor([[1.0, 0], [7, 0], [0, 1]])
    key = torch.tensor([[1.0, 0], [0, 1], [1, 1]])
    options = {"temperature": 1.0, "normalize": False, "reduction": "none"}
    losses = in_batch_contrastive(query, key, false_negative_threshold=0.99, **options)
    wanted = [
        math.log(1 + math.exp(1 - 1)),
        math.log(1 + math.exp(7 - 0)),
        math.log(1 + 1 + math.exp(-1)),
    ]
    torch.testing.assert_close(losses, torch.tensor(wanted))


def test_a_duplicate_key_is_a_negative_until_its_id_says_otherwise():
    query, key, _ = draw(rows=2)
    key[1] = key[0]
    losses = in_batch_contrastive(query, key, reduction="none")
    torch.testing.assert_close(losses, torch.full_like(losses, math.log(2)))
    assert in_batch_contrastive(query, key, key_ids=torch.tensor([9, 9])) == 0


def test_a_masked_overflow_does_not_reach_the_temperature():
    query = torch.tensor([[300.0], [300.0]], dtype=torch.float16)
    key = torch.tensor([[1.0], [300.0]], dtype=torch.float16)
    temperature = torch.tensor(1.0, requires_grad=True)
    masked = {"valid": torch.tensor([True, False]), "extra_keys": torch.tensor([[0.5]]).half()}
    loss = in_batch_contrastive(query, key, temperature=temperature, normalize=False, **masked)
    loss.backward()
    assert loss.isfinite() and temperature.grad.isfinite()


def test_zero_vectors_give_no_nan():
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        query, key = torch.zeros(3, 4, dtype=dtype), torch.randn(3, 4).to(dtype).requires_grad_()
        loss = in_batch_contrastive(query.requires_grad_(), key, false_negative_threshold=0.5)
        assert loss.item() == pytest.approx(math.log(3), rel=1e-6)
        loss.backward()
        assert not query.grad.isnan().any() and key.grad.isfinite().all()


def test_result_dtypes_and_autocast():
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        query, key, extra = draw(dtype=dtype)
        assert in_batch_contrastive(query, key).dtype == torch.float32
    assert in_batch_contrastive(*draw()[:2]).dtype == torch.float64
    query, key, extra = draw(dtype=torch.float32)
    temperature = torch.tensor(0.0712345, requires_grad=True)
    options = {"temperature": temperature, "log_q": LOG_Q}
    lowered = [t.bfloat16() for t in (query, key, extra)]
    wanted = in_batch_contrastive(*lowered[:2], extra_keys=lowered[2], **options)
    with torch.autocast("cpu", torch.bfloat16):
        loss = in_batch_contrastive(query, key, extra_keys=extra, **options)
        mixed = in_batch_contrastive(query, key.bfloat16(), extra_keys=extra, **options)
    assert loss == wanted == mixed and loss.dtype == torch.float32
    assert loss != in_batch_contrastive(query, key, extra_keys=extra, **options)


def test_compiles_whole_with_float_and_tensor_temperatures():
    def loss(query, key, temperature, threshold, valid):
        return in_batch_contrastive(
            query, key, temperature=temperature, false_negative_threshold=threshold, valid=valid
        )

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows, temperature, threshold in (
        (8, 0.07, 0.5),
        (13, 0.2, 0.3),
        (9, torch.tensor(0.1), 0.9),
    ):
        args = (temperature, threshold, torch.arange(rows) != 1)
        query, key = (t.requires_grad_() for t in draw(rows=rows)[:2])
        found, wanted = compiled(query, key, *args), loss(query, key, *args)
        assert found == wanted
        for got, want in zip(
            *(torch.autograd.grad(y, (query, key)) for y in (found, wanted)), strict=True
        ):
            torch.testing.assert_close(got, want)


def given(name, value):
    return lambda inputs: {name: value}


def changed(name, change):
    return lambda inputs: {name: change(inputs[name])}


def shorter(name):
    return changed(name, lambda t: t[1:])


def narrower(name):
    return changed(name, lambda t: t[:, 1:])


def cast(name, dtype):
    return changed(name, lambda t: t.to(dtype))


def elsewhere(name, other=None):
    return lambda inputs: {other or name: inputs[name].to("meta")}


def grouped(count):
    return given("group_ids", torch.zeros(count, dtype=torch.int64))


def pairs(count, width, dtype=torch.float32):
    return given("pair_vectors", torch.zeros(count, width).to(dtype))


def unsampled(**others):
    """Ask for the rule of the unsampled positive, by default with a log_q that is none."""
    return lambda inputs: {
        "log_q_rule": "unsampled_positive", "log_q": torch.zeros(96), "valid": None, **others
    }  # fmt: skip


def spoilt_log_q(value):
    """Put `value` into a valid row of log_q."""

    def change(inputs):
        log_q = inputs["log_q"].clone()
        log_q[3] = value
        return {"log_q": log_q, "valid": torch.ones_like(inputs["valid"])}

    return change


def scalar(value, **options):
    return given("temperature", torch.tensor(value, **options))


BOTH = r"key_ids: shape must be \[96\] or \[120\], got \[119\]"
BAD_INPUTS = {
    "in_batch_contrastive": [
        ("query list", given("query", [[1.0]]), TypeError, "query: must be a tensor, got list"),
        ("query ints", cast("query", torch.int64), TypeError, "query: dtype must be .*int64"),
        (
            "query 1-d",
            changed("query", lambda t: t[0]),
            ValueError,
            r"query: shape must be \[B, D\]",
        ),
        ("no columns", changed("query", lambda t: t[:, :0]), ValueError, r"query: D .*\[96, 0\]"),
        ("key dtype", cast("key", torch.float64), TypeError, "key: dtype must be that of query"),
        ("key rows", shorter("key"), ValueError, r"key: shape must be \[96, 32\], got \[95, 32\]"),
        ("key columns", narrower("key"), ValueError, r"key: shape must be .*got \[96, 31\]"),
        ("key device", elsewhere("key"), ValueError, "key: device must be that of query"),
        ("extra dtype", cast("extra_keys", torch.float64), TypeError, "extra_keys: dtype"),
        ("extra columns", narrower("extra_keys"), ValueError, r"extra_keys: shape .*\[24, 31\]"),
        ("extra device", elsewhere("extra_keys"), ValueError, "extra_keys: device"),
        ("temperature text", given("temperature", "1"), TypeError, "temperature: .*, got str"),
        ("temperature bool", given("temperature", True), TypeError, "temperature: .*, got bool"),
        ("temperature 0", given("temperature", 0.0), ValueError, "temperature: .*positive.* 0.0"),
        ("temperature < 0", given("temperature", -1), ValueError, "temperature: .* got -1"),
        ("temperature nan", given("temperature", NAN), ValueError, "temperature: .* got nan"),
        ("temperature inf", given("temperature", INF), ValueError, "temperature: .* got inf"),
        ("tensor of 0", scalar(0.0), ValueError, "temperature: must be positive .* got 0"),
        ("tensor of -2", scalar(-2.0), ValueError, "temperature: must be positive .* got -2"),
        ("tensor of nan", scalar(NAN), ValueError, "temperature: .* got nan"),
        ("tensor of inf", scalar(INF), ValueError, "temperature: .* got inf"),
        ("tensor 1-d", scalar([1.0]), ValueError, r"temperature: shape .*got \[1\]"),
        ("tensor of int", scalar(1), TypeError, "temperature: dtype .*int64"),
        ("tensor device", scalar(1.0, device="meta"), ValueError, "temperature: device"),
        ("normalize", given("normalize", 1), TypeError, "normalize: must be a bool, got int"),
        ("symmetric", given("symmetric", None), TypeError, "symmetric: must be a bool"),
        ("kept", given("keep_products", 1), TypeError, "keep_products: must be a bool, got int"),
        ("query_ids dtype", cast("query_ids", torch.int32), TypeError, "query_ids: dtype .*int32"),
        ("query_ids length", shorter("query_ids"), ValueError, r"query_ids: .*got \[95\]"),
        ("query_ids device", elsewhere("query_ids"), ValueError, "query_ids: device"),
        ("key_ids dtype", cast("key_ids", torch.float32), TypeError, "key_ids: dtype .*float32"),
        ("key_ids length", shorter("key_ids"), ValueError, BOTH),
        ("key_ids device", elsewhere("key_ids"), ValueError, "key_ids: device"),
        ("threshold text", given("false_negative_threshold", "x"), TypeError, "threshold: .*str"),
        ("threshold nan", given("false_negative_threshold", NAN), ValueError, "threshold: .*nan"),
        ("group_ids dtype", given("group_ids", torch.zeros(96)), TypeError, "group_ids: .*float32"),
        ("group_ids length", grouped(95), ValueError, r"group_ids: .*\[96\] or \[120\].*\[95\]"),
        ("group_ids device", elsewhere("query_ids", "group_ids"), ValueError, "group_ids: device"),
        ("pair_vectors dtype", pairs(96, 3, torch.int8), TypeError, "pair_vectors: dtype .*int8"),
        ("pair_vectors other", pairs(96, 3, torch.float64), TypeError, "pair_vectors: dtype must"),
        ("pair_vectors length", pairs(97, 3), ValueError, r"pair_vectors: .*\[96, P\] or \[120, P"),
        ("pair_vectors width", pairs(96, 0), ValueError, r"pair_vectors: P must be .*\[96, 0\]"),
        ("rule", given("log_q_rule", "none"), ValueError, "log_q_rule: .*'standard'.*got 'none'"),
        ("rule alone", unsampled(log_q=None), ValueError, "log_q_rule: .*needs log_q"),
        (
            "rule of groups",
            unsampled(group_ids=torch.zeros(96).long()),
            ValueError,
            "log_q_rule: .*group_ids must",
        ),
        ("no logarithm", unsampled(), ValueError, r"log_q: must be negative .*log_q\[0\] = 0.0"),
        (
            "precision",
            given("precision", "f16"),
            ValueError,
            "precision: .*None, 'bf16', got 'f16'",
        ),
        ("log_q dtype", cast("log_q", torch.float16), TypeError, "log_q: dtype .*float16"),
        ("log_q shape", changed("log_q", lambda t: t[None]), ValueError, "log_q: shape"),
        ("log_q length", changed("log_q", lambda t: t[:97]), ValueError, r"log_q: .*got \[97\]"),
        ("log_q device", elsewhere("log_q"), ValueError, "log_q: device"),
        (
            "log_q nan",
            spoilt_log_q(NAN),
            ValueError,
            r"log_q: must be finite, got log_q\[3\] = nan",
        ),
        ("log_q of 0", spoilt_log_q(-INF), ValueError, r"log_q: .*log_q\[3\] = -inf"),
        ("weights dtype", cast("weights", torch.int64), TypeError, "weights: dtype .*int64"),
        ("weights length", shorter("weights"), ValueError, r"weights: shape .*got \[95\]"),
        ("weights device", elsewhere("weights"), ValueError, "weights: device"),
        ("valid dtype", cast("valid", torch.int32), TypeError, "valid: dtype .*int32"),
        ("valid length", shorter("valid"), ValueError, r"valid: shape .*got \[95\]"),
        ("valid device", elsewhere("valid"), ValueError, "valid: device"),
        ("reduction", given("reduction", "max"), ValueError, "reduction: .*'mean'.*got 'max'"),
    ]
}
