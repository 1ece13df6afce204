"""The Triton kernels of history search: their edges, and how they reach the chip."""

import re
from importlib.util import find_spec

import gpu_gates as gates
import pytest
import torch
from conftest import run_in_tritons_interpreter
from test_gates import needs_triton

from livrec_fast import explain, history_search, history_search_codes
from livrec_fast.reference.history_search import ORACLES

BOTH = (history_search, history_search_codes)
SIZES = {"B": 2, "C": 3, "L": 60, "D": 20, "K": 7, "ids": 0, "bits": 0, "times": 0}


def _inputs(op, dtype=torch.float32, **sizes):
    more = {"distinct": 0} if op is history_search else {"F": 3, "N": 9, "rows": 50}
    generator = torch.Generator().manual_seed(5)
    return ORACLES[op.__name__].make_inputs(generator, dtype, **SIZES | more | sizes)


def _agree(op, inputs):
    """Hold the kernels to the rule, and to the reference bit by bit: the inputs' sums are exact."""
    got = op(**inputs, backend="triton")
    ORACLES[op.__name__].agree(got, inputs)
    wanted = op(**inputs, backend="reference")
    assert all(one.equal(other) for one, other in zip(got, wanted, strict=True))
    assert got[1].max() > 0
    return got


def _history(scores, k, query=1.0):
    """Search one history of numbers; return scores and positions of one candidate."""
    keys = torch.as_tensor(scores)[:, None]
    query, offsets = torch.full((1, 1, 1), query), torch.tensor([0, len(keys)])
    found = history_search(query, keys, offsets, k, backend="triton")
    return [output[0, 0] for output in found]


def histories_around_a_piece():
    for op in BOTH:
        inputs = _inputs(op, B=1, L=8000)
        rows = "keys" if op is history_search else "codes"
        inputs[rows] = (
            inputs[rows][:1].repeat(5121, 1) if len(inputs[rows]) < 5121 else inputs[rows]
        )
        inputs[rows] = inputs[rows][:5121]
        inputs["offsets"] = torch.tensor([0, 1023, 1023, 2047, 3072, 5121])
        inputs["query"] = inputs["query"].repeat(5, 1, 1)
        _agree(op, inputs)


def histories_of_many_runs_of_lists():
    """More pieces than one program puts together; equal scores across them, latest first."""
    scores = torch.randint(0, 50, (70_000,), generator=torch.Generator().manual_seed(0)).float()
    scores[[3, 1024, 66_000]] = 50
    found, positions = _history(scores, 16)
    assert positions[:3].tolist() == [66_000, 1024, 3] and found[2] == 50 > found[3] == 49
    assert positions[3:].equal((scores == 49).nonzero()[-13:, 0].flip(0))


def candidates_of_many_blocks():
    for op in BOTH:
        _agree(op, _inputs(op, C=19, D=33))
        _agree(op, _inputs(op, C=1, D=130))


def as_many_items_as_it_finds():
    """From a history of three pieces, and from one that is shorter."""
    _agree(history_search, _inputs(history_search, B=1, L=4000, K=1024, C=1))
    _agree(history_search_codes, _inputs(history_search_codes, K=1024, C=1))


def as_many_fields_as_it_takes():
    _agree(history_search_codes, _inputs(history_search_codes, F=8, N=3, kind=2, hash=1))


def scores_of_every_sign():
    """From the least to the greatest, subnormal ones and -0, which is 0, among them."""
    scores = torch.tensor([-3e38, 1e-40, -1.0, 0.0, -1e-40, -0.0, 2.5, 3e38, -2.5, 1.0])
    found, positions = _history(scores, 12)
    assert positions.tolist() == [7, 6, 9, 1, 5, 3, 4, 2, 8, 0, -1, -1]
    assert found[:10].equal(scores[positions[:10]]) and found[10:].isneginf().all()
    assert not found.signbit()[4:6].any()
    found, positions = _history(torch.tensor([0.0, -1e-30, 0.0]), 3, query=1e-30)
    assert positions.tolist() == [2, 1, 0] and not found.signbit().any()  # -1e-60 is -0


def scores_past_float32_stay_in_range():
    keys = torch.tensor([[3e38, 3e38], [-3e38, 3e38], [1.0, 1], [-3e38, -3e38], [torch.nan, 1]])
    query = torch.tensor([[[3e38, 3e38], [3e38, -3e38], [0, 0]]])
    _, positions = history_search(query, keys, torch.tensor([0, 5]), 6, backend="triton")
    assert positions.sort().values.equal(torch.arange(-1, 5).expand(1, 3, 6))


def masks_reach_every_piece():
    """An author's items lie apart, in pieces with few and none of them, and with more than k."""
    items = torch.arange(5000)
    author = torch.where((items > 2048) & (items < 3072), 1, items % 600)
    given = {"item_ids": author, "query_ids": torch.tensor([[1, 599, -1]])}
    inputs = _inputs(history_search, B=1, L=1) | given | {"k": 5}
    inputs |= {"keys": torch.zeros(5000, 20), "offsets": torch.tensor([0, 5000])}
    _, positions = history_search(**inputs, backend="triton")
    assert positions[0].tolist() == [
        [4801, 4201, 3601, 3071, 3070],
        [4799, 4199, 3599, 1799, 1199],
        [-1] * 5,
    ]


