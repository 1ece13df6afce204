"""Updates in one pass: what the two ops it stands for make, slots, chunks, refusals, memory."""

import json

import pytest
import torch
from conftest import python
from hard_vectors import kernels_of, run
from prefix_inputs import BAD_CODES, LEVELS, some_codes
from test_prefix_ngram_memory import MB, PROGRAM, needs_native

from livrec_fast import (
    PrefixNgramEmbedding,
    RowwiseAdagrad,
    prefix_ngram_gradient,
    prefix_ngram_update,
    row_update,
)
from livrec_fast.modules import _fused


def _first(name, change):
    return lambda g: {name: [change(g[name][0]), *g[name][1:]]}


def _grad(change):
    return lambda g: {"grad": change(g["grad"])}


BAD_INPUTS = {
    "prefix_ngram_update": [
        ("rule", lambda g: {"rule": "adam"}, ValueError, "rule: must be one of .*'adam'"),
        ("lr", lambda g: {"lr": 0.0}, ValueError, "lr: must be positive and finite, got 0.0"),
        ("eps", lambda g: {"eps": float("nan")}, ValueError, "eps: .* got nan"),
        ("tensor", lambda g: {"tables": g["tables"][0]}, TypeError, "tables: must be a list"),
        ("no table", lambda g: {"tables": []}, ValueError, "tables: at least one"),
        ("few tables", lambda g: {"tables": g["tables"][1:]}, ValueError, "tables: .* 3, got 2"),
        ("list", _first("tables", torch.Tensor.tolist), TypeError, r"tables\[0\]: .* list"),
        ("int", _first("tables", torch.Tensor.int), TypeError, r"tables\[0\]: dtype .* int32"),
        ("other", _first("tables", torch.Tensor.half), TypeError, r"tables\[1\]: dtype .*float16"),
        ("1-d", _first("tables", lambda t: t[0]), ValueError, r"tables\[0\]: shape"),
        ("rowless", _first("tables", lambda t: t[:0]), ValueError, r"tables\[0\]: .* got \[0, 8\]"),
        ("meta", _first("tables", lambda t: t.to("meta")), ValueError, "device .* meta"),
        ("dims differ", lambda g: {"mode": "sum"}, ValueError, r"tables\[1\]: .* 8, got 9"),
        ("no states", lambda g: {"states": None}, ValueError, "states: rule 'rowwise_.* needs"),
        ("sgd's", lambda g: {"rule": "sgd"}, ValueError, "states: rule 'sgd' has none"),
        ("few states", lambda g: {"states": g["states"][1:]}, ValueError, "states: .* 3, got 2"),
        ("state type", _first("states", torch.Tensor.tolist), TypeError, r"states\[0\]: .* tensor"),
        ("state dtype", _first("states", torch.Tensor.half), TypeError, r"states\[0\]: dtype"),
        ("state rows", _first("states", lambda t: t[1:]), ValueError, r"states\[0\]: shape"),
        ("state meta", _first("states", lambda t: t.to("meta")), ValueError, "device .* meta"),
        ("wide", lambda g: {"rule": "adagrad"}, ValueError, r"states\[0\]: shape .* \[6, 8\]"),
        ("seeds", lambda g: {"seeds": [1, 2]}, ValueError, r"seeds: .* got \[1, 2\]"),
        ("seed", lambda g: {"seeds": [1, 2, 0.5]}, ValueError, r"seeds: .* got \[1, 2, 0.5\]"),
        ("grad list", lambda g: {"grad": [[0.0]]}, TypeError, "grad: .* list"),
        ("grad int", _grad(torch.Tensor.int), TypeError, "grad: .* int32"),
        ("grad wide", _grad(torch.Tensor.double), TypeError, "grad: .* float64"),
        ("few", _grad(lambda t: t[1:]), ValueError, r"grad: shape .* 27\], got"),
        ("narrow", _grad(lambda t: t[:, 1:]), ValueError, r"grad: .* got .* 26\]"),
        ("grad meta", _grad(lambda t: t.to("meta")), ValueError, "device .* meta"),
        *BAD_CODES,
    ]
}  # fmt: skip

KERNELS = kernels_of("prefix_ngram_update")
NATIVE = [kernel for kernel in KERNELS if kernel != "reference"]
RULES = ("sgd", "adagrad", "rowwise_adagrad")


