"""A seeded synthetic world of live rooms and short videos, with the truth behind it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..logs.log import Array, LiveLog
from ._world_content import draw_content
from ._world_users import draw_users, events


@dataclass(frozen=True)
class Settings:
    """What the world is made of; the first seven are its size.

    Content. A topic is a direction in the space of embeddings, `verticals` times `subtopics` of
    them, those of a vertical close to each other. An author has a topic and a style; a room takes
    its author's topic with probability `faithful`, else any. What the room shows wanders: each
    slice goes on with the topic of the slice before or, with probability `switch`, picks the room's
    topic (with probability `home`) or any. embedding = normalised(topic + `style` * author's style
    + `noise` * noise). By default the slice of another room that is nearest shows the same topic in
    six cases of seven: an encoder that is good, not perfect.

    Behaviour. Authors' popularity is lognormal with `tail`; exposure is proportional to it. A user
    likes some topics: the taste is Dirichlet with `taste` per topic, in units of the mean. A user
    exposed to a room enters with probability sigmoid(`bias` + `slice_pull` * interest(slice's
    topic) + `room_pull` * interest(room's topic) + `loyalty` * (author is a favourite) +
    `room_quality` * q_room + `author_quality` * q_author + `lift` * (highlight)), where
    interest = log1p(taste). The qualities are standard normal and leave no trace in the content:
    identities are worth something, too.

    Times. A room lives for a lognormal time of median `life_min` and deviation `life_spread`. Both
    rooms and users are busiest at nine in the evening. Users come in visits of `visit` minutes.
    A room is cut into slices of `slice_min`; a share `highlights` of the slices are highlights.
    """

    users: int = 2000
    authors: int = 600
    rooms: int = 3000
    videos: int = 6000
    live_events: int = 200_000
    days: float = 3.0
    dim: int = 64
    verticals: int = 8
    subtopics: int = 4
    video_ratio: float = 9.0  # videos played per room entered
    slice_min: float = 2.0
    life_min: float = 40.0
    life_spread: float = 0.8
    tail: float = 1.2
    activity: float = 1.0  # deviation of the logarithm of the users' activity
    faithful: float = 0.8
    switch: float = 0.15
    home: float = 0.7
    style: float = 0.4
    noise: float = 1.5
    taste: float = 0.08
    spill: float = 0.3
    favourites: int = 6  # authors per user
    favourite_share: float = 0.25  # of exposures, where a favourite is on air
    visit: float = 25.0
    bias: float = -3.2
    slice_pull: float = 0.9
    room_pull: float = 0.5
    loyalty: float = 1.2
    room_quality: float = 0.6
    author_quality: float = 0.4
    lift: float = 1.0
    highlights: float = 0.03


_SHARE, _SIZE, _WEIGHT, _SPREAD = (0, 1), (0, 1000), (-100, 100), (0, 10)
_LIMITS: dict[str, tuple[float, float]] = {
    "users": (1, 10**8), "authors": (1, 2**21 - 1), "rooms": (1, 10**8), "videos": (1, 10**9),
    "live_events": (0, 10**10), "days": (0.01, 10_000), "dim": (1, 2**16),
    "verticals": (1, 10_000), "subtopics": (1, 10_000), "video_ratio": _SIZE,
    "slice_min": (0.1, 720), "life_min": (0.1, 720), "life_spread": _SPREAD, "tail": _SPREAD,
    "activity": _SPREAD, "faithful": _SHARE, "switch": _SHARE, "home": _SHARE, "style": _SIZE,
    "noise": _SIZE, "taste": _SIZE, "spill": _SHARE, "favourites": (0, 10_000),
    "favourite_share": _SHARE, "visit": (0, 10_000), "bias": _WEIGHT, "slice_pull": _WEIGHT,
    "room_pull": _WEIGHT, "loyalty": _WEIGHT, "room_quality": _WEIGHT, "author_quality": _WEIGHT,
    "lift": _WEIGHT, "highlights": _SHARE,
}  # fmt: skip

QUICK = {"users": 300, "authors": 120, "rooms": 500, "videos": 800, "live_events": 15_000}
QUICK_DAYS = 1.0


@dataclass(frozen=True)
class World:
    """A log, and what it was made from.

    slice_topic: int64 [S]. room_topic: int64 [R], of videos, too. topic_vertical: int64 [topics].
    taste: float32 [users, topics], of mean 1. favourite: int64 [users, favourites], authors.
    room_quality: float32 [R]. author_quality: float32 [authors]. highlight: bool [S].
    """

    log: LiveLog
    settings: Settings
    slice_topic: Array
    room_topic: Array
    topic_vertical: Array
    taste: Array
    favourite: Array
    room_quality: Array
    author_quality: Array
    highlight: Array


def settings(*, quick: bool = False, **sizes: float) -> Settings:
    """Return settings by name, checked; the arguments and errors are those of `make`."""
    known = {name: type(value) for name, value in asdict(Settings()).items()}
    given: dict[str, Any] = sizes
    for name, value in given.items():
        if name not in known:
            raise ValueError(f"sizes: there is no {name!r}; there are {', '.join(sorted(known))}")
        if isinstance(value, bool) or not hasattr(value, "__float__"):
            raise TypeError(f"sizes: {name} must be a number, got {type(value).__name__}")
        low, high = _LIMITS[name]
        if not low <= value <= high:
            raise ValueError(f"sizes: {name} must be from {low} to {high}, got {value}")
        if known[name] is int and value != int(value):
            raise ValueError(f"sizes: {name} must be a whole number, got {value}")
    small = {**QUICK, "days": QUICK_DAYS} if quick else {}
    return Settings(**{name: known[name](value) for name, value in {**small, **sizes}.items()})


def make(seed: int = 0, *, quick: bool = False, **sizes: float) -> World:
    """Make a world; the same seed and settings give the same one.

    Args:
        seed: of all that is drawn.
        quick: a world that is made in a second.
        sizes: any of `Settings`, by name.

    Returns:
        The log and the truth. Rooms come first in the log, then videos; live rooms have a start
        and an end. About `live_events` events are of live rooms: entering ("click", with the
        seconds watched) and what the user does inside ("like", "comment"). Short videos are played
        ("play") `video_ratio` times as often as rooms are entered.

    Raises:
        ValueError: a setting that does not exist or is out of range. TypeError: one that is no
        number.
    """
    chosen = settings(quick=quick, **sizes)
    rng = np.random.default_rng(seed)
    content = draw_content(chosen, rng)
    users = draw_users(chosen, content, rng)
    log = LiveLog(
        **events(chosen, content, users, rng),
        **content.columns(),
        user_id=np.arange(chosen.users),
        room_id=np.arange(len(content.author)),
        author_id=np.arange(chosen.authors),
    )
    return World(
        log=log,
        settings=chosen,
        slice_topic=content.slice_topic,
        room_topic=content.topic,
        topic_vertical=np.arange(len(content.topics)) // chosen.subtopics,
        taste=users.taste,
        favourite=users.favourite,
        room_quality=content.quality,
        author_quality=content.author_quality,
        highlight=content.highlight,
    )
