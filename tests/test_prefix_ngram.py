"""Prefix n-gram lookup: keys, hashing, unknown codes, pooling, gradients, and bad inputs."""

import pytest
import torch

from livrec_fast import _native, prefix_ngram_lookup
from livrec_fast.reference.prefix_ngram import prefix_keys


def _put(good, value):
    codes = good["codes"].clone()
    codes[7, 0] = value
    return {"codes": codes}


def _tables(good, change):
    return {"tables": [change(good["tables"][0]), *good["tables"][1:]]}


def _pooled(good, *offsets, dtype=torch.int64):
    offsets = [at if at is not None else len(good["codes"]) for at in offsets]
    return {"offsets": torch.tensor(offsets, dtype=dtype), "pool": "sum"}


def _small(good, **changed):
    """Tables of int8 instead, with their scales."""
    tables = [table.char() for table in good["tables"]]
    scales = [torch.ones(len(table)) for table in tables]
    return {"tables": tables, "scales": scales, **changed}


def _scales(good, change):
    scales = _small(good)["scales"]
    return _small(good, scales=[scales[0], change(scales[1]), scales[2]])


def _packed(good, width):
    return {"codes": torch.zeros(len(good["codes"]), width, dtype=torch.uint8), "packed": True}


BAD_INPUTS = {
    "prefix_ngram_lookup": [
        ("codes list", lambda g: {"codes": [[0]]}, TypeError, "codes: .* list"),
        ("codes float", lambda g: {"codes": g["codes"].float()}, TypeError, "codes: .* float32"),
        ("few", lambda g: {"codes": g["codes"][:, 1:]}, ValueError, r"codes: .*\[M, 3\]"),
        ("id = size", lambda g: _put(g, 6), IndexError, r"codes\[7, 0\] = 6 .* \[-1, 6\)"),
        ("below -1", lambda g: _put(g, -2), IndexError, r"codes\[7, 0\] = -2 .* \[-1, 6\)"),
        ("one table", lambda g: {"tables": g["tables"][0]}, TypeError, "tables: .* Tensor"),
        ("few tables", lambda g: {"tables": g["tables"][1:]}, ValueError, "tables: .* 3, got 2"),
        ("int", lambda g: _tables(g, torch.Tensor.int), TypeError, r"tables\[0\]: .* int32"),
        ("half", lambda g: _tables(g, torch.Tensor.half), TypeError, r"tables\[1\]: dtype"),
        ("1-d", lambda g: _tables(g, lambda t: t[0]), ValueError, r"tables\[0\]: shape"),
        ("empty", lambda g: _tables(g, lambda t: t[:0]), ValueError, r"got \[0, 8\]"),
        ("meta", lambda g: _tables(g, lambda t: t.to("meta")), ValueError, "device .* meta"),
        ("d differ", lambda g: {"mode": "sum"}, ValueError, r"tables\[1\]: mode 'sum' .* 8, got 9"),
        ("no levels", lambda g: {"levels": []}, ValueError, r"levels: .* got \[\]"),
        ("level 0", lambda g: {"levels": [6, 0, 8]}, ValueError, r"levels: .* got \[6, 0, 8\]"),
        ("too large", lambda g: {"levels": [2**21] * 3}, ValueError, r"product .* 2\^63 - 1"),
        ("mode", lambda g: {"mode": "mean"}, ValueError, "mode: .* 'sum', got 'mean'"),
        ("hash", lambda g: {"hashing": "xor"}, ValueError, "hashing: .*'modulo', .* got 'xor'"),
        ("groups few", lambda g: {"groups": (1, 1)}, ValueError, r"groups: .* 3 .* got \(1, 1\)"),
        ("group 0", lambda g: {"groups": (0, 3)}, ValueError, r"groups: .* got \(0, 3\)"),
        ("group below", lambda g: {"groups": (4, -1)}, ValueError, r"groups: .* got \(4, -1\)"),
        ("group float", lambda g: {"groups": (1.0, 2)}, ValueError, r"groups: .* got \(1.0, 2\)"),
        (
            "group too large", lambda g: {"levels": [6, 2**31 - 1, 2**31 - 1], "groups": [3]},
            ValueError, r"product .* 2\^63 - 1",
        ),
        ("packed wide", lambda g: _packed(g, 3), ValueError, r"codes: .*\[M, 2\], got .*3\]"),
        ("packed int16", lambda g: {"packed": True}, TypeError, "codes: .* uint8, got int16"),
        (
            "packed id", lambda g: {"codes": _packed(g, 2)["codes"] + 7, "packed": True},
            IndexError, r"codes\[0, 0\] = 7 .* 6\)",
        ),
        ("int8 alone", lambda g: _small(g, scales=None), ValueError, "scales: int8 .* got None"),
        (
            "scales", lambda g: {"scales": _small(g)["scales"]}, ValueError,
            "scales: go with int8 tables only, tables are float32",
        ),
        ("few scales", lambda g: _small(g, scales=[torch.ones(6)]), ValueError, "3, got 1"),
        ("one scale", lambda g: _small(g, scales=torch.ones(6)), TypeError, "scales: .* Tensor"),
        ("scale", lambda g: _scales(g, lambda s: s[1:]), ValueError, r"scales\[1\]: .*\[42\]"),
        ("half scale", lambda g: _scales(g, torch.Tensor.half), TypeError, r"scales\[1\]: .*16"),
        ("meta scale", lambda g: _scales(g, lambda s: s.to("meta")), ValueError, "device .* meta"),
        ("pool", lambda g: _pooled(g, 0, None) | {"pool": "max"}, ValueError, "pool: .* 'max'"),
        ("pool alone", lambda g: {"pool": "sum"}, ValueError, "pool: needs offsets"),
        ("offsets", lambda g: _pooled(g, 0, None) | {"pool": None}, ValueError, "no pool"),
        ("int32", lambda g: _pooled(g, 0, None, dtype=torch.int32), TypeError, "offsets: .* int32"),
        ("no offsets", _pooled, ValueError, "offsets: .* at least one element"),
        ("first", lambda g: _pooled(g, 1, None), ValueError, "offsets: .* first must be 0, got 1"),
        ("last", lambda g: _pooled(g, 0, 5), ValueError, "offsets: the last must be .*, got 5"),
        ("falls", lambda g: _pooled(g, 0, 9, 4, None), ValueError, r"offsets\[1\] = 9 and .* 4"),
        (
            "bad with sparse", lambda g: {**_put(g, 6), "sparse": True,
                "tables": [table.requires_grad_() for table in g["tables"]]},
            IndexError, r"codes\[7, 0\] = 6",
        ),
    ]
}  # fmt: skip


