"""RoomVotes: after any calls, what majority_vote gives for all the slices of a room."""

from collections import defaultdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from livrec_fast import RoomVotes, majority_vote

IDS = (-(2**63), -5, 0, 7, 2**40, 2**63 - 1)
RULES = ["per_level", "path"]
LEVELS = [(3, 4), (2, 300, 2), (2**31,), (4, 4, 4, 4)]


def add(votes, rooms, codes, **options):
    codes = torch.tensor(codes, dtype=torch.int64).reshape(-1, len(votes.levels))
    votes.add(torch.tensor(rooms, dtype=torch.int64), codes, **options)


def voted(votes, *rooms):
    return votes.codes(torch.tensor(rooms, dtype=torch.int64)).tolist()


def by_op(histories, rooms, levels, rule):
    """Vote over whole histories, {room: [codes, ...]}, with the op."""
    offsets = torch.tensor([0, *(len(histories.get(room, [])) for room in rooms)]).cumsum(0)
    slices = [code for room in rooms for code in histories.get(room, [])]
    codes = torch.tensor(slices, dtype=torch.int64).reshape(-1, len(levels))
    return majority_vote(codes, offsets, levels, rule=rule)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_equals_the_op_after_any_calls(tmp_path_factory, data):
    rule, levels = data.draw(st.sampled_from(RULES)), data.draw(st.sampled_from(LEVELS))
    votes, histories = RoomVotes(levels, rule=rule), defaultdict(list)
    code = st.tuples(*(st.sampled_from([-1, 0, 1, size - 1]) for size in levels))
    slices = st.lists(st.tuples(st.sampled_from(IDS), code), max_size=25)
    some_ids = st.lists(st.sampled_from(IDS), max_size=2)
    for _ in range(data.draw(st.integers(1, 5))):
        call = data.draw(slices)
        add(votes, [room for room, _ in call], [code for _, code in call])
        for room, codes in call:
            histories[room].append(codes)
        if gone := data.draw(some_ids):
            left = votes.evict(torch.tensor(gone))
            assert left == sum(histories.pop(room, None) is not None for room in set(gone))
        if data.draw(st.booleans()):
            path = tmp_path_factory.mktemp("votes") / "votes.safetensors"
            votes.save(path)
            votes = RoomVotes.load(path)
        assert set(votes.rooms.tolist()) == set(histories) and len(votes) == len(histories)
        wanted = by_op(histories, list(IDS), levels, rule)
        found = votes.codes(torch.tensor(IDS))
        assert found.dtype == wanted.dtype and found.equal(wanted)


@pytest.mark.parametrize("rule", RULES)
def test_ties_by_time_then_by_the_lowest_code(rule):
    votes = RoomVotes((9,), rule=rule)
    add(votes, [1, 1, 1], [5, 3, 4], time=torch.tensor([10, 30, 20]))
    assert voted(votes, 1) == [[3]]
    add(votes, [2, 2, 2], [6, 4, 5], time=torch.tensor([7, 7, 7]))
    assert voted(votes, 2) == [[4]]
    add(votes, [2, 2], [8, 6], time=torch.tensor([7, 7]))
    assert voted(votes, 2) == [[6]]  # two votes
    add(votes, [2], [8], time=torch.tensor([7]))
    assert voted(votes, 2) == [[6]]  # 6 and 8 tie, in number and time
    add(votes, [3, 3], [2, 1], time=torch.tensor([50, 40]))
    add(votes, [3], [1], time=torch.tensor([45]))  # late: counts as seen at 50
    assert voted(votes, 3) == [[1]]
    assert votes.clock == 50


@pytest.mark.parametrize("rule", RULES)
def test_times_in_any_order_within_a_call(rule):
    rng = np.random.default_rng(0)
    votes, every = RoomVotes((4, 3), rule=rule), []
    for call in range(6):
        time = rng.permutation(60) + 60 * call  # distinct
        rooms, codes = (
            rng.integers(0, 5, 60),
            np.stack([rng.integers(-1, n, 60) for n in (4, 3)], 1),
        )
        votes.add(*map(torch.from_numpy, (rooms, codes)), time=torch.from_numpy(time))
        every += sorted(zip(time.tolist(), rooms.tolist(), codes.tolist(), strict=True))
    histories = {room: [code for _, r, code in every if r == room] for room in range(5)}
    assert votes.codes(torch.arange(5)).equal(by_op(histories, range(5), (4, 3), rule))


