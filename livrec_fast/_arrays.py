"""Files of equally long rows, `.npy` and `.parquet`, read and written a chunk at a time.

In parquet the rows are a list column, and the other columns travel along. What else is to be known
of the rows, their tag, is parquet metadata, or a file beside the `.npy`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ._files import replacing

_KEY = b"livrec_fast"
Tag = dict[str, Any]
Write = Callable[[np.ndarray, Any], None]


class BadFile(ValueError):
    """A file is not what was asked for; the message begins with its path."""


@dataclass(frozen=True)
class Chunk:
    """Some rows: the number of the first in the file, their values [m, width], other columns."""

    start: int
    values: np.ndarray
    others: Any = None


class NpyRows:
    """The rows of a two-dimensional `.npy`, memory-mapped."""

    others = None

    def __init__(self, path: Path):
        self.path = path
        try:
            self.array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise BadFile(f"{path}: not a readable .npy file ({_first_line(error)})") from error
        if self.array.ndim != 2:
            raise BadFile(f"{path}: shape must be [rows, width], got {list(self.array.shape)}")
        self.rows, self.width = self.array.shape
        self.dtype = self.array.dtype.newbyteorder("=")

    def tag(self) -> Tag | None:
        """Return what the file beside this one says of the rows, or None."""
        beside = sidecar(self.path)
        return _parse_tag(beside, beside.read_bytes()) if beside.exists() else None

    def chunks(self, size: int) -> Iterator[Chunk]:
        """Yield all rows in order; the values are read when they are looked at."""
        for start in range(0, self.rows, size):
            yield Chunk(start, self.array[start : start + size])


class ParquetRows:
    """The rows of a list column of a parquet file, with the other columns."""

    def __init__(self, path: Path, column: str):
        pa, pq = _arrow(path)
        self.path, self._pa, self._column = path, pa, column
        try:
            # a buffer, or else each column of a row group is read whole
            self._file = pq.ParquetFile(path, buffer_size=2**20, pre_buffer=False)
        except (OSError, pa.ArrowException) as error:
            raise BadFile(f"{path}: not a readable parquet file ({_first_line(error)})") from error
        schema = self._file.schema_arrow
        if column not in schema.names:
            raise BadFile(f"{path}: no column {column!r}; there are {', '.join(schema.names)}")
        kind = schema.field(column).type
        if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or _is_fixed(pa, kind)):
            raise BadFile(f"{path}: column {column!r} must hold lists of numbers, got {kind}")
        self.rows: int = self._file.metadata.num_rows
        self.dtype = np.dtype(kind.value_type.to_pandas_dtype())
        self.others = pa.schema([field for field in schema if field.name != column])
        self._metadata = schema.metadata or {}
        self.width = kind.list_size if _is_fixed(pa, kind) else self._first_length()

    def tag(self) -> Tag | None:
        """Return what the file's metadata say of the rows, or None."""
        return _parse_tag(self.path, self._metadata[_KEY]) if _KEY in self._metadata else None

    def chunks(self, size: int) -> Iterator[Chunk]:
        """Yield all rows in order."""
        start = 0
        for batch in self._file.iter_batches(batch_size=size):
            others = batch.select(self.others.names)
            yield Chunk(start, self._matrix(batch.column(self._column), start), others)
            start += len(batch)

    def _first_length(self) -> int:
        for batch in self._file.iter_batches(batch_size=1, columns=[self._column]):
            return len(batch.column(0)[0] or ())
        return 0

    def _matrix(self, column: Any, start: int) -> np.ndarray:
        """Return a column's lists as an array; every one must be there, whole and of one length."""
        self._refuse(column.is_null().to_numpy(zero_copy_only=False), start, "is null")
        if not _is_fixed(self._pa, column.type):
            lengths = column.value_lengths().to_numpy()
            self._refuse(lengths != self.width, start, f"does not have {self.width} values")
        values = column.flatten()
        missing = values.is_null().to_numpy(zero_copy_only=False).reshape(len(column), self.width)
        self._refuse(missing.any(1), start, "has a null in it")
        return values.to_numpy(zero_copy_only=False).reshape(len(column), self.width)

    def _refuse(self, bad: np.ndarray, start: int, why: str) -> None:
        if bad.any():
            raise BadFile(f"{self.path}: row {start + int(bad.argmax())} of {self._column!r} {why}")


