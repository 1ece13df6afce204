"""Masks of history search: by hand, each by itself, gradients, the units of Moment&Cross."""

import pytest
import torch
from search_by_hand import by_sorting, keys_of, may_find

from livrec_fast import history_search, history_search_codes
from livrec_fast.reference import history_search as reference
from livrec_fast.reference._search_mask import NOW


def _changed(good, name, at, value):
    tensor = good[name].clone()
    tensor[at] = value
    return {name: tensor}


def _cast(good, name, dtype):
    return {name: good[name].to(dtype)}


BAD_MASKS = [
    ("ids alone", lambda g: {"query_ids": None}, ValueError, "item_ids: needs query_ids, got none"),
    ("query alone", lambda g: {"item_ids": None}, ValueError, "query_ids: needs item_ids"),
    ("ids list", lambda g: {"item_ids": [1, 2]}, TypeError, "item_ids: must be a tensor, got list"),
    ("ids float", lambda g: _cast(g, "item_ids", torch.float32), TypeError, "item_ids: .* float32"),
    ("ids short", lambda g: {"item_ids": g["item_ids"][1:]}, ValueError, r"item_ids: shape .* got"),
    ("ids 2-d", lambda g: {"item_ids": g["item_ids"][:, None]}, ValueError, "item_ids: shape"),
    ("ids meta", lambda g: _cast(g, "item_ids", "meta"), ValueError, "item_ids: device .* meta"),
    ("query int", lambda g: {"query_ids": 1}, TypeError, "query_ids: must be a tensor, got int"),
    ("query float", lambda g: _cast(g, "query_ids", torch.half), TypeError, "query_ids: .*float16"),
    ("query [B]", lambda g: {"query_ids": g["query_ids"][:, 0]}, ValueError, r"_ids: .*\[6, 4\]"),
    ("query meta", lambda g: _cast(g, "query_ids", "meta"), ValueError, "query_ids: device .*meta"),
    ("bits alone", lambda g: {"required_bits": None}, ValueError, "item_bits: needs required_bits"),
    ("no bits", lambda g: {"item_bits": None}, ValueError, "required_bits: needs item_bits, got"),
    ("bits bool", lambda g: _cast(g, "item_bits", torch.bool), TypeError, "item_bits: .* got bool"),
    ("bits short", lambda g: {"item_bits": g["item_bits"][1:]}, ValueError, "item_bits: shape"),
    ("bits meta", lambda g: _cast(g, "item_bits", "meta"), ValueError, "item_bits: device .* meta"),
    ("required 1.", lambda g: {"required_bits": 1.0}, TypeError, "_bits: .* int or .* got float"),
    ("required True", lambda g: {"required_bits": True}, TypeError, "required_bits: .* got bool"),
    ("required huge", lambda g: {"required_bits": 2**63}, ValueError, "required_bits: .*9,223"),
    ("required [1, 1]", lambda g: {"required_bits": torch.ones(1, 1).int()}, ValueError, "_bits: "),
    ("times alone", lambda g: {"since": None, "until": None}, ValueError, "needs since or until"),
    ("no times", lambda g: {"item_times": None}, ValueError, "since: needs item_times, got none"),
    (
        "until alone",
        lambda g: {"item_times": None, "since": None},
        ValueError,
        "until: needs item_times",
    ),
    ("times float", lambda g: _cast(g, "item_times", torch.float64), TypeError, "times: .*float64"),
    ("times short", lambda g: {"item_times": g["item_times"][1:]}, ValueError, "times: shape"),
    ("times meta", lambda g: _cast(g, "item_times", "meta"), ValueError, "times: device .* meta"),
    ("since str", lambda g: {"since": "2024"}, TypeError, "since: must be an int or .* got str"),
    ("since low", lambda g: {"since": -(2**63) - 1}, ValueError, "since: must be -2.63 to 2.63 - "),
    ("until float", lambda g: _cast(g, "until", torch.float32), TypeError, "until: dtype .*loat32"),
    ("until [C]", lambda g: {"until": g["until"][0]}, ValueError, r"until: .*\[6, 4\], got \[4\]"),
    ("until meta", lambda g: _cast(g, "until", "meta"), ValueError, "until: device .* meta"),
]
MASKS = {
    "ids": {"ids": 1, "bits": 0, "times": 0},
    "bits": {"ids": 0, "bits": 1, "times": 0},
    "times": {"ids": 0, "bits": 0, "times": 1},
    "all": {"ids": 1, "bits": 1, "times": 1},
}
COLUMNS = {"item_ids": "query_ids", "item_bits": "required_bits", "item_times": "since"}


def _inputs(seed=0, codes=False, dtype=torch.float32, **sizes):
    sizes = {"B": 5, "C": 3, "L": 40, "D": 7, "K": 9, **MASKS["all"]} | sizes
    generator = torch.Generator().manual_seed(seed)
    if codes:
        return reference.make_codes_inputs(generator, dtype, F=3, N=8, **sizes)
    return reference.make_inputs(generator, dtype, distinct=0, **sizes)


