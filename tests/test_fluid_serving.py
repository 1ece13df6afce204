"""Serving: what is published slice by slice is what the log gives, and ids stay behind."""

import itertools
import os

import numpy as np
import pytest
import torch
from fluid_batches import LEVELS

from livrec_fast import ResidualKMeans
from livrec_fast.data import world
from livrec_fast.logs.batches import Feed
from livrec_fast.logs.requests import split
from livrec_fast.systems.fluid import serving
from livrec_fast.systems.fluid.code_table import CodeTable
from livrec_fast.systems.fluid.codes import make_codes
from livrec_fast.systems.fluid.serving import CodePublisher

RULES = ("per_level", "path")
ROOMS, SLICES, DIM = 6, 60, 5


@pytest.fixture(scope="module")
def log():
    sizes = {"users": 60, "authors": 15, "rooms": 25, "videos": 30, "live_events": 900}
    return world.make(0, days=0.5, dim=16, **sizes).log


@pytest.fixture(scope="module")
def books(log):
    """Return codes by both rules, with few codewords, so that votes differ from slices."""
    return {rule: make_codes(log, int(log.ts[-1]), (8, 8, 4), rule=rule) for rule in RULES}


@pytest.fixture(scope="module")
def quantizer():
    rows = torch.randn(200, DIM, generator=torch.Generator().manual_seed(0))
    return ResidualKMeans(LEVELS, iterations=5).fit(rows)


def drawn(seed=1, slices=SLICES):
    """Draw slices of a few rooms: ids, times and vectors; each room's are in order."""
    generator = torch.Generator().manual_seed(seed)
    rooms = (torch.randint(ROOMS, (slices,), generator=generator) * 10**12 - 7).tolist()
    return rooms, list(range(100, 100 + slices)), torch.randn(slices, DIM, generator=generator)


def published(publisher, slices):
    return [publisher.publish(room, time, vector=z) for room, time, z in zip(*slices, strict=True)]


def contents(publisher, path):
    """Return what a snapshot holds; the votes' own file is told by the codes that it gives."""
    publisher.snapshot(path)
    tensors, facts = serving.checkpoints.read(path)
    votes = serving._loaded(tensors.pop("votes"), facts["version"])
    rooms = sorted(votes.rooms.tolist())
    known = {name: tensor.tolist() for name, tensor in tensors.items()}
    return known, facts, rooms, votes.codes(torch.tensor(rooms, dtype=torch.int64)).tolist()


def arrival(log):
    """Return slices in the order in which they are known, and when."""
    known = log.room_start[log.slice_room] + log.slice_t1
    return np.argsort(known, kind="stable"), known


@pytest.mark.parametrize("rule", RULES)
def test_slices_published_one_at_a_time_have_the_codes_of_the_log(log, books, rule):
    book, (order, known) = books[rule], arrival(log)
    publisher = CodePublisher(book.quantizer, rule=rule)
    differ = 0
    for at in order.tolist():
        vector = torch.from_numpy(log.slice_embedding[at])
        record = publisher.publish(int(log.slice_room[at]), int(known[at]), vector=vector)
        assert record.slice_code == tuple(book.slice_codes[at].tolist())
        assert record.room_code == tuple(book.room_codes[at].tolist())
        assert (record.time, record.version) == (known[at], book.version)
        differ += record.slice_code != record.room_code
    assert differ > len(order) / 4 and len(np.diff(order)[np.diff(order) != 1]) > len(order) / 4
    assert len(publisher) == len(np.unique(log.slice_room))


def test_a_ranker_is_served_at_each_request_what_it_is_trained_on(log, books):
    book, (order, known) = books["per_level"], arrival(log)
    asked, _ = split(log, 0.99, candidates=4, seed=0)
    feed = Feed(asked, log, book, 1, shuffle=False)
    publisher, table = CodePublisher(book.quantizer), CodeTable((8, 8, 4), book.version)
    videos = log.room_domain[log.slice_room] == 1
    early = [s for s in order.tolist() if videos[s]]  # a video is known from its start
    coming = iter([s for s in order.tolist() if not videos[s]])
    coming, unknown = itertools.chain(early, coming), 0
    at = next(coming)
    for request in range(len(asked)):
        batch = feed.batch(np.array([request]))
        while at is not None and (videos[at] or known[at] <= asked.ts[request]):
            vector = torch.from_numpy(log.slice_embedding[at])
            table.apply(publisher.publish(int(log.slice_room[at]), int(known[at]), vector=vector))
            at = next(coming, None)
        found = table.codes(batch.room)
        assert torch.equal(found.slice_codes, batch.slice_codes)
        assert torch.equal(found.room_codes, batch.room_codes)
        unknown += int((batch.slice_codes < 0).any())
    assert len(asked) > 200 and 0 < unknown < len(asked) / 2


