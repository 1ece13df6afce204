"""Checkpoints: tensors and facts in one safetensors file that appears whole or not at all."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from torch import Tensor

from ..._files import replacing

FORMAT = "livrec_fast.fluid/4"  # to be raised when what is trained, or how it is kept, changes
_OLD = 3600  # seconds, after which nobody is still at writing a file


def write(path: Path, tensors: dict[str, Tensor], **facts: Any) -> None:
    """Write tensors and facts that JSON can hold."""
    from safetensors.torch import save

    path.parent.mkdir(parents=True, exist_ok=True)
    whole = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as file:
        file.write(save(whole, {"format": FORMAT, "facts": json.dumps(facts, allow_nan=False)}))


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write` wrote. Raises: ValueError where the file is none of ours."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"path: {path} is not a safetensors file ({error})") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(f"path: {path} is no checkpoint of FLUID's training")
    return tensors, json.loads(metadata["facts"])


def sweep(folder: Path) -> None:
    """Delete what interrupted runs left: files half written, and parts of stages that are done."""
    for path in folder.glob(".*.part"):
        if time.time() - path.stat().st_mtime > _OLD:
            path.unlink(missing_ok=True)
    for path in folder.glob("*.part.safetensors"):
        key = path.name.removesuffix(".part.safetensors")
        if all((folder / f"{key}.{kind}.safetensors").exists() for kind in ("model", "trace")):
            path.unlink(missing_ok=True)


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names start so, without the prefix."""
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