def _same(one, other):
    return all(map(torch.equal, one, other))


@pytest.mark.parametrize("K", [1, 9, 60])
@pytest.mark.parametrize("masks", MASKS)
def test_agrees_with_leaving_items_out_by_hand(masks, K):
    """The drawn inputs have exact scores, so that ties are the same for both."""
    for seed in range(3):
        dense = _inputs(seed, K=K, **MASKS[masks])
        codes = _inputs(seed, codes=True, K=K, **MASKS[masks])
        for op, given in ((history_search, dense), (history_search_codes, codes)):
            scores, positions = op(**given)
            want, wanted = by_sorting(given, keys_of(given) if "codes" in given else None)
            assert torch.equal(positions, wanted)
            torch.testing.assert_close(scores.double(), want.double(), rtol=1e-6, atol=1e-6)
            free, _ = op(**_unmasked(given))
            assert K == 1 or not torch.equal(free, scores), "the masks leave everything"


def _unmasked(inputs):
    names = {*COLUMNS, *COLUMNS.values(), "until"}
    return {name: value for name, value in inputs.items() if name not in names}


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_columns_of_any_integer_dtype(dtype):
    generator = torch.Generator().manual_seed(0)
    inputs = _unmasked(_inputs())
    T = len(inputs["keys"])
    for item, query in COLUMNS.items():
        column = torch.randint(0, 100, (T,), generator=generator)
        wanted = torch.randint(0, 8, (5, 3), generator=generator)
        if item == "item_ids":
            column %= 8
        given = inputs | {item: column, query: wanted}
        want = history_search(**given)
        assert (want[1] >= 0).any() and torch.equal(want[1], by_sorting(given)[1])
        cast = {item: column.to(dtype), query: wanted.to(dtype)}
        assert _same(history_search(**inputs | cast), want), item


def test_an_int_is_that_number_for_every_candidate():
    inputs = _inputs()
    for name, number in (("required_bits", 3), ("since", NOW - 100), ("until", 2**62)):
        given = history_search(**inputs | {name: number})
        assert _same(given, history_search(**inputs | {name: torch.full((5, 3), number)}))
        assert torch.equal(given[1], by_sorting(inputs | {name: number})[1])


def _latest(k=9, **masks):
    """Search a history of six items with a query of zeros, and return the positions."""
    query, keys = torch.zeros(1, 1, 2), torch.randn(6, 2)
    _, positions = history_search(query, keys, torch.tensor([0, 6]), k, **masks)
    return [at for at in positions.flatten().tolist() if at != -1]


def _one(number):
    return torch.tensor([[number]])


def test_unknown_ids_equal_nothing_but_other_negative_ids_are_ids():
    ids = torch.tensor([-1, -2, 5, -1, 5, -(2**63)])
    found = {i: _latest(item_ids=ids, query_ids=_one(i)) for i in (-1, -2, 5, 4, -(2**63))}
    assert found == {-1: [], -2: [1], 5: [4, 2], 4: [], -(2**63): [5]}
    ids = torch.tensor([255, 0, 1, 2, 3, 4], dtype=torch.uint8)
    assert _latest(item_ids=ids, query_ids=_one(-1)) == [], "255 is an id of its own"
    assert _latest(item_ids=ids, query_ids=_one(255)) == [0]


def test_all_required_bits_and_any_others():
    bits = torch.tensor([0, 1, 2, 3, -128, 127], dtype=torch.int8)
    sets = {b: _latest(item_bits=bits, required_bits=b) for b in (0, 1, 3, 128, 256, -(2**63))}
    assert sets == {
        0: [5, 4, 3, 2, 1, 0], 1: [5, 3, 1], 3: [5, 3], 128: [4], 256: [4], -(2**63): [4],
    }  # fmt: skip
    assert _latest(item_bits=bits.view(torch.uint8), required_bits=256) == []


def test_a_window_holds_its_start_but_not_its_end():
    times = torch.tensor([10, 20, 20, 30, 15, 2**62])
    assert _latest(item_times=times, since=20) == [5, 3, 2, 1]
    assert _latest(item_times=times, until=20) == [4, 0]
    assert _latest(item_times=times, since=_one(15), until=30) == [4, 2, 1]
    assert _latest(item_times=times, since=20, until=_one(20)) == []
    assert _latest(item_times=times, since=-(2**63), until=2**63 - 1) == [5, 4, 3, 2, 1, 0]


def test_an_item_of_score_minus_infinity_goes_before_masked_ones():
    """Scores may overflow; what they mask must stay masked, and what they are must be found."""
    keys = torch.tensor([[-1e30], [1.0], [-1e30], [2.0]])
    found = history_search(
        torch.full((1, 1, 1), 1e30), keys, torch.tensor([0, 4]), 4,
        item_bits=torch.tensor([1, 1, 0, 0]), required_bits=1,
    )  # fmt: skip
    assert found[1].tolist() == [[[1, 0, -1, -1]]]


