"""Fields of code attention: prefixes, groups, hashed tables and packed codes, by hand."""

import prefix_by_hand as by_hand
import pytest
import torch
from hard_vectors import kernels_of, run

from livrec_fast import code_attention, pack_codes, prefix_ngram_keys, target_attention
from livrec_fast.reference.code_attention import ORACLES
from livrec_fast.testing import inputs_for

KERNELS = kernels_of("code_attention")
LEVELS = (7, 5, 4, 3, 4)  # as an author, a time gap and a code of three levels
KEYS = {(5,): (7, 35, 140, 420, 1680), (1,) * 5: LEVELS, (1, 1, 3): (7, 5, 4, 12, 48)}


def _offsets(*lengths):
    return torch.tensor([0, *lengths]).cumsum(0)


def _inputs(groups, most, dtype=torch.float64, seed=0, unknown=0.15, H=2, d=5, dv=3):
    """Draw histories of 9, 0, 1 and 14 rows, and tables of at most `most` rows."""
    generator = torch.Generator().manual_seed(seed)
    offsets = _offsets(9, 0, 1, 14)
    T = int(offsets[-1])

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    codes = torch.stack([torch.randint(n, (T,), generator=generator) for n in LEVELS], 1)
    absent = torch.rand(codes.shape, generator=generator) < unknown
    rows = [min(most, keys) for keys in KEYS[groups]]
    return {
        "q": draw(4, 3, H, d),
        "codes": codes.masked_fill(absent, -1),
        "key_tables": [draw(n, H, d) for n in rows],
        "value_tables": [draw(n, H, dv) for n in rows],
        "offsets": offsets,
        "bias": draw(T, H),
    }


def _leaves(inputs):
    tables = [*inputs["key_tables"], *inputs["value_tables"]]
    return [t.requires_grad_() for t in (inputs["q"], inputs["bias"], *tables)]


def _decode(tables, rows):
    """Add up rows in a loop; None names no row."""
    items = [
        sum(t[0] * 0 if r is None else t[r] for t, r in zip(tables, row, strict=True))
        for row in rows
    ]
    return torch.stack(items)


def _settings(groups):
    """Return each way to ask for these groups."""
    named = {"levels": LEVELS, "groups": groups}
    if groups == (5,):
        return [named, {"levels": LEVELS, "prefix": True}]
    return [named, {"levels": LEVELS}] if groups == (1,) * 5 else [named]


@pytest.mark.parametrize("hashing", ["modulo", "murmur3", "order_preserving"])
@pytest.mark.parametrize("most", [3000, 11, 3])
@pytest.mark.parametrize("groups", KEYS)
def test_is_target_attention_over_keys_decoded_by_hand(groups, most, hashing):
    inputs = _inputs(groups, most)
    names = inputs["key_tables"], inputs["value_tables"]
    sizes = [len(table) for table in names[0]]
    rows = by_hand.table_rows(inputs["codes"], LEVELS, sizes, hashing, groups)
    assert any(None in row for row in rows)
    given = {name: inputs[name] for name in ("q", "offsets", "bias")}
    leaves = _leaves(inputs)
    k, v = (_decode(tables, rows) for tables in names)
    want = target_attention(**given, k=k, v=v, return_lse=True)
    flows = [torch.randn(t.shape).to(t) for t in want]
    wanted = torch.autograd.grad(want, leaves, flows)
    for asked in _settings(groups):
        got = code_attention(**inputs, **asked, hashing=hashing, return_lse=True)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(torch.autograd.grad(got, leaves, flows), wanted)
    assert all(grad.ne(0).any() for grad in wanted)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("groups", KEYS)
def test_packed_codes_are_the_same_codes(groups, kernel):
    inputs = _inputs(groups, 11, torch.float32, unknown=0)
    rest = {"levels": LEVELS, "groups": groups, "hashing": "murmur3", "return_lse": True}
    leaves = _leaves(inputs)
    plain = run(code_attention, kernel, **inputs, **rest)
    packed = pack_codes(inputs["codes"], LEVELS)
    assert packed.dtype == torch.uint8 and packed.shape[1] == 2
    got = run(code_attention, kernel, **inputs | {"codes": packed}, **rest, packed=True)
    flows = [torch.randn(t.shape) for t in plain]
    for mine, want in zip(
        (*got, *torch.autograd.grad(got, leaves, flows)),
        (*plain, *torch.autograd.grad(plain, leaves, flows)),
        strict=True,
    ):
        assert torch.equal(mine, want)


