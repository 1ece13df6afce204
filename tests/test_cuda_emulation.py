"""The CUDA kernels, run on a CPU as tests/cuda/ emulates a GPU, against the formulas."""

import ctypes
import faulthandler
import os
import platform
import shutil
from functools import partial

import cuda_emulation as gpu
import pytest
import torch

from livrec_fast.reference.code_attention import code_attention as formula
from livrec_fast.testing.checks import check_forward, expected
from livrec_fast.testing.subjects import FORMULA, corners, inputs_for, subjects

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None or platform.machine() != "x86_64", reason="needs g++ on x86-64"
)
pytestmark = [needs_compiler, pytest.mark.xdist_group("cuda_emulation")]  # compiled once
SUBJECTS = subjects()
ATTENTION, VOTE = SUBJECTS["code_attention"], SUBJECTS["majority_vote"]
PLAIN = {"rows": 2**31, "kind": 0, "hash": 0, "pack": 0, "odd": 0}
ORDERS = (gpu.ASCENDING, gpu.DESCENDING, gpu.DRAWN)
SIZES = {"B": 3, "C": 3, "L": 40, "F": 3, "N": 20, "H": 2, "d": 6, "dv": 5, "bias": 2}


def agrees(inputs, **given):
    """Hold the attention to the contract's rule; return what it gave."""
    seen = []

    def attend(*args):
        seen.append(gpu.attend(*args, **given))
        return seen[-1]

    wanted = expected(ATTENTION, inputs)
    check_forward(gpu.emulated(ATTENTION, attend), FORMULA, inputs, wanted)
    (found,) = seen
    return found


def with_offsets(inputs, offsets):
    """Return inputs of histories as long as `offsets` says."""
    generator = torch.Generator().manual_seed(5)
    items, levels, bias = offsets[-1], map(len, inputs["key_tables"]), inputs["bias"]
    columns = [torch.randint(-1, level, (items,), generator=generator) for level in levels]
    changed = {"codes": torch.stack(columns, 1).to(torch.int16), "offsets": torch.tensor(offsets)}
    if bias is not None:
        changed["bias"] = torch.randn(items, *bias.shape[1:], generator=generator)
    return inputs | changed


def draw(dtype=torch.float32, offsets=None, **sizes):
    inputs = inputs_for(ATTENTION.oracle, {**SIZES, **sizes}, dtype)
    return inputs if offsets is None else with_offsets(inputs, offsets)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_code_attention_in_the_corners_of_the_contract(dtype):
    every = corners(ATTENTION.oracle).values()
    plain = [sizes for sizes in every if not sizes["kind"] and sizes["N"] < 1000]
    assert len(plain) > 12
    for sizes in plain:
        inputs = inputs_for(ATTENTION.oracle, sizes, dtype)
        for limit in (gpu.H100, gpu.OLD):
            agrees(inputs, limit=limit)


@pytest.mark.parametrize("bias", [0, 1, 2])
def test_code_attention_in_many_pieces(bias):
    """Histories that end just before, at and after a piece's end, of several pieces, and none."""
    offsets = [0, 1, 1, 1023, 1024, 2049, 2049, 5600, 5600]
    inputs = draw(B=8, H=1, bias=bias, offsets=offsets)
    out, lse = agrees(inputs)
    empty = [1, 5, 7]
    assert out[empty].eq(0).all() and lse[empty].isneginf().all()


def test_code_attention_of_any_number_of_columns_and_rows():
    """Tiles in part, several tiles, lanes from 128 down to 4 as memory gets short."""
    for sizes in (
        {"C": 1, "H": 1, "F": 1, "d": 1, "dv": 1},
        {"C": 11, "H": 3, "d": 8, "dv": 70},
        {"C": 40, "H": 2, "F": 2, "d": 33, "dv": 2},
        {"C": 32, "H": 1, "F": 1, "N": 1, "d": 4, "dv": 4},
        {"C": 4, "H": 4, "N": 300, "d": 128, "dv": 128, "B": 2},
        {"C": 8, "H": 1, "F": 2, "N": 1000, "B": 1},
        {"C": 1, "H": 4, "F": 8, "N": 250, "B": 1},
        {"C": 32, "H": 1, "N": 9, "d": 256, "dv": 256, "B": 2, "dtype": torch.bfloat16},
    ):
        inputs = draw(**sizes)
        for limit in (gpu.H100, gpu.OLD):
            agrees(inputs, limit=limit)


