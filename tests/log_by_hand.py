"""Small random logs for tests: few users and rooms, many ties, rooms with and without an end."""

import numpy as np

from livrec_fast.logs.log import KINDS, LIVE, UNKNOWN, VIDEO, LiveLog


def random_log(seed, events, users=5, rooms=9, timed=0.6, span=3000):
    """Draw a log; the last two rooms are videos."""
    rng = np.random.default_rng(seed)
    domain = np.where(np.arange(rooms) < rooms - 2, LIVE, VIDEO).astype(np.uint8)
    author = rng.integers(0, 4, rooms)
    start = rng.integers(0, span // 2, rooms)
    end = np.where(rng.random(rooms) < timed, start + rng.integers(1, span // 2, rooms), UNKNOWN)
    end[domain == VIDEO] = UNKNOWN
    ts = np.sort(rng.integers(0, span // 5, events) * 5)
    room = rng.integers(0, rooms, events)
    kind = np.where(domain[room] == VIDEO, KINDS.index("play"), rng.integers(0, 3, events))
    slices = rng.integers(0, 5, rooms)
    slices[domain == VIDEO] = 1
    slice_room = np.repeat(np.arange(rooms), slices)
    index = np.arange(slices.sum()) - np.repeat(np.cumsum(slices) - slices, slices)
    live = domain[slice_room] == LIVE
    return LiveLog(
        user=rng.integers(0, users, events),
        room=room,
        author=author[room],
        ts=ts,
        kind=kind.astype(np.uint8),
        value=rng.random(events).astype(np.float32),
        pos=ts - start[room] + (end[room] == UNKNOWN) * rng.integers(0, 900, events),
        slice_room=slice_room,
        slice_index=index.astype(np.int32),
        slice_t0=index * 200 * live,
        slice_t1=(index + 1) * 200 * live,
        slice_domain=domain[slice_room],
        slice_embedding=rng.standard_normal((len(slice_room), 4)).astype(np.float16),
        room_author=author,
        room_domain=domain,
        room_start=start,
        room_end=end,
        user_id=np.arange(users),
        room_id=np.arange(rooms),
        author_id=np.arange(4),
    )