def _tables(rows, dims, rule, dtype=torch.float32):
    torch.manual_seed(3)
    tables = [torch.randn(shape).to(dtype) for shape in zip(rows, dims, strict=True)]
    if rule == "sgd":
        return tables, None
    return tables, [torch.rand(t.shape if rule == "adagrad" else t.shape[:1]) for t in tables]


def _by_two_ops(kernel, tables, states, grad, codes, levels, rule, seeds, **how):
    rows, dims = [len(t) for t in tables], [t.shape[1] for t in tables]
    found = run(prefix_ngram_gradient, kernel, grad, codes, levels, rows, dims, **how)
    for level, table in enumerate(tables):
        at, sums = found[2 * level : 2 * level + 2]
        step = {"rule": rule, "lr": 0.1, "state": states[level] if states else None}
        run(row_update, kernel, table, at, sums, **step, seed=seeds[level])


def _both_ways(kernel, grad, codes, levels, rows, dims, rule, dtype=torch.float32, **how):
    """Return tables and states after an update, and after the two ops that it stands for."""
    seeds, ways = [9, -4, 2**40, 0][: len(levels)], []
    for update in (prefix_ngram_update, None):
        tables, states = _tables(rows, dims, rule, dtype)
        before = [table.clone() for table in tables]
        if update:
            step = {"rule": rule, "lr": 0.1, "states": states, "seeds": seeds}
            assert run(update, kernel, tables, grad, codes, levels, **step, **how) is None
        else:
            _by_two_ops(kernel, tables, states, grad, codes, levels, rule, seeds, **how)
        assert not any(map(torch.equal, tables, before))
        ways.append(tables + (states or []))
    return ways