@pytest.mark.parametrize("kernel", ORDERS)
def test_code_attention_does_not_depend_on_the_order_of_blocks_and_threads(kernel):
    inputs = draw(B=3, C=9, bias=1, offsets=[0, 700, 2100, 3000])
    args = ATTENTION.arguments(inputs)
    for limit in (gpu.H100, gpu.OLD):
        first = gpu.attend(*args, limit=limit)
        again = gpu.attend(*args, limit=limit, order=kernel)
        assert all(a.equal(b) and a.any() for a, b in zip(first, again, strict=True))


def test_code_attention_reads_codes_of_every_width():
    inputs = draw(N=100, offsets=[0, 30, 30, 77])
    inputs["codes"] = inputs["codes"].abs()  # as uint8 has no -1
    found = []
    for dtype in (torch.uint8, torch.int16, torch.int32):
        found.append(agrees(inputs | {"codes": inputs["codes"].to(dtype)}))
    assert all(one.equal(found[0][at]) for each in found for at, one in enumerate(each))


def test_code_attention_of_hot_logits():
    """Up to 10^4 of both signs, and one that outweighs all: whole numbers, exact in float32."""
    inputs = draw(F=2, H=1, bias=1, offsets=[0, 1300, 1301, 2100])
    generator = torch.Generator().manual_seed(0)
    for field, table in enumerate(inputs["key_tables"]):
        inputs["key_tables"][field] = torch.randint(
            -9, 10, table.shape, generator=generator
        ).float()
    inputs |= {"q": torch.full((3, 3, 1, 6), 50.0), "scale": 2.0}
    inputs["bias"] = torch.arange(2100).float() % 2 * 20_000 - 10_000
    agrees(inputs)
    inputs["bias"] = torch.zeros(2100)
    inputs["bias"][[17, 1700]] = 10_000.0
    agrees(inputs)


def test_code_attention_far_below_zero_in_one_piece_and_masked_in_another():
    inputs = draw(B=2, bias=1, offsets=[0, 2500, 2600])
    inputs["bias"] = torch.full((2600,), -1e4)
    inputs["bias"][:1024] = -torch.inf
    inputs["bias"][2500:] = -torch.inf
    out, lse = agrees(inputs)
    assert out[1].eq(0).all() and lse[1].isneginf().all() and out[0].all()


def test_code_attention_stays_in_bounds():
    """The host does not look at contents: codes out of range are unknown, offsets are cut off."""
    codes = torch.tensor([[0, 1], [2, 0], [-7, 1], [1, 3], [1, 2]], dtype=torch.int32)
    tables = [torch.ones(2, 1, 4), torch.full((3, 1, 4), 2.0)]
    q, rest = torch.zeros(3, 1, 1, 4), (None, 1.0, (2, 3), (1, 1), "modulo", False)
    offsets = torch.tensor([-3, 2**62, 2**62, 2**62])
    out, lse = gpu.attend(q, codes, tables, tables, offsets, *rest)
    assert torch.allclose(out[:, 0, 0, 0], torch.tensor([(3.0 + 2 + 2 + 1 + 3) / 5, 0, 0]))
    for bad in ([5, 1, 4, 0], [2**62, -(2**62), 3, 2], [0, 5, 0, 5]):
        for order in ORDERS:
            again = gpu.attend(q, codes, tables, tables, torch.tensor(bad), *rest, order=order)
            assert not any(one.isnan().any() for one in again)


def test_code_attention_of_offsets_that_descend_reads_nothing_unwritten():
    inputs = draw(B=4, offsets=[0, 900, 2100, 3900, 5000])
    args = ATTENTION.arguments(inputs)
    for bad in (
        [0, 4500, 1200, 3900, 5000],
        [5000, 0, 5000, 0, 5000],
        [4000, 3000, 2000, 1000, 0],
        [0, 5000, 1000, 1000, 1000],
    ):
        args[4] = torch.tensor(bad)
        first, *others = (gpu.attend(*args, order=order) for order in ORDERS)
        assert not any(one.isnan().any() for one in first)
        assert all(a.equal(b) for other in others for a, b in zip(first, other, strict=True))


def at_the_limits(rows):
    """Draw as much as the op lets through: 8 fields, `rows` rows with the unknown ones, d = 256."""
    inputs = draw(torch.bfloat16, F=8, B=1, C=1, H=1, L=5, N=22, d=256, dv=256)
    sizes = [1] * 7 + [rows - 15]
    generator = torch.Generator().manual_seed(1)
    for name in ("key_tables", "value_tables"):
        made = [torch.randn(size, 1, 256, generator=generator) for size in sizes]
        inputs[name] = [table.to(torch.bfloat16) for table in made]
    inputs["codes"] = inputs["codes"].clamp(max=0)
    inputs["codes"][:, 7] = rows - 16
    return inputs


