"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Open a binary file that takes the place of `path` when the block ends without an exception.

    The bytes reach the disk before the name does, so a reader sees the old file or the new one.
    Where the file system can, the file has no name until then, and a killed process leaves nothing.
    """
    path = Path(path)
    file, name = _open_beside(path)
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if name is None:
                name = _name_it(file, path)
        os.replace(name, path)
        _sync_folder(path.parent)
    except BaseException:
        if name is not None:
            Path(name).unlink(missing_ok=True)
        raise


def _open_beside(path: Path) -> tuple[IO[bytes], str | None]:
    """Open a file for `path` in its folder, nameless if possible, and return it with its name."""
    if hasattr(os, "O_TMPFILE"):
        try:
            handle = os.open(path.parent, os.O_TMPFILE | os.O_RDWR, 0o666)
            return os.fdopen(handle, "w+b"), None
        except OSError as error:  # not every file system has nameless files
            if isinstance(error, (FileNotFoundError, PermissionError, NotADirectoryError)):
                raise
    name = _fresh_name(path)
    return open(name, "x+b"), name


def _name_it(file: IO[bytes], path: Path) -> str:
    """Give a nameless file a name beside `path`."""
    name = _fresh_name(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:  # with a folder given, os.link follows the link in /proc to the file itself
        os.link(
            f"/proc/self/fd/{file.fileno()}", Path(name).name, src_dir_fd=folder, dst_dir_fd=folder
        )
    finally:
        os.close(folder)
    return name


def _fresh_name(path: Path) -> str:
    return tempfile.mktemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)


def _sync_folder(folder: Path) -> None:
    """Make a rename in `folder` last through a power cut, where folders can be synced."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
