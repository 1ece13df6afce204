"""What the users of the synthetic world do: rooms entered, likes and comments, videos played."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..logs.log import KINDS, Array
from ._world_content import MINUTE, START, Content, moments

if TYPE_CHECKING:
    from .world import Settings

CLICK, LIKE, COMMENT, PLAY = (KINDS.index(kind) for kind in ("click", "like", "comment", "play"))
_PILOT = 20_000  # exposures drawn to learn how many events an exposure makes
_MOST = 2**18  # exposures of a chunk
_PER_VISIT = 8
_BY_TASTE = 0.7  # share of the videos that are of a topic drawn by taste
_LIKES, _COMMENTS = -1.6, -2.2  # logits of liking and commenting at no interest
_WATCH = 40.0  # seconds watched at no interest, median


@dataclass(frozen=True)
class Users:
    """taste: [users, topics]. favourite: [users, favourites]. activity: [users], cumulative."""

    taste: Array
    favourite: Array
    activity: Array


def draw_users(settings: Settings, content: Content, rng: np.random.Generator) -> Users:
    """Draw tastes, favourites by popularity and taste, and how active each user is."""
    topics = len(content.topics)
    taste = rng.gamma(max(settings.taste, 1e-6), size=(settings.users, topics))
    taste /= max(settings.taste, 1e-6)
    vertical = taste.reshape(settings.users, settings.verticals, settings.subtopics).mean(2)
    taste = (1 - settings.spill) * taste
    taste += settings.spill * np.repeat(vertical, settings.subtopics, 1)
    liking = np.log(content.popularity) + np.log1p(taste)[:, content.author_topic]
    liking += rng.gumbel(size=liking.shape)
    most = min(settings.favourites, settings.authors)
    favourite = np.argpartition(-liking, most - 1, 1)[:, :most] if most else liking[:, :0]
    activity = np.cumsum(rng.lognormal(0, settings.activity, settings.users))
    return Users(taste.astype(np.float32), favourite.astype(np.int64), activity)


def events(
    settings: Settings, content: Content, users: Users, rng: np.random.Generator
) -> dict[str, Array]:
    """Draw the events, and return the columns that `LiveLog` has of them."""
    air = _Air(settings, content)
    pilot = min(_PILOT, settings.live_events)
    live = [_live(settings, content, users, air, pilot, rng)]
    if len(live[0]):
        rest = (settings.live_events - len(live[0])) * pilot // len(live[0])
        for start in range(0, rest, _MOST):
            count = min(_MOST, rest - start)
            live.append(_live(settings, content, users, air, count, rng))
    drawn = np.concatenate(live)
    plays = round(settings.video_ratio * int((drawn["kind"] == CLICK).sum()))
    drawn = np.concatenate([drawn, _plays(settings, content, users, plays, rng)])
    drawn = drawn[np.argsort(drawn["ts"], kind="stable")]
    room = drawn["room"].astype(np.int64)
    return {
        "user": drawn["user"].astype(np.int64),
        "room": room,
        "author": content.author[room],
        "ts": drawn["ts"].copy(),
        "kind": drawn["kind"].copy(),
        "value": drawn["value"].copy(),
        "pos": np.where(room < content.rooms, drawn["ts"] - content.start[room], 0),
    }


class _Air:
    """Which rooms are on air when."""

    def __init__(self, settings: Settings, content: Content):
        self.content, self.step = content, round(settings.slice_min * MINUTE)
        self.start, self.end = content.start[: content.rooms], content.end[: content.rooms]
        begin = (self.start - START) // self.step
        bins = (self.end - START) // self.step - begin + 1
        room = np.repeat(np.arange(content.rooms), bins)
        bin_of = np.arange(len(room)) - np.repeat(np.cumsum(bins) - bins - begin, bins)
        order = np.argsort(bin_of, kind="stable")
        self.room = room[order]
        weight = content.popularity[content.author[self.room]]
        self.weight = np.concatenate([[0], np.cumsum(weight)])
        self.bins = np.searchsorted(bin_of[order], np.arange(bin_of.max() + 2))
        author = content.author[: content.rooms]
        self.by_author = np.lexsort((self.start, author))
        self.key = author[self.by_author] * 2**42 + self.start[self.by_author]

    def draw(self, ts: Array, rng: np.random.Generator) -> Array:
        """Draw a room by popularity among those on air, -1 where the draw has just ended."""
        at = np.minimum((ts - START) // self.step, len(self.bins) - 2)
        low, high = self.weight[self.bins[at]], self.weight[self.bins[at + 1]]
        wanted = low + rng.random(len(ts)) * (high - low)
        found = np.searchsorted(self.weight, wanted, "right") - 1
        room = self.room[np.minimum(found, len(self.room) - 1)]
        return np.where((self.start[room] <= ts) & (ts < self.end[room]), room, -1)

    def of_author(self, author: Array, ts: Array) -> Array:
        """Return the latest room of each author if it is on air, else -1."""
        found = np.searchsorted(self.key, author * 2**42 + ts, "right") - 1
        room = self.by_author[np.maximum(found, 0)]
        mine = (found >= 0) & (self.content.author[room] == author) & (ts < self.end[room])
        return np.where(mine, room, -1)


_EVENT = np.dtype([("user", "i4"), ("room", "i4"), ("ts", "i8"), ("kind", "u1"), ("value", "f4")])


def _rows(user: Array, room: Array, ts: Array, kind: int, value: Array | float) -> Array:
    rows = np.empty(len(user), _EVENT)
    rows["user"], rows["room"], rows["ts"] = user, room, ts
    rows["kind"], rows["value"] = kind, value
    return rows


def _visits(
    settings: Settings, users: Users, count: int, rng: np.random.Generator
) -> tuple[Array, Array]:
    """Draw who is there and when, `count` times; some of these belong to one visit."""
    visits = count // _PER_VISIT + 1
    drawn = np.searchsorted(users.activity, rng.random(visits) * users.activity[-1], "right")
    begin = moments(settings, rng, visits)
    visit = rng.integers(0, visits, count)
    length = max(round(settings.visit * MINUTE), 1)
    return drawn[visit], begin[visit] + rng.integers(0, length, count)


def _live(
    settings: Settings,
    content: Content,
    users: Users,
    air: _Air,
    count: int,
    rng: np.random.Generator,
) -> Array:
    """Expose users to rooms, and return what comes of it."""
    user, ts = _visits(settings, users, count, rng)
    room = air.draw(ts, rng)
    if users.favourite.shape[1]:
        favourite = users.favourite[user, rng.integers(0, users.favourite.shape[1], count)]
        known = air.of_author(favourite, ts)
        room = np.where((known >= 0) & (rng.random(count) < settings.favourite_share), known, room)
    user, ts, room = (column[room >= 0] for column in (user, ts, room))
    row = content.first[room] + (ts - content.start[room]) // air.step
    interest = np.log1p(users.taste[user, content.slice_topic[row]])
    author = content.author[room]
    pull = settings.slice_pull * interest
    pull += settings.room_pull * np.log1p(users.taste[user, content.topic[room]])
    pull += settings.loyalty * (users.favourite[user] == author[:, None]).any(1)
    pull += settings.room_quality * content.quality[room]
    pull += settings.author_quality * content.author_quality[author]
    pull += settings.lift * content.highlight[row]
    kept = rng.random(len(user)) < _sigmoid(settings.bias + pull)
    return _inside(content, user[kept], room[kept], ts[kept], interest[kept], rng)


def _inside(
    content: Content, user: Array, room: Array, ts: Array, interest: Array, rng: np.random.Generator
) -> Array:
    """Return the events of users who enter: they stay, and some like or comment."""
    quality = content.quality[room]
    stay = _WATCH * np.exp(0.5 * interest + 0.3 * quality + rng.standard_normal(len(user)))
    stay = np.minimum(stay * 1000, content.end[room] - ts)
    made = [_rows(user, room, ts, CLICK, stay / 1000)]
    for kind, base in ((LIKE, _LIKES), (COMMENT, _COMMENTS)):
        does = rng.random(len(user)) < _sigmoid(base + 0.5 * interest + 0.3 * quality)
        when = ts + 1 + (rng.random(len(user)) * stay).astype(np.int64)
        when = np.minimum(when, content.end[room])[does]
        value = 1 if kind == LIKE else rng.geometric(0.08, int(does.sum()))
        made.append(_rows(user[does], room[does], when, kind, value))
    return np.concatenate(made)


def _plays(
    settings: Settings, content: Content, users: Users, count: int, rng: np.random.Generator
) -> Array:
    """Play videos: of a topic drawn by taste, or of any, and within it by popularity."""
    user, ts = _visits(settings, users, count, rng)
    topics = len(content.topics)
    taste = np.concatenate([[0], np.cumsum(users.taste + 1e-6, dtype=np.float64)])
    low, high = taste[user * topics], taste[(user + 1) * topics]
    wanted = low + rng.random(count) * (high - low)
    topic = np.clip(np.searchsorted(taste, wanted, "right") - 1 - user * topics, 0, topics - 1)
    topic = np.where(rng.random(count) < _BY_TASTE, topic, rng.integers(0, topics, count))
    order = np.argsort(content.topic[content.rooms :], kind="stable") + content.rooms
    weight = np.concatenate([[0], np.cumsum(rng.lognormal(0, settings.tail, len(order)))])
    at = np.searchsorted(content.topic[order], np.arange(topics + 1))
    low, high = weight[at[topic]], weight[at[topic + 1]]
    wanted = low + rng.random(count) * (high - low)
    video = order[np.clip(np.searchsorted(weight, wanted, "right") - 1, 0, len(order) - 1)]
    kept = high > low  # a topic may have no video
    seconds = np.exp(2.5 + 0.3 * np.log1p(users.taste[user, topic]) + rng.standard_normal(count))
    return _rows(user[kept], video[kept], ts[kept], PLAY, seconds[kept])


def _sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))
