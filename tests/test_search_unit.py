"""SearchUnit and ExtractUnit: what is found, what is attended to, against plain pipelines."""

import math

import pytest
import torch
from search_by_hand import by_sorting
from torch.nn import functional

from livrec_fast import ExtractUnit, SearchUnit, TargetAttention, history_search_codes

OFFSETS = torch.tensor([0, 9, 9, 30, 41, 43])
B, C, T, DIM, K = 5, 3, 43, 6, 4


@pytest.fixture(autouse=True)
def forget():
    """Let each test compile the modules anew."""
    torch.compiler.reset()


def _inputs(dtype=torch.float64):
    draw = {"generator": torch.Generator().manual_seed(0), "dtype": dtype}
    return torch.randn(B, C, DIM, **draw), torch.randn(T, DIM, **draw)


def _masks():
    generator = torch.Generator().manual_seed(1)

    def draw(low, high, *shape):
        return torch.randint(low, high, shape, generator=generator)

    return {
        "item_ids": draw(-1, 3, T), "query_ids": draw(-1, 3, B, C),
        "item_bits": draw(0, 8, T).to(torch.uint8), "required_bits": 4,
        "item_times": torch.arange(T), "until": draw(3, T, B, C),
    }  # fmt: skip


def _wanted(query, keys, k=K, **masks):
    return by_sorting({"query": query, "keys": keys, "offsets": OFFSETS, "k": k, **masks})[1]


def _unit(dtype=torch.float64, heads=2, **settings):
    torch.manual_seed(2)
    given = {"head_dim": 3, "value_dim": 5, "out_dim": 4, "dtype": dtype}
    return ExtractUnit(DIM, heads, **given | settings)


LATEST = torch.zeros(B, 1, 1), torch.zeros(T, 1)
TIED = torch.zeros(B, C, 1), torch.zeros(T, 1)


def test_latest():
    unit = SearchUnit("latest", K)
    assert torch.equal(unit(OFFSETS), _wanted(*LATEST))
    assert unit(OFFSETS)[:, 0].tolist()[1] == [-1] * K
    assert unit(OFFSETS)[:, 0].tolist()[4] == [1, 0, -1, -1]
    masks = {name: _masks()[name] for name in ("item_times", "until")}
    assert torch.equal(unit(OFFSETS, **masks), _wanted(*TIED, **masks))
    since = {"item_times": torch.arange(T), "since": 20}
    assert torch.equal(unit(OFFSETS, **since), _wanted(*LATEST, **since))
    assert unit(torch.zeros(1).long()).shape == (0, 1, K)


@pytest.mark.parametrize("scored", [False, True])
@pytest.mark.parametrize("kind", ["author", "long_view"])
def test_hard_search(kind, scored):
    names = {"author": ("item_ids", "query_ids"), "long_view": ("item_bits", "required_bits")}
    masks = {name: _masks()[name] for name in names[kind]}
    query, keys = _inputs()
    given = {"query": query, "keys": keys} if scored else {}
    plain = (query, keys) if scored else TIED if kind == "author" else LATEST
    found = SearchUnit(kind, K)(OFFSETS, **given, **masks)
    assert torch.equal(found, _wanted(*plain, **masks)) and (found >= 0).any()
    found = SearchUnit(kind, K)(OFFSETS, **given, **_masks())
    plain = plain if scored else TIED
    assert torch.equal(found, _wanted(*plain, **_masks())) and (found >= 0).any()


def test_dot_product_and_its_heads():
    query, keys = _inputs()
    search = SearchUnit("dot_product", K)
    found = search(OFFSETS, query=query, keys=keys)
    assert torch.equal(found, _wanted(query, keys))
    nested = torch.nested.nested_tensor_from_jagged(keys, OFFSETS)
    assert torch.equal(search(query=query, keys=nested), found)
    heads = torch.stack([query, -query], 2)
    found = search(OFFSETS, query=heads, keys=keys, **_masks())
    assert found.shape == (B, C, 2, K)
    for h, sign in enumerate((1, -1)):
        assert torch.equal(found[:, :, h], _wanted(sign * query, keys, **_masks()))


def test_by_codes():
    generator = torch.Generator().manual_seed(3)
    codes = torch.stack([torch.randint(-1, n, (T,), generator=generator) for n in (5, 4)], 1)
    tables = [torch.randn(n, DIM, generator=generator) for n in (5, 20)]
    query = _inputs(torch.float32)[0]
    settings = {"levels": (5, 4), "prefix": True}
    unit = SearchUnit("dot_product", K, **settings)
    found = unit(OFFSETS, query=query, codes=codes, tables=tables)
    wanted = history_search_codes(query, codes, tables, OFFSETS, K, **settings)[1]
    assert torch.equal(found, wanted)