@pytest.mark.parametrize("rule", RULES)
def test_slices_of_other_rooms_in_between_change_nothing(quantizer, rule):
    rooms, times, vectors = drawn()
    wanted = {(r.room, r.time): r for r in published(CodePublisher(quantizer, rule=rule), drawn())}
    order = sorted(range(SLICES), key=lambda at: (rooms[at], times[at]))  # room after room
    other = ([rooms[at] for at in order], [times[at] for at in order], vectors[order])
    assert order != sorted(order)
    for record in published(CodePublisher(quantizer, rule=rule), other):
        assert record == wanted[record.room, record.time]


def test_many_slices_in_a_call_are_those_one_after_the_other(quantizer):
    rooms, times, vectors = drawn()
    wanted = published(CodePublisher(quantizer), drawn())
    publisher = CodePublisher(quantizer, lambda numbers: vectors[list(numbers)].numpy())
    assert publisher.publish_many(rooms[:25], times[:25], vectors=vectors[:25]) == wanted[:25]
    assert publisher.publish_many(rooms[25:], times[25:], range(25, SLICES)) == wanted[25:]
    assert publisher.publish_many([], [], vectors=vectors[:0]) == []
    assert publisher.current() == sorted(
        {record.room: record for record in wanted}.values(), key=lambda record: record.time
    )


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("after", [0, 1, 30])
def test_a_restored_publisher_goes_on_as_the_one_that_was_never_stopped(
    quantizer, tmp_path, rule, after
):
    rooms, times, vectors = drawn()
    whole = CodePublisher(quantizer, rule=rule)
    parts = [(rooms[p], times[p], vectors[p]) for p in (slice(after), slice(after, None))]
    published(whole, parts[0])
    closed = rooms[0]
    if after:
        whole.close(closed)
        whole.evict_before(times[0])
    whole.snapshot(tmp_path / "state")
    again = CodePublisher.restore(tmp_path / "state", quantizer)
    assert again.current() == whole.current() and again.rule == rule
    kept = [at for at, room in enumerate(parts[1][0]) if not after or room != closed]
    rest = ([parts[1][0][at] for at in kept], [parts[1][1][at] for at in kept], parts[1][2][kept])
    assert published(again, rest) == published(whole, rest)
    for publisher in (again, whole) if after else ():
        with pytest.raises(ValueError, match=f"room {closed} is closed, at"):
            publisher.publish(closed, 10**6, vector=vectors[0])
        with pytest.raises(ValueError, match="is late: what is older than 100 was forgotten"):
            publisher.publish(1, 99, vector=vectors[0])
    assert contents(again, tmp_path / "again") == contents(whole, tmp_path / "whole")


def test_a_snapshot_that_fails_leaves_the_one_before(quantizer, tmp_path, monkeypatch):
    publisher = CodePublisher(quantizer)
    publisher.publish(1, 1, vector=torch.zeros(DIM))
    publisher.snapshot(tmp_path / "state")
    before = (tmp_path / "state").read_bytes()
    publisher.publish(1, 2, vector=torch.zeros(DIM))
    monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(OSError, match="no space"):
        publisher.snapshot(tmp_path / "state")
    assert [path.name for path in tmp_path.iterdir()] == ["state"]
    assert (tmp_path / "state").read_bytes() == before


@pytest.mark.parametrize("time", [5, 4, -1])
def test_a_slice_that_is_late_or_comes_twice_is_refused_and_not_counted(quantizer, time):
    publisher, vectors = CodePublisher(quantizer), drawn()[2]
    publisher.publish(3, 5, vector=vectors[0])
    with pytest.raises(ValueError, match=f"slice of room 3 at {time} is late or comes twice.*at 5"):
        publisher.publish(3, time, vector=vectors[1])
    with pytest.raises(ValueError, match="is late or comes twice"):
        publisher.publish_many([4, 3, 4], [7, 6, 7], vectors=vectors[:3])
    assert [record.room for record in publisher.current()] == [3]
    fresh = CodePublisher(quantizer)
    fresh.publish(3, 5, vector=vectors[0])
    for publish in (publisher.publish, fresh.publish):
        publish(3, 6, vector=vectors[2])
    assert publisher.current() == fresh.current()


