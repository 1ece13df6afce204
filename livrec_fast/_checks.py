"""Argument checks shared by the ops. Each message names the argument, its value and the limit.

Wrong types and dtypes raise TypeError, wrong shapes and offsets ValueError, ids out of range
IndexError.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def check_tensor(
    name: str, value: Any, shape: Sequence[int | str], dtypes: Sequence[torch.dtype]
) -> None:
    """Check that `value` is a tensor of this shape and one of these dtypes.

    shape: an int where the size is fixed, a name where it is free, such as ("M", 256).
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: must be a tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        allowed = ", ".join(str(dtype)[6:] for dtype in dtypes)
        raise TypeError(f"{name}: dtype must be one of {allowed}, got {str(value.dtype)[6:]}")
    if not _fits(value.shape, shape):
        wanted = ", ".join(str(size) for size in shape)
        raise ValueError(f"{name}: shape must be [{wanted}], got {list(value.shape)}")


def _fits(shape: Sequence[int], wanted: Sequence[int | str]) -> bool:
    if len(shape) != len(wanted):
        return False
    for have, want in zip(shape, wanted, strict=True):  # `all` of a generator takes twice as long
        if type(want) is not str and have != want:
            return False
    return True


def check_same(what: str, **tensors: Tensor | None) -> None:
    """Check that all given tensors share their `what`: "device" or "dtype"."""
    first_name = first = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        value = getattr(tensor, what)
        if first_name is None:
            first_name, first = name, value
        elif value != first:
            error = ValueError if what == "device" else TypeError
            raise error(f"{name}: {what} must be that of {first_name}, {first}, got {value}")


def check_one_dtype(**tensors: Tensor | None) -> None:
    """Check that the tensors share a dtype, except where autocast is about to give them one."""
    given = [tensor for tensor in tensors.values() if tensor is not None]
    if not autocast_is_on(given[0].device.type) or torch.float64 in {t.dtype for t in given}:
        check_same("dtype", **tensors)


def autocast_is_on(device: str) -> bool:
    """Tell whether autocast is on for this type of device; meta, which has none, must not ask."""
    return device != "meta" and torch.is_autocast_enabled(device)


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Check that `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name}: must be one of {', '.join(map(repr, choices))}, got {value!r}")


def named_items(name: str, value: Any) -> dict[str, Any]:
    """Check that `value` is a list of one item or more, and return its items by name."""
    if not isinstance(value, (list, tuple, torch.nn.ParameterList)):
        raise TypeError(f"{name}: must be a list of tensors, got {type(value).__name__}")
    if not len(value):
        raise ValueError(f"{name}: at least one tensor is needed, got none")
    return {f"{name}[{at}]": item for at, item in enumerate(value)}


def check_levels(
    levels: Sequence[int], depth: int | None = None, most: int = 2**63 - 1
) -> list[int]:
    """Check codebook sizes (N_1, ..., N_L), each 1 to `most`, and return them as a list."""
    if not isinstance(levels, (list, tuple)) or not all([isinstance(n, int) for n in levels]):
        raise TypeError(f"levels: must be a list or tuple of ints, got {levels!r}")
    sizes = list(levels)
    if not sizes or min(sizes) < 1:
        raise ValueError(f"levels: must be one or more positive ints, got {levels!r}")
    if max(sizes) > most:
        raise ValueError(f"levels: each must be at most {most:,}, got {levels!r}")
    if depth is not None and len(sizes) != depth:
        raise ValueError(
            f"levels: must have one size per column of codes, {depth}, got {len(sizes)}"
        )
    return sizes


def check_offsets(offsets: Tensor, total: int, name: str = "offsets") -> None:
    """Check the contents of jagged offsets: first 0, never decreasing, last `total`."""
    if offsets.numel() == 0:
        raise ValueError(f"{name}: must have at least one element, got none")
    first, last = int(offsets[0]), int(offsets[-1])
    if first != 0:
        raise ValueError(f"{name}: the first must be 0, got {first}")
    falls = (offsets.diff() < 0).nonzero()
    if len(falls):
        at = int(falls[0])
        raise ValueError(
            f"{name}: must not decrease, got {name}[{at}] = {int(offsets[at])} and "
            f"{name}[{at + 1}] = {int(offsets[at + 1])}"
        )
    if last != total:
        raise ValueError(f"{name}: the last must be the number of rows, {total}, got {last}")


def check_codes(codes: Tensor, sizes: Sequence[int], name: str = "codes", least: int = 0) -> None:
    """Check that column l of `codes` lies in [least, sizes[l])."""
    if codes.numel() == 0:
        return
    for column, size in enumerate(sizes):
        values = codes[:, column].long()  # uint8 compares wrongly with a least of -1
        bad = ((values < least) | (values >= size)).nonzero()
        if len(bad):
            row = int(bad[0])
            raise IndexError(
                f"{name}: {name}[{row}, {column}] = {int(values[row])} is outside [{least}, {size})"
            )


def check_finite(name: str, value: Tensor) -> None:
    """Check that no row of `value` has a NaN or an infinity."""
    if value.numel() == 0:
        return
    bad = (~value.isfinite()).flatten(1).any(1).nonzero()
    if len(bad):
        raise ValueError(f"{name}: row {int(bad[0])} is not finite")
