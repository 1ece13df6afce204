"""The synthetic world: its sizes and distributions; both content and ids tell something."""

from dataclasses import fields

import numpy as np
import pytest

from livrec_fast.data import live_log, world
from livrec_fast.logs import requests as made
from livrec_fast.logs.log import KINDS, LIVE, UNKNOWN, VIDEO, known_before


@pytest.fixture(scope="module")
def quick():
    return world.make(7, quick=True)


@pytest.fixture(scope="module")
def asked(quick):
    return made.make(quick.log, backend="numpy")


def auc(score, positive):
    rank = np.argsort(np.argsort(score, kind="stable"))[positive] + 1.0
    count = positive.sum()
    return (rank.sum() - count * (count + 1) / 2) / (count * (~positive).sum())


def test_a_seed_makes_the_same_world_again(quick):
    again, other = world.make(7, quick=True), world.make(8, quick=True)
    for field in fields(quick.log):
        one, two = getattr(quick.log, field.name), getattr(again.log, field.name)
        np.testing.assert_array_equal(one, two)
    assert len(other.log.ts) != len(quick.log.ts) or (other.log.ts != quick.log.ts).any()


def test_the_log_is_sound(quick, tmp_path):
    log, rooms = quick.log, quick.settings.rooms
    assert (np.diff(log.ts) >= 0).all() and (log.author == log.room_author[log.room]).all()
    live = log.room_domain[log.room] == LIVE
    assert (log.room[live] < rooms).all() and (log.kind[~live] == KINDS.index("play")).all()
    assert (log.pos == np.where(live, log.ts - log.room_start[log.room], 0)).all()
    assert (log.ts[live] <= log.room_end[log.room[live]]).all() and (log.pos >= 0).all()
    assert (log.room_end[rooms:] == UNKNOWN).all() and (log.slice_domain[-1] == VIDEO)
    assert known_before(log, int(log.ts[0]))[log.slice_domain == VIDEO].all()
    live_log.write(log, tmp_path / "log")
    read = live_log.read(tmp_path / "log")  # which checks everything
    for field in fields(log):
        if field.name not in ("user", "user_id"):  # users without an event are not in the files
            np.testing.assert_array_equal(getattr(read, field.name), getattr(log, field.name))