@pytest.mark.parametrize("kernel", KERNELS)
def test_an_unknown_code_silences_the_deeper_levels_of_its_group_only(kernel):
    inputs = _inputs((1, 1, 3), 3000, torch.float32, unknown=0)
    inputs["codes"][:, 3] = -1  # the second level of the group of three

    def call(changed):
        rest = {"levels": LEVELS, "groups": (1, 1, 3)}
        return run(code_attention, kernel, **inputs | {"codes": changed}, **rest)

    want = call(inputs["codes"])
    for column in range(5):
        codes = inputs["codes"].clone()
        codes[:, column] = (codes[:, column] + 1) % LEVELS[column]
        assert torch.equal(call(codes), want) == (column == 4), column
    codes = inputs["codes"].clone()
    codes[:, 2:] = -1  # an unknown first level leaves the author and the gap
    rest = {key: inputs[key][:2] for key in ("key_tables", "value_tables")}
    two = code_attention(**inputs | rest | {"codes": codes[:, :2]})
    torch.testing.assert_close(call(codes), two)


def test_the_rows_are_those_of_prefix_ngram_keys():
    inputs = _inputs((1, 1, 3), 11)
    rest = {"levels": LEVELS, "groups": (1, 1, 3), "hashing": "murmur3"}
    rows = prefix_ngram_keys(inputs["codes"], rows=[len(t) for t in inputs["key_tables"]], **rest)
    torch.testing.assert_close(
        code_attention(**inputs, **rest), code_attention(**inputs | {"codes": rows}), rtol=0, atol=0
    )


def test_levels_default_to_the_rows_of_tables():
    inputs = _inputs((1,) * 5, 3000)
    torch.testing.assert_close(
        code_attention(**inputs), code_attention(**inputs, levels=LEVELS), rtol=0, atol=0
    )
    rest = {key: [t[:4] for t in inputs[key]] for key in ("key_tables", "value_tables")}
    with pytest.raises(IndexError, match=r"is outside \[-1, 4\)"):
        code_attention(**inputs | rest)
    assert code_attention(**inputs | rest, levels=LEVELS).isfinite().all()  # codes share rows


def test_a_table_may_have_more_rows_than_keys():
    inputs = _inputs((1, 1, 3), 3000, torch.float32)
    rest = {"levels": LEVELS, "groups": (1, 1, 3), "hashing": "murmur3"}
    wide = {
        key: [torch.cat([t, t.new_full((7, *t.shape[1:]), torch.nan)]) for t in inputs[key]]
        for key in ("key_tables", "value_tables")
    }
    got = code_attention(**inputs | wide, **rest)
    torch.testing.assert_close(got, code_attention(**inputs, **rest), rtol=0, atol=0)


@pytest.mark.parametrize("kernel", KERNELS)
def test_compiles_with_prefixes(kernel):
    inputs = _inputs((1, 1, 3), 11, torch.float32)
    rest = {"levels": LEVELS, "groups": (1, 1, 3), "hashing": "order_preserving"}
    leaves = _leaves(inputs)

    def call():
        return run(code_attention, kernel, **inputs, **rest)

    def inner(q, codes, keys, values, offsets, bias):
        tables = {"key_tables": keys, "value_tables": values}
        name = kernel.partition(" ")[0]
        return code_attention(q, codes, offsets=offsets, bias=bias, **tables, **rest, backend=name)

    compiled = torch.compile(inner, fullgraph=True, dynamic=True, backend="aot_eager")
    got = compiled(*(inputs[n] for n in ("q", "codes", "key_tables", "value_tables", "offsets",
                                         "bias")))  # fmt: skip
    want = call()
    torch.testing.assert_close(got, want)
    grads = (torch.autograd.grad(out.square().sum(), leaves) for out in (got, want))
    torch.testing.assert_close(*grads)


def test_the_cases_of_the_contract_are_what_they_are_called():
    """They are drawn: a name must not promise what the draw does not keep."""
    oracle = ORACLES["code_attention"]
    drawn = {case: inputs_for(oracle, case) for case in oracle.cases}
    assert drawn["one of each"]["codes"].tolist() == [[0]]
    assert drawn["packed"]["packed"] and drawn["packed"]["groups"] == [1, 2]
    for case in ("prefixes", "mixed groups", "hashed fields"):
        keys = torch.tensor(drawn[case]["levels"]).prod()
        assert len(drawn[case]["key_tables"][-1]) < keys and drawn[case]["codes"].eq(-1).any()
    for case, inputs in drawn.items():
        masked = inputs["bias"] is not None and inputs["bias"].isneginf().any()
        assert masked == ("masked" in case), case
        alike = len(inputs["codes"]) > 1 and (inputs["codes"] == inputs["codes"][:1]).all()
        assert alike == (case == "all rows alike"), case