def _units(query, keys, offsets, k, video, live, viewed, bits, authors, wanted):
    """The five general search units of Moment&Cross over one history of both kinds of items."""
    zeros = torch.zeros_like(query)
    given = {"keys": keys, "offsets": offsets, "k": k, "item_bits": bits}
    same = {"item_ids": authors, "query_ids": wanted}
    return {
        "short": history_search(zeros, required_bits=video, **given),
        "long": history_search(query, required_bits=video, **given),
        "aidhard": history_search(zeros, required_bits=video, **same, **given),
        "livelong": history_search(query, required_bits=live, **given),
        "mixed": history_search(zeros, required_bits=viewed, **given),
    }


def test_the_five_search_units_of_moment_and_cross():
    VIDEO, LIVE, VIEWED, k = 1, 2, 8, 12
    inputs = _unmasked(_inputs(seed=3, B=4, C=3, L=200))
    query, keys, offsets = (inputs[name] for name in ("query", "keys", "offsets"))
    generator = torch.Generator().manual_seed(4)
    T = len(keys)
    is_live = torch.rand(T, generator=generator) < 0.2
    viewed = torch.rand(T, generator=generator) < 0.3
    bits = (torch.where(is_live, LIVE, VIDEO) + VIEWED * viewed).to(torch.uint8)
    authors = torch.randint(0, 30, (T,), generator=generator)
    wanted = torch.randint(0, 30, (4, 3), generator=generator)
    units = _units(query, keys, offsets, k, VIDEO, LIVE, VIEWED, bits, authors, wanted)
    for u in range(4):
        rows = range(int(offsets[u]), int(offsets[u + 1]))
        for c in range(3):
            scores = (keys[rows.start : rows.stop].double() @ query[u, c].double()).tolist()
            videos = [at for at, row in enumerate(rows) if not is_live[row]]
            lives = [at for at, row in enumerate(rows) if is_live[row]]
            by_score = lambda at, scores=scores: (-scores[at], -at)  # noqa: E731
            want = {
                "short": videos[::-1],
                "long": sorted(videos, key=by_score),
                "aidhard": [at for at in videos[::-1] if authors[rows[at]] == wanted[u, c]],
                "livelong": sorted(lives, key=by_score),
                "mixed": [at for at, row in enumerate(rows) if viewed[row]][::-1],
            }
            for name, (_, positions) in units.items():
                assert positions[u, c].tolist() == (want[name] + [-1] * k)[:k], (name, u, c)
    assert (units["aidhard"][1] >= 0).any() and (units["livelong"][1] == -1).any()


def test_masked_items_have_gradients_of_zero_and_others_are_exact():
    for codes in (False, True):
        inputs = _inputs(codes=codes, dtype=torch.float64, B=3, C=2, L=30, D=3, K=4)
        name = "tables" if codes else "keys"
        op = history_search_codes if codes else history_search
        parts = list(inputs[name]) if codes else [torch.randn_like(inputs[name])]

        def finite(query, *parts, op=op, inputs=inputs, codes=codes, name=name):
            scores, _ = op(**inputs | {"query": query, name: parts if codes else parts[0]})
            assert scores.isfinite().any()
            return scores[scores.isfinite()]

        leaves = [t.requires_grad_() for t in (inputs["query"], *parts)]
        assert torch.autograd.gradcheck(finite, leaves)
        if not codes:
            scores, positions = op(**inputs | {"keys": parts[0]})
            (grad,) = torch.autograd.grad(scores, parts, torch.ones_like(scores))
            ends = inputs["offsets"].tolist()
            for u in range(3):
                for row in range(ends[u], ends[u + 1]):
                    found = any(may_find(inputs, u, c, row) for c in range(2))
                    assert found or not grad[row].any()


def test_masks_and_plain_numbers_trace_in_one_graph():
    inputs = _inputs() | {"required_bits": 1, "until": NOW - 20}
    tensors = {n: v for n, v in inputs.items() if isinstance(v, torch.Tensor)}

    def search(tensors, since):
        plain = {"k": 5, "required_bits": 1, "until": NOW - 20}
        return history_search(**tensors | plain, since=since)

    compiled = torch.compile(search, fullgraph=True, dynamic=True, backend="aot_eager")
    for since in (inputs["since"], inputs["since"] + 130, -(2**63), 2**63 - 1, None):
        assert _same(compiled(tensors, since), search(tensors, since)), since


def test_the_oracle_refuses_masked_items():
    inputs = _inputs(seed=2, B=1, C=1, L=40, K=40, **MASKS["ids"])
    inputs["query_ids"].fill_(7)
    scores, positions = history_search(**_unmasked(inputs))
    reference.agree((scores, positions), _unmasked(inputs))
    with pytest.raises(AssertionError, match="filled with -inf"):
        reference.agree((scores, positions), inputs)
    inputs["item_ids"].fill_(7)[positions[0, 0, 0]] = 8
    with pytest.raises(AssertionError, match="a masked item is reported"):
        reference.agree((scores[..., :1], positions[..., :1]), inputs | {"k": 1})