Rows = NpyRows | ParquetRows


def open_rows(path: Path, column: str) -> Rows:
    """Open a file of rows; `column` names them in parquet."""
    if not path.is_file():
        raise BadFile(f"{path}: no such file")
    return NpyRows(path) if _is_npy(path) else ParquetRows(path, column)


@contextmanager
def writing(
    path: Path, column: str, rows: int, width: int, dtype: Any, tag: Tag | None, others: Any = None
) -> Iterator[Write]:
    """Yield what appends rows, and other columns, to a file that appears when the block has ended.

    others: the schema of the other columns, or None. A `.npy` has no place for them.
    """
    if not path.parent.is_dir():
        raise BadFile(f"{path}: no such folder")
    write = _writing_npy if _is_npy(path) else _writing_parquet
    with write(path, column, (rows, width), np.dtype(dtype), tag, others) as append:
        yield append


def sidecar(path: Path) -> Path:
    """Return where the tag of a `.npy` lies."""
    return path.with_name(f"{path.name}.json")


@contextmanager
def _writing_npy(
    path: Path, column: str, shape: tuple[int, int], dtype: np.dtype, tag: Tag | None, others: Any
) -> Iterator[Write]:
    descr = np.lib.format.dtype_to_descr(dtype)
    header = {"descr": descr, "fortran_order": False, "shape": shape}
    with replacing(path) as file:
        np.lib.format.write_array_header_1_0(file, header)
        yield lambda values, others: _write(file, np.ascontiguousarray(values, dtype))
        file.flush()
        os.fsync(file.fileno())
        sidecar(path).unlink(missing_ok=True)  # rows without a tag are refused, with an old one not
    if tag is not None:
        with replacing(sidecar(path)) as file:
            file.write(json.dumps(tag).encode() + b"\n")


def _parse_tag(path: Path, text: bytes) -> Tag:
    try:
        tag = json.loads(text)
    except ValueError as error:
        raise BadFile(f"{path}: the tag is not JSON ({error})") from error
    if not isinstance(tag, dict):
        raise BadFile(f"{path}: the tag must be a JSON object, got {tag!r}")
    return tag


def _write(file: Any, values: np.ndarray) -> None:
    file.write(values.data if values.size else b"")


@contextmanager
def _writing_parquet(
    path: Path, column: str, shape: tuple[int, int], dtype: np.dtype, tag: Tag | None, others: Any
) -> Iterator[Write]:
    pa, pq = _arrow(path)
    carried = pa.schema([]) if others is None else others
    if column in carried.names:
        raise BadFile(f"{path}: the input has a column {column!r} of its own; rename it")
    kind = pa.list_(pa.from_numpy_dtype(dtype), shape[1])
    metadata = {} if tag is None else {_KEY: json.dumps(tag).encode()}
    schema = pa.schema([*carried, pa.field(column, kind)], metadata=metadata)

    def append(values: np.ndarray, other: Any) -> None:
        flat = pa.array(np.ascontiguousarray(values, dtype).reshape(-1))
        made = pa.FixedSizeListArray.from_arrays(flat, shape[1])
        before = [] if others is None else other.columns
        writer.write_batch(pa.record_batch([*before, made], schema=schema))

    with replacing(path) as file, pq.ParquetWriter(file, schema) as writer:
        yield append


def _is_npy(path: Path) -> bool:
    if path.suffix not in (".npy", ".parquet"):
        raise BadFile(f"{path}: must end in .npy or .parquet")
    return path.suffix == ".npy"


def _is_fixed(pa: ModuleType, kind: Any) -> bool:
    return bool(pa.types.is_fixed_size_list(kind))


def _arrow(path: Path) -> tuple[ModuleType, ModuleType]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise BadFile(f"{path}: parquet needs pyarrow (pip install pyarrow)") from None
    return pyarrow, pyarrow.parquet


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