def rows_at_any_address():
    inputs = _inputs(history_search)
    wanted = _agree(history_search, inputs)
    for name in ("query", "keys"):
        given = inputs[name]
        inputs[name] = torch.cat([given.new_ones(1), given.flatten()])[1:].view(given.shape)
        assert inputs[name].data_ptr() % 16
    assert all(
        one.equal(other) for one, other in zip(_agree(history_search, inputs), wanted, strict=True)
    )


def bad_contents_stay_in_bounds():
    """The host does not look at them: codes out of range are unknown, offsets are cut off."""
    codes = torch.tensor([[0, 1], [2, 0], [-7, 1], [1, 3], [1, 2]])
    tables = [torch.tensor([[4.0], [8]]), torch.tensor([[1.0], [2], [3]])]
    leaves = [torch.ones(3, 1, 1), *tables]
    for leaf in leaves:
        leaf.requires_grad_()
    offsets = torch.tensor([-3, 2**62, 1, 2**62])
    scores, positions = torch.ops.livrec.history_search_codes.triton(
        leaves[0], codes, leaves[1:], offsets, 6, *[None] * 7, [2, 3], [1, 1], "modulo", False
    )
    assert positions[0, 0].tolist() == [4, 3, 0, 2, 1, -1] and (positions[1:] == -1).all()
    assert scores[0, 0, :5].tolist() == [11, 8, 6, 2, 1]
    scores[0, 0, :5].sum().backward()
    assert [leaf.grad.flatten().tolist() for leaf in leaves] == [[28, 0, 0], [1, 2], [1, 2, 1]]


def what_it_cannot_do_is_refused():
    asked = {
        "k at most 1,024": {"K": 1025},
        "queries are float64": {"dtype": torch.float64},
        "at most 8 fields": {"F": 9},
    }
    for op in BOTH:
        for words, sizes in asked.items():
            if "F" not in sizes or op is history_search_codes:
                told = explain(op, **_inputs(op, **sizes))
                (line,) = [line for line in told.splitlines() if line.startswith("  triton")]
                assert words in line


EDGES = [
    histories_around_a_piece,
    histories_of_many_runs_of_lists,
    candidates_of_many_blocks,
    as_many_items_as_it_finds,
    as_many_fields_as_it_takes,
    scores_of_every_sign,
    scores_past_float32_stay_in_range,
    masks_reach_every_piece,
    rows_at_any_address,
    bad_contents_stay_in_bounds,
    what_it_cannot_do_is_refused,
]


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("edge", EDGES, ids=lambda edge: edge.__name__)
def test_edge_in_tritons_interpreter(edge):
    run_in_tritons_interpreter(edge)


@needs_triton
def test_every_score_is_one_chain_of_products():
    """Fused multiply-adds, not more than products: parts would be added up by others.

    Additions are the rows' own, field by field. Rows of 64 columns travel in 128 bits.
    """
    module = gates.load("history_search")
    seen = 0
    for kernel, types, constants, options in module.compile_configs():
        if kernel is module._select and constants["K"] == 100:
            sass = gates.compile_triton(kernel, types, constants, options, 90).sass
            columns = constants["BLOCK_D"] * constants["SIZE"] // (32 * options["num_warps"])
            assert len(re.findall(r"\bFFMA\b", sass)) == constants["BLOCK_C"] * columns
            assert len(re.findall(r"\bFADD\b", sass)) in (columns, columns * constants["FIELDS"])
            assert not re.search(gates.MATRIX_INSTRUCTION, sass)
            assert constants["D"] != 64 or re.search(r"LDG\.E\S*\.128", sass)
            seen += 1
    assert seen == 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("k", [1, 100, 1024])
@pytest.mark.parametrize("op", BOTH, ids=lambda op: op.__name__)
def test_large_batches_on_a_gpu(op, k):
    """Against the rule, of numbers whose sums round, and against themselves, with gradients."""
    inputs = _inputs(op, B=20, C=20, L=10_000, D=64, K=k, ids=1, bits=1, times=1)
    for name in {"query", "keys"} & set(inputs):
        inputs[name] = inputs[name] * 1.1

    def move(value):
        if isinstance(value, list):
            return [move(item) for item in value]
        if not torch.is_tensor(value):
            return value
        return value.cuda().requires_grad_(value.is_floating_point())

    on_gpu = {name: move(value) for name, value in inputs.items()}
    leaves = [on_gpu["query"], *([on_gpu["keys"]] if "keys" in on_gpu else on_gpu["tables"])]
    runs = []
    for _ in range(2):
        scores, positions = op(**on_gpu, backend="triton")
        kept = scores.where(positions >= 0, 0).sum()
        runs.append([scores.detach(), positions, *torch.autograd.grad(kept, leaves)])
    assert all(one.equal(other) for one, other in zip(*runs, strict=True))
    assert all(one.any() and not one.isnan().any() for one in runs[0])
    ORACLES[op.__name__].agree(tuple(output.cpu() for output in runs[0][:2]), inputs)
