"""The rows that codebooks are fitted on, less the codewords of the levels that are done.

In memory the rows are one float32 (or float64) tensor, from which codewords are subtracted for
good. Out of core they stay in their array, a memory-mapped file as a rule, and every chunk is
converted and has its codewords subtracted when it is read: what is kept is a code per row and
level. Either way a row goes through the same operations, and has the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._checks import FLOATS, check_tensor
from ..reference.residual_kmeans import code_dtype

_READ = 2**22  # elements of a chunk read from a file: 16 MiB of float32
_SUBTRACT = 2**19  # elements that codewords are subtracted from at a time, on a CPU in its cache
_ARRAYS = (np.float32, np.float16, np.float64)

Source = Tensor | np.ndarray


class MemoryRows:
    """Rows of a tensor. The first subtraction makes the copy, unless the dtype did before.

    own: the tensor may be written to.
    """

    def __init__(self, x: Tensor, own: bool = False):
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        as_given = x.dtype == wide and x.stride(1) == 1
        self._own = own or not as_given
        self._rows = x.detach() if as_given else x.detach().to(wide).contiguous()
        self.count, self.dim = x.shape
        self.dtype, self.device = wide, x.device

    def chunks(self, most: int) -> Iterator[tuple[slice, Tensor]]:
        """Yield all rows in order, at most `most` at a time."""
        for start in range(0, self.count, most):
            part = slice(start, min(start + most, self.count))
            yield part, self._rows[part]

    def take(self, index: Tensor) -> Tensor:
        """Return a copy of some rows."""
        return self._rows.index_select(0, index.to(self.device))

    def subtract(self, book: Tensor, codes: Tensor) -> None:
        """Leave what these codewords, one per row, leave of the rows."""
        left = self._rows
        if not self._own:
            left, self._own = torch.empty_like(left, memory_format=torch.contiguous_format), True
        most = max(1, (_SUBTRACT if left.device.type == "cpu" else _READ) // self.dim)
        for part, rows in self.chunks(most):
            torch.sub(rows, book.index_select(0, codes[part].int()), out=left[part])
        self._rows = left


class MappedRows:
    """Rows of an array that is read a chunk at a time, and never copied whole."""

    def __init__(self, x: np.ndarray):
        self._array = x
        self.count, self.dim = x.shape
        self.dtype = torch.float64 if x.dtype.itemsize == 8 else torch.float32
        self.device = torch.device("cpu")
        self._levels: list[tuple[Tensor, Tensor]] = []

    def chunks(self, most: int) -> Iterator[tuple[slice, Tensor]]:
        """Yield all rows in order, at most `most` at a time; the next take over their place."""
        most = min(most, max(1, _READ // self.dim), max(1, self.count))
        room = self._room(most)
        for start in range(0, self.count, most):
            part = slice(start, min(start + most, self.count))
            yield part, self._left_of(part, part, room, part.stop - start)

    def take(self, index: Tensor) -> Tensor:
        """Return a copy of some rows, read in the order of the file."""
        ordered, order = index.sort()
        rows = self._left_of(ordered.numpy(), ordered, self._room(len(index)), len(index))
        return torch.empty_like(rows).index_copy_(0, order, rows)

    def subtract(self, book: Tensor, codes: Tensor) -> None:
        """Subtract these codewords, one per row, from whatever is read from now on."""
        self._levels.append((book, codes.to(code_dtype(len(book)))))

    def _room(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return room for rows, for their codewords, and for rows as they are in the array."""
        rows, words = (torch.empty(count, self.dim, dtype=self.dtype) for _ in range(2))
        half = self._array.dtype.itemsize == 2
        return rows, words, torch.empty_like(rows, dtype=torch.float16) if half else rows

    def _left_of(
        self,
        part: slice | np.ndarray,
        codes_at: slice | Tensor,
        room: tuple[Tensor, Tensor, Tensor],
        count: int,
    ) -> Tensor:
        rows, words, given = (space[:count] for space in room)
        given.numpy()[...] = self._array[part]
        rows.copy_(given)
        for book, codes in self._levels:
            rows -= torch.index_select(book, 0, codes[codes_at].int(), out=words)
        return rows


Rows = MemoryRows | MappedRows


def open_rows(x: Source, dim: int | str = "D", name: str = "x") -> Rows:
    """Check type, dtype and shape of rows, and make them readable.

    An array in memory is used where it lies; one that is mapped, read-only or of foreign byte order
    is read in chunks.
    """
    if not isinstance(x, np.ndarray):
        check_tensor(name, x, ("M", dim), FLOATS)
        _check_dim(name, x.shape)
        return MemoryRows(x)
    if x.dtype.newbyteorder("=") not in _ARRAYS:
        raise TypeError(f"{name}: dtype must be float32, float16 or float64, got {x.dtype}")
    like = torch.empty(x.shape, dtype=torch.float32, device="meta")
    check_tensor(name, like, ("M", dim), FLOATS)
    _check_dim(name, like.shape)
    plain = x.flags.writeable and x.dtype.isnative and min(x.strides) >= 0
    if isinstance(x, np.memmap) or not plain:
        return MappedRows(x)
    return MemoryRows(torch.from_numpy(x))


def largest(rows: Rows) -> tuple[float, int]:
    """Return the greatest |x_id| and -1, or that of the first row that cannot be used, and which.

    No float32 (float64) distance between rows that can be used overflows.
    """
    limit = (torch.finfo(rows.dtype).max / (8 * rows.dim)) ** 0.5
    most = 0.0
    for part, block in rows.chunks(max(1, _READ // rows.dim)):
        low, high = block.aminmax()
        size = float(torch.maximum(-low, high))
        if not size <= limit:
            row = int((~(block.abs() <= limit).all(1)).nonzero()[0])
            return float(block[row].abs().amax()), part.start + row
        most = max(most, size)
    return most, -1


def _check_dim(name: str, shape: Any) -> None:
    if shape[1] < 1:
        raise ValueError(f"{name}: D must be at least 1, got shape {list(shape)}")