@pytest.mark.parametrize("groups", [(3,), (1, 2), (1, 1, 1)])
@pytest.mark.parametrize("hashing", ["modulo", "murmur3", "order_preserving"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_equals_gradient_and_row_update_to_the_bit(kernel, rule, hashing, groups):
    """Chunks of 1,024 items, runs that outlast them, and rows that several keys share."""
    codes, dims = some_codes(5000), (3, 16, 20)
    grad, how = torch.randn(5000, sum(dims)), {"hashing": hashing, "groups": groups}
    for rows in ((5, 20, 120), (2, 7, 50)):
        ours, two = _both_ways(kernel, grad, codes, LEVELS, rows, dims, rule, **how)
        assert all(map(torch.equal, ours, two))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("pool", [None, "sum", "mean"])
@pytest.mark.parametrize("kernel", NATIVE)
def test_halves_and_pools_are_rounded_the_same(kernel, pool, dtype):
    offsets = torch.tensor([0, 700, 700, 701, 3000])
    codes, rows, dims = some_codes(3000), (5, 20, 40), (33, 16, 1)
    how = {"offsets": offsets, "pool": pool} if pool else {}
    grad = torch.randn(4 if pool else 3000, sum(dims)).to(dtype)
    ours, two = _both_ways(kernel, grad, codes, LEVELS, rows, dims, "adagrad", dtype, **how)
    assert all(map(torch.equal, ours, two))


@pytest.mark.parametrize("kernel", NATIVE)
@pytest.mark.parametrize("rows", [(5, 20, 120), (3, 7, 50)])
def test_sums_over_levels(kernel, rows):
    codes, grad = some_codes(5000), torch.randn(5000, 20)
    for rule in RULES:
        ours, two = _both_ways(kernel, grad, codes, LEVELS, rows, [20] * 3, rule, mode="sum")
        assert all(map(torch.equal, ours, two))


@pytest.mark.parametrize("kernel", NATIVE)
@pytest.mark.parametrize("items", [1, 1023, 1024, 1025, 3072, 10_000])
def test_runs_longer_than_a_chunk(kernel, items):
    codes = torch.tensor([[4, 3, 5]]).repeat(items, 1)
    codes[items // 3 :, 2] = 1
    key, keys = torch.zeros(items, dtype=torch.int64), []
    for column, size in enumerate(LEVELS):
        key = key * size + codes[:, column]
        keys.append(key)
    for rows in ((5, 20, 120), (1, 1, 1)):
        grad = torch.randn(items, 9)
        tables, _ = _tables(rows, (3, 3, 3), "sgd")
        wanted = [table.double() for table in tables]
        for table, key, part in zip(wanted, keys, grad.double().split(3, 1), strict=True):
            table.index_add_(0, key % len(table), part, alpha=-0.1)
        run(prefix_ngram_update, kernel, tables, grad, codes, LEVELS, rule="sgd", lr=0.1)
        torch.testing.assert_close([t.double() for t in tables], wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("levels", [(1, 1, 1), (3, 2, 2), (64, 64, 64)])
def test_threads_do_not_change_a_bit(levels):
    codes, grad = some_codes(150_000, levels, unknown=0.1), torch.randn(150_000, 12)
    rows, found, before = (levels[0], levels[0] * levels[1], 1000), [], torch.get_num_threads()
    for threads in (1, 2, 2, 3):
        torch.set_num_threads(threads)
        tables, states = _tables(rows, (4,) * 3, "rowwise_adagrad")
        given = [tensor.clone() for tensor in tables + states]
        step = {"rule": "rowwise_adagrad", "lr": 0.1, "states": states}
        prefix_ngram_update(tables, grad, codes, levels, **step)
        found.append(tables + states)
        assert not any(map(torch.equal, given, found[-1]))
    torch.set_num_threads(before)
    assert all(all(map(torch.equal, found[0], other)) for other in found[1:])


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_refused_call_changes_nothing(kernel):
    """Of two groups, too: all codes are looked at before a row moves."""
    tables, _ = _tables((5, 6), (2, 2), "sgd")
    before, codes = [table.clone() for table in tables], torch.zeros(2000, 2, dtype=torch.int64)
    codes[1999, 1] = 6
    with pytest.raises(IndexError, match=r"codes\[1999, 1\] = 6"):
        grad = torch.ones(2000, 4)
        how = {"rule": "sgd", "lr": 1.0, "groups": (1, 1)}
        run(prefix_ngram_update, kernel, tables, grad, codes, (5, 6), **how)
    assert all(map(torch.equal, tables, before))


@needs_native
def test_tables_that_share_memory_are_refused():
    table = torch.zeros(10, 4)
    for shared in ([table, table], [table[:6], table[5:]]):
        with pytest.raises(RuntimeError, match="tables: no two .* share memory"):
            prefix_ngram_update(
                shared, torch.ones(3, 8), torch.zeros(3, 2, dtype=torch.int64), (5, 5),
                rule="sgd", lr=1.0, groups=(1, 1), backend="native",
            )  # fmt: skip
    prefix_ngram_update(
        [table[:5], table[5:]], torch.ones(3, 8), torch.zeros(3, 2, dtype=torch.int64), (5, 5),
        rule="sgd", lr=1.0, groups=(1, 1),
    )  # fmt: skip
    assert table.sum(1).tolist() == [-12.0, 0, 0, 0, 0, -12.0, 0, 0, 0, 0]


def test_graphs_notice_the_change():
    table = torch.ones(4, 2, requires_grad=True)
    loss = table.square().sum()
    codes = torch.tensor([[1]])
    prefix_ngram_update([table], torch.ones(1, 2), codes, (4,), rule="sgd", lr=1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@needs_native
def test_the_embedding_learns_the_same_by_either_way(monkeypatch):
    found = []
    for one_pass in (True, False):
        torch.manual_seed(0)
        module = PrefixNgramEmbedding(
            LEVELS, 8, optimizer=RowwiseAdagrad(0.1), dtype=torch.bfloat16, max_rows=30
        )
        if not one_pass:
            monkeypatch.setattr(_fused, "_in_one_pass", lambda *args: False)
        for seed in range(3):
            module(some_codes(2000, seed=seed)).float().sin().sum().backward()
        found.append(module.state_dict())
    assert found[0].keys() == found[1].keys() and found[0]["updates"] == 3
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


UPDATES = """
from livrec_fast import prefix_ngram_update
tables = [torch.zeros(h, 16) for h in (64, 2**22)]
codes = torch.randint(0, 64, (3000, 2))
codes[:, 1] *= 2**16
grad = torch.randn(3000, 32)
peaks(update=lambda: prefix_ngram_update(tables, grad, codes, (64, 2**22), rule="sgd", lr=0.1))
"""


@needs_native
def test_nothing_of_a_tables_size_is_needed():
    done = python(PROGRAM + UPDATES)
    assert done.returncode == 0, done.stderr
    used = json.loads(done.stdout)["update"]
    if used is None:
        pytest.skip("the peak of the resident set cannot be asked here")
    assert used < 8 * MB
