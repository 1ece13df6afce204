"""History search: against sorting in Python, ties, filling, gradients, refusals, its oracle."""

import pytest
import torch
from search_by_hand import by_sorting, keys_of
from test_history_search_masks import BAD_MASKS

from livrec_fast import history_search, history_search_codes, prefix_ngram_lookup
from livrec_fast.reference import history_search as reference


def _changed(good, name, at, value):
    tensor = good[name].clone()
    tensor[at] = value
    return {name: tensor}


def _table(good, change):
    tables = list(good["tables"])
    tables[1] = change(tables[1])
    return {"tables": tables}


def _nan_table(good):
    return _table(good, lambda t: t.index_fill(0, torch.tensor([3]), float("nan")))


_COMMON = [
    ("query list", lambda g: {"query": [[1.0]]}, TypeError, "query: must be a tensor, got list"),
    ("query int", lambda g: {"query": g["query"].int()}, TypeError, "query: dtype .* int32"),
    ("query 2-d", lambda g: {"query": g["query"][0]}, ValueError, r"query: .*\[B, C, D\]"),
    ("query NaN", lambda g: _changed(g, "query", 4, float("nan")), ValueError, "query: row 4 .*"),
    ("query inf", lambda g: _changed(g, "query", 2, -torch.inf), ValueError, "query: row 2 .*"),
    ("no width", lambda g: {"query": g["query"][..., :0]}, ValueError, "query: D must be at least"),
    ("k = 0", lambda g: {"k": 0}, ValueError, "k: must be 1 to .*, got 0"),
    ("k < 0", lambda g: {"k": -3}, ValueError, "k: must be 1 to .*, got -3"),
    ("k huge", lambda g: {"k": 2**31}, ValueError, "k: must be 1 to 2,147,483,647, got 2,147"),
    ("k float", lambda g: {"k": 10.0}, TypeError, "k: must be an int, got float"),
    ("k bool", lambda g: {"k": True}, TypeError, "k: must be an int, got bool"),
    ("int32", lambda g: {"offsets": g["offsets"].int()}, TypeError, "offsets: dtype .* int32"),
    ("short", lambda g: {"offsets": g["offsets"][:-1]}, ValueError, r"offsets: .*\[7\], got \[6\]"),
    ("meta", lambda g: {"offsets": g["offsets"].to("meta")}, ValueError, "offsets: device .* meta"),
    ("first", lambda g: _changed(g, "offsets", 0, 1), ValueError, "offsets: the first must be 0"),
    ("last", lambda g: _changed(g, "offsets", -1, 2**62), ValueError, f"offsets: .* {2**62}"),
    ("falls", lambda g: _changed(g, "offsets", 3, 999), ValueError, "offsets: must not decrease"),
]
BAD_INPUTS = {
    "history_search": [
        *_COMMON,
        *BAD_MASKS,
        ("keys list", lambda g: {"keys": [[1.0]]}, TypeError, "keys: must be a tensor, got list"),
        ("keys half", lambda g: {"keys": g["keys"].half()}, TypeError, "keys: dtype .*float16"),
        ("keys wide", lambda g: {"keys": g["keys"].repeat(1, 2)}, ValueError, r"keys: .*\[T, 32\]"),
        ("keys meta", lambda g: {"keys": g["keys"].to("meta")}, ValueError, "keys: device .* meta"),
        (
            "NaN",
            lambda g: _changed(g, "keys", 7, float("nan")),
            ValueError,
            "keys: row 7 .* finite",
        ),
        ("inf", lambda g: _changed(g, "keys", 9, torch.inf), ValueError, "keys: row 9 .* finite"),
    ],
    "history_search_codes": [
        *_COMMON,
        *BAD_MASKS,
        ("codes float", lambda g: {"codes": g["codes"].float()}, TypeError, "codes: .* float32"),
        ("narrow", lambda g: {"codes": g["codes"][:, 1:]}, ValueError, r"codes: .*\[T, 3\]"),
        ("codes meta", lambda g: {"codes": g["codes"].to("meta")}, ValueError, "codes: .* meta"),
        (
            "id = size",
            lambda g: _changed(g, "codes", (5, 2), 12),
            IndexError,
            r"2\] = 12 .*\[-1, 6\)",
        ),
        ("id -2", lambda g: _changed(g, "codes", (5, 2), -2), IndexError, r"codes\[5, 2\] = -2 "),
        ("tensor", lambda g: {"tables": g["tables"][0]}, TypeError, "tables: must be a list"),
        ("no table", lambda g: {"tables": []}, ValueError, "tables: at least one .* none"),
        ("half", lambda g: _table(g, torch.Tensor.half), TypeError, r"tables\[1\]: dtype"),
        ("no rows", lambda g: _table(g, lambda t: t[:0]), ValueError, r"tables\[1\]: .* one row"),
        ("wide", lambda g: _table(g, lambda t: t.repeat(1, 2)), ValueError, r"tables\[1\]: shape"),
        ("table meta", lambda g: _table(g, lambda t: t.to("meta")), ValueError, r"\[1\]: .* meta"),
        ("NaN", _nan_table, ValueError, r"tables\[1\]: row 3 is not finite"),
        ("levels", lambda g: {"levels": (12, 9)}, ValueError, "levels: .* one per table, 3, got 2"),
        ("no levels", lambda g: {"packed": True}, ValueError, "levels: needed with packed=True"),
        ("prefix 1", lambda g: {"prefix": 1}, TypeError, "prefix: must be True or False, got 1"),
        ("groups", lambda g: {"levels": (12,) * 3, "groups": (1, 1)}, ValueError, "groups: .* 3 l"),
        ("hashing", lambda g: {"hashing": "xx"}, ValueError, "hashing: must be one of .* got 'xx'"),
        (
            "both",
            lambda g: {"levels": (12,) * 3, "prefix": True, "groups": (3,)},
            ValueError,
            "groups: prefix=True means one group",
        ),
    ],
}