def test_code_attention_at_its_limits_fits_every_chip_and_no_more():
    agrees(at_the_limits(2048), limit=gpu.OLD)
    with pytest.raises(AssertionError):
        agrees(at_the_limits(2049), limit=gpu.H100)


@pytest.mark.parametrize(
    "name, most", [("code_attention", 2048), ("code_attention_gradient", 1024)]
)
def test_what_the_op_lets_through_and_refuses(name, most, monkeypatch):
    """As if the tensors were on a GPU."""
    subject = SUBJECTS[name]
    monkeypatch.setattr("livrec_fast.ops._code_fields.refuse_cuda", lambda tensor: None)
    monkeypatch.setattr("livrec_fast.ops._code_fields.refuse_triton", lambda tensor: None)

    def said(**sizes):
        return subject.refusal(inputs_for(subject.oracle, {**SIZES, **PLAIN, **sizes}), "cuda")

    assert said() is None and said(C=64, H=4) is None and said(F=8, d=100, dv=100) is None
    assert said(F=1, N=most - 1) is None
    assert f"at most {most:,} rows" in said(F=1, N=most)
    assert "at most 256 candidates" in said(C=65, H=4)
    assert "8 fields" in said(F=9)
    assert all("no groups, no hashing" in said(kind=kind, rows=5) for kind in (1, 2, 3))
    assert "not packed" in said(kind=1, pack=1)
    inputs = inputs_for(subject.oracle, {**SIZES, **PLAIN})
    inputs["codes"] = inputs["codes"].long()
    assert "uint8, int16 or int32" in subject.refusal(inputs, "cuda")


def test_code_attention_of_tables_with_more_rows_than_codes():
    inputs = draw(N=9, offsets=[0, 12, 40, 41])
    *args, levels, groups, hashing, packed = ATTENTION.arguments(inputs)
    args[1] = args[1].clamp(max=1)
    rest = ([2, 2, 2], groups, hashing, packed)
    wanted = formula(*args, levels, *rest[1:])
    for one, other in zip(gpu.attend(*args, *rest), wanted, strict=True):
        assert torch.allclose(one, other, atol=1e-5) and one.any()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32], ids=str)
def test_majority_vote_in_the_corners_of_the_contract(dtype):
    """All cases that it takes, in any order of blocks and threads."""
    taken = 0
    for case, sizes in corners(VOTE.oracle).items():
        inputs = inputs_for(VOTE.oracle, sizes)
        if inputs.get("rule", "per_level") != "per_level" or sum(inputs["levels"]) > 12288:
            continue
        codes = inputs["codes"]
        inputs["codes"] = codes.clamp(0, 255).to(dtype) if dtype == torch.uint8 else codes.to(dtype)
        wanted = VOTE.run(inputs, FORMULA)
        for order in ORDERS:
            subject = gpu.emulated(VOTE, partial(gpu.vote, order=order))
            assert subject.run(inputs, FORMULA).equal(wanted), case
        taken += len(wanted) > 0
    assert taken > 3


def test_majority_vote_stays_in_bounds():
    codes = torch.tensor([[0, 1], [7, 1], [-7, 1], [0, 3], [1, 2]], dtype=torch.int32)
    offsets = torch.tensor([-3, 2**62, 1, 3, 2**40])
    voted = gpu.vote(codes, offsets, (2, 3), "per_level")
    assert voted.tolist() == [[0, 1], [-1, -1], [-1, 1], [1, 2]]


def killed_by(run, path):
    """Run a function in a child; return the signal that ended it, and what it wrote to stderr."""
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        run()
        os._exit(0)
    return os.WTERMSIG(os.waitpid(child, 0)[1]), path.read_text()


def test_the_emulation_finds_faults(tmp_path):
    """A barrier that some miss, memory beyond the end, more of it than allowed; and races show."""
    lib = gpu.library("faults")
    for run, words in (
        (lib.run_uneven_barrier, "a barrier that not all threads reach"),
        (lib.run_too_much_memory, "more shared memory than was asked for"),
        (lib.run_beyond_the_end, ""),
    ):
        signal, told = killed_by(run, tmp_path / "stderr")
        assert signal and words in told, words
    seen = [(ctypes.c_int * 64)() for _ in ORDERS]
    for out, order in zip(seen, ORDERS, strict=True):
        lib.run_race(out, order)
    assert len({tuple(out) for out in seen}) > 1