def _draw(levels, dims, rows, items=40, dtype=torch.float64, unknown=True):
    generator = torch.Generator().manual_seed(items)
    codes = torch.stack([torch.randint(n, (items,), generator=generator) for n in levels], 1)
    if unknown:
        codes[torch.rand(codes.shape, generator=generator) < 0.15] = -1
    tables = [
        torch.randn(h, d, generator=generator).to(dtype).requires_grad_()
        for h, d in zip(rows, dims, strict=True)
    ]
    return codes, tables


def _by_hand(codes, tables, levels):
    """Look up row by row with Python's integers; one list of L vectors per row."""
    found = []
    for row in codes.tolist():
        key, vectors = 0, []
        for code, size, table in zip(row, levels, tables, strict=True):
            key = None if key is None or code < 0 else key * size + code
            vectors.append(table[0] * 0 if key is None else table[key % len(table)])
        found.append(vectors)
    return found


def test_keys_of_the_paper():
    assert prefix_keys(torch.tensor([[0, 2], [3, 2]]), (4, 4)).tolist() == [[0, 2], [3, 14]]


def test_large_keys_are_exact():
    keys = prefix_keys(torch.tensor([[8191] * 3, [5000, 1, 8190]]), (8192,) * 3)
    assert keys[:, 2].tolist() == [8192**3 - 1, 5000 * 8192**2 + 8192 + 8190]
    levels = (2**31 - 1, 2**31 - 1, 2)
    assert prefix_keys(torch.tensor([levels]) - 1, levels)[0, 2] == (2**31 - 1) ** 2 * 2 - 1


def test_keys_stop_at_an_unknown_code():
    codes = torch.tensor([[1, -1, 2], [-1, 0, 0], [1, 2, -1]], dtype=torch.int8)
    assert prefix_keys(codes, (3, 3, 3)).tolist() == [[1, -1, -1], [-1, -1, -1], [1, 5, -1]]


@pytest.mark.parametrize("mode", ["concat", "sum"])
@pytest.mark.parametrize("rows", [(5, 20, 120), (5, 7, 11)], ids=["identity", "hashed"])
def test_agrees_with_looking_up_by_hand(mode, rows):
    levels, dims = (5, 4, 6), (3, 3, 3) if mode == "sum" else (3, 1, 4)
    codes, tables = _draw(levels, dims, rows)
    out = prefix_ngram_lookup(codes, tables, levels, mode=mode)
    found = _by_hand(codes, tables, levels)
    wanted = torch.stack([torch.cat(v) if mode == "concat" else sum(v) for v in found])
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-14)

    grad = torch.randn_like(out)
    ours = torch.autograd.grad(out, tables, grad)
    theirs = torch.autograd.grad(wanted, tables, grad)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)