_FREE = {"ids": 0, "bits": 0, "times": 0}
_ALL = {"ids": 1, "bits": 1, "times": 1}


def _inputs(dtype=torch.float32, seed=0, **sizes):
    sizes = {"B": 6, "C": 3, "L": 25, "D": 7, "K": 9, "distinct": 0, **_FREE} | sizes
    return reference.make_inputs(torch.Generator().manual_seed(seed), dtype, **sizes)


def _codes_inputs(dtype=torch.float32, seed=0, **sizes):
    sizes = {"B": 6, "C": 3, "L": 25, "D": 7, "F": 3, "N": 4, "K": 9, **_FREE} | sizes
    return reference.make_codes_inputs(torch.Generator().manual_seed(seed), dtype, **sizes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("K", [1, 9, 40])
def test_agrees_with_sorting_by_hand(dtype, K):
    """The drawn inputs have exact scores, so that ties are the same for both."""
    for name, inputs in (("dense", _inputs(dtype, K=K)), ("codes", _codes_inputs(dtype, K=K))):
        keys = inputs["keys"] if name == "dense" else keys_of(inputs)
        op = history_search if name == "dense" else history_search_codes
        scores, positions = op(**inputs)
        want, wanted = by_sorting(inputs, keys)
        assert torch.equal(positions, wanted), name
        assert scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(scores.double(), want.double(), rtol=1e-6, atol=1e-6)
        tied = (scores[..., 1:] == scores[..., :-1]) & scores[..., 1:].isfinite()
        assert K == 1 or tied.any(), "the inputs have no ties"


def test_equal_rows_tie_wherever_they_stand():
    """Rows of a matrix product may round differently at the edge of a block; these must not."""
    generator = torch.Generator().manual_seed(1)
    for D in (1, 3, 16, 33, 64, 127, 256):
        for length in (2, 5, 16, 37, 200):
            for layout in (torch.Tensor.contiguous, lambda t: t.T.contiguous().T):
                key = torch.randn(1, D, generator=generator)
                keys = layout(key.repeat(length, 1))
                query = torch.randn(1, 3, D, generator=generator)
                offsets = torch.tensor([0, length])
                scores, positions = history_search(query, keys, offsets, length)
                assert (scores == scores[..., :1]).all(), (D, length)
                assert positions[0, 0].tolist() == list(range(length - 1, -1, -1))


def test_equal_codes_tie_for_any_number_of_fields():
    generator = torch.Generator().manual_seed(1)
    for fields in (1, 4, 9, 17):
        tables = [torch.randn(5, 24, generator=generator) for _ in range(fields)]
        codes = torch.randint(-1, 5, (1, fields), generator=generator).repeat(101, 1)
        query = torch.randn(1, 2, 24, generator=generator)
        offsets = torch.tensor([0, 101])
        scores, positions = history_search_codes(query, codes, tables, offsets, 101)
        assert (scores == scores[..., :1]).all()
        assert positions[0, 1].tolist() == list(range(100, -1, -1))


def test_zero_scores_rank_above_negative_ones_and_tie_whatever_their_sign():
    keys = torch.tensor([[-1.0], [0.0], [-0.0], [-2.0], [0.0]])
    offsets = torch.tensor([0, 5])
    scores, positions = history_search(
        torch.tensor(
            [
                [[1.0]],
            ]
        ),
        keys,
        offsets,
        7,
    )
    assert positions.tolist() == [[[4, 2, 1, 0, 3, -1, -1]]]
    assert scores.tolist() == [[[0, 0, 0, -1, -2, -torch.inf, -torch.inf]]]


def test_short_and_empty_histories_are_filled():
    keys = torch.tensor([[2.0], [1.0], [3.0]])
    query = torch.tensor([[[1.0]], [[1.0]], [[1.0]], [[-1.0]]], requires_grad=True)
    offsets = torch.tensor([0, 2, 2, 2, 3])
    scores, positions = history_search(query, keys.requires_grad_(), offsets, 2)
    assert positions.tolist() == [[[0, 1]], [[-1, -1]], [[-1, -1]], [[0, -1]]]
    assert scores[1:3].eq(-torch.inf).all() and scores[3].tolist() == [[-3, -torch.inf]]
    grads = torch.autograd.grad(scores, (query, keys), torch.ones_like(scores))
    assert grads[0].tolist() == [[[3.0]], [[0.0]], [[0.0]], [[3.0]]]
    assert grads[1].tolist() == [[1.0], [1.0], [-1.0]]


def test_each_score_gives_its_gradient_to_its_own_row():
    inputs = _inputs(torch.float64, distinct=1)
    query, keys, offsets = (inputs[n] for n in ("query", "keys", "offsets"))
    scores, positions = history_search(query.requires_grad_(), keys.requires_grad_(), offsets, 4)
    flow = torch.randn(scores.shape, dtype=torch.float64)
    got = torch.autograd.grad(scores, (query, keys), flow)
    rows = offsets[:-1, None, None] + positions
    found = positions >= 0
    weights = torch.where(found, flow, 0)
    chosen = keys.detach()[rows.clamp(max=len(keys) - 1)]
    want_query = torch.einsum("bck,bckd->bcd", weights, chosen)
    want_keys = torch.zeros_like(keys)
    spread = weights[..., None] * query.detach()[:, :, None]
    want_keys = want_keys.index_add(0, rows[found], spread[found])
    torch.testing.assert_close(got, (want_query, want_keys))


def test_gradients_are_exact_in_float64():
    inputs = _inputs(torch.float64, B=4, C=2, L=6, D=3, K=3, distinct=1)
    leaves = [inputs[name].requires_grad_() for name in ("query", "keys")]

    def finite(scores):
        return scores[scores.isfinite()]

    def dense(query, keys):
        return finite(history_search(query, keys, inputs["offsets"], 3)[0])

    assert torch.autograd.gradcheck(dense, leaves)
    given = _codes_inputs(torch.float64, B=4, C=2, L=6, D=3, K=3)
    leaves = [t.requires_grad_() for t in (given["query"], *given["tables"])]

    def codes(query, *tables):
        scores, _ = history_search_codes(query, given["codes"], tables, given["offsets"], 3)
        return finite(scores)

    assert torch.autograd.gradcheck(codes, leaves)


def test_codes_search_is_search_on_decoded_keys():
    inputs = _codes_inputs(torch.float64)
    keys = keys_of(inputs)
    got = history_search_codes(**inputs)
    want = history_search(inputs["query"], keys, inputs["offsets"], inputs["k"])
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("hash", range(3))
@pytest.mark.parametrize("kind, pack", [(1, 0), (1, 1), (2, 0), (2, 1), (3, 0), (3, 1)])
def test_prefixes_hashed_and_packed_codes_are_search_on_what_lookup_sums(kind, pack, hash):
    """The drawn rows are multiples of 2^-10, so that their sums are exact, and ties are ties."""
    given = _codes_inputs(kind=kind, pack=pack, hash=hash, rows=7, N=9, L=60, **_ALL)
    named = {name: given.pop(name) for name in ("levels", "prefix", "groups", "hashing", "packed")}
    assert named["prefix"] == (kind == 2) and named["packed"] == bool(pack)
    scores, positions = history_search_codes(**given, **named)
    groups = [3] if named.pop("prefix") else named["groups"] or [1] * 3
    named["groups"] = groups
    keys = prefix_ngram_lookup(given.pop("codes"), given.pop("tables"), mode="sum", **named)
    want, wanted = history_search(keys=keys, **given)
    assert torch.equal(positions, wanted) and (positions >= 0).any()
    torch.testing.assert_close(scores, want)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_codes_of_any_integer_dtype(dtype):
    inputs = _codes_inputs()
    inputs["codes"] = inputs["codes"].clamp(min=0)
    cast = inputs | {"codes": inputs["codes"].to(dtype)}
    got, want = history_search_codes(**cast), history_search_codes(**inputs)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def test_autocast_leaves_scores_in_float32():
    inputs = _inputs()
    want = history_search(**inputs)
    with torch.autocast("cpu", torch.bfloat16):
        got = history_search(**inputs)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


WRONG = {
    "older first": (lambda s, p: (s, p[..., [0, 2, 1, 3, 4]]), "not in order"),
    "recent left out": (lambda s, p: (s[..., :2], p[..., [0, 2]]), "equal row .* was left out"),
    "best left out": (lambda s, p: (s[..., 1:3], p[..., 1:3]), "an item was left out"),
    "twice": (lambda s, p: (s, p[..., [0, 1, 1, 3, 4]]), "reported twice"),
    "filled with 0": (lambda s, p: (s, p.clamp(min=0)), "filled with -1"),
    "past the end": (lambda s, p: (s[..., :3], p[..., :3] + 2), "outside the history"),
    "negative": (lambda s, p: (s[..., :3], p[..., :3] - 1), "outside the history"),
    "not filled": (lambda s, p: (s.nan_to_num(neginf=0.0), p), "filled with -inf"),
    "not in order": (lambda s, p: (s[..., [1, 0]], p[..., [1, 0]]), "not in order"),
    "rounded": (lambda s, p: (s.bfloat16().float(), p), "a score is off"),
    "untied": (lambda s, p: (s * (1 + 2e-7 * torch.tensor([0, 1, 0, 0, 0])), p), "do not tie"),
    "int32": (lambda s, p: (s, p.int()), "int32"),
}


@pytest.mark.parametrize("change, why", WRONG.values(), ids=WRONG)
def test_the_oracle_refuses_wrong_answers(change, why):
    keys = torch.tensor([[1.0, 2.0], [1.0, 2.0], [0.3, 0.7], [5.1, 1.3]])
    inputs = {"query": torch.tensor([[[1.1, 0.9]]]), "keys": keys, "k": 5}
    inputs |= {"offsets": torch.tensor([0, 4])}
    scores, positions = history_search(**inputs)
    assert positions.tolist() == [[[3, 1, 0, 2, -1]]]
    reference.agree((scores, positions), inputs)
    changed = change(scores, positions)
    with pytest.raises(AssertionError, match=why):
        reference.agree(changed, inputs | {"k": changed[0].shape[-1]})
