"""Majority voting: both rules against Python's Counter, ties, unknown codes and empty histories."""

from collections import Counter

import pytest
import torch

from livrec_fast import majority_vote
from livrec_fast._native import isa_levels, use_isa


def _put(good, value):
    codes = good["codes"].clone()
    codes[7, 0] = value
    return {"codes": codes}


def _offsets(good, change):
    offsets = good["offsets"].clone()
    change(offsets)
    return {"offsets": offsets}


BAD_INPUTS = {
    "majority_vote": [
        ("list", lambda good: {"codes": [[0]]}, TypeError, "codes: must be a tensor, got list"),
        ("float", lambda good: {"codes": good["codes"].float()}, TypeError, "codes: .* float32"),
        (
            "too few",
            lambda good: {"codes": good["codes"][:, 1:]},
            ValueError,
            r"\[T, 4\], got .*, 3\]",
        ),
        ("id = size", lambda good: _put(good, 6), IndexError, r"codes\[7, 0\] = 6 .* \[-1, 6\)"),
        ("below -1", lambda good: _put(good, -2), IndexError, r"codes\[7, 0\] = -2 .* \[-1, 6\)"),
        ("no levels", lambda good: {"levels": ()}, ValueError, r"levels: .* got \(\)"),
        (
            "huge level",
            lambda good: {"levels": [2**40] * 4},
            ValueError,
            "levels: .* 2,147,483,648",
        ),
        ("rule", lambda good: {"rule": "mean"}, ValueError, "rule: .*'path', got 'mean'"),
        (
            "int32 offsets",
            lambda good: {"offsets": good["offsets"].int()},
            TypeError,
            "offsets: .* int32",
        ),
        (
            "offsets 2-d",
            lambda good: {"offsets": good["offsets"][None]},
            ValueError,
            r"offsets: .*\[B \+ 1\]",
        ),
        (
            "no offsets",
            lambda good: {"offsets": good["offsets"][:0]},
            ValueError,
            "offsets: .* at least one",
        ),
        (
            "device",
            lambda good: {"offsets": good["offsets"].to("meta")},
            ValueError,
            "offsets: device .* meta",
        ),
        (
            "first",
            lambda good: _offsets(good, lambda o: o[0].fill_(1)),
            ValueError,
            "offsets: the first .* 1",
        ),
        (
            "short",
            lambda good: _offsets(good, lambda o: o[-1].sub_(1)),
            ValueError,
            "offsets: the last must",
        ),
        (
            "falls",
            lambda good: _offsets(good, lambda o: o[5].add_(99)),
            ValueError,
            "offsets: must not decrease",
        ),
    ]
}


def _vote(codes, offsets, levels, rule="per_level"):
    codes = torch.tensor(codes, dtype=torch.int64).reshape(-1, len(levels))
    return majority_vote(codes, torch.tensor(offsets), levels, rule=rule).tolist()


def _by_counter(codes, offsets, levels, rule):
    voted = []
    for first, last in zip(offsets, offsets[1:], strict=False):
        slices, row = codes[first:last], []
        for level in range(len(levels)):
            counts = Counter(code[level] for code in slices if code[level] >= 0)
            seen = {code[level]: at for at, code in enumerate(slices)}
            winner = max(counts, key=lambda c: (counts[c], seen[c]), default=-1)
            row.append(winner)
            if rule == "path":
                slices = [code for code in slices if code[level] == winner >= 0]
        voted.append(row)
    return voted


@pytest.mark.parametrize("rule", ["per_level", "path"])
@pytest.mark.parametrize("seed", range(5))
def test_agrees_with_counting_by_hand(rule, seed):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 15, (60,), generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    levels = (3, 4, 2)
    codes = torch.randint(-1, 12, (int(offsets[-1]), 3), generator=generator) % 12
    codes = torch.where(codes == 11, -1, codes % torch.tensor(levels))
    voted = majority_vote(codes, offsets, levels, rule=rule)
    assert voted.tolist() == _by_counter(codes.tolist(), offsets.tolist(), levels, rule)


