"""Codebooks in files of others: plain arrays, and checkpoints of OpenOneRec and GRID."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._files import replacing

_KINDS = ("float16", "float32", "float64")
_CENTROIDS = re.compile(r"centroids\.(\d+)|(?:.*\.)?quantization_layer_list\.(\d+)\.centroids")


def write_npy(folder: str | os.PathLike[str], books: list[np.ndarray], about: Any) -> None:
    """Write an array per level, and last what is to be known about them."""
    home = Path(folder)
    home.mkdir(parents=True, exist_ok=True)
    further = home / f"codebook_{len(books)}.npy"
    if further.exists():
        raise ValueError(f"folder: {further} would be read as a level of these; remove it")
    for level, book in enumerate(books):
        with replacing(home / f"codebook_{level}.npy") as file:
            np.save(file, np.ascontiguousarray(book), allow_pickle=False)
    with replacing(home / "codebooks.json") as file:
        file.write(json.dumps(about).encode() + b"\n")


def read_npy(paths: Any) -> tuple[list[Tensor], str | None]:
    """Return the codebooks in a folder, a file or a list of files, and the version they claim."""
    if not isinstance(paths, (str, os.PathLike)):
        files = [Path(path) for path in paths]
        if not files:
            raise ValueError("paths: at least one file is needed, got none")
        return _same_width([_read(file, (2,)) for file in files], files), None
    home = Path(paths)
    if not home.is_dir():
        array = _read(home, (2, 3))
        return list(array) if array.dim() == 3 else [array], None
    files = _levels_in(home)
    about = home / "codebooks.json"
    version = _version_in(about) if about.exists() else None
    return _same_width([_read(file, (2,)) for file in files], files), version


def _levels_in(home: Path) -> list[Path]:
    """Return codebook_0.npy, codebook_1.npy, ... of a folder, of which none may be missing."""
    numbers = [re.fullmatch(r"codebook_(\d+)\.npy", path.name) for path in home.iterdir()]
    count = max((int(number[1]) + 1 for number in numbers if number), default=1)
    files = [home / f"codebook_{level}.npy" for level in range(count)]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"paths: {file} is missing; {home} has {count - 1} after it")
    return files


def _version_in(about: Path) -> str:
    try:
        return str(json.loads(about.read_bytes())["version"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"paths: {about} names no version ({error})") from error


def _read(path: Path, dimensions: Sequence[int]) -> Tensor:
    """Return an array of codewords, float32 or float64."""
    try:
        array = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"paths: {path} is not a readable .npy file ({error})") from error
    if not isinstance(array, np.ndarray) or array.dtype.name not in _KINDS:
        kind = getattr(array, "dtype", type(array).__name__)
        raise ValueError(f"paths: {path} must hold one of {', '.join(_KINDS)}, got {kind}")
    shape = list(array.shape)
    if array.ndim not in dimensions:
        wanted = " or ".join("[N, D]" if n == 2 else "[L, N, D]" for n in dimensions)
        raise ValueError(f"paths: {path} must be {wanted}, got shape {shape}")
    if array.size == 0 or array.shape[-2] > 65_536:
        raise ValueError(f"paths: {path}: N must be 1 to 65536 and D at least 1, got shape {shape}")
    bad = ~np.isfinite(array).all(-1).reshape(-1)
    if bad.any():
        level, row = divmod(int(bad.argmax()), array.shape[-2])
        raise ValueError(f"paths: {path}: codeword {row} of level {level} is not finite")
    wide = np.float64 if array.dtype.name == "float64" else np.float32
    return torch.from_numpy(np.array(array, wide, order="C"))


def _same_width(books: list[Tensor], files: Sequence[Path]) -> list[Tensor]:
    for book, file in zip(books, files, strict=True):
        if book.shape[1] != books[0].shape[1]:
            raise ValueError(
                f"paths: {file} must be [N, {books[0].shape[1]}] like {files[0].name}, got shape "
                f"{list(book.shape)}"
            )
    return books


def centroids(source: Any) -> list[Tensor]:
    """Return the codebooks in a checkpoint of OpenOneRec or GRID, or in the path of one."""
    held = source if isinstance(source, Mapping) else _checkpoint(source)
    told = held.get("hyper_parameters")
    if isinstance(told, Mapping) and told.get("normalize_residuals"):
        raise ValueError(
            "source: its codes are of residuals scaled to length 1 (normalize_residuals is true), "
            "which are not those of residual k-means"
        )
    state = held.get("state_dict", held)
    found = {}
    for name, value in state.items():
        level = _CENTROIDS.fullmatch(str(name))
        if level and isinstance(value, Tensor):
            found[int(level[1] or level[2])] = value.detach()
    if sorted(found) != list(range(len(found))) or not found:
        names = ", ".join(list(state)[:4]) or "nothing"
        raise ValueError(
            "source: no tensors centroids.<l> or quantization_layer_list.<l>.centroids for levels "
            f"0, 1, ... in it; it has {names}"
        )
    return [found[level] for level in range(len(found))]


def _checkpoint(path: Any) -> Mapping[str, Any]:
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # of any kind, where the bytes are no checkpoint
        raise ValueError(
            f"source: {path} cannot be read as tensors alone; pass what torch.load gives instead "
            f"if you trust it ({(str(error).splitlines() or [''])[0]})"
        ) from error
    if not isinstance(held, Mapping):
        raise ValueError(f"source: {path} must hold a dict, got {type(held).__name__}")
    return held
