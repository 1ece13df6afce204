"""The benches of attention: peers agree, and whoever cannot take part says why."""

import importlib
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.nn import functional as F

from livrec_fast.benchmarking import Absent, Options, enter, find_cases

BENCHES = Path(__file__).parent.parent / "benches"
CPU, GPU = Options(quick=True), Options("cuda")
ROUNDED = torch.bfloat16


def module(name):
    next(find_cases(BENCHES, CPU))  # makes the folder a package
    return importlib.import_module(f"livrec_benches.{name}")


def entered(case):
    """Hold all contestants to agree, without timing any; return what came of each."""
    inputs = case.make()
    return {c.name: enter(c, case, inputs) for c in case.contestants}


def reasons(case):
    return {c.name: c.reason for c in case.contestants if isinstance(c, Absent)}


def attention_case(kind, training, options=CPU, **more):
    bench = module("bench_target_attention")
    return bench.case(kind, 3, 40, 2, options, training, **more)


@pytest.mark.parametrize("training", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize("kind", ["alike", "jagged"])
def test_both_ways_to_attend_to_features_agree(kind, training):
    bench = module("bench_target_attention_features")
    found = entered(bench.case(kind, 3, 40, 2, CPU, training))
    assert not [came for came in found.values() if isinstance(came, Absent)]
    for name in ("products", "absorbed"):
        attention, layout = found[f"{name} + SDPA"].run.note.split(", ")
        assert attention in ("flash_attention", "math")
        assert layout in (
            ("padded", "user by user") if kind == "jagged" else ("heads last", "heads first")
        )


def test_features_user_by_user_and_heads_first_are_the_same():
    peers, bench = module("peers_features"), module("bench_target_attention_features")
    case = bench.case("alike", 3, 40, 2, CPU, training=True)
    inputs = case.make()
    for function in (peers.products, peers.absorbed):
        for layout in (peers.BY_USER, peers.HEADS_FIRST, peers.PADDED):
            found, restore = peers.running(layout, inputs, function)()
            case.agree(restore(found), inputs)
            with pytest.raises(AssertionError, match="off by"):
                case.agree([1.01 * x for x in restore(found)], inputs)


def test_features_and_units_are_timed_at_the_sizes_asked_for():
    for name, lengths in (
        ("target_attention_features", {2_000, 10_000}),
        ("din_attention", {50, 200}),
    ):
        cases = list(find_cases(BENCHES, Options(), [name]))
        for direction in ("forward", "forward+backward"):
            sizes = {
                (c.sizes["B"], c.sizes["C"], c.sizes["T"])
                for c in cases
                if c.direction == direction
            }
            assert {(16, c, t) for c in (1, 8, 32) for t in lengths} <= sizes
            names = {c.name for case in cases for c in case.contestants}
            assert sum("compiled" in name for name in names) >= 2


@pytest.mark.parametrize("training", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize("activation", ["sigmoid", "relu", "dice"])
def test_every_din_unit_agrees(activation, training):
    case = module("bench_din_attention").case(activation, 3, 20, 2, 8, CPU, training)
    found = entered(case)
    for name in ("torch, pairs", "torch, first layer in parts"):
        assert not isinstance(found[name], Absent), found[name]
    reason = getattr(found["FuxiCTR DIN_Attention"], "reason", None)
    if find_spec("fuxictr") is None:
        assert "is not installed" in reason
    elif activation == "dice":
        assert "the batch's own statistics" in reason
    elif find_spec("sklearn") and find_spec("pandas") and find_spec("pyarrow"):
        assert reason is None
    assert not {"h5py", "polars", "ray"} & {
        n for n, m in sys.modules.items() if "Mock" in str(type(m))
    }


def varlen_by_hand(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k):
    """Attend user by user, and hold the arguments to what torch's own asks for."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and query.dim() == key.dim() == 3
    assert max_q == int(cu_seq_q.diff().max()) and max_k == int(cu_seq_k.diff().max())
    q, k, v = (
        [part.transpose(0, 1) for part in x.split(ends.diff().tolist())]
        for x, ends in ((query, cu_seq_q), (key, cu_seq_k), (value, cu_seq_k))
    )
    each = map(F.scaled_dot_product_attention, q, k, v)
    return torch.cat([out.transpose(0, 1) for out in each])


@pytest.mark.parametrize("training", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize("kind", ["alike", "jagged"])
def test_varlen_is_given_rows_as_they_come(kind, training, monkeypatch):
    varlen = pytest.importorskip("torch.nn.attention.varlen", reason="comes with torch 2.10")
    monkeypatch.setattr(varlen, "varlen_attn", varlen_by_hand)
    case = attention_case(kind, training)
    inputs = case.make()
    found = module("peers_attention_gpu").varlen(inputs)()
    case.agree(found, inputs)
    with pytest.raises(AssertionError, match="off by"):
        case.agree([1.01 * x for x in ([found] if torch.is_tensor(found) else found)], inputs)


class Backend:
    """Takes what ffpa-attn's own does."""

    def __init__(self, forward=None, backward=None, autotune=False):
        self.side = forward, backward, autotune


def ffpa_by_hand(query, key, value, attn_mask=None, *, forward_backend, backward_backend):
    """Attend with torch's, and hold the arguments to what ffpa-attn asks for."""
    assert (forward_backend.side, backward_backend.side) == ((True, None, True), (None, True, True))
    assert os.environ["FFPA_TRITON_ALLOW_SMALL_D"] == "1"
    return F.scaled_dot_product_attention(query, key, value, attn_mask)


@pytest.mark.parametrize("training", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize("kind", ["alike", "jagged"])
def test_ffpa_runs_its_own_kernels_and_gets_a_mask(kind, training, monkeypatch):
    library = ModuleType("ffpa_attn")
    library.TritonBackend, library.ffpa_attn_func = Backend, ffpa_by_hand
    monkeypatch.setitem(sys.modules, "ffpa_attn", library)
    peers = module("peers_attention_gpu")
    for name in peers.OWN_KERNELS:
        monkeypatch.setenv(name, "0")
    case = attention_case(kind, training)
    inputs = case.make()
    run = peers.ffpa(CPU, inputs)
    found, restore = run()
    case.agree(restore(found), inputs)
    assert run.note in (("padded",) if kind == "jagged" else ("heads last", "heads first"))


def test_attentions_of_gpus_say_why_they_are_absent():
    said = reasons(attention_case("alike", False))
    assert "on a GPU only" in said["varlen_attn"] and "GPU only" in said["ffpa-attn"]
    said = reasons(attention_case("alike", False, GPU))
    assert "16-bit rows only" in said["varlen_attn"]
    said = reasons(attention_case("alike", True, GPU, dtype=ROUNDED))
    assert "varlen_attn" not in said or find_spec("torch.nn.attention.varlen") is None
    installed = find_spec("ffpa_attn") is not None
    assert ("heads of 64 or more" if installed else "not installed") in said["ffpa-attn"]
    wide = reasons(attention_case("alike", True, GPU, dtype=ROUNDED, dim=64))
    assert ("ffpa-attn" in wide) is not installed


@pytest.mark.parametrize("name", ["target_attention", "code_attention"])
def test_flex_attention_takes_part_wherever_it_can(name):
    for options in (Options(), GPU):
        for case in find_cases(BENCHES, options, [name]):
            entries = {c.name: c for c in case.contestants}
            (flex,) = (entry for entry in entries if "FlexAttention" in entry)
            refused = options.device == "cpu" and case.direction != "forward"
            assert isinstance(entries[flex], Absent) == refused