def test_padding_never_wins_and_nothing_is_found_twice():
    query, keys = -torch.ones(B, C, DIM), torch.ones(T, DIM)  # all scores are below padding's 0
    for k in (1, 8, 50):
        found = SearchUnit("dot_product", k)(OFFSETS, query=query, keys=keys)
        for user, length in enumerate(OFFSETS.diff().tolist()):
            for row in found[user].tolist():
                assert row == [*range(length - 1, -1, -1), *[-1] * k][:k]


def _plain_pipeline(unit, candidates, x, mode):
    """Run SIM or TWIN in plain torch, user by user."""
    q = functional.linear(candidates, unit.query.weight).unflatten(-1, (2, 3)) / math.sqrt(3)
    k = functional.linear(x, unit.key.weight).unflatten(-1, (2, 3))
    v = functional.linear(x, unit.value.weight).unflatten(-1, (2, 5))
    out = x.new_zeros(B, C, 2, 5)
    for user in range(B):
        span = slice(OFFSETS[user], OFFSETS[user + 1])
        count = min(K, len(x[span]))
        logits = torch.einsum("chd,thd->cht", q[user], k[span])
        if mode == "sum":
            at = logits.sum(1, keepdim=True).topk(count).indices.expand(-1, 2, -1)
        elif mode == "each":
            at = logits.topk(count).indices
        else:
            scores = candidates[user] @ x[span].T
            at = scores.topk(count).indices[:, None].expand(-1, 2, -1)
        best = logits.gather(2, at).softmax(2)
        values = v[span].transpose(0, 1)[torch.arange(2)[None, :, None], at]
        out[user] = torch.einsum("cht,chtv->chv", best, values)
    return functional.linear(out.flatten(2), unit.out.weight)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("absorb", ["none", "query"])
@pytest.mark.parametrize("mode", ["soft", "sum", "each"])
def test_pipelines_of_sim_and_twin(mode, absorb, compiled):
    candidates, x = _inputs()
    unit, search = _unit(absorb=absorb), SearchUnit("dot_product", K)

    def run(candidates, x):
        query = candidates if mode == "soft" else unit.search_query(candidates, mode)
        positions = search(OFFSETS, query=query, keys=x)
        return unit(candidates, x, OFFSETS, positions=positions)

    call = torch.compile(run, fullgraph=True, backend="aot_eager") if compiled else run
    candidates, x = candidates.requires_grad_(), x.requires_grad_()
    wanted = [*unit.parameters(), candidates, x]
    outs = call(candidates, x), _plain_pipeline(unit, candidates, x, mode)
    torch.testing.assert_close(*outs)
    assert torch.equal(outs[0][1], torch.zeros(C, 4).double()) and outs[0][4].any()
    grads = [torch.autograd.grad(o.cos().sum(), wanted) for o in outs]
    for ours, theirs in zip(*grads, strict=True):
        assert theirs.any()
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("bias", [None, 1, 2])
@pytest.mark.parametrize("form", ["pairs", "shared", "heads"])
@pytest.mark.parametrize("compiled", [False, True])
def test_all_found_is_target_attention(compiled, form, bias):
    candidates, x = _inputs()
    unit, whole = _unit(), TargetAttention(DIM, 2, head_dim=3, value_dim=5, out_dim=4).double()
    whole.load_state_dict(unit.state_dict())
    positions = SearchUnit("latest", 25)(OFFSETS)  # [B, 1, 25], more than any has
    if form == "pairs":
        positions = positions.repeat(1, C, 1)
    elif form == "heads":
        positions = positions[:, :, None].repeat(1, C, 2, 1)
    generator = torch.Generator().manual_seed(4)
    bias = bias and torch.randn((T, 2)[:bias], generator=generator).double()
    if bias is not None:
        bias[3] = -torch.inf
    call = torch.compile(unit, fullgraph=True, backend="aot_eager") if compiled else unit
    out = call(candidates, x, OFFSETS, positions=positions, bias=bias)
    torch.testing.assert_close(out, whole(candidates, x, OFFSETS, bias=bias))
    if form == "shared":
        one = call(candidates[:, 0], x, OFFSETS, positions=positions, bias=bias)
        torch.testing.assert_close(one, out[:, 0])


