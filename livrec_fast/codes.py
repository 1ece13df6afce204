"""`livrec-fast codes`: codebooks and codes of vectors in files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import numpy as np
import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress

from . import pack_codes, unpack_codes
from ._arrays import BadFile, Chunk, NpyRows, Rows, Tag, open_rows, writing
from ._dispatch import BackendError
from .modules._sampling import sample_of
from .modules.residual_kmeans import ResidualKMeans

_FILE = click.Path(path_type=Path)
_CHUNK = 65_536
_chunk_option = click.option(
    "--chunk", type=click.IntRange(1), default=_CHUNK, show_default=True, help="Rows at a time."
)
_codebooks_option = click.option(
    "--codebooks", type=_FILE, required=True, help="What `codes fit` wrote."
)


class _OneLine(click.ClickException):
    """An input that cannot be used."""

    exit_code = 2


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """Tell of bad inputs in one line and with exit code 2, of a failing disk with 1."""
    try:
        yield
    except BadFile as error:
        raise _OneLine(str(error)) from error
    except (OSError, BackendError) as error:
        raise click.ClickException(str(error)) from error


@click.group("codes")
def command() -> None:
    """Fit codebooks on vectors in files; encode and decode such files in chunks.

    Files are .npy ([rows, width]) or .parquet (a list column; other columns are carried along).
    """


@command.command()
@click.argument("vectors", metavar="INPUT", type=_FILE)
@click.option("--levels", required=True, help="Codewords per level, such as 512,256,128.")
@click.option("--out", type=_FILE, default=Path("codebooks.safetensors"), show_default=True)
@click.option("--iterations", type=click.IntRange(1), default=20, show_default=True)
@click.option("--init", type=click.Choice(["k-means++", "random"]), default="k-means++")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--balance", type=click.FloatRange(1), help="Most rows of a cluster, in even shares of them."
)
@click.option("--sample", type=click.IntRange(1), help="Rows to draw (default: all).")
@click.option("--column", default="embedding", show_default=True, help="Of a parquet INPUT.")
def fit(
    vectors: Path,
    levels: str,
    out: Path,
    iterations: int,
    init: str,
    seed: int,
    balance: float | None,
    sample: int | None,
    column: str,
) -> None:
    """Learn codebooks from the rows of INPUT; without --sample, a .npy stays on disk meanwhile."""
    with _one_line_errors():
        try:
            sizes = [int(part) for part in levels.split(",")]
            coder = ResidualKMeans(
                sizes, iterations=iterations, init=init, seed=seed, balance=balance
            )
        except ValueError as error:
            raise BadFile(f"--levels {levels}: {error}") from error
        if not out.parent.is_dir():
            raise BadFile(f"{out}: no such folder")
        source = _open_vectors(vectors, column)
        x: np.ndarray | torch.Tensor
        if isinstance(source, NpyRows) and sample is None:
            x = source.array
        else:
            x = _draw(source, sample, seed)
        try:
            coder.fit(x, progress=Console().is_terminal)
        except ValueError as error:
            why = str(error).removeprefix("x: ")
            raise BadFile(f"{vectors}: {why}") from error
        coder.save(out)
    left = coder.quality(x).relative_error[-1]
    click.echo(f"{out}: version {coder.version}, of {len(x):,} rows, relative error {left:.4f}")


@command.command()
@click.argument("vectors", metavar="INPUT", type=_FILE)
@_codebooks_option
@click.option("--out", type=_FILE, required=True)
@click.option("--packed", is_flag=True, help="Write bits, ceil(bits / 8) bytes a row.")
@_chunk_option
@click.option("--column", default="embedding", show_default=True, help="Of a parquet INPUT.")
def encode(
    vectors: Path, codebooks: Path, out: Path, packed: bool, chunk: int, column: str
) -> None:
    """Write the codes of the rows of INPUT, in parquet as the column "codes".

    The version of the codebooks goes with them: in the metadata of a parquet file, or in <out>.json
    beside a .npy file.
    """
    with _one_line_errors():
        coder = _load(codebooks)
        source = _open_vectors(vectors, column)
        if source.width != coder.dim and source.rows:
            raise BadFile(f"{vectors}: {source.width} values a row, the codebooks have {coder.dim}")
        tag = {"codebooks": coder.version, "levels": list(coder.levels), "packed": packed}

        def codes_of(values: np.ndarray) -> torch.Tensor:
            codes = coder.encode(_tensor(values.reshape(-1, coder.dim), source.dtype))
            return pack_codes(codes, coder.levels) if packed else codes

        _convert(source, out, "codes", tag, codes_of, chunk)


@command.command()
@click.argument("codes", metavar="CODES", type=_FILE)
@_codebooks_option
@click.option("--out", type=_FILE, required=True)
@_chunk_option
def decode(codes: Path, codebooks: Path, out: Path, chunk: int) -> None:
    """Write the vectors that CODES stand for, in parquet as the column "embedding"."""
    with _one_line_errors():
        coder = _load(codebooks)
        source = open_rows(codes, "codes")
        packed = _check_tag(source, coder)

        def vectors_of(values: np.ndarray) -> torch.Tensor:
            rows = _tensor(values, source.dtype)
            return coder.decode(unpack_codes(rows, coder.levels) if packed else rows)

        _convert(source, out, "embedding", None, vectors_of, chunk)


def _load(path: Path) -> ResidualKMeans:
    if not path.is_file():
        raise BadFile(f"{path}: no such file")
    try:
        return ResidualKMeans.load(path)
    except Exception as error:  # safetensors has errors of its own for files that are not its
        reason = str(error).removeprefix(f"path: {path} ")
        raise BadFile(f"{path}: cannot be used as codebooks: {reason}") from error


def _open_vectors(path: Path, column: str) -> Rows:
    source = open_rows(path, column)
    if source.dtype not in (np.float32, np.float16):
        raise BadFile(f"{path}: must hold float32 or float16, got {source.dtype}")
    return source


def _check_tag(source: Rows, coder: ResidualKMeans) -> bool:
    """Check that codes are of these codebooks, and return whether they are packed."""
    tag = source.tag()
    if tag is None or "codebooks" not in tag:
        raise BadFile(f"{source.path}: does not say of which codebooks it is; see `codes encode`")
    version, packed = tag["codebooks"], bool(tag.get("packed"))
    if version != coder.version:
        raise BadFile(f"{source.path}: codes of codebooks {version}, not of {coder.version}")
    none = torch.empty(0, len(coder.levels), dtype=torch.uint8)
    width = pack_codes(none, coder.levels).shape[1] if packed else len(coder.levels)
    if source.width != width and source.rows:
        raise BadFile(f"{source.path}: {source.width} values a row, its codes have {width}")
    if source.dtype != np.uint8 and (packed or source.dtype.kind not in "ui"):
        wanted = "uint8" if packed else "integers"
        raise BadFile(f"{source.path}: these codes must be {wanted}, got {source.dtype}")
    return packed


def _draw(source: Rows, sample: int | None, seed: int) -> torch.Tensor:
    """Return `sample` rows drawn without replacement, in file order, or all rows."""
    wanted = np.arange(source.rows)
    if sample is not None and sample < source.rows:
        wanted = sample_of(source.rows, sample, seed)
    count = len(wanted)
    drawn = np.empty((count, source.width), source.dtype)
    filled = 0
    for chunk in _progress(source, _CHUNK, "read"):
        stop = int(np.searchsorted(wanted, chunk.start + len(chunk.values)))
        rows = wanted[filled:stop]
        drawn[filled:stop] = chunk.values[rows - chunk.start]
        bad = ~np.isfinite(drawn[filled:stop]).all(1)
        if bad.any():
            raise BadFile(f"{source.path}: row {rows[bad.argmax()]} is not finite")
        filled = stop
    return torch.from_numpy(drawn)


def _convert(
    source: Rows,
    out: Path,
    column: str,
    tag: Tag | None,
    function: Callable[[np.ndarray], torch.Tensor],
    size: int,
) -> None:
    """Write `function` of all rows of `source`, chunk by chunk."""
    empty = function(np.empty((0, source.width), source.dtype)).numpy()
    shape = (source.rows, empty.shape[1])
    with writing(out, column, *shape, empty.dtype, tag, source.others) as append:
        for chunk in _progress(source, size, column):
            append(_apply(function, chunk, source.path).numpy(), chunk.others)
    click.echo(f"{out}: {source.rows:,} rows")


def _apply(
    function: Callable[[np.ndarray], torch.Tensor], chunk: Chunk, path: Path
) -> torch.Tensor:
    """Return `function` of a chunk; where it refuses, name the row by its place in the file."""
    if chunk.values.dtype.kind == "f":
        bad = ~np.isfinite(chunk.values).all(1)
        if bad.any():
            raise BadFile(f"{path}: row {chunk.start + int(bad.argmax())} is not finite")
    try:
        return function(chunk.values)
    except (ValueError, IndexError):
        for row in range(len(chunk.values)):
            try:
                function(chunk.values[row : row + 1])
            except (ValueError, IndexError) as error:
                why = str(error).rpartition("row 0 ")[2].replace("codes[0, ", "codes[")
                raise BadFile(f"{path}: row {chunk.start + row}: {why}") from error
        raise


def _tensor(values: np.ndarray, dtype: np.dtype) -> torch.Tensor:
    """Copy rows out of their file into a tensor."""
    kind = (
        {2: np.int32, 4: np.int64, 8: np.int64}.get(dtype.itemsize) if dtype.kind == "u" else None
    )
    return torch.from_numpy(np.array(values, kind or dtype))  # torch has no wide unsigned codes


def _progress(source: Rows, size: int, what: str) -> Iterator[Chunk]:
    """Yield the chunks of `source`, with a bar where somebody can see it."""
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    console = Console(stderr=True)
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(what, total=source.rows)
        for chunk in source.chunks(size):
            yield chunk
            bar.advance(task, len(chunk.values))