def test_sizes_and_distributions(quick):
    log, chosen = quick.log, quick.settings
    assert (log.users, log.rooms, log.authors) == (
        chosen.users,
        chosen.rooms + chosen.videos,
        chosen.authors,
    )
    live = log.room_domain[log.room] == LIVE
    assert abs(live.sum() / chosen.live_events - 1) < 0.1
    clicks = (log.kind == KINDS.index("click")).sum()
    assert abs((~live).sum() / clicks / chosen.video_ratio - 1) < 0.02
    life = (log.room_end - log.room_start)[: chosen.rooms] / 60_000
    assert 34 < np.median(life) < 47 and np.log(life).std() > 0.6
    lengths = (log.slice_t1 - log.slice_t0)[log.slice_domain == LIVE]
    assert lengths.max() == 120_000 and (lengths == 120_000).mean() > 0.9
    hour = (log.ts // 3_600_000 % 24)[live]
    assert ((hour >= 19) & (hour < 23)).mean() > 0.2  # of four hours, a sixth if even
    per_author = np.sort(np.bincount(log.author[live], minlength=log.authors))[::-1]
    assert per_author[: log.authors // 10].sum() > 0.3 * live.sum()  # a tail of popularity
    assert (
        abs(quick.highlight.mean() * len(quick.highlight) / (log.slice_domain == LIVE).sum() - 0.03)
        < 0.01
    )


def test_slices_wander_around_their_room_and_show_their_topic(quick):
    log = quick.log
    live = log.slice_domain == LIVE
    same = quick.slice_topic == quick.room_topic[log.slice_room]
    assert 0.6 < same[live].mean() < 0.85 and same[~live].all()
    next_one = (log.slice_room[1:] == log.slice_room[:-1]) & live[1:]
    stays = (quick.slice_topic[1:] == quick.slice_topic[:-1])[next_one].mean()
    assert 0.85 < stays < 0.99
    vectors = log.slice_embedding.astype(np.float32)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=2e-3)
    topics = int(quick.slice_topic.max()) + 1
    centre = np.stack([vectors[(quick.slice_topic == k) & live].mean(0) for k in range(topics)])
    told = (vectors @ (centre / np.linalg.norm(centre, axis=1, keepdims=True)).T).argmax(1)
    assert (told == quick.slice_topic)[~live].mean() > 0.6  # videos by the topics of live slices
    vertical = quick.topic_vertical
    assert (vertical[told] == vertical[quick.slice_topic])[~live].mean() > 0.8


def test_clicks_follow_taste_quality_and_highlights(quick, asked):
    mask = asked.mask[..., 0] & (asked.slice >= 0)
    clicked = asked.labels[..., 0][mask] > 0
    user = np.broadcast_to(asked.user[:, None], asked.room.shape)[mask]
    room, slices = asked.room[mask], asked.slice[mask]
    author = quick.log.room_author[room]
    by_content = auc(np.log1p(quick.taste[user, quick.slice_topic[slices]]), clicked)
    by_room = auc(quick.room_quality[room], clicked)
    by_author = auc(quick.author_quality[author], clicked)
    favourite = (quick.favourite[user] == author[:, None]).any(1)
    assert 0.57 < by_content < 0.8 and by_room > 0.52 and by_author > 0.51
    assert favourite[clicked].mean() > 1.3 * favourite[~clicked].mean()
    assert auc(np.random.default_rng(0).random(len(clicked)), clicked) < 0.53


def test_ids_and_content_are_told_apart_by_their_settings():
    by = {}
    for name, off in (
        ("content", {"room_quality": 0.0}),
        ("ids", {"slice_pull": 0, "room_pull": 0}),
    ):
        flat = world.make(1, quick=True, loyalty=0.0, favourite_share=0.0, bias=-1.5, **off)
        asked = made.make(flat.log, backend="numpy", popular=1.0)
        mask = asked.mask[..., 0] & (asked.slice >= 0)
        clicked = asked.labels[..., 0][mask] > 0
        user = np.broadcast_to(asked.user[:, None], asked.room.shape)[mask]
        content = auc(flat.taste[user, flat.slice_topic[asked.slice[mask]]], clicked)
        by[name] = content, auc(flat.room_quality[asked.room[mask]], clicked)
    assert by["content"][0] > 0.58 and abs(by["ids"][0] - 0.5) < 0.02
    assert by["ids"][1] > by["content"][1]


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"user": 3}, "there is no 'user'; there are activity"),
        ({"users": 1.5}, "users must be a whole number, got 1.5"),
        ({"rooms": 0}, "rooms must be from 1 to 100000000, got 0"),
        ({"noise": -1}, "noise must be from 0 to 1000, got -1"),
        ({"switch": 1.01}, "switch must be from 0 to 1, got 1.01"),
        ({"slice_min": 0}, "slice_min must be from 0.1 to 720, got 0"),
        ({"tail": float("nan")}, "tail must be from 0 to 10, got nan"),
        ({"authors": 2**21}, "authors must be from 1 to 2097151, got 2097152"),
    ],
)
def test_bad_sizes(sizes, message):
    with pytest.raises(ValueError, match=message):
        world.settings(quick=True, **sizes)
    with pytest.raises(ValueError, match=message):
        world.make(0, quick=True, **sizes)


def test_every_setting_has_limits_that_hold_for_its_default():
    given = {field.name: getattr(world.Settings(), field.name) for field in fields(world.Settings)}
    assert world.settings(**given) == world.Settings()
    for name in given:
        with pytest.raises(ValueError, match=f"sizes: {name} must be from"):
            world.settings(**{name: float("inf")})
    with pytest.raises(TypeError, match="users must be a number, got str"):
        world.settings(users="3")


@pytest.mark.parametrize(
    ("sizes", "live", "requests"),
    [
        ({"users": 1, "authors": 1, "videos": 1, "verticals": 1, "subtopics": 1}, 10_000, 100),
        ({"rooms": 1}, 10_000, 100),
        ({"users": 1, "authors": 1, "rooms": 1, "videos": 1, "subtopics": 1}, 10_000, 1),
        ({"live_events": 0}, 0, 0),
        ({"favourites": 0, "video_ratio": 0}, 10_000, 100),
        ({"days": 0.2, "activity": 0, "tail": 0, "style": 0, "noise": 0}, 10_000, 100),
        ({"days": 0.01, "slice_min": 720, "life_min": 0.1, "visit": 0}, 10_000, 100),
        ({"slice_min": 0.1, "rooms": 20, "taste": 0, "switch": 1, "home": 0}, 10_000, 100),
    ],
)
def test_corners(sizes, live, requests):
    log = world.make(0, quick=True, **sizes).log
    assert (np.diff(log.ts) >= 0).all() and np.isfinite(log.slice_embedding).all()
    there = log.room_domain[log.room] == LIVE
    assert live <= there.sum() <= 20_000
    assert ((~there).sum() > live) == (sizes.get("video_ratio", 9) * live > 0)
    assert np.isfinite(log.value).all() and len(made.make(log, backend="numpy")) >= requests
