"""Embeddings of codes in safetensors files."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from ._exchange import Path, _read, _write
from ._huge_pages import empty_rows
from ._row_optimizers import OPTIMIZERS

_FORMAT = "livrec_fast.PrefixNgramEmbedding"
_SETTINGS = ("levels", "max_rows", "mode", "scheme", "pool", "hashing", "sparse", "version")


def write_tables(path: Path, module: Any) -> None:
    """Write tables, settings and an optimiser's state."""
    settings = {name: getattr(module, name) for name in _SETTINGS} | {"dims": module.dims}
    if module.optimizer is not None:
        kind = type(module.optimizer).__name__
        settings["optimizer"] = {"kind": kind, **asdict(module.optimizer)}
    metadata = {name: json.dumps(value) for name, value in settings.items()}
    tensors = {name: tensor.contiguous() for name, tensor in module.state_dict().items()}
    _write(path, tensors, {"format": _FORMAT, **metadata})


def read_tables(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the state and the arguments of the module that `write_tables` wrote."""
    tensors, metadata = _read(path, _FORMAT, "PrefixNgramEmbedding.save")
    given = {name: json.loads(text) for name, text in metadata.items() if name != "format"}
    given["dim"] = given.pop("dims")
    if "optimizer" in given:
        optimizer = given["optimizer"]
        given["optimizer"] = OPTIMIZERS[optimizer.pop("kind")](**optimizer)
    for name, tensor in tensors.items():
        tensors[name] = empty_rows(tensor.shape, tensor.dtype, tensor.device).copy_(tensor)
    return tensors, given | {"dtype": tensors["tables.0"].dtype}


def check_version(what: str, found: str | None, wanted: str | None) -> None:
    """Refuse tables of other codebooks, where both are known."""
    if None not in (found, wanted) and found != wanted:
        raise ValueError(f"{what} are for codes of codebooks {found}, not of {wanted}")


def assign(module: torch.nn.Module, path: Path, tensors: dict[str, Tensor]) -> None:
    """Make the tensors of a file those of a module."""
    try:
        module.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        raise ValueError(f"path: the tables of {path} are not of its settings: {error}") from error
