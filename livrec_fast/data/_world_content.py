"""What the synthetic world shows: topics, authors, rooms with their slices, videos."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..logs.log import LIVE, UNKNOWN, VIDEO, Array

if TYPE_CHECKING:
    from .world import Settings

DAY = 86_400_000
MINUTE = 60_000
START = 1_735_689_600_000  # 2025-01-01, UTC
_LIFE = (4 * MINUTE, 12 * 60 * MINUTE)  # bounds of a room's life
_SUBTOPIC = 0.8  # how far the topics of a vertical lie from its direction, which is of length 1


@dataclass(frozen=True)
class Content:
    """Live rooms, sorted by start, then videos; `rooms` of them are live.

    first: int64 [rooms + 1], the first slice of each live room.
    """

    rooms: int
    topics: Array
    popularity: Array
    author_quality: Array
    author_topic: Array
    author: Array
    topic: Array
    quality: Array
    start: Array
    end: Array
    first: Array
    slice_topic: Array
    slice_t0: Array
    slice_t1: Array
    highlight: Array
    embedding: Array

    def columns(self) -> dict[str, Array]:
        """Return the slices and the rooms as `LiveLog` has them."""
        videos = len(self.author) - self.rooms
        per_room = np.append(np.diff(self.first), np.ones(videos, np.int64))
        room = np.repeat(np.arange(len(self.author)), per_room)
        firsts = np.repeat(np.cumsum(per_room) - per_room, per_room)
        domain = np.repeat(np.array([LIVE, VIDEO], np.uint8), [self.rooms, videos])
        return {
            "slice_room": room,
            "slice_index": (np.arange(len(room)) - firsts).astype(np.int32),
            "slice_t0": self.slice_t0,
            "slice_t1": self.slice_t1,
            "slice_domain": domain[room],
            "slice_embedding": self.embedding,
            "room_author": self.author,
            "room_domain": domain,
            "room_start": self.start,
            "room_end": self.end,
        }


def draw_content(settings: Settings, rng: np.random.Generator) -> Content:
    """Draw everything but the users."""
    rooms, videos, authors = settings.rooms, settings.videos, settings.authors
    topics = _topics(settings, rng)
    author = rng.integers(0, authors, rooms + videos)
    author_topic = rng.integers(0, len(topics), authors)
    faithful = rng.random(rooms + videos) < settings.faithful
    other = rng.integers(0, len(topics), rooms + videos)
    topic = np.where(faithful, author_topic[author], other)
    start, end = _times(settings, rng)
    step = round(settings.slice_min * MINUTE)
    first = np.concatenate([[0], np.cumsum(-(-(end - start) // step))])
    slice_room = np.repeat(np.arange(rooms), np.diff(first))
    slice_t0 = (np.arange(first[-1]) - first[slice_room]) * step
    slice_t1 = np.minimum(slice_t0 + step, (end - start)[slice_room])
    still = np.zeros(videos, np.int64)
    slice_topic = np.append(_wander(settings, topic[:rooms], first, rng), topic[rooms:])
    slice_author = np.append(author[slice_room], author[rooms:])
    highlight = rng.random(len(slice_topic)) < settings.highlights
    highlight[first[-1] :] = False
    return Content(
        rooms=rooms,
        topics=topics,
        popularity=rng.lognormal(0, settings.tail, authors),
        author_quality=rng.standard_normal(authors).astype(np.float32),
        author_topic=author_topic,
        author=author,
        topic=topic,
        quality=rng.standard_normal(rooms + videos).astype(np.float32),
        start=np.append(start, START - rng.integers(0, 30 * DAY, videos)),
        end=np.append(end, np.full(videos, UNKNOWN)),
        first=first,
        slice_topic=slice_topic,
        slice_t0=np.append(slice_t0, still),
        slice_t1=np.append(slice_t1, still),
        highlight=highlight,
        embedding=_embed(settings, topics, slice_topic, slice_author, rng),
    )


def time_of_day(rng: np.random.Generator, count: int) -> Array:
    """Draw times of a day, ms, most of them around nine in the evening."""
    hours = np.linspace(0, 24, 24 * 60 + 1)
    density = 1 + 0.8 * np.cos((hours - 21) * np.pi / 12)
    share = np.cumsum(density) - density[0]
    drawn = np.interp(rng.random(count), share / share[-1], hours)
    return (drawn * (DAY / 24)).astype(np.int64)


def moments(settings: Settings, rng: np.random.Generator, count: int) -> Array:
    """Draw times of the wall clock within the world's days."""
    drawn = rng.integers(0, int(np.ceil(settings.days)), count) * DAY + time_of_day(rng, count)
    return START + drawn % round(settings.days * DAY)


def _topics(settings: Settings, rng: np.random.Generator) -> Array:
    verticals = _directions(rng, settings.verticals, settings.dim)
    topics = np.repeat(verticals, settings.subtopics, 0)
    topics = topics + _SUBTOPIC * _directions(rng, len(topics), settings.dim)
    return topics / np.linalg.norm(topics, axis=1, keepdims=True)


def _times(settings: Settings, rng: np.random.Generator) -> tuple[Array, Array]:
    start = np.sort(moments(settings, rng, settings.rooms))
    life = rng.lognormal(np.log(settings.life_min * MINUTE), settings.life_spread, settings.rooms)
    return start, start + np.clip(life, *_LIFE).astype(np.int64)


def _wander(settings: Settings, topic: Array, first: Array, rng: np.random.Generator) -> Array:
    """Return the topic of each slice of the live rooms."""
    slices = first[-1]
    turn = rng.random(slices) < settings.switch
    turn[first[:-1]] = True
    at_home = rng.random(slices) < settings.home
    home = np.repeat(topic, np.diff(first))
    picked = np.where(
        at_home, home, rng.integers(0, settings.verticals * settings.subtopics, slices)
    )
    return picked[np.maximum.accumulate(np.where(turn, np.arange(slices), 0))]


def _embed(
    settings: Settings, topics: Array, topic: Array, author: Array, rng: np.random.Generator
) -> Array:
    style = settings.style * _directions(rng, settings.authors, settings.dim)
    noise = rng.standard_normal((len(topic), settings.dim), np.float32)
    vectors = topics[topic] + style[author] + noise * (settings.noise / settings.dim**0.5)
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)


def _directions(rng: np.random.Generator, count: int, dim: int) -> Array:
    drawn = rng.standard_normal((count, dim), np.float32)
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)