def test_ties_go_to_the_codeword_seen_last():
    assert _vote([1, 2, 2, 1], [0, 4], [3]) == [[1]]
    assert _vote([2, 1, 1, 2], [0, 4], [3]) == [[2]]
    assert _vote([0, 1, 2], [0, 3], [3]) == [[2]]


def test_frequency_outweighs_recency():
    assert _vote([4, 4, 4, 1, 1], [0, 5], [5]) == [[4]]


def test_path_votes_among_the_slices_that_share_the_prefix():
    codes = [[0, 1], [0, 1], [0, 2], [1, 2], [1, 2]]
    assert _vote(codes, [0, 5], [2, 3]) == [[0, 2]]
    assert _vote(codes, [0, 5], [2, 3], rule="path") == [[0, 1]]


def test_unknown_codes_cast_no_vote():
    codes = [[-1, 2], [-1, 2], [3, -1]]
    assert _vote(codes, [0, 3], [4, 4]) == [[3, 2]]
    assert _vote(codes, [0, 3], [4, 4], rule="path") == [[3, -1]]


def test_path_stops_where_the_prefix_is_unknown():
    codes = [[-1, 2], [-1, 2]]
    assert _vote(codes, [0, 2], [4, 4]) == [[-1, 2]]
    assert _vote(codes, [0, 2], [4, 4], rule="path") == [[-1, -1]]


@pytest.mark.parametrize("rule", ["per_level", "path"])
def test_empty_histories_are_unknown(rule):
    assert _vote([[1, 0]], [0, 0, 1, 1], [2, 2], rule) == [[-1, -1], [1, 0], [-1, -1]]
    assert _vote([], [0, 0, 0], [2, 2], rule) == [[-1, -1]] * 2
    assert _vote([], [0], [2, 2], rule) == []


@pytest.mark.parametrize(
    ("size", "dtype"), [(32767, torch.int16), (32768, torch.int32), (2**31, torch.int32)]
)
def test_dtype_holds_the_codes_and_minus_one(size, dtype):
    codes = torch.tensor([[size - 1], [size - 1], [0]])
    voted = majority_vote(codes, torch.tensor([0, 3, 3]), [size])
    assert voted.dtype == dtype
    assert voted.tolist() == [[size - 1], [-1]]


def test_unsigned_codes():
    codes = torch.tensor([[255], [255], [1]], dtype=torch.uint8)
    assert majority_vote(codes, torch.tensor([0, 3]), [256]).tolist() == [[255]]


def test_compiled_once_for_any_number_of_slices():
    compiled = torch.compile(majority_vote, fullgraph=True, dynamic=True, backend="aot_eager")
    for stance, codes, voted in (
        ("default", [[1], [1], [1], [0]], [[1], [0]]),
        ("fail_on_recompile", [[1], [0], [0], [0], [1]], [[0], [1]]),
    ):
        offsets = torch.tensor([0, len(codes) - 1, len(codes)])
        with torch.compiler.set_stance(stance):
            assert compiled(torch.tensor(codes), offsets, (2,)).tolist() == voted


INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
KERNELS = isa_levels()
needs_native = pytest.mark.skipif(not KERNELS, reason="the compiled library is not there")


def _draw(lengths, levels, dtype=torch.int64, seed=0, unknown=True):
    """Draw codes that often tie; at the largest levels, from both ends of their range."""
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    few = torch.randint(
        -1 if unknown else 0, 3, (int(offsets[-1]), len(levels)), generator=generator
    )
    top = torch.randint(2, few.shape, generator=generator).bool() & (few >= 0)
    room = torch.tensor(levels).clamp(max=torch.iinfo(dtype).max)
    codes = few.minimum(room - 1)
    return torch.where(top, room - 1 - codes, codes).to(dtype), offsets


def _agree(codes, offsets, levels):
    for rule in ("per_level", "path"):
        wanted = majority_vote(codes, offsets, levels, rule=rule, backend="reference")
        for kernel in KERNELS:
            with use_isa(kernel):
                for threads in (1, 2, 3):
                    torch.set_num_threads(threads)
                    voted = majority_vote(codes, offsets, levels, rule=rule, backend="native")
                    torch.set_num_threads(1)
                    assert voted.dtype == wanted.dtype and voted.equal(wanted), (kernel, threads)