@pytest.mark.parametrize("pool", ["sum", "mean"])
@pytest.mark.parametrize("mode", ["concat", "sum"])
def test_pooling_is_a_sum_or_mean_over_items(mode, pool):
    levels, offsets = (5, 4), [0, 7, 7, 8, 40]
    codes, tables = _draw(levels, (3, 3), (5, 9))
    items = prefix_ngram_lookup(codes, tables, levels, mode=mode)
    out = prefix_ngram_lookup(
        codes, tables, levels, mode=mode, offsets=torch.tensor(offsets), pool=pool
    )
    histories = [items[a:b] for a, b in zip(offsets, offsets[1:], strict=False)]
    wanted = [h.sum(0) / (max(len(h), 1) if pool == "mean" else 1) for h in histories]
    torch.testing.assert_close(out, torch.stack(wanted), rtol=0, atol=1e-13)
    assert out[1].tolist() == [0] * out.shape[1]

    grad = torch.randn_like(out)
    ours = torch.autograd.grad(out, tables, grad)
    theirs = torch.autograd.grad(torch.stack(wanted), tables, grad)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)


def test_unknown_levels_are_zeros_even_beside_nan():
    tables = [torch.full((2, 1), torch.nan), torch.full((4, 1), torch.nan)]
    out = prefix_ngram_lookup(torch.tensor([[-1, 1], [1, -1]]), tables, (2, 2))
    assert out[0].tolist() == [0, 0]
    assert out[1, 0].isnan() and out[1, 1] == 0


def test_unknown_codes_count_in_the_mean():
    codes = torch.tensor([[1], [-1]])
    table = torch.tensor([[0.0], [6.0]])
    out = prefix_ngram_lookup(codes, [table], [2], offsets=torch.tensor([0, 2]), pool="mean")
    assert out.tolist() == [[3.0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_sums_are_rounded_once(dtype):
    codes, table = torch.zeros(1000, 1, dtype=torch.uint8), torch.ones(1, 2, dtype=dtype)
    table.requires_grad_()
    out = prefix_ngram_lookup(codes, [table], [1])
    out.backward(torch.ones_like(out))
    assert out.dtype == dtype
    assert table.grad.tolist() == [[1000, 1000]]  # one at a time, bfloat16 stays at 256
    pooled = prefix_ngram_lookup(codes, [table], [1], offsets=torch.tensor([0, 1000]), pool="sum")
    assert pooled.tolist() == [[1000, 1000]]


def test_autocast_leaves_the_tables_alone():
    codes, tables = _draw((5,), (3,), (5,), dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = prefix_ngram_lookup(codes, tables, (5,))
    assert torch.equal(out, prefix_ngram_lookup(codes, tables, (5,)))


@pytest.mark.parametrize("threads", [1, 2])
def test_equal_to_the_bit_for_any_thread_count(threads):
    levels = (8, 8, 8)
    codes, tables = _draw(levels, (16,) * 3, (8, 64, 100), items=5000, dtype=torch.float32)
    offsets = torch.arange(0, 5001, 50)
    before = torch.get_num_threads()
    results = []
    for count in (1, threads, threads):
        torch.set_num_threads(count)
        out = prefix_ngram_lookup(codes, tables, levels, mode="sum", offsets=offsets, pool="mean")
        results.append((out, *torch.autograd.grad(out.square().sum(), tables)))
    torch.set_num_threads(before)
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], again, strict=True))


def test_compiled_once_for_any_number_of_items():
    levels = (5, 4)
    compiled = torch.compile(prefix_ngram_lookup, fullgraph=True, dynamic=True, backend="aot_eager")
    for stance, items in (("default", 12), ("fail_on_recompile", 31)):
        codes, tables = _draw(levels, (3, 2), (5, 9), items=items)
        offsets = torch.tensor([0, 4, items])
        with torch.compiler.set_stance(stance):
            out = compiled(codes, tables, levels, offsets=offsets, pool="mean")
        wanted = prefix_ngram_lookup(codes, tables, levels, offsets=offsets, pool="mean")
        grad = torch.randn_like(out)
        ours, theirs = (torch.autograd.grad(o, tables, grad) for o in (out, wanted))
        assert torch.equal(out, wanted)
        assert all(torch.equal(a, b) and a.any() for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("dim", [16, 13])  # whole vectors of every level, and none of any
@pytest.mark.parametrize("isa", _native.isa_levels() if _native.MISSING is None else [])
def test_results_larger_than_the_caches(isa, dim):
    """Their rows go past them: other instructions, and every row must have arrived."""
    items = (17 << 20) // (8 * dim)
    tables = [torch.randn(rows, dim) for rows in (50, 2500)]
    codes = torch.randint(-1, 50, (items, 2), dtype=torch.int8)
    first, second = codes.long().unbind(1)
    padded = [torch.cat([table, torch.zeros(1, dim)]) for table in tables]
    second = torch.where((first < 0) | (second < 0), 2500, first * 50 + second)
    wanted = torch.cat([padded[0][torch.where(first < 0, 50, first)], padded[1][second]], 1)
    with _native.use_isa(isa):
        found = prefix_ngram_lookup(codes, tables, (50, 50), backend="native")
    assert found.numel() * 4 > 16 << 20 and torch.equal(found, wanted)