@pytest.mark.parametrize("rule", RULES)
def test_counts_grow_beyond_16_bits(rule):
    votes = RoomVotes((3,), rule=rule)
    add(votes, [1] * 65_535, [2] * 65_535)
    assert votes._ballots[0].counts.dtype == np.uint16
    add(votes, [1] * 65_536, [0] * 65_536)
    assert votes._ballots[0].counts.dtype == np.uint32
    assert voted(votes, 1) == [[0]]
    add(votes, [1, 1], [2, 2])
    assert voted(votes, 1) == [[2]]


def test_a_room_of_four_levels_of_64_takes_512_bytes_of_counts():
    votes = RoomVotes((64, 64, 64, 64))
    add(votes, range(100), [[1, 2, 3, 4]] * 100)
    counts = [ballots.state()["counts"] for ballots in votes._ballots]
    assert sum(array.nbytes for array in counts) == 100 * 512


def test_rooms_leave_by_age():
    votes = RoomVotes((5,), rule="path")
    add(votes, [1, 2, 1, 3], [1, 2, 3, 4], time=torch.tensor([10, 20, 30, 40]))
    assert votes.evict_before(10) == 0 and len(votes) == 3
    assert votes.evict_before(30) == 1 and votes.rooms.tolist() == [1, 3]
    assert voted(votes, 1, 2, 3) == [[3], [-1], [4]]
    add(votes, [2], [0])
    assert votes.clock == 41 and voted(votes, 2) == [[0]]


def test_unknown_rooms_and_codes():
    votes = RoomVotes((3, 3))
    assert voted(votes, 4) == [[-1, -1]] and voted(votes) == []
    add(votes, [4], [[-1, 2]])
    assert voted(votes, 4, 5) == [[-1, 2], [-1, -1]] and len(votes) == 1
    add(votes, [], [])
    assert votes.evict(torch.tensor([5])) == 0 and votes.evict(torch.tensor([4])) == 1
    assert len(votes) == 0 and voted(votes, 4) == [[-1, -1]]


def test_versions_do_not_mix(tmp_path):
    votes = RoomVotes((3,), version="a")
    add(votes, [1], [2], version="a")
    with pytest.raises(ValueError, match="version: .* 'a', got 'b'"):
        add(votes, [1], [1], version="b")
    votes.save(tmp_path / "votes")
    loaded = RoomVotes.load(tmp_path / "votes", version="a")
    assert loaded.version == "a" and voted(loaded, 1) == [[2]] and loaded.clock == votes.clock
    with pytest.raises(ValueError, match="path: .* 'a', got 'b'"):
        RoomVotes.load(tmp_path / "votes", version="b")


def test_other_and_damaged_files_are_refused(tmp_path, coder):
    coder.save(tmp_path / "books")
    with pytest.raises(ValueError, match="not written by RoomVotes"):
        RoomVotes.load(tmp_path / "books")
    (tmp_path / "text").write_text("no such thing")
    with pytest.raises(ValueError, match="not a safetensors file"):
        RoomVotes.load(tmp_path / "text")
    for damage in (
        lambda votes: votes._ballots[0].leader.__setitem__(0, 3),
        lambda votes: votes._ballots[0].__setattr__("counts", np.zeros(0, np.uint16)),
        lambda votes: votes._index.keys.__setitem__(0, 2),
    ):
        votes = RoomVotes((3,))
        add(votes, [1, 2], [2, 1])
        damage(votes)
        votes.save(tmp_path / "votes")
        with pytest.raises(ValueError, match="path: .* is damaged"):
            RoomVotes.load(tmp_path / "votes")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rooms": torch.zeros(2, dtype=torch.int32)}, TypeError, "rooms: .* int32"),
        ({"codes": torch.zeros(2, 3, dtype=torch.int64)}, ValueError, r"codes: .*\[2, 2\], got"),
        ({"codes": torch.zeros(2, 2)}, TypeError, "codes: .* float32"),
        ({"codes": torch.tensor([[0, 1], [3, 0]])}, IndexError, r"codes\[1, 0\] = 3 .* \[-1, 3\)"),
        ({"time": torch.zeros(3, dtype=torch.int64)}, ValueError, r"time: shape must be \[2\]"),
        ({"time": torch.zeros(2)}, TypeError, "time: .* float32"),
    ],
)
def test_bad_slices_change_nothing(change, error, message):
    votes = RoomVotes((3, 3))
    good = {"rooms": torch.tensor([1, 2]), "codes": torch.tensor([[0, 1], [2, 2]]), "time": None}
    with pytest.raises(error, match=message):
        votes.add(**(good | change))
    assert len(votes) == 0 and votes.clock == 0


def test_bad_settings():
    with pytest.raises(ValueError, match="rule: .* 'mean'"):
        RoomVotes((3,), rule="mean")
    with pytest.raises(ValueError, match="levels: "):
        RoomVotes(())