@needs_native
@pytest.mark.parametrize("dtype", INTEGERS)
def test_native_takes_every_integer(dtype):
    codes, offsets = _draw([0, 9, 1, 30, 0], (64, 2, 5, 300, 100), dtype, unknown=dtype.is_signed)
    _agree(codes, offsets, (64, 2, 5, 300, 100))


@needs_native
@pytest.mark.parametrize("levels", [(2**31, 2**31), (2**31, 3, 2**31, 70_000, 7), (65_537,)])
def test_native_counts_levels_far_larger_than_histories(levels):
    codes, offsets = _draw([40, 0, 7, 300], levels)
    _agree(codes, offsets, levels)


@needs_native
@pytest.mark.parametrize("lengths", [[300_000], [5, 150_000, 0, 20_000, 140_001, 3]])
def test_native_shares_out_a_huge_history(lengths):
    levels = (64, 3, 100_000, 2**31, 2)
    codes, offsets = _draw(lengths, levels)
    _agree(codes, offsets, levels)
    latest = torch.arange(120_000)[:, None] % 7  # all but a few tie
    assert majority_vote(latest, torch.tensor([0, 120_000]), [7]).item() == 119_999 % 7
    first = torch.cat([torch.full((10,), 9), torch.arange(10, 100_000)])[:, None]
    assert majority_vote(first, torch.tensor([0, len(first)]), [2**31]).item() == 9


@needs_native
def test_native_reads_codes_as_they_lie():
    codes, offsets = _draw([50, 3, 200], (64, 4, 9), torch.int16)
    wide = torch.full((len(codes), 9), -77, dtype=torch.int16)
    wide[:, 2::3] = codes
    _agree(wide[:, 2::3], offsets, (64, 4, 9))
    _agree(codes.T.contiguous().T, offsets, (64, 4, 9))
    _agree(codes[:1].expand(253, 3), offsets, (64, 4, 9))
    _agree(codes.repeat(2, 1)[::2], offsets, (64, 4, 9))


@needs_native
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("rule", ["per_level", "path"])
@pytest.mark.parametrize("at", [0, 70_000, 139_999])
def test_native_finds_a_bad_code_wherever_it_is(at, rule, threads):
    codes, offsets = _draw([10, 139_990], (5, 6, 2**31), unknown=False)
    torch.set_num_threads(threads)
    for level, value in ((0, 5), (1, -2), (2, 2**31)):
        bad = codes.clone()
        bad[at, level] = value
        with pytest.raises(IndexError, match=rf"codes\[{at}, {level}\] = {value} is outside"):
            majority_vote(bad, offsets, (5, 6, 2**31), rule=rule, backend="native")
    torch.set_num_threads(1)


@needs_native
def test_native_counters_are_not_confused_between_levels_and_histories():
    levels = [64, 2**31, 5, 2**20, 64, 64, 2, 2**31]
    codes, offsets = _draw([3, 90, 0, 1, 17, 200, 2] * 40, levels, seed=3)
    _agree(codes, offsets, levels)


@needs_native
@pytest.mark.parametrize("rule", ["per_level", "path"])
def test_native_workspace_is_what_the_docstring_says(rule):
    def allocated(lengths, levels):
        codes, offsets = _draw(lengths, levels)
        with torch.profiler.profile(profile_memory=True) as profile:
            voted = majority_vote(codes, offsets, levels, rule=rule, backend="native")
        total = sum(max(0, event.self_cpu_memory_usage) for event in profile.events())
        return total - voted.nbytes

    slack = 4096
    assert allocated([20] * 5000, (64, 64)) <= 16 * 64 + 4 * 20 + slack
    assert allocated([20] * 500, (2**31, 64)) <= 16 * 64 + (24 + 4) * 20 + slack
    assert allocated([50_000], (2**31, 100_000)) <= 16 * 100_000 + (24 + 4) * 50_000 + slack
