"""Keys of a contrastive loss with what is known of each, and several of them as an op's arguments.

A loss has its batch's own keys and may have more: given ones, those of other ranks and those of a
queue. Not all need to know the same of their keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._checks import FLOATS, check_tensor

_DTYPES = {"log_q": (torch.float32, torch.float64), "pair_vectors": FLOATS}


class KeyRows(NamedTuple):
    """Keys [M, D] and, where known, ids, logs of probabilities [M] and pair vectors [M, P]."""

    keys: Tensor
    key_ids: Tensor | None = None
    query_ids: Tensor | None = None
    group_ids: Tensor | None = None
    log_q: Tensor | None = None
    pair_vectors: Tensor | None = None

    def known(self) -> dict[str, Tensor]:
        """Return what is known, by name, the keys too."""
        return {name: value for name, value in self._asdict().items() if value is not None}

    def take(self, rows: Tensor | slice) -> KeyRows:
        """Return some of the rows."""
        return KeyRows(**{name: value[rows] for name, value in self.known().items()})

    def detach(self) -> KeyRows:
        """Return the rows without their gradients."""
        return KeyRows(**{name: value.detach() for name, value in self.known().items()})


FIELDS = KeyRows._fields[1:]


def check_known(name: str, value: Any, lengths: Sequence[int]) -> None:
    """Check what is known of some keys: its type, dtype and number of rows."""
    shape = ("B", "P") if name == "pair_vectors" else ("B",)
    check_tensor(name, value, shape, _DTYPES.get(name, (torch.int64,)))
    if value.shape[0] not in lengths:
        allowed = " or ".join(str(length) for length in dict.fromkeys(lengths))
        raise ValueError(f"{name}: must have {allowed} rows, got {value.shape[0]}")


def divide(
    key: Tensor, extra_keys: Tensor | None, known: dict[str, Tensor | None]
) -> tuple[KeyRows, KeyRows | None]:
    """Check what is known of B keys, or of these and E more, and part the B from the E."""
    batch = key.shape[0]
    total = batch if extra_keys is None else batch + extra_keys.shape[0]
    given = {name: value for name, value in known.items() if value is not None}
    for name, value in given.items():
        check_known(name, value, (batch, total))
    own = KeyRows(key, **{name: value[:batch] for name, value in given.items()})
    if extra_keys is None:
        return own, None
    more = {name: value[batch:] for name, value in given.items() if len(value) > batch}
    return own, KeyRows(extra_keys, **more)


def arguments(
    own: KeyRows, more: Sequence[KeyRows], threshold: float | None = None
) -> dict[str, Any]:
    """Return the op's keyword arguments for a batch's own keys and more of them, if any.

    Of what is not known of the batch's own keys, that of others is of no use. Where others do not
    know it, their ids equal none, the logs of their probabilities are 0, and they are false
    negatives of no row.
    """
    more = [rows for rows in more if len(rows.keys)]
    found: dict[str, Any] = {}
    if more:
        keys = [rows.keys.to(own.keys.dtype) for rows in more]
        found["extra_keys"] = torch.cat(keys) if len(keys) > 1 else keys[0]
    known = own.known()
    del known["keys"]
    if threshold is None:
        known.pop("pair_vectors", None)
    for name, mine in known.items():
        theirs = [getattr(rows, name) for rows in more]
        if any(values is not None for values in theirs):
            parts = [
                _unknown(name, mine, len(rows.keys), threshold)
                if values is None
                else values.to(mine.dtype)
                for rows, values in zip(more, theirs, strict=True)
            ]
            mine = torch.cat([mine, *parts])
        found[name] = mine
    return found


def _unknown(name: str, mine: Tensor, count: int, threshold: float | None) -> Tensor:
    """Return what stands for unknown values of `count` keys."""
    if name == "pair_vectors" and threshold is not None and threshold < 0:
        raise ValueError(  # a row of zeros has the cosine 0
            "false_negative_threshold: must not be negative where only some of the extra keys "
            f"have pair vectors, got {threshold}"
        )
    values = mine.new_zeros((count, *mine.shape[1:]))
    return values + _free_id(mine) if name.endswith("ids") else values


def _free_id(ids: Tensor) -> Tensor:
    """Return the least id from 0 on that is not among `ids`, which are too few to have them all."""
    free = ~torch.isin(torch.arange(len(ids) + 1, device=ids.device), ids)
    return free.to(torch.uint8).argmax()


def joined(parts: Sequence[KeyRows]) -> KeyRows:
    """Put rows, without gradients, one after the other; all know the same of their keys."""
    known = [part.detach().known() for part in parts]
    return KeyRows(**{name: torch.cat([part[name] for part in known]) for name in known[0]})