@pytest.mark.parametrize("compiled", [False, True])
def test_rows_not_found_are_not_read(compiled):
    candidates, x = _inputs()
    positions = SearchUnit("latest", K)(OFFSETS)
    unit = _unit()
    call = torch.compile(unit, fullgraph=True, backend="aot_eager") if compiled else unit
    wanted = call(candidates, x, OFFSETS, positions=positions)
    dirty = x.clone()
    for user, length in enumerate(OFFSETS.diff().tolist()):
        dirty[OFFSETS[user] : OFFSETS[user] + max(length - K, 0)] = math.nan
    assert torch.equal(call(candidates, dirty, OFFSETS, positions=positions), wanted)
    gone = torch.full((B, 1, K), -1)
    out = call(candidates, x[:0], torch.zeros(B + 1).long(), positions=gone)
    assert torch.equal(out, torch.zeros(B, C, 4).double())


def test_search_query_is_detached_and_ignores_autocast():
    unit, (candidates, _) = _unit(torch.float32), _inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        each, total = (unit.search_query(candidates, heads) for heads in ("each", "sum"))
    assert each.dtype == torch.float32 and not each.requires_grad and each.any()
    assert each.shape == (B, C, 2, DIM)
    torch.testing.assert_close(each.sum(2), total)
    assert torch.equal(unit.search_query(candidates[:, 0]), unit.search_query(candidates[:, :1]))
    unit.scale = -unit.scale  # the best logits are now those of the least products
    torch.testing.assert_close(unit.search_query(candidates), -each)


def test_autocast():
    unit, (candidates, x) = _unit(torch.float32), _inputs(torch.float32)
    positions = SearchUnit("latest", K)(OFFSETS)
    exact = unit(candidates, x, OFFSETS, positions=positions)
    with torch.autocast("cpu", torch.bfloat16):
        out = unit(candidates, x, OFFSETS, positions=positions)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), exact, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("kind", "given", "error", "message"),
    [
        ("newest", {}, ValueError, "kind: must be one of 'latest', 'dot_product', .* got 'newest'"),
        ("latest", {"k": 0}, ValueError, "k: must be from 1 to .*, got 0"),
        ("latest", {"k": 5.0}, TypeError, "k: must be an int, got 5.0"),
        ("latest", {"query": torch.zeros(B, C, 2)}, ValueError, "query: the latest are found with"),
        ("latest", {"offsets": OFFSETS.int()}, TypeError, "offsets: dtype .* int32"),
        ("latest", {"offsets": OFFSETS[:0]}, ValueError, "offsets: must have at least one"),
        ("latest", {"offsets": OFFSETS.flip(0)}, ValueError, "offsets: the first must be 0"),
        ("latest", {"until": 5}, ValueError, "until: needs item_times, got none"),
        ("dot_product", {}, ValueError, "query: needed by a search of kind 'dot_product', got no"),
        ("dot_product", {"query": [1.0]}, TypeError, "query: must be a tensor, got list"),
        ("dot_product", {"query": torch.zeros(B, 2)}, ValueError, r"query: must be \[B, C, D\] or"),
        ("dot_product", {"query": torch.zeros(B, C, 2)}, ValueError, "keys: give these or codes"),
        ("author", {"item_ids": torch.zeros(T).long()}, ValueError, "query_ids: needed by a sear"),
        ("author", {"keys": torch.zeros(T, 2)}, ValueError, "item_ids: needed by a search of kind"),
        ("long_view", {"required_bits": 1}, ValueError, "item_bits: needed by a search of kind"),
    ],
)
def test_bad_searches(kind, given, error, message):
    given = {"k": K, "offsets": OFFSETS} | given
    with pytest.raises(error, match=message):
        SearchUnit(kind, given.pop("k"))(given.pop("offsets"), **given)


@pytest.mark.parametrize(
    ("positions", "error", "message"),
    [
        (torch.full((B, C, K), 0), IndexError, r"positions\[1, 0, 0\] = 0 is outside \[-1, 0\)"),
        (torch.full((B, C, K), -2), IndexError, r"positions\[0, 0, 0\] = -2 is outside \[-1, 9\)"),
        (torch.full((B, 2, K), 0), ValueError, r"positions: shape must be \[5, 3, k\], got \[5, 2"),
        (torch.full((B, C, 3, K), 0), ValueError, r"positions: shape must be \[5, 3, 2, k\], got"),
        (torch.zeros(B, C, K), TypeError, "positions: dtype must be one of int64, got float32"),
        (None, TypeError, "positions: must be a tensor, got NoneType"),
    ],
)
def test_bad_positions(positions, error, message):
    with pytest.raises(error, match=message):
        _unit()(*_inputs(), OFFSETS, positions=positions)
