"""The attention unit: what it computes, exactly however it absorbs, and in a ranker's training."""

import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from livrec_fast import (
    CodeTargetAttention,
    gap_bucket,
    pack_codes,
    prefix_ngram_keys,
    residual_kmeans_decode,
)

LEVELS = (7, 5, 4)
OFFSETS = torch.tensor([0, 9, 9, 30, 41])
T, AUTHORS, GAPS, QUERY = 41, 50, 8, 6


def _inputs(dtype=torch.float64, unknown=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    least = -1 if unknown else 0
    draw = {"generator": generator}
    codes = torch.stack([torch.randint(least, n, (T,), **draw) for n in LEVELS], 1)
    return {
        "candidates": torch.randn(4, 3, QUERY, dtype=dtype, **draw),
        "codes": codes.to(torch.int16),
        "offsets": OFFSETS,
        "authors": torch.randint(least, AUTHORS, (T,), **draw),
        "gaps": torch.randint(least, GAPS, (T,), **draw).to(torch.int8),
    }


def _unit(dtype=torch.float64, seed=0, **settings):
    torch.manual_seed(seed)
    given = {"levels": LEVELS, "authors": AUTHORS, "gap_buckets": GAPS, "query_dim": QUERY}
    given |= {"head_dim": 3, "value_dim": 5, "out_dim": 4, "dtype": dtype, **settings}
    unit = CodeTargetAttention(8, 2, **given)
    nn.init.normal_(unit.query.bias)
    return unit


def _bias(kind, dtype=torch.float64):
    if kind is None:
        return None
    bias = torch.randn((T, 2)[:kind], generator=torch.Generator().manual_seed(1), dtype=dtype)
    bias[3] = -torch.inf
    return bias.requires_grad_()


def _gradients(out, wanted):
    weight = torch.arange(1, out.numel() + 1).view(out.shape).sin().to(out.dtype)
    return [g.to_dense() for g in torch.autograd.grad((out * weight).sum(), wanted)]


WAYS = [("tables", False), ("query", False), ("query", True)]
KEYS = {
    "levels": {},
    "prefixes": {"prefix": True},
    "hashed": {"prefix": True, "max_rows": 20, "authors": 11, "author_ids": AUTHORS},
    "murmur3": {"prefix": True, "max_rows": 20, "hashing": "murmur3"},
}


@pytest.mark.parametrize("bias", [None, 1, 2])
@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize(("absorb", "sparse"), WAYS)
def test_absorbed_is_unabsorbed(absorb, sparse, keys, bias):
    unit, inputs, bias = _unit(absorb=absorb, sparse=sparse, **KEYS[keys]), _inputs(), _bias(bias)
    inputs["candidates"].requires_grad_()
    wanted = [*unit.parameters(), inputs["candidates"], *([] if bias is None else [bias])]
    out, plain = unit(**inputs, bias=bias), unit.unabsorbed(**inputs, bias=bias)
    assert out.shape == (4, 3, 4)
    torch.testing.assert_close(out, plain, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(_gradients(out, wanted), _gradients(plain, wanted), strict=True):
        assert theirs.any()
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    unit(**inputs, bias=bias).sum().backward()
    assert all(table.weight.grad.is_sparse == sparse for table in unit.tables.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("absorb", "sparse"), WAYS)
def test_absorbing_rounds_about_as_much(absorb, sparse, dtype):
    unit = _unit(absorb=absorb, sparse=sparse).to(dtype)
    exact = _unit(absorb=absorb).double()
    exact.load_state_dict(unit.state_dict())
    inputs = _inputs(dtype)
    found = []
    for model, call, given in (
        (exact, exact.unabsorbed, inputs | {"candidates": inputs["candidates"].double()}),
        (unit, unit, inputs),
        (unit, unit.unabsorbed, inputs),
    ):
        out = call(**given)
        found.append([out.detach().double(), *_gradients(out, list(model.parameters()))])
    for wanted, ours, plain in zip(*found, strict=True):
        error, allowed = (ours - wanted).norm(), (plain - wanted).norm()
        assert error <= 2 * allowed + 8 * torch.finfo(dtype).eps * wanted.norm()


@pytest.mark.parametrize("absorb", ["tables", "query"])
def test_is_softmax_attention_written_by_hand(absorb):
    unit = _unit(absorb=absorb, prefix=True)
    inputs = _inputs()
    rows = prefix_ngram_keys(inputs["codes"], LEVELS, [7, 35, 140])
    rows = torch.cat([inputs["authors"][:, None], inputs["gaps"][:, None], rows], 1)
    x = torch.zeros(T, 8, dtype=torch.float64)
    for t in range(T):
        for row, table in zip(rows[t].tolist(), unit.tables.values(), strict=True):
            x[t] += table.weight[row].detach() if row >= 0 else 0
    parts = {"k": unit.key.weight.view(2, 3, 8), "v": unit.value.weight.view(2, 5, 8)}
    wanted = torch.zeros(4, 3, 10, dtype=torch.float64)
    for user in (0, 2, 3):
        own = x[OFFSETS[user] : OFFSETS[user + 1]]
        for c, candidate in enumerate(inputs["candidates"][user]):
            q = (unit.query.weight @ candidate + unit.query.bias).view(2, 3)
            heads = [
                torch.softmax(own @ parts["k"][h].T @ q[h] / math.sqrt(3), 0)
                @ own
                @ parts["v"][h].T
                for h in range(2)
            ]
            wanted[user, c] = torch.cat(heads)
    torch.testing.assert_close(unit(**inputs), wanted @ unit.out.weight.T)


@pytest.mark.parametrize("kind", [None, 1, 2])
@pytest.mark.parametrize(("absorb", "sparse"), WAYS)
def test_lse_is_that_of_the_logits(absorb, sparse, kind):
    unit, given, bias = _unit(absorb=absorb, sparse=sparse), _inputs(), _bias(kind)
    out, lse = unit(**given, bias=bias, return_lse=True)
    assert torch.equal(out, unit(**given, bias=bias)) and lse.shape == (4, 3, 2)
    x = unit.embed(given["codes"], authors=given["authors"], gaps=given["gaps"])
    q = unit.query(given["candidates"]).unflatten(2, (2, 3))
    k = unit.key(x).unflatten(1, (2, 3))
    more = torch.zeros(T, 2) if bias is None else bias.view(T, -1).expand(T, 2)
    for user in range(4):
        rows = slice(OFFSETS[user], OFFSETS[user + 1])
        logits = torch.einsum("chd,thd->cht", q[user], k[rows]) / 3**0.5 + more[rows].T
        torch.testing.assert_close(lse[user], logits.logsumexp(2))
    wanted = [unit.query.weight, unit.key.weight]
    assert all(grad.any() for grad in torch.autograd.grad(lse[lse.isfinite()].sum(), wanted))


@pytest.mark.parametrize("absorb", ["tables", "query"])
def test_gradcheck(absorb):
    unit, inputs = _unit(absorb=absorb), _inputs()
    names, values = zip(*unit.named_parameters(), strict=True)

    def call(candidates, *parameters):
        given = inputs | {"candidates": candidates}
        state = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(unit, state, kwargs=given)

    candidates = inputs["candidates"].requires_grad_()
    assert torch.autograd.gradcheck(call, (candidates, *values), fast_mode=True)


def test_one_state_for_either_way():
    unit, other = _unit(absorb="tables"), _unit(absorb="query", seed=1)
    assert not torch.allclose(unit(**_inputs()), other(**_inputs()))
    assert {"tables.author.weight", "tables.gap.weight", "tables.code_2.weight"} <= set(
        unit.state_dict()
    )
    other.load_state_dict(unit.state_dict())
    torch.testing.assert_close(unit(**_inputs()), other(**_inputs()))


@pytest.mark.parametrize(("absorb", "sparse"), WAYS)
def test_empty_histories_give_zeros(absorb, sparse):
    unit, inputs = _unit(absorb=absorb, sparse=sparse), _inputs()
    out = unit(**inputs)
    assert torch.equal(out[1], torch.zeros(3, 4).double()) and out[0].all()
    gone = {name: inputs[name][:0] for name in ("codes", "authors", "gaps")}
    out = unit(inputs["candidates"], **gone, offsets=torch.zeros(5, dtype=torch.int64))
    assert torch.equal(out, torch.zeros(4, 3, 4).double())
    assert not any(g.any() for g in _gradients(out, list(unit.parameters())))
    assert unit(**inputs | {"candidates": torch.zeros(4, 0, QUERY).double()}).shape == (4, 0, 4)
    offsets = torch.zeros(1, dtype=torch.int64)
    assert unit(torch.zeros(0, 3, QUERY).double(), **gone, offsets=offsets).shape == (0, 3, 4)


class _Made(TorchDispatchMode):
    """Notes the shapes of all floats that are computed."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(each, torch.Tensor) and each.is_floating_point():
                self.shapes.append(tuple(each.shape))
        return out


@pytest.mark.parametrize("absorb", ["tables", "query"])
def test_no_float_is_made_per_item(absorb):
    unit = _unit(absorb=absorb)
    for call, per_item in ((unit.unabsorbed, True), (unit, False)):
        with _Made() as made:
            call(**_inputs()).sum().backward()
        assert (4, 3, 4) in made.shapes and any(T in shape for shape in made.shapes) == per_item


@pytest.mark.parametrize("fields", [True, False])
def test_packed_codes(fields):
    unit = _unit() if fields else _unit(authors=None, gap_buckets=None)
    inputs = _inputs(unknown=False)
    if not fields:
        del inputs["authors"], inputs["gaps"]
    packed = inputs | {"codes": pack_codes(inputs["codes"], LEVELS), "packed": True}
    for call in (unit, unit.unabsorbed):
        assert torch.equal(call(**packed), call(**inputs))


def test_embed_sums_the_fields_and_skips_the_unknown():
    unit = _unit()
    tables = [table.weight for table in unit.tables.values()]
    codes = torch.tensor([[6, 4, 3], [1, -1, 2]], dtype=torch.uint8).to(torch.int8)
    known = {"authors": torch.tensor([2**5, -1]), "gaps": torch.tensor([-1, 7])}
    wanted = torch.stack([tables[2][6] + tables[3][4] + tables[4][3], tables[2][1] + tables[4][2]])
    torch.testing.assert_close(unit.embed(codes), wanted)
    both = torch.stack([tables[0][32], tables[1][7]])
    torch.testing.assert_close(unit.embed(codes, **known), wanted + both)
    shared = _unit(authors=10, author_ids=2**40)
    ids = {"authors": torch.tensor([3, 10 * 2**30 + 3])}
    assert torch.equal(*shared.embed(codes[:1].repeat(2, 1), **ids))


def test_from_codebooks_starts_with_what_codes_stand_for():
    books = [torch.randn(n, 8, generator=torch.Generator().manual_seed(n)) / 50 for n in LEVELS]
    unit = CodeTargetAttention.from_codebooks(books, 2, authors=4000)
    codes = _inputs(unknown=False)["codes"]
    torch.testing.assert_close(unit.embed(codes), residual_kmeans_decode(codes, books))
    assert unit.tables["author"].weight.std().item() == pytest.approx(1 / 50, rel=0.3)
    assert unit.tables["code_0"].weight.requires_grad
    with pytest.raises(ValueError, match=r"codebooks\[1\]: shape must be \[N, 8\], got \[5, 7\]"):
        CodeTargetAttention.from_codebooks([books[0], books[1][:, :7]], 2)
    with pytest.raises(ValueError, match="prefix: rows of prefixes are not codewords"):
        CodeTargetAttention.from_codebooks(books, 2, prefix=True)


def test_starts_with_items_of_variance_one():
    torch.manual_seed(0)
    unit = CodeTargetAttention(64, 4, authors=500, gap_buckets=25)
    ids = {"authors": torch.randint(500, (2000,)), "gaps": torch.randint(25, (2000,))}
    codes = torch.stack([torch.randint(n, (2000,)) for n in (512, 256, 128)], 1)
    x = unit.embed(codes, **ids)
    assert x.var().item() == pytest.approx(1, abs=0.1)
    assert unit.key(x).var().item() == pytest.approx(1, abs=0.1)


def test_absorbs_by_what_is_less():
    def absorb(**more):
        return CodeTargetAttention(64, 4, device="meta", **more).absorb

    assert absorb(authors=1000) == "tables"
    assert absorb(authors=1000, sparse=True) == "query"
    assert absorb(authors=100_000) == absorb(prefix=True) == "query"


def test_meta_device_and_reset():
    unit = _unit(device="meta", dtype=torch.float32)
    assert {p.device.type for p in unit.parameters()} == {"meta"}
    unit = unit.to_empty(device="cpu")
    unit.reset_parameters()
    assert torch.isfinite(unit(**_inputs(torch.float32))).all()
    assert not unit.query.bias.any()


def test_gap_bucket():
    seconds = torch.tensor([0, 1, 2, 3, 4, 59, 3599, 3600, 2**24 - 1, 2**24, 2**53 - 1, 2**62])
    wanted = [min(int(s).bit_length(), 24) for s in seconds]
    assert gap_bucket(seconds, 25).tolist() == wanted
    assert gap_bucket(seconds, 25).dtype == torch.int8
    assert gap_bucket(seconds.view(3, 4), 64).flatten().tolist() == [
        int(s).bit_length() for s in seconds
    ]
    odd = torch.tensor([0.5, 1.0, 1.99, 2.0, torch.inf, torch.nan, -1.0, -torch.inf, 1e-30])
    assert gap_bucket(odd, 10).tolist() == [0, 1, 1, 2, 9, -1, -1, -1, 0]
    assert gap_bucket(torch.tensor([-5, 7]), 1).tolist() == [-1, 0]
