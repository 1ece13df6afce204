"""Items: vectors from titles and genres, codebooks, codes, and what the codes say."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ... import ResidualKMeans, pack_codes, residual_kmeans_encode, unpack_codes
from ...data.movielens import Ratings
from ...data.word_vectors import WordVectors
from ...modules._quality import Quality
from ...reference import residual_kmeans as reference
from .measure import OpTimer, synchronize

ENCODE_REPEATS = 5


@dataclass(frozen=True)
class Items:
    """Items and their codes, the same for both runs.

    vectors: float32 [n, D]. codes: [n, L]. packed: uint8 [n, bytes]. fit_seconds, encode_seconds:
    by backend; backend: the one that auto ran. differing: items whose codes differ between the
    backends, all of them near ties.
    neighbours: titles that share their first two codes, by those codes.
    """

    vectors: Tensor
    codebooks: list[Tensor]
    codes: Tensor
    packed: Tensor
    quality: Quality
    fit_seconds: dict[str, float]
    encode_seconds: dict[str, float]
    backend: str
    differing: int
    neighbours: dict[tuple[int, int], list[str]]


def item_vectors(ratings: Ratings, words: WordVectors) -> np.ndarray:
    """Return unit vectors [n, D]: mean token vectors of title plus genres, each centred."""
    titles = [re.sub(r" \(\d{4}\)$", "", title) for title in ratings.titles]
    both = _unit(words.embed(titles)) + _unit(words.embed(ratings.genres))
    return _unit(both)


def _unit(vectors: np.ndarray) -> np.ndarray:
    centred = vectors - vectors.mean(0)
    return centred / np.linalg.norm(centred, axis=1, keepdims=True).clip(1e-6)


def make_items(
    ratings: Ratings,
    words: WordVectors,
    levels: tuple[int, ...],
    seed: int,
    device: torch.device,
    on_fit: Callable[[], None] = lambda: None,
) -> Items:
    """Make vectors, fit the codebooks by either backend, and encode.

    Both training runs use the codebooks that the reference has fitted, so that they start alike.
    The codes of the two backends are held to the op's exactness rule; AssertionError says where
    they fail.
    """
    vectors = torch.from_numpy(item_vectors(ratings, words)).to(device)
    quantizers, fit_seconds = {}, {}
    for backend in ("reference", "auto"):
        quantizers[backend] = ResidualKMeans(levels, init="random", seed=seed, backend=backend)
        fit_seconds[backend] = _clock(partial(quantizers[backend].fit, vectors), device)
        on_fit()
    quantizer = quantizers["reference"]
    codes, encode_seconds, ran = _encode_twice(vectors, quantizer.codebooks, device)
    packed = pack_codes(codes["reference"], levels)
    if not torch.equal(unpack_codes(packed, levels).long(), codes["reference"].long()):
        raise AssertionError("packed codes do not unpack to what they were packed from")
    return Items(
        vectors,
        quantizer.codebooks,
        codes["reference"],
        packed,
        quantizer.quality(vectors),
        fit_seconds,
        encode_seconds,
        ran,
        int((codes["auto"] != codes["reference"]).any(1).sum()),
        shared_prefixes(ratings.titles, codes["reference"].cpu().numpy()),
    )


def _encode_twice(
    vectors: Tensor, books: list[Tensor], device: torch.device
) -> tuple[dict[str, Tensor], dict[str, float], str]:
    """Return codes and median seconds by backend, and the backend that auto ran."""
    codes, seconds = {}, {}
    for backend in ("reference", "auto"):
        encode = partial(residual_kmeans_encode, vectors, books, backend=backend)
        with OpTimer(device) as timer:
            codes[backend] = encode()
        seconds[backend] = median(_clock(encode, device) for _ in range(ENCODE_REPEATS))
    reference.agree(codes["auto"], {"x": vectors, "codebooks": books})
    (ran,) = next(iter(timer.backends.values()))
    return codes, seconds, ran


def shared_prefixes(
    titles: list[str], codes: np.ndarray, groups: int = 6, most: int = 6
) -> dict[tuple[int, int], list[str]]:
    """Return the titles of the largest groups that share their first two codes; no code twice."""
    found: dict[tuple[int, int], list[str]] = {}
    for title, (first, second) in zip(titles, codes[:, :2].tolist(), strict=True):
        found.setdefault((first, second), []).append(title)
    chosen: dict[tuple[int, int], list[str]] = {}
    for prefix in sorted(found, key=lambda prefix: (-len(found[prefix]), prefix)):
        if len(chosen) < groups and not any(
            prefix[0] == first or prefix[1] == second for first, second in chosen
        ):
            chosen[prefix] = found[prefix][:most]
    return chosen


def _clock(action: Callable[[], Any], device: torch.device) -> float:
    synchronize(device)
    begin = time.perf_counter()
    action()
    synchronize(device)
    return time.perf_counter() - begin