def test_rooms_are_closed_and_forgotten(quantizer):
    publisher, vectors = CodePublisher(quantizer), drawn()[2]
    for room, time in ((1, 10), (2, 20), (3, 30)):
        for past in (2, 1, 0):  # three slices outvote one that follows
            publisher.publish(room, time - past, vector=vectors[0])
    assert publisher.close(2).time == 20 and len(publisher) == 2
    with pytest.raises(KeyError, match="2 is not on air"):
        publisher.close(2)
    assert publisher.evict_before(11) == [1]
    with pytest.raises(ValueError, match="room 2 is closed, at 20"):
        publisher.publish(2, 40, vector=vectors[0])
    with pytest.raises(ValueError, match="older than 11 was forgotten"):
        publisher.publish(1, 10, vector=vectors[0])
    again = publisher.publish(1, 40, vector=vectors[1])
    assert again.room_code == again.slice_code  # by one slice: its earlier ones are gone
    assert publisher.evict_before(31) == [3] and publisher.evict_before(5) == []
    with pytest.raises(ValueError, match="older than 31 was forgotten"):
        publisher.publish(4, 30, vector=vectors[0])
    for room, vector in ((2, vectors[2]), (3, vectors[3])):  # forgotten, too
        again = publisher.publish(room, 50, vector=vector)
        before = CodePublisher(quantizer).publish(room, 50, vector=vectors[0])
        assert again.room_code == again.slice_code != before.slice_code


def test_slices_go_through_the_encoder():
    pytest.importorskip("transformers", reason="FLUID's encoder is made of its models")
    from fluid_pairs import drawn as content
    from fluid_pairs import small

    encoder = small()
    shown = [content([2], [3], seed) for seed in range(30)]
    vectors = torch.cat([encoder.encode(one) for one in shown])
    quantizer = ResidualKMeans((8, 4)).fit(vectors)
    publisher = CodePublisher(
        quantizer, lambda contents: torch.cat([encoder.encode(one) for one in contents])
    )
    found = [publisher.publish(at % 3, at, one).slice_code for at, one in enumerate(shown)]
    assert found == [tuple(code) for code in quantizer.encode(vectors).tolist()]
    assert len(set(found)) > 8


def test_codebooks_of_another_version_are_refused(quantizer, tmp_path):
    other = ResidualKMeans(LEVELS, iterations=1, seed=1).fit(drawn(5, 200)[2])
    publisher, table = CodePublisher(quantizer), CodeTable(LEVELS, other.version)
    record = publisher.publish(1, 1, vector=torch.zeros(DIM))
    with pytest.raises(ValueError, match=f"codebooks {quantizer.version}.* of {other.version}"):
        table.apply(record)
    publisher.snapshot(tmp_path / "state")
    with pytest.raises(ValueError, match=f"codebooks {quantizer.version}, not of {other.version}"):
        CodePublisher.restore(tmp_path / "state", other)
    moving = ResidualKMeans(LEVELS, iterations=1, seed=1).fit(drawn(5, 200)[2])
    publisher = CodePublisher(moving)
    publisher.publish(1, 1, vector=torch.zeros(DIM))
    moving.partial_fit(drawn(6, 50)[2])
    with pytest.raises(ValueError, match=f"changed to version {moving.version}"):
        publisher.publish(1, 2, vector=torch.zeros(DIM))


def wrong(name, quantizer):
    """Return what a call that must fail is given: room, time, then by name."""
    zeros = torch.zeros(DIM)
    return {
        "neither": (1, 1, {}, ValueError, "either vectors or contents"),
        "both": (1, 1, {"content": 3, "vector": zeros}, ValueError, "not both"),
        "no encode": (1, 1, {"content": 3}, ValueError, "has no `encode`"),
        "width": (1, 1, {"vector": zeros[1:]}, ValueError, r"shape must be \[1, 5\]"),
        "not finite": (1, 1, {"vector": zeros / 0}, ValueError, "finite"),
        "integers": (1, 1, {"vector": zeros.long()}, TypeError, "dtype must be one of float32"),
        "room": (1.5, 1, {"vector": zeros}, TypeError, "rooms: must be int64 integers"),
        "time": (1, 1.5, {"vector": zeros}, TypeError, "times: must be int64 integers"),
    }[name]


@pytest.mark.parametrize(
    "name", ["neither", "both", "no encode", "width", "not finite", "integers", "room", "time"]
)
def test_what_is_wrong_is_said_and_not_counted(quantizer, name):
    publisher = CodePublisher(quantizer)
    room, time, given, error, message = wrong(name, quantizer)
    with pytest.raises(error, match=message):
        publisher.publish(room, time, **given)
    assert len(publisher) == 0
    publisher.publish(1, 1, vector=torch.zeros(DIM))


def test_what_no_publisher_can_be_made_from(tmp_path, quantizer):
    with pytest.raises(RuntimeError, match="no codebooks yet"):
        CodePublisher(ResidualKMeans(LEVELS))
    with pytest.raises(TypeError, match="must be ResidualKMeans, got str"):
        CodePublisher("codes")
    (tmp_path / "file").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        CodePublisher.restore(tmp_path / "file", quantizer)
    serving.checkpoints.write(tmp_path / "other", {"a": torch.zeros(1)}, kind="something")
    with pytest.raises(ValueError, match=r"not written by CodePublisher\.snapshot"):
        CodePublisher.restore(tmp_path / "other", quantizer)
