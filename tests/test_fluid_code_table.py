"""The table that a ranker is served from: the latest codes, and never a room's id."""

import dataclasses

import pytest
import torch
from fluid_batches import LEVELS, MODEL, SIZES, TRAIN, make_batch

from livrec_fast.systems.fluid.code_table import CodeBatch, CodeTable, Published
from livrec_fast.systems.fluid.ranker import Ranker

FEATURES = ("user", "author", "dense", "offsets", "history_author", "history_codes", "history_gap")


def record(room, time, code=(0, 0, 0), voted=(0, 0, 0), version="v"):
    return Published(room, time, tuple(code), tuple(voted), version)


def filled(batch, names, table=None):
    """Return a table with the batch's codes of rooms, and the rooms by other names."""
    table = CodeTable(LEVELS, "v") if table is None else table
    rooms = torch.arange(batch.room.numel()).view_as(batch.room)
    for room, own, voted in zip(
        rooms.flatten().tolist(), batch.slice_codes.flatten(0, 1).tolist(),
        batch.room_codes.flatten(0, 1).tolist(), strict=True,
    ):  # fmt: skip
        if own[0] >= 0:
            table.apply(record(int(names[room]), 1, own, voted))
    return table, names[rooms]


def served(batch, names, table=None):
    table, rooms = filled(batch, names, table)
    return table.batch(rooms, **{name: getattr(batch, name) for name in FEATURES})


def leaks(make_table):
    """Tell whether what is served differs between two namings of the same rooms."""
    batch = make_batch()
    count = batch.room.numel()
    names = torch.randperm(count, generator=torch.Generator().manual_seed(1))
    one = served(batch, torch.arange(count), make_table())
    other = served(batch, 10**15 - names * 977, make_table())
    assert not torch.equal(torch.arange(count), names)
    pairs = [(getattr(one, f.name), getattr(other, f.name)) for f in dataclasses.fields(one)]
    return not all(torch.equal(*pair) for pair in pairs) or vars(one).keys() != vars(other).keys()


def test_a_batch_is_the_same_whatever_the_rooms_are_called():
    assert not leaks(lambda: CodeTable(LEVELS, "v"))


@pytest.mark.parametrize("field", ["author", "slice_codes", "dense"])
def test_a_leak_of_the_room_id_would_be_seen(field):
    class Leaky(CodeTable):
        def batch(self, rooms, **features):
            made = super().batch(rooms, **features)
            value = getattr(made, field)
            ids = rooms if value.dim() == 2 else rooms[..., None]
            return dataclasses.replace(made, **{field: value + (ids % 5).to(value.dtype)})

    assert leaks(lambda: Leaky(LEVELS, "v"))


def test_a_batch_has_no_place_for_a_room():
    batch = make_batch()
    given = {name: getattr(batch, name) for name in FEATURES}
    table, rooms = filled(batch, torch.arange(batch.room.numel()))
    for name in ("room", "room_id", "ts"):
        with pytest.raises(TypeError, match=rf"differs in \['{name}'\]"):
            table.batch(rooms, **given, **{name: rooms})
    with pytest.raises(TypeError, match=r"differs in \['user'\]"):
        table.batch(rooms, **{name: given[name] for name in FEATURES if name != "user"})
    fields = {field.name for field in dataclasses.fields(CodeBatch)}
    assert fields == {*FEATURES, "slice_codes", "room_codes"}
    made = table.batch(rooms, **given)
    assert vars(made).keys() == fields


@pytest.mark.parametrize("fusion", ["fluid", "replace"])
def test_a_ranker_scores_what_is_served_as_the_batch_it_stands_for(fusion):
    batch = make_batch()
    model = Ranker(fusion, MODEL, SIZES, TRAIN).eval()
    with torch.no_grad():
        wanted = model(batch).logits
        found = model(served(batch, torch.arange(batch.room.numel()) + 10**9)).logits
        batch.slice_codes = torch.zeros_like(batch.slice_codes)
        assert not torch.equal(wanted, model(batch).logits)
    assert torch.equal(found, wanted)


def test_the_latest_record_counts_and_rooms_without_one_are_unknown():
    table = CodeTable(LEVELS, "v")
    assert table.apply(record(5, 10, (1, 2, 3), (3, 2, 1)))
    assert table.apply(record(-9, 1, (0, 1, 0), (0, 0, 1)))
    assert not table.apply(record(5, 10, (0, 0, 0)))
    assert not table.apply(record(5, 9, (0, 0, 0)))
    found = table.codes(torch.tensor([[5, 77], [-9, 5]]))
    assert found.slice_codes.tolist() == [[[1, 2, 3], [-1] * 3], [[0, 1, 0], [1, 2, 3]]]
    assert found.room_codes.tolist() == [[[3, 2, 1], [-1] * 3], [[0, 0, 1], [3, 2, 1]]]
    assert found.slice_codes.dtype == torch.int16 and found.slice_codes.is_contiguous()
    assert table.apply(record(5, 11, (2, 2, 2), (3, 3, 3)))
    assert table.codes(torch.tensor([5])).slice_codes.tolist() == [[2, 2, 2]]
    assert table.codes(torch.zeros(0, 3, dtype=torch.int64)).room_codes.shape == (0, 3, 3)


def test_forgotten_rooms_give_their_place_to_others():
    table, here, draws = CodeTable(LEVELS, "v"), {}, torch.Generator().manual_seed(0)
    for turn in range(12):
        codes = torch.randint(4, (40, 3), generator=draws).tolist()
        for room, code in enumerate(codes, 100 * turn):
            table.apply(record(room, 1, code, code[::-1]))
            here[room] = code
        asked = torch.arange(100 * (turn + 1))
        wanted = [here.get(room, [-1] * 3) for room in asked.tolist()]
        assert table.codes(asked).slice_codes.tolist() == wanted
        assert table.codes(asked).room_codes.tolist() == [code[::-1] for code in wanted]
        gone = [room for room in here if room % 7 != turn % 7]
        table.forget([*gone, -1])
        here = {room: code for room, code in here.items() if room not in gone}
        assert len(table) == len(here) > 0
    assert len(table._time) < 100 < 12 * 40


def test_records_go_through_a_line_of_text():
    one = record(2**62, -5, (1, 2, 3), (-1, -1, -1), "0123456789abcdef")
    assert Published.from_json(one.to_json()) == one and "\n" not in one.to_json()
    for line in ("", "[]", '{"room":1}', one.to_json().replace("[1,2,3]", '"x"')):
        with pytest.raises(ValueError, match="no published record"):
            Published.from_json(line)


def test_records_that_cannot_be_are_refused():
    table = CodeTable(LEVELS, "v")
    with pytest.raises(ValueError, match="room 1 are of codebooks w, this table is of v"):
        table.apply(record(1, 1, version="w"))
    with pytest.raises(ValueError, match="codes of 3 levels are needed"):
        table.apply(record(1, 1, (1, 1)))
    with pytest.raises(IndexError, match=r"room_code\[0, 2\] = 4 is outside \[-1, 4\)"):
        table.apply(record(1, 1, (1, 1, 1), (0, 0, 4)))
    assert len(table) == 0
    with pytest.raises(TypeError, match="rooms: must be an int64 tensor"):
        table.codes(torch.zeros(2))
